"""Refuses ports and run directories that cannot work, before any process is started."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

from asyncgrpo.config import Config
from asyncgrpo.errors import ConfigError
from asyncgrpo.launch.plan import LOOPBACK, Ports, role_names

LAST_PORT = 65535
RUN_FOLDERS = ("logs", "trajectories")


def check_port_free(host: str, port: int, setting: str) -> None:
    """ConfigError when nobody could listen on host:port; `setting` is what to change then."""
    try:
        _bind(host, port).close()
    except OSError as error:
        raise ConfigError(
            f"{setting}: port {port} on {host} cannot be used ({error.strerror}); end the process "
            f"that listens there, or set another {setting} (0 = any free port)"
        ) from None


def pick_free_ports(
    count: int, besides: frozenset[int] = frozenset(), host: str = LOOPBACK
) -> list[int]:
    """Distinct ports of an address that nobody uses now, none of them in `besides`."""
    picked: list[int] = []
    with ExitStack() as open_until_done:  # held together, so that no port is picked twice
        while len(picked) < count:
            port = open_until_done.enter_context(_bind(host, 0)).getsockname()[1]
            if port not in besides:
                picked.append(port)
    return picked


def choose_ports(config: Config) -> Ports:
    """The ports that the settings name, proven free, and free ones for the others."""
    launch = config.launch
    fixed = {"launch.buffer_port": launch.buffer_port, "launch.weights_port": launch.weights_port}
    asked = [(setting, port) for setting, port in fixed.items() if port]
    asked += [("launch.metrics_port", port) for port in _metrics_ports(config)]
    _check_distinct(asked)
    metrics_host = config.observe.metrics_host.replace("auto", launch.host)
    _check_own_address(launch.host, "launch.host")
    _check_own_address(metrics_host, "observe.metrics_host")
    for setting, port in asked:
        check_port_free(launch.host if setting in fixed else metrics_host, port, setting)
    free = pick_free_ports(4, frozenset(port for _, port in asked), launch.host)
    return Ports(
        buffer=launch.buffer_port or free[0],
        weights=launch.weights_port or free[1],
        store=free[2],
        rendezvous=free[3],
        metrics=launch.metrics_port,
    )


def check_run_dir(path: Path) -> None:
    """ConfigError when a run cannot be written there, or one is there already. Changes nothing."""
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(
                f"run directory {str(path)[:60]}... is longer than a path may be here; "
                "give a shorter --run-dir"
            ) from None
    # os.path.exists, unlike Path.exists, takes "may not look" for "no".
    if os.path.exists(path / "config.json"):
        raise ConfigError(
            f"run directory {path} already holds a run; give another --run-dir (each Trainer makes "
            "one run)"
        )
    ancestor = path.absolute()
    while not os.path.exists(ancestor):
        ancestor = ancestor.parent
    if not ancestor.is_dir():
        raise ConfigError(
            f"run directory {path} cannot be made: {ancestor} is a file; give another --run-dir"
        )
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise ConfigError(
            f"run directory {path} cannot be written: no permission in {ancestor}; "
            "give another --run-dir"
        )


def missing_extra(config: Config) -> str:
    """What the learner needs and is not installed, with the remedy; "" when nothing is."""
    lora = config.learner.lora
    if config.learner.optimizer == "adamw_8bit" and find_spec("bitsandbytes") is None:
        return "learner.optimizer='adamw_8bit' needs bitsandbytes: pip install 'asyncgrpo[qlora]'"
    needed = {"peft": lora, "bitsandbytes": lora and lora.quantize}
    missing = [name for name, use in needed.items() if use and find_spec(name) is None]
    install = f"pip install 'asyncgrpo[{'qlora' if lora and lora.quantize else 'lora'}]'"
    return f"learner.lora needs {' and '.join(missing)}: {install}" if missing else ""


def prepare_run_dir(path: Path) -> None:
    """Checks the run directory and makes it, with logs/ and trajectories/."""
    check_run_dir(path)
    try:
        for name in RUN_FOLDERS:
            (path / name).mkdir(parents=True, exist_ok=True)
        point_latest(path)
    except OSError as error:
        raise ConfigError(
            f"run directory {path} cannot be written ({error.strerror}: {error.filename}); "
            "give another --run-dir"
        ) from None


def _check_own_address(host: str, setting: str) -> None:
    try:
        _bind(host, 0).close()
    except OSError as error:
        raise ConfigError(
            f"{setting}={host} cannot be listened on ({error.strerror}); set it to an address of "
            "this machine, such as 127.0.0.1"
        ) from None


def point_latest(path: Path) -> None:
    """Makes runs/latest, where grafana/prometheus.yml looks, a link to a run directory of runs/."""
    if path.parent.name == "runs":
        draft = path.with_name(".latest")
        draft.unlink(missing_ok=True)
        draft.symlink_to(path.name)
        draft.replace(path.with_name("latest"))


def _bind(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # As our servers do: connections of an earlier run that still linger are no hindrance.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except BaseException:
        listener.close()
        raise
    return listener


def _metrics_ports(config: Config) -> list[int]:
    first = config.launch.metrics_port
    count = len(role_names(config.launch.actors, config.launch.learners))
    if first and first + count - 1 > LAST_PORT:
        raise ConfigError(
            f"launch.metrics_port={first} leaves no room for {count} endpoints; "
            f"it must be <= {LAST_PORT - count + 1}, or 0 for any free ports"
        )
    return list(range(first, first + count)) if first else []


def _check_distinct(asked: list[tuple[str, int]]) -> None:
    owners: dict[int, str] = {}
    for setting, port in asked:
        if port in owners:
            raise ConfigError(
                f"port {port} is asked for twice, by {owners[port]} and {setting} "
                "(launch.metrics_port takes one port per role, upwards); move one of them"
            )
        owners[port] = setting
