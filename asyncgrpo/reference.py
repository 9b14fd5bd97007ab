"""What can be set: each setting with limits, default and other names; and settings as TOML."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from asyncgrpo.algorithms import MODULES, PRESETS, catalogue
from asyncgrpo.aliases import by_name, entries
from asyncgrpo.config import Config, load_config, preset_files
from asyncgrpo.errors import ConfigError
from asyncgrpo.hints import USUAL, nearest

LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
TYPES = {"string": "text", "boolean": "true or false", "null": "none", "object": "table"}


class Setting(NamedTuple):
    """One setting; a key with [] is about each table of a list."""

    key: str
    kind: str  # type and limits, or the allowed values
    default: str  # as TOML; "none" is unset, "" must be given
    description: str
    aliases: tuple[str, ...]  # at other trainers


@cache
def settings() -> Mapping[str, Setting]:
    """All settings by key, in the order of the config classes."""
    schema = Config.model_json_schema()
    return {setting.key: setting for setting in _walk(schema, schema["$defs"], "", set())}


def explain(key: str) -> str:
    """What is known of a room, setting, foreign name or preset; ConfigError names the nearest."""
    named = {name.replace("[]", ""): setting for name, setting in settings().items()}
    place = re.sub(r"(\[\d*\]|\.\d+)(?=\.|$)", "", key)  # eval.1.every is eval.every of a block
    below = [s for name, s in named.items() if name.startswith(f"{place}.")]
    texts = [
        _in_full(s)
        for name, s in named.items()
        if place in (s.key, name) or (not below and place == _last(name))
    ]
    lines = [f"{s.key} = {s.default or '?'}  # {s.description or s.kind}" for s in below]
    texts += ["\n".join(lines)] if lines else []
    texts += [_foreign(key)] if key in by_name() else []
    if key in PRESETS:
        values = "\n".join(f"  algo.{name} = {_toml(v)}" for name, v in PRESETS[key].items())
        texts.append(f"algo.preset = {key} sets what is not set:\n{values}")
    if key in preset_files():
        path = preset_files()[key]
        texts.append(f"{path}: {summary(path)}\n\n{as_toml(changed(load_config(path)))}")
    if not texts:
        room = place.rpartition(".")[0]
        inside = {_last(name): name for name in named if name.startswith(f"{room}.")}
        known = [*map(_last, named), *by_name(), *Config.model_fields, *PRESETS, *preset_files()]
        near = inside.get(nearest(_last(place), inside) or "") if room else nearest(key, known)
        hint = f"did you mean {near}?" if near else "see `asyncgrpo config show`"
        raise ConfigError(f"there is no setting, alias or preset {key!r}; {hint}")
    return "\n\n".join(texts)


def summary(path: Path) -> str:
    """The first comment line of a settings file."""
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def changed(config: Config) -> dict[str, Any]:
    """Only what differs from the defaults, such that it loads as the same settings."""
    part = config.model_dump(mode="json", exclude_defaults=True)
    again = Config.model_validate(part)
    whole, usual = (settings.model_dump(mode="json") for settings in (config, Config()))
    return {  # a preset may stand behind a value that is also the default: then its whole room
        room: part[room] if getattr(again, room) == getattr(config, room) else whole[room]
        for room in whole
        if whole[room] != usual[room]
    }


def as_toml(table: Mapping[str, Any], prefix: str = "", header: str = "") -> str:
    """Nested settings as TOML. None is left out: it is what an unset setting is.

    header: of the table itself, if it is one of a list.
    """
    plain = {key: v for key, v in table.items() if v is not None and not _tables(v)}
    lines = [header or f"[{prefix}]"] if prefix and (plain or header) else []
    lines += [f"{_key(key)} = {_toml(value)}" for key, value in plain.items()]
    blocks = ["\n".join(lines)] if lines else []
    for key, value in table.items():
        name = f"{prefix}.{_key(key)}" if prefix else _key(key)
        header = "" if isinstance(value, Mapping) else f"[[{name}]]"
        blocks += [as_toml(part, name, header) for part in _tables(value)]
    return "\n\n".join(block for block in blocks if block)


def _walk(node: Any, models: Any, prefix: str, seen: set[str]) -> Iterator[Setting]:
    for name, field in node["properties"].items():
        key = prefix + name
        # a table, or (eval) one table or a list of them
        tables = [part for part in (field, *field.get("oneOf", ())) if "$ref" in part]
        if tables:
            yield from _walk(_model(tables[0], models), models, f"{key}.", seen)
            continue
        kind = _kind(field)
        if prefix == "algo." and name in MODULES:
            kind = f"{', '.join(catalogue(name))}, or 'package.module:function'"
        default = field.get("default", ...)
        shown = "" if default is ... else "none" if default is None else _toml(default)
        aliases = tuple(n for entry in entries() for n in entry.names if key in entry.keys_of(n))
        yield Setting(key, kind, shown, field.get("description", ""), aliases)
        for part in (field, *field.get("oneOf", ()), *field.get("anyOf", ())):
            inner = part.get("items", part.get("additionalProperties", {}))
            below = f"{key}[]."
            if "$ref" in part and "[]" not in prefix:  # a table that may be left out
                inner, below = part, f"{key}."
            if isinstance(inner, dict) and "$ref" in inner and inner["$ref"] not in seen:
                seen.add(inner["$ref"])
                yield from _walk(_model(inner, models), models, below, seen)


def _model(field: Any, models: Any) -> Any:
    return models[field["$ref"].rpartition("/")[2]]


def _kind(field: Any) -> str:
    if "enum" in field or "const" in field:
        return ", ".join(map(str, field.get("enum", [field.get("const")])))
    if options := field.get("anyOf", field.get("oneOf")):
        return " or ".join(map(_kind, options))
    if "prefixItems" in field:
        return f"[{', '.join(map(_kind, field['prefixItems']))}]"
    if "items" in field:
        return f"list: {_kind(field['items'])}"
    if isinstance(inner := field.get("additionalProperties"), dict):
        return f"name = {_kind(inner)}"
    kind = field.get("type", "table")
    limits = [f"{sign} {field[name]}" for name, sign in LIMITS.items() if name in field]
    return f"{TYPES.get(kind, kind)} {' and '.join(limits)}".strip()


def _in_full(setting: Setting) -> str:
    usual = USUAL.get(setting.key)
    rows = {
        "default": setting.default or "must be given",
        "allowed": setting.kind,
        "usual": f"{usual.low:g} to {usual.high:g} ({usual.why})" if usual else "",
        "meaning": setting.description,
        "elsewhere": ", ".join(setting.aliases),
    }
    return "\n".join(
        [setting.key, *(f"  {name:<10} {text}" for name, text in rows.items() if text)]
    )


def _foreign(name: str) -> str:
    entry = by_name()[name]
    trainers = [t for t, names in (("TRL", entry.trl), ("XTuner", entry.xtuner)) if name in names]
    said = {"not_needed": "not needed", "not_yet": "not offered yet", "refused": "refused if on"}
    meaning = said.get(entry.kind) or f"is {', '.join(entry.keys_of(name))} here"
    return f"{name} ({', '.join(trainers)}): {meaning}" + (f"; {entry.note}" if entry.note else "")


def _tables(value: Any) -> Sequence[Any]:
    """What gets headers of its own: a table that is not empty, or a list of tables."""
    if isinstance(value, Mapping):
        return [value] if value else []
    is_list = isinstance(value, list | tuple) and all(isinstance(v, Mapping) for v in value)
    return value if is_list else []


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _key(name: str) -> str:
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else _toml(name)


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        pairs = [f"{_key(key)} = {_toml(v)}" for key, v in value.items() if v is not None]
        return f"{{ {', '.join(pairs)} }}" if pairs else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    # DEL is the one character that JSON leaves in a string and TOML does not
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return {"Infinity": "inf", "-Infinity": "-inf", "NaN": "nan"}.get(text, text)
