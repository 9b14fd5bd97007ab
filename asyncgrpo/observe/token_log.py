"""Per-token numbers of a step in a binary file, so that the step can be studied offline.

`tokens/step_<k>.rank<r>.npz` (numpy, compressed, no pickle; `numpy.load` opens it). Row t of every
array of COLUMNS is one token of a completion that entered the loss, completions one after another.
`leases` holds the lease ids, `step` the learner step. Completions without any loss token are left
out; `trajectories/step_<k>.jsonl` lists them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLUMNS: Mapping[str, type] = {
    "lease": np.int32,  # index into `leases`
    "sample": np.int16,  # which completion of the group
    "place": np.int32,  # which token of the completion
    "token_id": np.int32,
    "version": np.int32,  # policy version that sampled it
    "behavior_logprob": np.float32,  # nats, from the engine
    "proximal_logprob": np.float32,  # nats, the learner's before the first optimizer step on it
    "logprob": np.float32,  # nats, the learner's in the last forward pass on the batch
    "ref_logprob": np.float32,  # nats; NaN without a reference
    "advantage": np.float32,
    "weight": np.float32,  # what corrections multiplied the loss with; 0 = masked by one
    "mask": np.bool_,  # False: stale, so not in the loss (log-probs of the learner are 0)
}
Columns = Mapping[str, NDArray[np.generic]]


def write_token_log(
    run_dir: Path, step: int, rank: int, leases: Sequence[str], pieces: Sequence[Columns]
) -> Path:
    """Writes one rank's file of one step, whole; pieces: the columns of each completion."""
    folder = run_dir / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {
        name: np.concatenate([np.zeros(0, kind), *(piece[name] for piece in pieces)], dtype=kind)
        for name, kind in COLUMNS.items()
    }
    path = folder / f"step_{step}.rank{rank}.npz"
    draft = folder / f".step_{step}.rank{rank}.tmp.npz"
    np.savez_compressed(draft, leases=np.array(leases, np.str_), step=np.int64(step), **columns)
    draft.rename(path)
    return path
