"""Translates settings under the names of other trainers, by the table in aliases.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from asyncgrpo.errors import ConfigError
from asyncgrpo.settings.reward import as_functions
from asyncgrpo.settings.room import Room

Rooms = Mapping[str, Mapping[str, Any]]  # room -> its fields
Foreign = Mapping[str, Any]  # foreign name -> value
Pairs = Iterator[tuple[str, Any]]  # our keys and their values

NO_LOWER_BOUND = 1e-9  # algo.icepop.low must be above 0


class Entry(NamedTuple):
    """A row of the table: names by trainer, our keys, and what differs, or why there are none."""

    kind: str  # called, not_needed, not_yet, refused
    trl: list[str]
    xtuner: list[str]
    ours: list[str]
    note: str

    @property
    def names(self) -> list[str]:
        """All foreign names, each once."""
        return list(dict.fromkeys(self.trl + self.xtuner))

    def keys_of(self, name: str) -> list[str]:
        """Our keys that one of the names sets."""
        return [_table()["sets"][name]] if name in _table()["sets"] else self.ours


@cache
def entries() -> tuple[Entry, ...]:
    """The table in its order."""
    called = [
        Entry("called", trl.split(), xtuner.split(), ours.split(", "), note)
        for ours, (trl, xtuner, note) in _table()["called"].items()
    ]
    left_out = [
        Entry(kind, trl.split(), xtuner.split(), [], reason)
        for kind in ("not_needed", "not_yet", "refused")
        for reason, (trl, xtuner) in _table()[kind].items()
    ]
    return (*called, *left_out)


@cache
def by_name() -> Mapping[str, Entry]:
    """Foreign name -> its row."""
    return {name: entry for entry in entries() for name in entry.names}


def translate(raw: Mapping[str, Any], rooms: Rooms) -> tuple[dict[str, Any], list[str]]:
    """The settings under our names, and a notice about every foreign name that was among them.

    Foreign names are taken at the top level and in any room; those that are ours too, such as
    `temperature`, at the top level only. ConfigError: two names contradict each other, a value
    cannot be computed, or it would change what is learned and is not offered.
    """
    found, ours = _sort(raw, rooms)
    notices: list[str] = []
    problems: list[str] = []
    for entry in entries() if found else ():
        its = {name: found[name] for name in entry.names if name in found}
        try:
            notices += _take(entry, its, ours) if its else []
        except ConfigError as error:
            problems.append(str(error))
        except (TypeError, ValueError, AttributeError, ArithmeticError):
            keys = ", ".join(entry.ours)
            problems.append(f"{_shown(its)} cannot be taken as {keys}: a wrong type of value")
    if problems:
        raise ConfigError("\n".join(problems))
    return ours.settings, notices


class _Ours:
    """Settings under our names, while they are being completed."""

    def __init__(self, settings: dict[str, Any], rooms: Rooms) -> None:
        self.settings, self._rooms = settings, rooms
        self._origins: dict[str, str] = {}  # key -> the foreign setting it came from

    def given(self, key: str) -> Any:
        """What was given for a key; None if nothing was."""
        found: Any = self.settings
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found

    def get(self, key: str) -> Any:
        """What was given for `room.key`, else the default."""
        given, (room, name) = self.given(key), key.split(".")
        return self._rooms[room][name].default if given is None else given

    def put(self, key: str, value: Any, origin: str) -> None:
        """Sets it; ConfigError when something else is set already."""
        there = self.given(key)
        if there is not None and there != value:
            other = self._origins.get(key, origin)
            by = f" by {other}" if other != origin else ""
            raise ConfigError(
                f"{origin}: {key} would be {value!r}, but is {there!r}{by}; keep one of them"
            )
        place = self.settings
        *parents, last = key.split(".")
        for parent in parents:
            if not isinstance(place.get(parent, {}), Mapping):
                raise ConfigError(f"{origin} means {key}, but {parent} is no table; set it there")
            place[parent] = dict(place.get(parent, {}))
            place = place[parent]
        place[last] = value
        self._origins.setdefault(key, origin)


def _sort(raw: Mapping[str, Any], rooms: Rooms) -> tuple[dict[str, Any], _Ours]:
    """Foreign settings by name, and the rest."""
    found: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for room, content in raw.items():
        if room not in rooms and room in by_name():
            _add(found, room, content)
            continue
        settings[room] = dict(content) if isinstance(content, Mapping) else content
        for key in content if isinstance(content, Mapping) else ():
            if key in by_name() and key not in rooms.get(room, ()) and not _is_ours(key):
                _add(found, key, settings[room].pop(key))
    return found, _Ours(settings, rooms)


def _add(found: dict[str, Any], name: str, value: Any) -> None:
    if found.get(name, value) != value:
        raise ConfigError(f"{name} is set twice, to {found[name]!r} and to {value!r}; keep one")
    if value is not None:
        found[name] = value


def _is_ours(name: str) -> bool:
    """Whether our key ends so too: in a wrong room it is a mistake, not a foreign name."""
    return any(key.endswith(f".{name}") for key in by_name()[name].ours)


def _take(entry: Entry, its: Foreign, ours: _Ours) -> list[str]:
    """Sets what the names of one row mean; returns the notices."""
    if entry.kind != "called":
        return [_left_out(entry, name, value) for name, value in its.items()]
    whole = _TRANSLATORS.get(entry.ours[0])
    pairs: list[tuple[str, Any]] = []
    for translator in dict.fromkeys(_TRANSLATORS.get(name, whole) for name in its):
        pairs += translator(its, ours) if translator else _same(entry.ours[0], its)
    for key, value in pairs:
        ours.put(key, value, _shown(its))
    taken = ", ".join(dict.fromkeys(f"{key}={value!r}" for key, value in pairs))
    note = f" ({entry.note})" if entry.note and len(entry.ours) == 1 else ""
    return [f"{_shown(its)}: " + (f"taken as {taken}{note}" if taken else "changes nothing here")]


def _left_out(entry: Entry, name: str, value: Any) -> str:
    if entry.kind == "refused" and value and value not in _table()["off"].get(name, []):
        raise ConfigError(f"{name}={value!r} is not offered: {entry.note}")
    said = {"not_needed": "not needed here", "not_yet": "not offered yet"}
    return f"{name}: {said.get(entry.kind, 'off here too')} ({entry.note})"


def _shown(its: Foreign) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in its.items())


@cache
def _table() -> dict[str, dict[str, Any]]:
    return tomllib.loads((Path(__file__).parent / "aliases.toml").read_text(encoding="utf-8"))


def _same(key: str, its: Foreign) -> Pairs:
    for name, value in its.items():
        meant = _table()["values"].get(name, {}).get(str(value).lower(), value)
        if meant != "" and name not in _TRANSLATORS:
            yield key, meant


def _loss(its: Foreign, ours: _Ours) -> Pairs:
    kind = its.get("loss_type")
    known: dict[Any, dict[str, str]] = {None: {}, **_table()["loss_type"]}
    chosen = known.get(kind, {"algo.loss": kind})
    if its.get("importance_sampling_level") == "sequence":
        if chosen.get("algo.loss", "ppo_clip") != "ppo_clip":
            raise ConfigError(
                f"importance_sampling_level='sequence' with loss_type={kind!r} is not offered; "
                "use algo.loss = 'gspo' or 'vespo', which look at the whole sequence"
            )
        chosen = {**chosen, **known["gspo"]}
    yield from chosen.items()


def _correction(its: Foreign, ours: _Ours) -> Pairs:
    on, mode, low, cap = (
        its.get(f"vllm_importance_sampling_{end}")
        for end in ("correction", "mode", "clip_min", "clip_max")
    )
    cap, given = its.get("vllm_importance_sampling_cap", cap), ours.get("algo.correction")
    names = [given] if isinstance(given, str) else list(given)
    if on is False and names != ["bypass"]:
        names = ["none"]
    elif (mode, low, cap) != (None, None, None) and names != ["bypass"]:
        mode, offered = mode or "token_truncate", _table()["corrections"]
        if mode not in offered or (low is not None and mode != "token_mask"):
            raise ConfigError(
                f"vllm_importance_sampling_mode={mode!r} with clip_min={low} is not offered; "
                f"offered are {', '.join(offered)}, with clip_min for token_mask alone; near to "
                "sequence_mask is algo.correction = ['geometric_mask', 'tis_sequence']"
            )
        name, cap_key = offered[mode]
        names = [name]
        if cap is not None:
            yield cap_key, cap
        if mode == "token_mask":
            yield "algo.icepop.low", low or NO_LOWER_BOUND
    if "off_policy_mask_threshold" in its:
        names = ["opsm", *names]
        yield "algo.opsm.threshold", its["off_policy_mask_threshold"]
    yield "algo.correction", names if len(names) > 1 else names[0]


def _clips(its: Foreign, ours: _Ours) -> Pairs:
    lows = [its[name] for name in ("epsilon", "clip_range", "cliprange_low") if name in its]
    highs = [its[name] for name in ("epsilon_high", "cliprange_high") if name in its]
    if ours.get("algo.loss") == "cispo":
        yield from (("algo.cispo.cap", high) for high in highs)
        return
    home = "algo.gspo" if ours.get("algo.loss") == "gspo" else "algo"
    if not highs and ours.given(f"{home}.clip_high") is None:
        highs = [its[name] for name in ("epsilon", "clip_range") if name in its]
    yield from ((f"{home}.clip_low", low) for low in lows)
    yield from ((f"{home}.clip_high", high) for high in highs)


def _batch(its: Foreign, ours: _Ours) -> Pairs:
    size, ranks = its.get("per_device_train_batch_size"), ours.get("launch.learners")
    whole, parts = its.get("generation_batch_size"), its.get("gradient_accumulation_steps", 1)
    if size is not None:
        update = size * ranks * parts
        whole = whole or size * ranks * its.get("steps_per_generation", parts)
        if whole % update:
            raise ConfigError(
                f"{_shown(its)}: a generation batch of {whole} completions is no multiple of "
                f"{size} per device x {ranks} launch.learners x {parts} accumulated = {update}, "
                "those of one optimizer step; change one of them"
            )
        yield "algo.minibatches", whole // update
    if whole is None:
        raise ConfigError(
            f"{_shown(its)} is a batch only together with per_device_train_batch_size; give that "
            "too, or buffer.completions_per_step = per device x launch.learners x "
            "steps_per_generation"
        )
    yield "buffer.completions_per_step", whole


def _kl_coef(its: Foreign, ours: _Ours) -> Pairs:
    on = its.get("use_kl_loss", True)
    yield "algo.kl_coef", its.get("kl_loss_coef", 0.001) if on else 0.0


def _reference(its: Foreign, ours: _Ours) -> Pairs:
    if its.get("sync_ref_model"):
        yield "algo.reference.sync_every", its.get("ref_model_sync_steps", 512)
        yield "algo.reference.mix_alpha", its.get("ref_model_mixup_alpha", 0.6)


def _lists(its: Foreign, ours: _Ours) -> Pairs:
    for key, parts in _table()["lists"].items():
        if parts.keys() & its.keys():
            yield key, [its.get(name, default) for name, default in parts.items()]


def _warmup(its: Foreign, ours: _Ours) -> Pairs:
    if (steps := ours.given("learner.warmup_steps")) is not None:
        raise ConfigError(f"{_shown(its)}, but learner.warmup_steps={steps}: keep one of the two")
    yield "learner.warmup_ratio", its["warmup_ratio"]


def _min_lr(its: Foreign, ours: _Ours) -> Pairs:
    yield "learner.min_lr_ratio", its["lr_min"] / ours.get("learner.lr")


def _reward_weights(its: Foreign, ours: _Ours) -> Pairs:
    """The functions anew, each with its weight: those that were given are taken out first."""
    weights, given = its["reward_weights"], as_functions(ours.get("reward.functions"))
    functions = [
        f.model_dump(exclude_unset=True) if isinstance(f, Room) else dict(f) for f in given
    ]
    if len(weights) != len(functions):
        raise ConfigError(
            f"reward_weights={weights} are {len(weights)} numbers for {len(functions)} functions "
            f"({', '.join(f['use'] for f in functions)}); give one for each"
        )
    pairs = list(zip(functions, weights, strict=True))
    for function, weight in pairs:
        if (own := function.get("weight", weight)) != weight:
            raise ConfigError(f"reward_weights: {function['use']} has the weight {own} already")
    ours.settings.get("reward", {}).pop("functions", None)
    yield "reward.functions", [{**function, "weight": weight} for function, weight in pairs]


# A whole row by our first key, or some names of a row that are not taken as they are.
_TRANSLATORS: Mapping[str, Callable[[Foreign, _Ours], Pairs]] = {
    "algo.loss": _loss,
    "algo.correction": _correction,
    "algo.clip_low": _clips,
    "algo.reference.sync_every": _reference,
    "algo.vespo.positive": _lists,
    "buffer.completions_per_step": _batch,
    "learner.min_lr_ratio": _min_lr,
    "learner.warmup_ratio": _warmup,
    "reward.functions": _reward_weights,
    **dict.fromkeys(("use_kl_loss", "kl_loss_coef"), _kl_coef),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), _lists),
}
