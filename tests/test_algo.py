"""Names, presets and combinations of algorithms: what is refused, why, and what is explained."""

from __future__ import annotations

from typing import Any

import pytest

from asyncgrpo.algorithms import MODULES, PRESETS, catalogue, find
from asyncgrpo.config import from_mapping
from asyncgrpo.errors import ConfigError
from asyncgrpo.settings.algo import AlgoSettings, notices


@pytest.mark.parametrize(
    ("algo", "message"),
    [
        ({"loss": "ppo_clp"}, "no loss 'ppo_clp'; did you mean 'ppo_clip'"),
        ({"advantage": "gpro"}, "did you mean 'grpo'"),
        ({"aggregation": "token_men"}, "did you mean 'token_mean'"),
        ({"kl": "k4", "kl_coef": 0.1}, "no kl 'k4'"),
        ({"correction": ["icepopp"]}, "did you mean 'icepop'"),
        ({"preset": "dappo"}, "Input should be 'grpo', 'dapo' or 'dr_grpo'"),
        ({"correction": ["opsm", "opsm"]}, "a name appears twice"),
        ({"correction": []}, "at least 1 item"),
        ({"correction": ["none", "icepop"]}, "none means that mu is ignored"),
        ({"correction": ["tis", "decoupled"]}, "tis is decoupled by another name"),
        ({"correction": ["decoupled", "tis_sequence"]}, "both multiply by w"),
        ({"correction": ["bypass", "tis"]}, "correct twice"),
        ({"loss": "cispo"}, "weighs each token with pi / mu itself"),
        ({"loss": "topr", "correction": "none"}, "set algo.correction to 'bypass'"),
        ({"loss": "gspo"}, "exactly 1 with one optimizer step.*could not have any effect"),
        ({"loss": "sapo", "correction": ["icepop", "decoupled"]}, "could not have any effect"),
        ({"dual_clip": 3.0}, "dual_clip=3.0 bounds r"),
        ({"dual_clip": 3.0, "loss": "gspo", "passes": 2}, "loss=gspo does not use it"),
        ({"proximal": "loglinear"}, "with one optimizer step per batch p is pi"),
        ({"proximal": "loglinear", "passes": 2, "correction": "none"}, "nothing looks at p"),
        ({"correction": "icepop", "icepop": {"low": 2.0, "high": 3.0}}, "low < 1 < high"),
        ({"correction": "geometric_mask", "geometric_mask": {"low": 1.2}}, "low < 1 < high"),
        ({"kl": "k1", "kl_coef": 0.1}, "expected gradient of zero"),
        ({"kl_target": 0.1}, "kl_coef=0 loads no reference"),
        ({"reference": {"sync_every": 10}}, "kl_coef=0 loads no reference"),
        ({"icepop": {"high": 3.0}}, "icepop is set, but correction=decoupled does not name it"),
        ({"gspo": {"clip_low": 0.1}}, "gspo is set, but loss=ppo_clip does not use it"),
        ({"advantage": "pass_at_k", "pass_k": 9}, r"pass_k=9 must be <= algo.group_size=8"),
        ({"advantage": "batch_std", "reward_combination": "normalise_each"}, "that of the summed"),
        ({"group_size": 1}, "group_size=1 must be >= 2"),
        ({"clip_low": -0.1}, "algo.clip_low=-0.1 is not allowed"),
        ({"clip_low": 1.5}, "algo.clip_low=1.5 is not allowed"),
        ({"kl_coef": -1}, "algo.kl_coef=-1 is not allowed"),
        ({"entropy_coef": -1}, "algo.entropy_coef=-1 is not allowed"),
        ({"dual_clip": 0.5}, "algo.dual_clip=0.5 is not allowed"),
        ({"vespo": {"positive": [2, -3]}}, "algo.vespo.positive.1=-3 is not allowed"),
        ({"max_nonfinite": -1}, "algo.max_nonfinite=-1 is not allowed"),
        ({"minibatches": 9}, r"step=16 must be >= launch.learners=2 x algo.minibatches=9: each"),
        ({"overlong_buffer": 16}, r"algo.overlong_buffer=16 must be < .*max_completion_tokens=16"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(algo: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping({"algo": algo})


@pytest.mark.parametrize(
    "algo",
    [
        {"correction": ["opsm", "m2po", "geometric_mask", "icepop", "tis_sequence"]},
        {"correction": ["bypass", "icepop", "opsm"], "loss": "cispo"},
        {"loss": "gspo", "passes": 2, "proximal": "loglinear", "aggregation": "sequence_mean"},
        {"kl": "k1", "kl_coef": 0.1, "kl_in": "reward", "kl_target": 0.05},
        {"loss": "my.losses:own", "advantage": "my.advantages:own", "group_size": 1},
    ],
)
def test_what_makes_sense_is_taken_and_survives_the_resolved_dump(algo: dict[str, Any]) -> None:
    config = from_mapping({"algo": algo})
    assert from_mapping(config.model_dump(mode="json")).algo == config.algo


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fills_in_what_is_not_set(preset: str) -> None:
    plain = AlgoSettings(preset=preset)
    for key, value in PRESETS[preset].items():
        assert getattr(plain, key) == value
    assert AlgoSettings(preset=preset, clip_high=0.5).clip_high == 0.5


def test_presets_are_the_papers() -> None:
    dapo, dr_grpo = AlgoSettings(preset="dapo"), AlgoSettings(preset="dr_grpo")
    assert (dapo.clip_low, dapo.clip_high, dapo.aggregation) == (0.2, 0.28, "token_mean")
    assert (dr_grpo.advantage, dr_grpo.aggregation) == ("dr_grpo", "dr_grpo")


@pytest.mark.parametrize(
    ("algo", "message"),
    [
        ({"loss": "gspo", "correction": "bypass"}, "the paper takes sequence_mean"),
        ({"clip_low": 0.1}, "algo.clip_low cannot act"),
        ({"preset": "dapo"}, "set algo.minibatches = 2, or algo.correction = bypass"),
        ({"aggregation": "bnpo"}, "max_tokens_per_microbatch"),
    ],
)
def test_what_works_but_may_surprise_is_explained(algo: dict[str, Any], message: str) -> None:
    assert any(message in notice for notice in notices(AlgoSettings(**algo)))


def test_the_defaults_need_no_explanation() -> None:
    assert list(notices(AlgoSettings())) == []


@pytest.mark.parametrize("kind", MODULES)
def test_every_entry_of_the_catalogue_is_complete_and_its_settings_exist(kind: str) -> None:
    for name, entry in catalogue(kind).items():
        assert callable(find(kind, name))
        assert entry.summary.endswith(".")
        assert entry.formula
        assert entry.source
        assert entry.use
        assert entry.staleness or kind not in ("loss", "correction")
        for setting in entry.settings:
            place: Any = AlgoSettings()
            for part in setting.split("."):
                place = getattr(place, part)
