"""Weights for an engine in the same process (`--serial`): the same buffer, and canaries."""

from __future__ import annotations

from collections.abc import Sequence

from asyncgrpo.config import Config
from asyncgrpo.protocols import NamedTensors, SentTensors
from asyncgrpo.types import Float32
from asyncgrpo.weights.flat import FlatWeights, Manifest
from asyncgrpo.weights.proof import check_proof


class LocalLink:
    """Both ends at once: a protocols.WeightSender and a protocols.WeightReceiver."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._flat: FlatWeights | None = None
        self._canary_logprobs: Float32 | None = None
        self._newest = -1
        self._held = -1
        self._busy = False
        self._metrics: dict[str, float] = {}

    def publish(self, version: int, tensors: SentTensors, canary_logprobs: Float32) -> None:
        if self._flat is None:
            self._flat = FlatWeights(Manifest.of(tensors, self._config.model.dtype))
        self._flat.fill(tensors)
        self._canary_logprobs, self._newest = canary_logprobs, version

    def release(self) -> None:
        """The weights were copied."""

    def serve(self) -> None:
        """The actor takes the weights by itself."""

    def wait_for_actors(self, count: int, timeout_seconds: float) -> None:
        """The one actor is here."""

    def settle(self, timeout_seconds: float) -> None:
        """Nothing to wait for: the actor takes the weights in its next turn."""

    def metrics(self) -> dict[str, float]:
        return dict(self._metrics)

    def staged(self) -> tuple[int, NamedTensors] | None:
        if self._flat is None or self._busy or self._held >= self._newest:
            return None
        return self._newest, self._flat.views()

    def loaded(
        self, version: int, stall_seconds: float, canaries: Sequence[tuple[int, float]]
    ) -> None:
        assert self._flat is not None, "nothing published"
        assert self._canary_logprobs is not None, "nothing published"
        self._held = version
        if version != self._newest:
            return  # overtaken; the newest is checked when it is loaded
        fields = {
            "actor": "the serial actor",
            "canary_tokens": [token for token, _ in canaries],
            "canary_logprobs": [logprob for _, logprob in canaries],
        }
        difference = check_proof(
            fields,
            version=version,
            wrong_tensors=(),
            logprobs=self._canary_logprobs,
            tolerance=self._config.canary_tolerance,
        )
        self._metrics = {
            "publish/canary_difference": difference,
            "publish/bytes": float(len(self._flat.bytes)),
        }

    def forget(self) -> None:
        """Another engine takes the place of the one that holds weights."""
        self._held, self._busy, self._metrics = -1, False, {}

    def set_busy(self, busy: bool) -> None:
        self._busy = busy

    def wants_sleep(self, is_asleep: bool) -> bool:
        return False

    def check(self) -> None:
        """Faults were raised where they were found."""
