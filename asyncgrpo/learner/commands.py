"""`asyncgrpo algo list` and `asyncgrpo algo show NAME`: the catalogue of algorithms, printed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import typer

app = typer.Typer(help="Losses, advantages, corrections: names, formulas, when to use which.")


@app.command("list")
def list_all() -> None:
    """Every algorithm by kind, with one line, its formula and its source."""
    from rich.console import Console
    from rich.text import Text

    from asyncgrpo.algorithms import MODULES, PRESETS, catalogue

    console = Console(highlight=False)
    for kind in MODULES:
        console.print(f"algo.{kind}", style="bold")
        entries = catalogue(kind).values()
        _print_rows(
            console,
            [
                (e.name, Text.assemble(e.summary, (f"\n{e.formula}", "cyan"), f"\n{e.source}"))
                for e in entries
            ],
        )
    console.print("algo.preset", style="bold")
    shown = [(n, ", ".join(f"{k} = {v}" for k, v in keys.items())) for n, keys in PRESETS.items()]
    _print_rows(console, shown)


@app.command()
def show(name: Annotated[str, typer.Argument(help="a name from `asyncgrpo algo list`")]) -> None:
    """The equation, defaults, when to use it and up to which staleness; what a preset sets."""
    from rich.console import Console

    from asyncgrpo.algorithms import MODULES, PRESETS, catalogue, nearest
    from asyncgrpo.errors import ConfigError
    from asyncgrpo.settings.algo import AlgoSettings

    entries = [catalogue(kind)[name] for kind in MODULES if name in catalogue(kind)]
    if not entries and name not in PRESETS:
        near = nearest(name, [*(known for kind in MODULES for known in catalogue(kind)), *PRESETS])
        hint = f"did you mean {near!r}?" if near else "see `asyncgrpo algo list`"
        raise ConfigError(f"there is no algorithm {name!r}; {hint}")
    console, defaults = Console(highlight=False), AlgoSettings()
    for entry in entries:
        console.print(f"algo.{entry.kind} = {entry.name}", style="bold", markup=False)
        rows = [("what", entry.summary), ("formula", entry.formula), ("source", entry.source)]
        rows += [("use", entry.use)]
        if entry.staleness:
            rows.append(("staleness up to", entry.staleness))
        rows += [(f"algo.{s}", f"default {_value(defaults, s)}") for s in entry.settings]
        _print_rows(console, rows)
    if name in PRESETS:
        console.print(f"algo.preset = {name}", style="bold", markup=False)
        rows = [(f"algo.{key}", str(value)) for key, value in PRESETS[name].items()]
        _print_rows(console, [("what", "sets these keys; what you set yourself wins"), *rows])


def _print_rows(console: Any, rows: Iterable[tuple[str, Any]]) -> None:
    """Two columns; long text wraps inside its own."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=16)
    table.add_column()
    for label, text in rows:
        table.add_row(f"  {label}", Text(text) if isinstance(text, str) else text)
    console.print(table)


def _value(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = getattr(settings, part)
    return settings
