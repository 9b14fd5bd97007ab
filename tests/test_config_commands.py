"""`asyncgrpo config`: what it prints loads as the same settings, and explains every one of them."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from asyncgrpo.aliases import by_name
from asyncgrpo.cli import app
from asyncgrpo.config import Config, from_mapping, load_config, preset_files
from asyncgrpo.errors import ConfigError
from asyncgrpo.reference import as_toml, changed, explain
from asyncgrpo.reference import settings as all_settings

TEXT = st.text(max_size=12)
WEIGHT = st.floats(0.001, 1e6)
TRICKY = st.fixed_dictionaries(
    {},
    optional={
        "run": st.fixed_dictionaries({"name": TEXT, "seed": st.integers(0, 2**31 - 1)}),
        "data": st.fixed_dictionaries(
            {"train": st.lists(st.fixed_dictionaries({"path": TEXT.filter(bool)}), min_size=1)},
            optional={
                "eval": st.sampled_from(["tasks", "none", "x.jsonl"]),
                "tasks": st.fixed_dictionaries({"kinds": st.dictionaries(TEXT, WEIGHT)}),
                "template": st.fixed_dictionaries({"system": TEXT}),
            },
        ),
        "reward": st.fixed_dictionaries(
            {},
            optional={
                "routes": st.dictionaries(TEXT, st.just("gsm8k"), min_size=1),
                "functions": st.just([{"use": "task"}, {"use": "length_penalty"}]),
            },
        ),
        "algo": st.fixed_dictionaries(
            {},
            optional={
                "preset": st.sampled_from(["grpo", "dapo", "dr_grpo"]),
                "clip_high": st.sampled_from([0.2, 0.28, 0.3]),
                "advantage": st.sampled_from(["grpo", "dr_grpo"]),
                "correction_cap": st.sampled_from([2.0, 3.0, float("inf")]),
            },
        ),
        "buffer": st.sampled_from([{"completions_per_step": 128}, {"completions_per_step": 64}]),
        "learner": st.fixed_dictionaries(
            {"lr": WEIGHT, "adam_eps": st.floats(1e-12, 1e-3)},
            optional={"lora": st.sampled_from([{}, {"r": 4}])},
        ),
        "eval": st.sampled_from([[], [{}], {"every": 3}, [{}, {"name": "b"}], [{"reward": {}}]]),
    },
)


@settings(max_examples=settings().max_examples // 3)
@given(TRICKY)
def test_settings_written_as_toml_load_as_the_same_settings(raw: dict[str, Any]) -> None:
    config = from_mapping(raw)
    whole = tomllib.loads(as_toml(config.model_dump(mode="json")))
    assert from_mapping(whole) == config
    part = tomllib.loads(as_toml(changed(config)))
    assert from_mapping(part) == config
    assert set(part) <= set(raw)


@pytest.mark.parametrize("name", preset_files())
def test_a_preset_is_shown_as_toml_that_is_that_preset(name: str) -> None:
    for flags in ([], ["--changed"]):
        shown = run("show", "--config", name, *flags)
        assert from_mapping(tomllib.loads(shown)) == load_config(name)


def test_only_what_differs_from_the_defaults_is_shown_on_demand() -> None:
    assert run("show", "--changed") == "\n"
    shown = run("show", "--changed", "--set", "algo.cispo.cap=5", "--set", "learner.lr=1e-6")
    assert tomllib.loads(shown) == {"learner": {"lr": 1e-6}}
    grpo = run("show", "--changed", "--set", "algo.preset=grpo", "--set", "algo.clip_high=0.28")
    assert tomllib.loads(grpo)["algo"]["clip_high"] == 0.28  # the default, but not that of grpo


def test_every_setting_is_explained_with_its_meaning_limits_and_default() -> None:
    for key, setting in all_settings().items():
        assert setting.description, key
        text = explain(key)
        assert all(part in text for part in (key, setting.kind, setting.default or "must be given"))
        assert explain(key.replace("[]", "")) == text


def test_the_explained_default_is_the_default() -> None:
    tables = from_mapping({"learner": {"lora": {}}, "eval": {"reward": {}}})  # that may be left out
    for key, setting in all_settings().items():
        if "[]" not in key and setting.default != "none":
            found: Any = tables.model_dump(mode="json")
            for part in key.split("."):
                found = found[part]
            shown = tomllib.loads(f"value = {setting.default}")["value"]
            assert as_toml({"v": shown}) == as_toml({"v": found}), key


def test_limits_and_choices_are_shown_as_they_are_checked() -> None:
    assert all_settings()["algo.clip_low"].kind == "number > 0 and < 1"
    assert all_settings()["data.epochs"].kind == "integer >= 1 or none"
    assert all_settings()["actor.engine"].kind == "vllm, toy"
    assert all_settings()["algo.kl"].kind.startswith("k1, k2, k3, ")
    assert all_settings()["learner.betas"].kind == f"[{', '.join(['number >= 0 and < 1'] * 2)}]"


def test_a_room_shows_its_settings_and_a_last_part_all_that_end_so() -> None:
    lines = run("explain", "buffer").splitlines()
    assert lines[0].startswith("buffer.groups_per_step = 16  # batch size in groups")
    assert len(lines) == len(Config().buffer.model_dump())
    assert "actor.threads" in run("explain", "threads")
    assert "learner.threads" in run("explain", "threads")
    assert "eval.reward" not in run("explain", "reward")


@pytest.mark.parametrize("key", ["eval.1.every", "eval[0].every", "eval[].every"])
def test_a_setting_of_one_table_of_a_list_is_explained_like_the_others(key: str) -> None:
    assert run("explain", key).startswith("eval.every\n")


def test_a_foreign_name_is_explained_and_named_at_its_own_setting() -> None:
    assert "prompt_repeat_k (XTuner): is algo.group_size here" in run("explain", "prompt_repeat_k")
    assert "elsewhere  num_generations, prompt_repeat_k" in run("explain", "algo.group_size")
    assert "min_p (TRL): refused if on; leave it out" in run("explain", "min_p")
    assert "save_steps (TRL): not offered yet" in run("explain", "save_steps")
    assert all(name in explain(name) for name in by_name())


def test_presets_are_listed_and_explained() -> None:
    listed = run("presets")
    for name in (*preset_files(), "grpo", "dapo", "dr_grpo"):
        assert name in listed
    assert 'algo.aggregation = "sequence_mean"' in run("explain", "grpo")
    assert "[learner]\nmax_tokens_per_microbatch = 4096" in run("explain", "tiny")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("algo.grup_size", "did you mean algo.group_size"),
        ("num_generation", "did you mean num_generations"),
        ("nope.x", "see `asyncgrpo config show`"),
        ("qqqqqqqq", "see `asyncgrpo config show`"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(key: str, hint: str) -> None:
    result = CliRunner().invoke(app, ["config", "explain", key])
    assert isinstance(result.exception, ConfigError)
    assert f"there is no setting, alias or preset {key!r}" in str(result.exception)
    assert hint in str(result.exception)


def test_a_preset_that_does_not_exist_names_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"config file tini does not exist; there are: .*tiny"):
        load_config("tini")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["config", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_lists_of_tables_are_blocks_that_load_as_the_same_settings(tmp_path):
    tables = ["data.train=[{path='a', template={suffix='x'}}, {path='b'}]"]
    config = load_config(
        None, [*tables, "eval=[{name='p'}, {name='q', reward={functions=['math']}}]"]
    )
    text = as_toml(config.model_dump(mode="json"))
    assert text.count("[[data.train]]") == text.count("[[eval]]") == 2
    assert max(map(len, text.splitlines())) < 200
    (tmp_path / "all.toml").write_text(text)
    assert load_config(tmp_path / "all.toml") == config


def test_a_foreign_name_stands_only_at_the_settings_it_sets():
    low, high = (all_settings()[f"algo.clip_{end}"].aliases for end in ("low", "high"))
    assert "epsilon" in low
    assert "epsilon" in high
    assert "epsilon_high" in high
    assert "epsilon_high" not in low
    assert "algo.clip_low" not in explain("epsilon_high").partition(";")[0]
