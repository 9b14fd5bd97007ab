"""torchrun whose rendezvous listens on the address it is told: torch's own listens on all.

usage: python -m asyncgrpo.learner.torchrun --rdzv-backend asyncgrpo --rdzv-endpoint HOST:PORT ...
"""

from __future__ import annotations

from torch.distributed.elastic.rendezvous import (
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import main

from asyncgrpo.weights.collective import open_store

BACKEND = "asyncgrpo"
STORE_SECONDS = 600


class OneMachine(StaticTCPRendezvous):
    """torch's static rendezvous with a store of our own, and this agent as its only member."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        host, port = parse_rendezvous_endpoint(parameters.endpoint, -1)
        super().__init__(host, port, 0, 1, parameters.run_id, STORE_SECONDS)
        self._store = open_store(host, port, is_master=True, timeout_seconds=STORE_SECONDS)

    def get_backend(self) -> str:
        return BACKEND


if __name__ == "__main__":
    rendezvous_handler_registry.register(BACKEND, OneMachine)
    main()
