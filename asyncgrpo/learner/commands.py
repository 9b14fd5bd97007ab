"""`asyncgrpo algo list` and `asyncgrpo algo show NAME`: the catalogue of algorithms, printed."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Annotated, Any

import typer

app = typer.Typer(help="Losses, advantages, corrections: names, formulas, when to use which.")


@app.command("list")
def list_all() -> None:
    """Every algorithm by kind, with one line, its formula and its source."""
    from rich.text import Text

    from asyncgrpo.algorithms import MODULES, PRESETS, catalogue

    for kind in MODULES:
        rows = {
            e.name: Text.assemble(e.summary, (f"\n{e.formula}", "cyan"), f"\n{e.source}")
            for e in catalogue(kind).values()
        }
        _print(f"algo.{kind}", rows)
    shown = {n: ", ".join(f"{k} = {v}" for k, v in keys.items()) for n, keys in PRESETS.items()}
    _print("algo.preset", shown)


@app.command()
def show(name: Annotated[str, typer.Argument(help="a name from `asyncgrpo algo list`")]) -> None:
    """The equation, defaults, when to use it and up to which staleness; what a preset sets."""
    from asyncgrpo.algorithms import MODULES, PRESETS, catalogue
    from asyncgrpo.errors import ConfigError
    from asyncgrpo.hints import did_you_mean
    from asyncgrpo.settings.algo import AlgoSettings

    entries = [catalogue(kind)[name] for kind in MODULES if name in catalogue(kind)]
    if not entries and name not in PRESETS:
        known = [*(each for kind in MODULES for each in catalogue(kind)), *PRESETS]
        hint = did_you_mean(name, known)
        raise ConfigError(f"there is no algorithm {name!r}; {hint}see `asyncgrpo algo list`")
    for entry in entries:
        rows = {"what": entry.summary, "formula": entry.formula, "source": entry.source}
        rows |= {"use": entry.use, "staleness up to": entry.staleness}
        defaults = AlgoSettings()
        rows |= {f"algo.{s}": f"default {attrgetter(s)(defaults)}" for s in entry.settings}
        _print(f"algo.{entry.kind} = {entry.name}", rows)
    if name in PRESETS:
        values = {f"algo.{key}": str(value) for key, value in PRESETS[name].items()}
        what = "sets these keys; what you set yourself wins"
        _print(f"algo.preset = {name}", {"what": what, **values})


def _print(title: str, rows: Mapping[str, Any]) -> None:
    """A title above two columns; long text wraps inside its own."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, table = Console(highlight=False), Table.grid(padding=(0, 2))
    table.add_column(min_width=16)
    table.add_column()
    for label, text in rows.items():
        if text:
            table.add_row(f"  {label}", Text(text) if isinstance(text, str) else text)
    console.print(title, style="bold", markup=False)
    console.print(table)
