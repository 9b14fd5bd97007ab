"""The keys of a run: nobody but their owner can read them, and nothing shows them."""

from __future__ import annotations

import logging
import os
import stat

import pytest

from asyncgrpo.config import from_mapping
from asyncgrpo.errors import ConfigError
from asyncgrpo.rundir import Endpoints, RunDir
from asyncgrpo.wire.keys import make_keys, read_keys


@pytest.fixture
def run(tmp_path) -> RunDir:
    endpoints = Endpoints(buffer="tcp://127.0.0.1:1", weights="", store=("127.0.0.1", 2))
    config = from_mapping({"launch": {"encrypt": True}})
    return RunDir(path=tmp_path, config=config, endpoints=endpoints)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_only_the_owner_may_read_the_keys_whatever_the_umask(run):
    before = os.umask(0)
    try:
        make_keys(run.path)
    finally:
        os.umask(before)
    assert mode(run.path / "keys") == 0o700
    assert [mode(path) for path in sorted((run.path / "keys").iterdir())] == [0o600, 0o600]


def test_each_side_knows_the_other_by_its_public_key_and_every_run_has_its_own(run):
    make_keys(run.path)
    server, client = read_keys(run, "server"), read_keys(run, "client")
    assert (server.other, client.other) == (client.public, server.public)
    assert len({server.public, server.secret, client.public, client.secret}) == 4
    make_keys(run.path)
    assert read_keys(run, "server").secret != server.secret


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o660])
def test_keys_that_others_may_read_are_refused_with_their_mode(run, bits):
    make_keys(run.path)
    (run.path / "keys" / "client.key").chmod(bits)
    with pytest.raises(ConfigError, match=rf"client\.key has mode 0{bits:o}.*start a new run"):
        read_keys(run, "client")


def test_missing_and_broken_keys_are_named_with_what_to_do(run):
    with pytest.raises(ConfigError, match=r"server\.key cannot be read .*the launcher makes it"):
        read_keys(run, "server")
    make_keys(run.path)
    (run.path / "keys" / "server.key").write_text("one two three")
    with pytest.raises(ConfigError, match=r"server\.key or .* does not hold three keys"):
        read_keys(run, "server")


def test_the_environment_takes_the_place_of_the_file(run, monkeypatch):
    make_keys(run.path)
    words = (run.path / "keys" / "client.key").read_text()
    monkeypatch.setenv("ASYNCGRPO_CLIENT_KEYS", words.replace("\n", " "))
    expected = read_keys(run, "client")
    (run.path / "keys" / "client.key").unlink()
    assert read_keys(run, "client") == expected
    monkeypatch.setenv("ASYNCGRPO_CLIENT_KEYS", "abc")
    with pytest.raises(ConfigError, match=r"or ASYNCGRPO_CLIENT_KEYS does not hold three keys"):
        read_keys(run, "client")


def test_a_run_without_encryption_has_no_keys(run):
    plain = RunDir(path=run.path, config=from_mapping({}), endpoints=run.endpoints)
    assert read_keys(plain, "client") is None


def test_keys_are_not_shown_by_printing_or_logging_them(run, caplog):
    make_keys(run.path)
    keys = read_keys(run, "server")
    logging.getLogger().warning("%r %s", keys, keys)
    for key in (keys.public, keys.secret, keys.other):
        assert key.decode() not in caplog.text
    assert "Keys()" in caplog.text
