"""The seams between rooms: what each side may rely on, whoever stands on the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from asyncgrpo.types import Float32, Sampled, Sampling

if TYPE_CHECKING:
    import torch

    from asyncgrpo.actor.concurrency import EngineLoad
    from asyncgrpo.wire.codec import Packet

# f(prompts, completions, **columns) -> one float (or None: not applicable) per completion; or
# f(prompt, completion, **columns) -> one float or None. May be async; rewards/function.py has all.
Reward = Callable[..., Any]

# (name as in Hugging Face's named_parameters, tensor), in manifest order each time they are asked
# for; a tensor may be made on the way, so hold one at a time
NamedTensors = Iterable[tuple[str, "torch.Tensor"]]


@dataclass(frozen=True, slots=True)
class Parts:
    """In place of a tensor that is spread over ranks: flat pieces in order, each until the next."""

    shape: Sequence[int]
    flat: Iterator[torch.Tensor]


SentTensors = Iterable[tuple[str, "torch.Tensor | Parts"]]


class Engine(Protocol):
    """An inference engine that its owner steps; all calls come from one thread.

    Consumes requests (add), produces Sampled groups (step), never blocks on a peer.
    Between two steps `load_weights` may replace the weights: sequences in flight go on, and
    tokens sampled afterwards carry the new version.
    """

    @property
    def version(self) -> int:
        """Policy version that the next sampled token will carry."""

    @property
    def num_requests(self) -> int:
        """Requests added and not yet returned by step."""

    @property
    def load(self) -> EngineLoad:
        """How full its KV cache is, and whether sequences had to make room for others."""

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: Sampling,
        num_completions: int,
        seed: int,
    ) -> None:
        """Starts one group; EngineError when the prompt cannot fit."""

    def step(self) -> list[Sampled]:
        """Advances every sequence in flight by at most one token; returns finished groups."""

    def load_weights(self, version: int, tensors: NamedTensors) -> None:
        """Replaces all weights; WeightsError when a name or shape does not fit."""

    def sleep(self) -> None:
        """Gives away the memory of weights and KV cache; no step and no weights until `wake`."""

    def wake(self) -> None:
        """Takes it back: the same weights, and sequences in flight go on where they were."""


class Client(Protocol):
    """A connection to the buffer. Requests are answered exactly once, also across resends."""

    def post(self, packet: Packet) -> int:
        """Sends a request without waiting; returns the id that its answer will carry."""

    def poll(self, timeout_seconds: float) -> list[Packet]:
        """Answers and pushed packets that have arrived; waits up to the timeout for the first."""

    def call(
        self,
        packet: Packet,
        timeout_seconds: float,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Packet:
        """Sends a request and waits for its answer; PeerTimeout names the buffer.

        meanwhile: called now and then while it waits.
        """


class WeightSender(Protocol):
    """The learner's side of publishing; only rank 0 has one."""

    def publish(self, version: int, tensors: SentTensors, canary_logprobs: Float32) -> None:
        """Lets the weights travel to every actor in the background.

        They may be read until `release`. canary_logprobs: float32 [NUM_CANARIES, V], the learner's
        own at this version. Blocks only while the last version is still on its way, within the
        deadlines; with FSDP or without weights.overlap until this one was sent.
        """

    def release(self) -> None:
        """Waits until weights that change next were read, or (actor.sleep) until engines sleep."""

    def serve(self) -> None:
        """While the learner waits for something else: sends to late actors what it alone can."""

    def wait_for_actors(self, count: int, timeout_seconds: float) -> None:
        """Waits until `count` actors proved the newest version; PeerTimeout if none ever did."""

    def settle(self, timeout_seconds: float) -> None:
        """Waits until every actor that is not busy proved the newest version, or was evicted."""

    def metrics(self) -> dict[str, float]:
        """Times of the last publishes by metric name, seconds; and eviction counts."""


class WeightReceiver(Protocol):
    """The actor's side of publishing; all calls come from the thread that owns the engine."""

    def staged(self) -> tuple[int, NamedTensors] | None:
        """A newer version, complete and ready to be swapped in; the same until `loaded`."""

    def loaded(
        self, version: int, stall_seconds: float, canaries: Sequence[tuple[int, float]]
    ) -> None:
        """The version is live; canaries: (token id, log-prob) after each canary prompt."""

    def set_busy(self, busy: bool) -> None:
        """While busy, no newer version is accepted (an evaluation needs one fixed version)."""

    def wants_sleep(self, is_asleep: bool) -> bool:
        """Whether the engine is to sleep; the learner is told when it does."""

    def check(self) -> None:
        """Raises WeightsError when the learner found this actor's weights wrong."""
