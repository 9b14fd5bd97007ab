"""What stale data costs each algorithm: accuracy over lag, on the embedded tiny model.

    python benchmarks/staleness.py --lags 0 1 2 4 8 16 --seeds 0 1 2 --jobs 2 \\
        --out docs/staleness.json --plot docs/staleness.svg

Lag is exact, not whatever a schedule gives: the batch of step s is sampled by the weights of step
s - k (by the first weights while s < k). Every training step is PolicyUpdater.update; prompts,
rewards, warm start, the filter of uniform groups and its refill are the project's own. Results
that are in the JSON already are not run again. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from common import table_line
from staleness_plot import draw
from staleness_run import MAX_GROUPS_PER_STEP, METHODS, config_of, run_one

from asyncgrpo.config import Config
from asyncgrpo.data.tiny import ensure_tiny
from asyncgrpo.launch.environment import machine_report
from asyncgrpo.rows import replace_file

PANELS = {
    "a weight, or a clip on the ratio": ("none", "decoupled", "tis_sequence", "bypass"),
    "decoupled and a mask": (
        *("decoupled", "icepop", "m2po", "opsm", "geometric_mask", "geometric_mask_wide"),
    ),
    "with bypass: losses that clip or gate": ("bypass", "gspo", "sapo", "dppo_tv"),
    "with bypass: losses that weigh": ("bypass", "cispo", "topr", "vespo"),
}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, dict[int, tuple[float, float, float]]]:
    """method -> lag -> mean, lowest and highest accuracy over the seeds."""
    found: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        found.setdefault(run["method"], {}).setdefault(run["lag"], []).append(run["accuracy"])
    return {
        method: {lag: (statistics.mean(v), min(v), max(v)) for lag, v in by_lag.items()}
        for method, by_lag in found.items()
    }


def markdown(runs: Sequence[dict[str, Any]]) -> str:
    """Mean accuracy in percent, and the range over seeds, by method and lag."""
    table, lags = summary(runs), sorted({run["lag"] for run in runs})
    lines = [table_line(["method", *(f"lag {lag}" for lag in lags)])]
    lines.append(table_line(["---"] * (len(lags) + 1)))
    for method in (name for name in METHODS if name in table):
        cells = []
        for lag in lags:
            values = table[method].get(lag)
            shown = [f"{100 * value:.0f}" for value in values or ()]
            cells.append(f"**{shown[0]}** ({shown[1]} to {shown[2]})" if values else "")
        lines.append(table_line([method, *cells]))
    return "\n".join(lines)


class Results:
    """The JSON file: settings, environment, and one entry per finished run."""

    def __init__(self, path: Path, steps: int, lr: float) -> None:
        self._path = path
        common = config_of("decoupled", 0, steps, lr, "tiny").model_dump(mode="json")
        rooms = ("data", "sampling", "reward", "buffer", "algo", "learner", "eval")
        settings = {"max_groups_sampled_per_step": MAX_GROUPS_PER_STEP, "steps": steps, "lr": lr}
        settings |= {room: common[room] for room in rooms}
        self._head = {"settings": settings, "environment": machine_report()}
        self.runs: list[dict[str, Any]] = []
        if path.is_file():
            self._head = json.loads(path.read_text())
            self.runs = self._head.pop("runs")
            if self._head["settings"] != settings:
                sys.exit(f"{path} holds runs of other settings; give another --out, or remove it")

    def has(self, method: str, lag: int, seed: int) -> bool:
        """Whether this run is there, made with the method's present settings."""
        wanted = (method, lag, seed, METHODS[method])
        return any((r["method"], r["lag"], r["seed"], r["algo"]) == wanted for r in self.runs)

    def add(self, run: dict[str, Any]) -> None:
        """Adds a run in place of an older one and writes the file."""
        same = ("method", "lag", "seed")
        self.runs[:] = [r for r in self.runs if any(r[key] != run[key] for key in same)] + [run]
        self.runs.sort(key=lambda r: (r["method"], r["lag"], r["seed"]))
        lines = ",\n".join(map(json.dumps, self.runs))
        replace_file(self._path, f'{json.dumps(self._head)[:-1]},\n"runs": [\n{lines}\n]}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 2, 4, 8, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60, help="learner steps")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a thread each")
    parser.add_argument("--out", type=Path, default=Path("docs/staleness.json"))
    parser.add_argument("--plot", type=Path, help="SVG file")
    chosen = parser.parse_args()
    for seed in chosen.seeds:  # before the runs: two of them would build the same model twice
        ensure_tiny(Config().data.tasks, seed=seed)
    results = Results(chosen.out, chosen.steps, chosen.lr)
    wanted = [(m, k, s) for m in chosen.methods for k in chosen.lags for s in chosen.seeds]
    todo = [run for run in wanted if not results.has(*run)]
    with ProcessPoolExecutor(chosen.jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run_one, *run, chosen.steps, chosen.lr) for run in todo]
        for number, future in enumerate(as_completed(futures), start=1):
            run = future.result()
            results.add(run)
            print(
                f"{number} of {len(todo)}: {run['method']}, lag {run['lag']}, seed {run['seed']}: "
                f"{100 * run['accuracy']:.1f} % in {run['seconds']:.0f} s",
                flush=True,
            )
    print(markdown(results.runs))
    if chosen.plot and results.runs:
        start = statistics.mean(run["curve"]["0"] for run in results.runs)
        lags = sorted({run["lag"] for run in results.runs})
        draw(chosen.plot, PANELS, summary(results.runs), lags, start)


if __name__ == "__main__":
    main()
