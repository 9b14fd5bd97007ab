"""`launch --dry-run`: what would run, in numbers, on any machine; what is not here is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from asyncgrpo.cli import app
from asyncgrpo.config import from_mapping, load_config, preset_files
from asyncgrpo.errors import AsyncGRPOError, ConfigError, DataError, ModelError
from asyncgrpo.hints import unusual
from asyncgrpo.launch.placement import choose_transport
from asyncgrpo.launch.plan import Host, make_plan, render_sizes
from asyncgrpo.rundir import Endpoints

ROOT = Path(__file__).parent.parent
HUGE = {"gsm8k-qwen3-8b-8gpu": (4, 4, 8), "math-long": (6, 2, 8)}  # actors, learners, GPUs
SMALL = {
    "gsm8k-qwen2.5-0.5b-1gpu": (1, 1, 1),
    "lora-8gb": (1, 1, 1),
    "tags-zh": (1, 1, 1),
    "tiny": (2, 2, 0),
}


def dry_run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["launch", "--dry-run", *arguments])
    if isinstance(result.exception, AsyncGRPOError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and a hub cache without any model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


@pytest.mark.parametrize("name", preset_files())
def test_every_preset_is_checked_on_a_machine_without_its_gpus_model_and_data(
    name: str, elsewhere: Path
) -> None:
    actors, learners, gpus = {**HUGE, **SMALL}[name]
    output = dry_run("--config", name)
    config = load_config(name)
    assert (config.launch.actors, config.launch.learners, config.launch.gpus) == (
        actors,
        learners,
        gpus,
    )
    assert all(f"actor-{index}" in output for index in range(actors))
    assert f"--nproc-per-node {learners} " in output
    assert f"run      {config.run.max_steps} batches" in output
    assert ("not checked: launch.gpus" in output) == (gpus > 0)
    assert ("not checked: data file" in output) == (config.data.train != "tasks")
    assert ("not checked: model.path='Qwen/" in output) == (config.model.path != "tiny")
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("name", preset_files())
def test_every_preset_says_what_it_is_and_how_to_start_it(name: str) -> None:
    first, second = preset_files()[name].read_text(encoding="utf-8").splitlines()[:2]
    assert first.startswith("# ")
    assert first.endswith(".")
    assert second.startswith("# asyncgrpo ")


def test_presets_are_the_files_of_the_configs_folder() -> None:
    assert sorted(preset_files()) == sorted(path.stem for path in (ROOT / "configs").glob("*.toml"))


def test_a_preset_for_eight_gpus_gives_each_process_its_own() -> None:
    output = dry_run("--config", "gsm8k-qwen3-8b-8gpu")
    assert "actor-3    GPU 3" in output
    assert "learner    GPU 4, 5, 6, 7" in output


def test_the_sizes_are_in_groups_completions_tokens_and_optimizer_steps() -> None:
    config = from_mapping(
        {
            "run": {"max_steps": 10},
            "data": {"train": "x.jsonl", "epochs": 3, "max_prompt_tokens": 28},
            "sampling": {"max_completion_tokens": 100},
            "actor": {"concurrency": 5},
            "buffer": {"groups_per_step": 12, "max_staleness": 2},
            "algo": {"group_size": 4, "minibatches": 3, "passes": 2},
            "learner": {"max_tokens_per_microbatch": 256},
            "launch": {"actors": 3, "learners": 2},
        }
    )
    lines = [line.split(maxsplit=1)[1] for line in render_sizes(config).splitlines()]
    assert lines == [
        "temperature 1, top_p 1, top_k 0, at most 100 tokens; no penalties, no stop strings; "
        "each token with its log-prob",
        "12 groups x 4 completions = 48 completions, at most x 100 = 4800 completion tokens",
        "3 x 2 optimizer steps per batch (minibatches x passes), of 16 completions each",
        "2, with 6 groups each; micro-batches of at most 256 tokens, 2 or more sequences",
        "3, with 5 groups x 4 = 20 sequences in flight",
        "at most 3 batches = 36 groups are started before they are trained "
        "(buffer.max_staleness + 1)",
        "10 batches = 120 groups = 480 completions = 60 optimizer steps, or 3 epochs if that is "
        "less",
    ]


def test_a_batch_in_tokens_says_what_is_guessed() -> None:
    settings = ("--set", "buffer.tokens_per_step=4000", "--set", "algo.minibatches=2")
    line = "batch    the fewest groups, 4 or more, with 4000 completion tokens; where groups are"
    assert line in dry_run(*settings)


def test_what_is_here_and_broken_is_still_refused(elsewhere: Path) -> None:
    (elsewhere / "bad.jsonl").write_text('{"question": \n')
    (elsewhere / "model").mkdir()
    with pytest.raises(DataError, match=r"bad.jsonl:1 is not JSON"):
        dry_run("--set", "data.train=bad.jsonl")
    with pytest.raises(ModelError, match=r"has no config.json"):
        dry_run("--set", "model.path=model")
    with pytest.raises(ModelError, match="does not exist"):
        dry_run("--set", "model.path=modle")
    with pytest.raises(AsyncGRPOError, match="tagg"):
        dry_run("--set", "reward.functions=[{use='tagg'}]")
    with pytest.raises(ConfigError, match=r"one GPU each = 4, but launch.gpus=2"):
        dry_run("--set", "launch.gpus=2")


def test_a_run_itself_refuses_what_a_dry_run_only_notes() -> None:
    for setting in ("data.train=none.jsonl", "model.path=Qwen/Qwen3-0.6B", "launch.gpus=8"):
        result = CliRunner().invoke(app, ["launch", "--set", setting])
        assert isinstance(result.exception, AsyncGRPOError), setting
        assert result.exception.exit_code == 2


def test_a_model_that_would_be_downloaded_is_said_to_be_unchecked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert "and would be downloaded" in dry_run("--set", "model.path=Qwen/Qwen3-0.6B")


def test_model_and_data_of_the_command_line_win_over_the_file(elsewhere: Path) -> None:
    row = '{"question": "1 + 1?", "answer": "2"}'
    for name in ('a "b".jsonl', "held.jsonl"):
        (elsewhere / name).write_text(row.replace("1?", f"{len(name)}?"))
    (elsewhere / "my.toml").write_text('data.train = "no.jsonl"')
    own = ("--set", 'reward.functions=["exact"]', "--config", "my.toml")
    output = dry_run("--data", 'a "b".jsonl', "--eval-data", "held.jsonl", *own)
    assert "not checked" not in output
    with pytest.raises(ModelError, match=r"held\.jsonl' is a file; give the folder"):
        dry_run("--model", "held.jsonl", *own)


def test_a_setting_that_is_given_by_set_and_by_its_own_option_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_steps=0, but an option .* to 3; keep one"):
        dry_run("--max-steps", "3", "--set", "run.max_steps=0")


def test_targets_that_match_nothing_are_found_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"'q_prj' cannot .* did you mean 'q_proj'\? take 'all"):
        dry_run("--set", "learner.lora.targets=['q_prj']")
    assert "not checked: model" in dry_run(
        "--set", "learner.lora.targets=['q_prj']", "--model", "Qwen/Qwen3-0.6B"
    )


def test_what_is_unusual_for_a_pretrained_model_is_warned_of() -> None:
    model = ("--model", "Qwen/Qwen3-0.6B")
    assert "warning: learner.lr=0.0005 is not usual: 5e-07 to 1e-05 is (for" in dry_run(*model)
    assert "is not usual" not in dry_run(*model, "--set", "learner.lr=1e-5")
    adapter = (*model, "--set", "learner.lora.r=8")
    assert "is not usual" not in dry_run(*adapter, "--set", "learner.lr=1e-4")
    assert "learner.lr=0.0002 is not usual" in dry_run(*adapter, "--set", "learner.lr=2e-4")


@pytest.mark.parametrize(
    ("key", "usual", "not_usual"),
    [
        ("sampling.temperature", (0.5, 1.2), (0.4, 1.3)),
        ("algo.group_size", (4, 16), (2, 32)),
        ("algo.kl_coef", (0, 0.001, 0.2), (0.0001, 0.3)),
        ("learner.lr", (1,), ()),  # of the embedded model
    ],
)
def test_hints_are_about_values_outside_of_the_usual_range(
    key: str, usual: tuple[float, ...], not_usual: tuple[float, ...]
) -> None:
    room, name = key.split(".")
    for model in ("tiny", "cache/tiny-0123"):  # its folder stands in a run's config.json
        assert not list(unusual(from_mapping({"model": {"path": model}})))
    for value in (*usual, *not_usual):
        found = list(unusual(from_mapping({room: {name: value}})))
        assert [line.split("=")[0] for line in found] == [key] * (value in not_usual)


def test_a_choice_that_does_nothing_is_warned_of() -> None:
    assert "warning: algo.clip_low cannot act" in dry_run("--set", "algo.clip_low=0.1")


DOORS = Endpoints(buffer="", weights="", store=("", 3))


def places(actors: int, learners: int, gpus: int, *present: str) -> dict[str, tuple[str, ...]]:
    launch = {"actors": actors, "learners": learners, "gpus": gpus, "share_gpus": True}
    config = from_mapping({"launch": launch, "weights": {"transport": "gloo"}})
    plan = make_plan(config, Host(cores=(0,), gpu_ids=present), DOORS, Path("/r"))
    return {spec.name: spec.gpus for spec in plan.specs if spec.name != "buffer"}


def test_processes_may_share_gpus_but_learner_ranks_never_one() -> None:
    assert places(1, 1, 1, "5") == {"actor-0": ("5",), "learner": ("5",)}
    shared = places(3, 2, 2, "0", "1")
    assert sorted(shared["learner"]) == ["0", "1"]
    assert {gpu for index in range(3) for gpu in shared[f"actor-{index}"]} == {"0", "1"}
    with pytest.raises(ConfigError, match="a GPU for each learner"):
        places(1, 2, 1, "0")


@pytest.mark.parametrize(
    ("gpus", "best", "refused"),
    [
        ([], "gloo", ("nccl", "cuda_ipc")),
        (["a0 0", "a1 1", "l0 2"], "nccl", ("cuda_ipc",)),
        (["a0 0", "a1 0", "l0 0"], "cuda_ipc", ("nccl",)),
        (["a0 1", "a1 0", "l0 0"], "gloo", ("nccl", "cuda_ipc")),
        (["a0 0", "a1 2", "l0 1", "l1 3"], "nccl", ("cuda_ipc",)),
    ],
)
def test_weights_take_the_fastest_way_that_the_places_allow(gpus, best, refused) -> None:
    roles = {"a": "actor-", "l": "learner-"}
    placed = {roles[p[0]] + p[1]: p[3] for p in gpus}
    for asked in ("auto", "gloo", "disk", "nccl", "cuda_ipc"):
        settings = {"launch": {"actors": 2}, "weights": {"transport": asked}}
        config = from_mapping(settings)
        if asked in refused:
            with pytest.raises(
                ConfigError, match=rf"'{asked}' needs .* set .*transport = '{best}'"
            ):
                choose_transport(config, placed)
        else:
            assert choose_transport(config, placed)[0] == (best if asked == "auto" else asked)


def test_the_plan_says_how_weights_travel_and_why() -> None:
    assert ", by gloo: launch.gpus=0 is a CPU run" in dry_run()
    assert ", by disk: as weights.transport says" in dry_run("--set", "weights.transport=disk")
    with pytest.raises(ConfigError, match=r"'nccl' needs CUDA.* is a CPU run; set .* = 'gloo'"):
        dry_run("--set", "weights.transport=nccl")


def test_prompts_that_are_all_too_long_are_refused_with_their_lengths(elsewhere: Path) -> None:
    file = elsewhere / "train.jsonl"
    file.write_text(
        "".join(f'{{"prompt": "{"x" * n}", "answer": "1", "kind": "add"}}\n' for n in (40, 50, 90))
    )
    settings = ("--set", f"data.train={file}", "--set", "learner.max_tokens_per_microbatch=4096")
    with pytest.raises(DataError, match=r"=30: all 3 .* shortest has 42 tokens.* 52; set .* to 92"):
        dry_run(*settings, "--set", "data.max_prompt_tokens=30", "--set", "data.eval=none")
    output = dry_run(*settings, "--set", "data.max_prompt_tokens=60")
    assert "warning: data.train: 33% of the prompts are longer" in output
    assert "are longer" not in dry_run(*settings)


def test_evaluations_whose_prompts_are_all_too_long_are_refused(elsewhere: Path) -> None:
    file = elsewhere / "eval.jsonl"
    file.write_text(f'{{"prompt": "{"x" * 300}", "answer": "1", "kind": "add"}}\n')
    with pytest.raises(DataError, match="all 1 prompts of evaluation held-out are longer"):
        dry_run("--set", f"data.eval={file}")


def test_a_run_directory_is_taken_literally(elsewhere: Path) -> None:
    assert f'{elsewhere}/a"b' in dry_run("--run-dir", 'a"b').replace("\\", "")


def eval_error(*arguments: str) -> AsyncGRPOError:
    result = CliRunner().invoke(app, ["eval", "--model", "tiny", "--engine", "toy", *arguments])
    assert isinstance(result.exception, AsyncGRPOError)
    return result.exception


def test_records_without_a_reward_are_told_how_to_give_one(elsewhere: Path) -> None:
    file = elsewhere / "eval.jsonl"
    file.write_text('{"prompt": "a", "answer": "1"}\n')
    assert str(eval_error("--data", str(file))).startswith("these records need a reward: give")
    named = eval_error("--data", str(file), "--set", "reward.functions=['task']")
    assert "these records" not in str(named)


def test_an_evaluation_of_nothing_is_refused() -> None:
    assert "--data '' names nothing" in str(eval_error("--data", ""))


@pytest.mark.parametrize("option", ["--config", "--run-dir", "model.path", "data.train"])
def test_paths_that_are_too_long_are_one_message(
    option: str, asyncgrpo: Callable[..., tuple[int, str, str]]
) -> None:
    path = "x" * 5000
    arguments = [option, path] if option.startswith("--") else ["--set", f"{option}={path}"]
    code, _, err = asyncgrpo("launch", "--dry-run", *arguments)
    assert (code, "Traceback" in err) == (2, False)
    assert "longer than a path may be" in err
