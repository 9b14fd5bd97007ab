"""torchrun whose rendezvous listens on the address it is told: torch's own listens on all.

usage: python -m asyncgrpo.learner.torchrun --rdzv-backend asyncgrpo --rdzv-endpoint HOST:PORT ...
"""

from __future__ import annotations

import os
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import main

from asyncgrpo.errors import EXIT_BAD_INPUT
from asyncgrpo.weights.collective import open_store
from asyncgrpo.wire.address import device_of, own_address

BACKEND = "asyncgrpo"
STORE_SECONDS = 600


class OwnStore(StaticTCPRendezvous):
    """torch's static rendezvous with an own store; of several nodes Slurm says which this is."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        host, port = parse_rendezvous_endpoint(parameters.endpoint, -1)
        count, place = parameters.max_nodes, 0
        if count > 1:
            place = int(os.environ["SLURM_NODEID"])
            device = device_of(own_address(host, port))  # for the ranks, which this agent starts
            os.environ |= {"GLOO_SOCKET_IFNAME": device, "NCCL_SOCKET_IFNAME": device}
        super().__init__(host, port, place, count, parameters.run_id, STORE_SECONDS)
        is_master = place == 0
        self._store = open_store(host, port, is_master=is_master, timeout_seconds=STORE_SECONDS)

    def get_backend(self) -> str:
        return BACKEND


if __name__ == "__main__":
    rendezvous_handler_registry.register(BACKEND, OwnStore)
    try:
        main()
    except SignalException as stopped:  # the ranks have ended in order
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as failed:  # by its code the launcher knows what is worth a restart
        codes = [failure.exitcode for failure in failed.failures.values()]
        # of several: who lost its peers to bad input may seem to have failed first
        sys.exit(EXIT_BAD_INPUT if EXIT_BAD_INPUT in codes else max(1, *codes))
