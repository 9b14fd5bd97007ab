"""What is optimised: settings of the algorithms, and which of them make sense together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, PositiveFloat, model_validator

from asyncgrpo.algorithms import PRESETS, check_name
from asyncgrpo.settings.room import Room, Unbounded

WEIGHTS = ("decoupled", "tis", "tis_sequence")
MASKS = ("icepop", "geometric_mask", "opsm", "m2po")
# Losses that weigh with pi / mu themselves, and losses that are nothing but their ratio's clip.
RHO_LOSSES = ("cispo", "dppo_tv", "vespo", "topr")
RATIO_LOSSES = ("gspo", "gspo_token", "sapo")


class CispoSettings(Room):
    cap: Unbounded = Field(5.0, ge=1, description="largest weight pi / mu (1 + epsilon_high)")
    floor: float | None = Field(None, gt=0, le=1, description="smallest weight; none: no floor")


class GspoSettings(Room):
    clip_low: float = Field(3e-4, gt=0, lt=1, description="sequence ratios are cut at 1 - this")
    clip_high: float = Field(4e-4, gt=0, description="and at 1 + this")


class SapoSettings(Room):
    tau_positive: float = Field(1.0, gt=0, description="steepness of the gate for A > 0")
    tau_negative: float = Field(1.05, gt=0, description="for A < 0; larger fades faster")


class DppoTvSettings(Room):
    delta: float = Field(0.2, gt=0, le=1, description="largest move of one token's probability")
    cap: Unbounded = Field(20.0, ge=1, description="cap of the ratio pi / mu")


class VespoSettings(Room):
    positive: tuple[PositiveFloat, PositiveFloat] = Field(
        (2.0, 3.0), description="(k, c) for A > 0"
    )
    negative: tuple[PositiveFloat, PositiveFloat] = Field(
        (3.0, 2.0), description="(k, c) for A < 0"
    )


class ToprSettings(Room):
    level: Literal["sequence", "token"] = Field(
        "sequence", description="truncate the ratio of the whole sequence, or of each token"
    )


class TisSequenceSettings(Room):
    cap: Unbounded = Field(8.0, gt=0, description="cap of the sequence's importance weight")


class IcepopSettings(Room):
    low: float = Field(0.5, gt=0, description="tokens with a smaller weight are masked")
    high: Unbounded = Field(5.0, gt=0, description="tokens with a larger weight are masked")


class GeometricMaskSettings(Room):
    low: float = Field(0.99, gt=0, description="sequences with a smaller mean are masked")
    high: Unbounded = Field(1.01, gt=0, description="sequences with a larger mean are masked")


class OpsmSettings(Room):
    threshold: float = Field(1e-4, ge=0, description="nats per token, mean over the sequence")


class M2poSettings(Room):
    threshold: float = Field(0.04, gt=0, description="largest mean of log(w)^2 over the batch")


class ReferenceSettings(Room):
    path: str | None = Field(None, description="folder or hub name; none = the start model")
    on_cpu: bool = Field(
        False, description="its weights wait in host memory and come to the GPU to compute"
    )
    sync_every: int = Field(0, ge=0, description="learner steps between syncs; 0 = frozen")
    mix_alpha: float = Field(
        0.9, gt=0, le=1, description="sync: ref := alpha pi + (1 - alpha) ref; 1 resets"
    )


class AlgoSettings(Room):
    """What is optimised. `asyncgrpo algo list` shows every name, `algo show NAME` its formula."""

    preset: Literal["grpo", "dapo", "dr_grpo"] | None = Field(
        None, description="advantage, aggregation and clips of a paper; other keys win over it"
    )
    group_size: int = Field(8, ge=1, description="completions per prompt (G)")
    advantage: str = Field("grpo", description="what a reward says against the others of its group")
    advantage_eps: float = Field(1e-4, gt=0, description="added to the standard deviation")
    advantage_ddof: Literal[0, 1] = Field(1, description="1: sample, 0: population deviation")
    pass_k: int = Field(4, ge=2, description="k of advantage pass_at_k")
    reward_combination: Literal["sum", "normalise_each"] = Field(
        "sum", description="advantage of the weighted sum, or weighted sum of each one's advantage"
    )
    loss: str = Field("ppo_clip", description="of one token")
    clip_low: float = Field(0.2, gt=0, lt=1, description="ratios are clipped at 1 - this")
    clip_high: Unbounded = Field(0.28, gt=0, description="and at 1 + this")
    dual_clip: float | None = Field(None, gt=1, description="lower bound of r A for A < 0; e.g. 3")
    cispo: CispoSettings = CispoSettings()
    gspo: GspoSettings = GspoSettings()
    sapo: SapoSettings = SapoSettings()
    dppo_tv: DppoTvSettings = DppoTvSettings()
    vespo: VespoSettings = VespoSettings()
    topr: ToprSettings = ToprSettings()
    correction: tuple[str, ...] = Field(
        ("decoupled",), min_length=1, description="one name or several: masks, and one weight"
    )
    correction_cap: Unbounded = Field(2.0, gt=0, description="cap of the token importance weight")
    tis_sequence: TisSequenceSettings = TisSequenceSettings()
    icepop: IcepopSettings = IcepopSettings()
    geometric_mask: GeometricMaskSettings = GeometricMaskSettings()
    opsm: OpsmSettings = OpsmSettings()
    m2po: M2poSettings = M2poSettings()
    proximal: Literal["recompute", "loglinear"] = Field(
        "recompute",
        description="p: a forward pass (none with one optimizer step), or between mu and pi",
    )
    minibatches: int = Field(1, ge=1, description="parts of a batch, an optimizer step each")
    passes: int = Field(1, ge=1, description="times a batch is gone through")
    aggregation: str = Field("token_mean", description="how token losses become one number")
    kl: str = Field("k3", description="estimator of the KL to the reference")
    kl_coef: float = Field(0.0, ge=0, description="0 loads no reference model")
    kl_in: Literal["loss", "reward", "reward_token"] = Field(
        "loss", description="reward: summed per completion; reward_token: per token, to go"
    )
    kl_target: float | None = Field(
        None, gt=0, description="nats per token: adapts kl_coef towards this KL"
    )
    kl_horizon: int = Field(10_000, ge=1, description="completions over which it adapts")
    reference: ReferenceSettings = ReferenceSettings()
    entropy_coef: float = Field(0.0, ge=0, description="bonus per nat of token entropy")
    mask_truncated: bool = Field(False, description="completions cut at the limit leave the loss")
    overlong_buffer: int = Field(
        0, ge=0, description="last tokens before the limit over which a length penalty grows"
    )
    overlong_penalty: float = Field(1.0, ge=0, description="of a completion at the limit")
    drop_uniform_groups: bool = Field(
        True, description="groups all right or all wrong are filtered and replaced"
    )
    max_nonfinite: int = Field(
        3, ge=0, description="updates skipped because a loss or gradient is not finite, per run"
    )

    @property
    def optimizer_steps(self) -> int:
        """Optimizer updates made from one batch."""
        return self.minibatches * self.passes

    @property
    def custom(self) -> tuple[str, ...]:
        """The user's own functions, 'package.module:function'."""
        names = (self.loss, *self.correction, self.aggregation, self.kl, self.advantage)
        return tuple(name for name in names if ":" in name)

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, raw: Any) -> Any:
        """A preset fills in what is not set; a single correction may be given as text."""
        if not isinstance(raw, dict):
            return raw
        preset = raw.get("preset")
        filled = {**(PRESETS.get(preset, {}) if isinstance(preset, str) else {}), **raw}
        if isinstance(filled.get("correction"), str):
            filled["correction"] = (filled["correction"],)
        return filled

    @model_validator(mode="after")
    def _makes_sense(self) -> AlgoSettings:
        for kind in ("advantage", "loss", "aggregation", "kl"):
            check_name(kind, getattr(self, kind))
        for name in self.correction:
            check_name("correction", name)
        for problem in _contradictions(self):
            raise ValueError(problem)
        return self


def _contradictions(algo: AlgoSettings) -> Iterator[str]:
    """Why this combination could not work, or would silently do nothing."""
    yield from _correction_problems(algo)
    yield from _without_effect(algo)
    for name, band in (("icepop", algo.icepop), ("geometric_mask", algo.geometric_mask)):
        if not band.low < 1.0 < band.high:
            yield f"{name}.low={band.low} and {name}.high={band.high} must hold low < 1 < high"
    if algo.kl_coef and algo.kl == "k1" and algo.kl_in == "loss":
        yield (
            "kl=k1 in the loss has an expected gradient of zero: it would only add noise; set "
            "algo.kl to k2 or k3, or algo.kl_in to reward"
        )
    yield from _unused(algo)
    if algo.advantage == "batch_std" and algo.reward_combination == "normalise_each":
        yield (
            "advantage=batch_std with reward_combination=normalise_each: the batch's spread is "
            "that of the summed reward; use advantage grpo or dr_grpo"
        )
    if algo.advantage == "pass_at_k" and algo.pass_k > algo.group_size:
        yield f"pass_k={algo.pass_k} must be <= algo.group_size={algo.group_size}: k of a group"


def _correction_problems(algo: AlgoSettings) -> Iterator[str]:
    names = algo.correction
    shown = ", ".join(names)
    weights = [name for name in names if name in WEIGHTS]
    if len(set(names)) < len(names):
        yield f"correction={shown}: a name appears twice; name each once"
    if "none" in names and len(names) > 1:
        yield f"correction={shown}: none means that mu is ignored; remove it, or the others"
    if len(weights) > 1:
        yield (
            f"correction={shown}: {' and '.join(weights)} would both multiply by w = p / mu; keep "
            "one (tis is decoupled by another name)"
        )
    if "bypass" in names and weights:
        yield (
            f"correction={shown}: with bypass the loss's ratio pi / mu corrects already, "
            f"{weights[0]} would correct twice; keep one of them"
        )
    if algo.loss in RHO_LOSSES and "bypass" not in names:
        yield (
            f"loss={algo.loss} weighs each token with pi / mu itself; correction={shown} would "
            "count that twice, or hide it; set algo.correction to 'bypass' (masks may be added)"
        )


def _without_effect(algo: AlgoSettings) -> Iterator[str]:
    is_one = algo.optimizer_steps == 1
    acting = {
        f"loss={algo.loss} acts on": algo.loss in RATIO_LOSSES,
        f"dual_clip={algo.dual_clip} bounds": algo.dual_clip is not None,
    }
    for what, is_set in acting.items():
        if is_set and is_one and "bypass" not in algo.correction:
            yield (
                f"{what} r = pi / p, which is exactly 1 with one optimizer step per batch: it "
                "could not have any effect; set algo.correction to 'bypass' (ratio pi / mu), or "
                "algo.minibatches or algo.passes >= 2"
            )
    if algo.proximal == "loglinear" and is_one:
        yield (
            "proximal=loglinear approximates p between mu and pi, but with one optimizer step per "
            "batch p is pi, exactly and at no cost; leave it out, or set algo.minibatches or "
            "algo.passes >= 2"
        )
    if algo.proximal == "loglinear" and set(algo.correction) <= {"none", "bypass"}:
        yield (
            f"proximal=loglinear with correction={algo.correction[0]}: nothing looks at p; use "
            "correction decoupled, or leave proximal out"
        )


def _unused(algo: AlgoSettings) -> Iterator[str]:
    """Settings of algorithms that are not named would silently do nothing."""
    changed = algo.model_dump(exclude_defaults=True)  # a resolved dump sets everything
    for name in ("kl_target", "reference"):
        if changed.get(name) and not algo.kl_coef:
            yield f"{name} is set, but kl_coef=0 loads no reference; set kl_coef, e.g. 1e-3"
    for name in ("cispo", "sapo", "dppo_tv", "vespo", "topr", "gspo"):
        if changed.get(name) and not algo.loss.startswith(name) and ":" not in algo.loss:
            yield f"{name} is set, but loss={algo.loss} does not use it; set algo.loss to {name!r}"
    for name in ("tis_sequence", *MASKS):
        if changed.get(name) and name not in algo.correction:
            shown = ", ".join(algo.correction)
            yield f"{name} is set, but correction={shown} does not name it; add {name!r} there"
    if algo.dual_clip is not None and algo.loss != "ppo_clip" and ":" not in algo.loss:
        yield f"dual_clip is set, but loss={algo.loss} does not use it; leave it out"


def notices(algo: AlgoSettings) -> Iterator[str]:
    """Combinations that work but may not do what their names promise."""
    if algo.loss.startswith("gspo") and algo.aggregation == "token_mean":
        yield (
            "algo.loss=gspo with aggregation token_mean: clipped per sequence, but long sequences "
            "weigh more; the paper takes sequence_mean"
        )
    is_one = algo.optimizer_steps == 1
    clips = {"clip_low", "clip_high"} & algo.model_fields_set
    if is_one and clips and algo.loss == "ppo_clip" and "bypass" not in algo.correction:
        yield (
            f"{' and '.join(f'algo.{name}' for name in sorted(clips))} cannot act: with one "
            "optimizer step per batch r = pi / p is 1; set algo.minibatches = 2, or "
            "algo.correction = bypass; as it is only algo.correction_cap bounds a token's weight"
        )
    if algo.aggregation == "bnpo":
        yield "algo.aggregation=bnpo depends on learner.max_tokens_per_microbatch"
