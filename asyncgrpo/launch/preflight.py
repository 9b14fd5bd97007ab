"""Refuses ports and run directories that cannot work, before any process is started."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Collection
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

from asyncgrpo.config import Config
from asyncgrpo.errors import ConfigError
from asyncgrpo.launch.plan import LOOPBACK, Ports, role_names

LAST_PORT = 65535


def check_port_free(host: str, port: int, setting: str) -> None:
    """ConfigError when nobody could listen on host:port; `setting` is what to change then."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise ConfigError(
            f"{setting}: port {port} on {host} cannot be used ({os.strerror(error.errno or 0)}); "
            f"end the process that listens there, or set another {setting} (0 = any free port)"
        ) from None


def pick_free_ports(count: int, besides: Collection[int] = (), host: str = LOOPBACK) -> list[int]:
    """Distinct ports of an address that nobody uses now, none of them in `besides`."""
    picked: list[int] = []
    with ExitStack() as open_until_done:  # held together, so that no port is picked twice
        while len(picked) < count:
            server = open_until_done.enter_context(socket.create_server((host, 0)))
            if (port := server.getsockname()[1]) not in besides:
                picked.append(port)
    return picked


def choose_ports(config: Config) -> Ports:
    """The ports that the settings name, proven free, and free ones for the others."""
    launch = config.launch
    metrics_host = config.observe.metrics_host.replace("auto", launch.host)
    for setting, host in (("launch.host", launch.host), ("observe.metrics_host", metrics_host)):
        try:
            socket.create_server((host, 0)).close()
        except OSError as error:
            raise ConfigError(
                f"{setting}={host} cannot be listened on ({os.strerror(error.errno or 0)}); set "
                "it to an address of this machine, such as 127.0.0.1"
            ) from None
    asked = [
        ("launch.buffer_port", launch.host, launch.buffer_port),
        ("launch.weights_port", launch.host, launch.weights_port),
        *(("launch.metrics_port", metrics_host, port) for port in _metrics_ports(config)),
    ]
    owners: dict[int, str] = {}
    for setting, host, port in asked:
        if not port:
            continue
        if port in owners:
            raise ConfigError(
                f"port {port} is asked for twice, by {owners[port]} and {setting} "
                "(launch.metrics_port takes one port per role, upwards); move one of them"
            )
        check_port_free(host, port, setting)
        owners[port] = setting
    free = pick_free_ports(4, owners, launch.host)
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
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        why = "may not be written" if ancestor.is_dir() else "is a file"
        raise ConfigError(
            f"run directory {path} cannot be made: {ancestor} {why}; give another --run-dir"
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
        for name in ("logs", "trajectories"):
            (path / name).mkdir(parents=True, exist_ok=True)
        point_latest(path)
    except OSError as error:
        raise ConfigError(
            f"run directory {path} cannot be written ({error.strerror}: {error.filename}); "
            "give another --run-dir"
        ) from None


def point_latest(path: Path) -> None:
    """Makes runs/latest, where grafana/prometheus.yml looks, a link to a run directory of runs/."""
    if path.parent.name == "runs":
        draft = path.with_name(".latest")
        draft.unlink(missing_ok=True)
        draft.symlink_to(path.name)
        draft.replace(path.with_name("latest"))


def _metrics_ports(config: Config) -> list[int]:
    first = config.launch.metrics_port
    count = len(role_names(config.launch.actors, config.launch.learners))
    if first and first + count - 1 > LAST_PORT:
        raise ConfigError(
            f"launch.metrics_port={first} leaves no room for {count} endpoints; "
            f"it must be <= {LAST_PORT - count + 1}, or 0 for any free ports"
        )
    return list(range(first, first + count)) if first else []
