"""How many groups an engine works on at once when it is to find that out by itself.

More sequences use the machine better until the KV cache is full; from then on the engine preempts
some and computes their keys and values again, which is slower than fewer sequences. As in TCP:
one more at a time while there is room, a quarter fewer when something was preempted.
"""

from __future__ import annotations

from dataclasses import dataclass

ROOM_SHARE = 0.8  # below: one group more; the cache still grows with every token in flight
FULL_SHARE = 0.95  # above: one group fewer
SHRINK = 0.75


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine's scheduler says of itself now."""

    kv_share: float  # of the KV cache that is in use, in [0, 1]
    preempted: int  # sequences that were begun and wait for room again


class Concurrency:
    """Groups in flight, at most `limit`: fixed at `most`, or found between 1 and `most`."""

    def __init__(self, most: int, *, adaptive: bool) -> None:
        self._most, self._adaptive = most, adaptive
        self.limit = max(1, most // 4) if adaptive else most

    def observe(self, load: EngineLoad, in_flight: int) -> None:
        """A step, which `in_flight` groups took part in, has finished some of them."""
        if not self._adaptive:
            return
        if load.preempted:
            self.limit = max(1, int(self.limit * SHRINK))
        elif load.kv_share > FULL_SHARE:
            self.limit = max(1, self.limit - 1)
        elif load.kv_share < ROOM_SHARE and in_flight >= self.limit:
            self.limit = min(self._most, self.limit + 1)
