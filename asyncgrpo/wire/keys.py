"""The CURVE keys of one run: the launcher makes them, the roles read them, nobody else gets in.

RUN/keys/server.key and client.key (0600, in a folder of 0700) hold three words each: the own
public key, the own secret key, and the public key of the other side. Roles that do not share the
run directory get the same words in ASYNCGRPO_SERVER_KEYS and ASYNCGRPO_CLIENT_KEYS.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import zmq

from asyncgrpo.errors import ConfigError

if TYPE_CHECKING:
    from asyncgrpo.rundir import RunDir

KEY_LENGTH = 40  # characters of a key in Z85


@dataclass(frozen=True, slots=True)
class Keys:
    """What one side of a connection holds. Never shown: not in logs, not in error messages."""

    public: bytes = field(repr=False)
    secret: bytes = field(repr=False)
    other: bytes = field(repr=False)  # public key of the other side: the only one that is let in


def make_keys(run_dir: Path) -> None:
    """Writes new keys into the run directory."""
    if not zmq.has("curve"):
        raise ConfigError(
            "this build of pyzmq has no CURVE encryption; install the pyzmq wheel, or stay on "
            "loopback with launch.encrypt=false"
        )
    folder = run_dir / "keys"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o700)
    server, client = zmq.curve_keypair(), zmq.curve_keypair()
    for side, words in (("server", (*server, client[0])), ("client", (*client, server[0]))):
        path = folder / f"{side}.key"
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(b"\n".join(words) + b"\n")


def read_keys(run: RunDir, side: Literal["server", "client"]) -> Keys | None:
    """A role's keys; None in a run without. ConfigError when they are missing or no secret."""
    if not run.config.launch.encrypted:
        return None
    variable, path = f"ASYNCGRPO_{side.upper()}_KEYS", run.path / "keys" / f"{side}.key"
    words = (os.environ.get(variable) or _read(path)).split()
    if [len(word) for word in words] != [KEY_LENGTH] * 3:
        raise ConfigError(
            f"{path} or {variable} does not hold three keys; start a new run, which makes them"
        )
    return Keys(*(word.encode() for word in words))


def _read(path: Path) -> str:
    try:
        with path.open(encoding="ascii") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            text = file.read()
    except OSError as error:
        raise ConfigError(
            f"the run is encrypted, but {path} cannot be read ({error.strerror}); the launcher "
            "makes it in each run"
        ) from None
    if mode & 0o077:
        raise ConfigError(
            f"{path} has mode {mode:04o}, so others may know the keys; start a new run, and keep "
            "its keys at 0600"
        )
    return text
