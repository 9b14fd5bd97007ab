"""What proves a version: digests of the bytes given to the engine, and canary log-probs.

Digests show that the right bytes arrived; the canaries show that the engine computes with them:
after each swap it samples one token after each of a few fixed prompts, and the learner compares
the log-probs with its own. (A CPU build of the engine was seen to keep a stale copy of the output
layer without any error: only the second kind of proof finds that.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asyncgrpo.errors import WeightsError
from asyncgrpo.types import Sampling

NUM_CANARIES, CANARY_TOKENS = 4, 8
CANARY_SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_completion_tokens=1)


def canary_prompts(vocab_size: int) -> list[list[int]]:
    """Fixed prompts of ordinary token ids, the same on both sides."""
    return [
        [(7 + 31 * (row * CANARY_TOKENS + place)) % vocab_size for place in range(CANARY_TOKENS)]
        for row in range(NUM_CANARIES)
    ]


def check_proof(
    fields: Mapping[str, Any],
    *,
    version: int,
    wrong_tensors: Sequence[str],
    logprobs: NDArray[np.float32],  # float32 [NUM_CANARIES, V], the learner's, at `version`
    tolerance: float,
) -> float:
    """Largest |engine - learner| canary log-prob in nats; WeightsError when the proof fails."""
    actor = fields["actor"]
    if wrong_tensors:
        raise WeightsError(
            f"{actor} did not receive version {version} intact: {len(wrong_tensors)} tensors "
            f"differ, first {wrong_tensors[0]}"
        )
    tokens, engine = fields["canary_tokens"], fields["canary_logprobs"]
    if len(tokens) != NUM_CANARIES or len(engine) != NUM_CANARIES:
        raise WeightsError(f"{actor} sent {len(tokens)} canaries, not {NUM_CANARIES}")
    if max(tokens) >= logprobs.shape[1]:
        raise WeightsError(f"{actor} sent canary tokens {tokens}, not all in the vocabulary")
    # numpy's max, unlike Python's, does not lose a NaN on its way.
    worst = float(np.max(np.abs(logprobs[np.arange(NUM_CANARIES), tokens] - np.array(engine))))
    if not worst <= tolerance:
        raise WeightsError(
            f"{actor} received version {version} but does not compute with it: canary log-probs "
            f"differ by {worst:.3g} nats, allowed are {tolerance:g} (weights.canary_tolerance)"
        )
    return worst
