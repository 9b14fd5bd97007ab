"""The nodes of a Slurm job and who runs where: pure functions of settings and scontrol's words.

A node has slots. A slot holds one learner rank, or one of the actor.tensor_parallel processes of an
actor: as many CPUs as the one of them with more threads wants, and one GPU if the run uses any.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from asyncgrpo.config import Config
from asyncgrpo.errors import ConfigError

SHARE = re.compile(r"(?<!\S)Nodes=(\S+) CPU_IDs=(\S+) Mem=\S* GRES=(\S*)")
GPUS = re.compile(r"gpu(?::[^:,()]+)?:(\d+)")
LEARNER, LEARNERS, ACTORS = "learner", "0", "1"  # the components of a heterogeneous job


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What a job has of one node."""

    name: str
    slots: int
    slot_cpus: int = 1
    address: str = ""
    group: str = ""  # component of a heterogeneous job


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where a role runs, with how many slots on each node."""

    nodes: tuple[Node, ...]
    slots: int
    on_gpus: bool

    def srun(self, name: str) -> tuple[str, ...]:
        """The words that start a command as a step of the job, one task on each node."""
        count, group = len(self.nodes), self.nodes[0].group
        return (
            *("srun", f"--job-name={name}", f"--nodelist={','.join(n.name for n in self.nodes)}"),
            *(f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--exact"),
            f"--cpus-per-task={self.slots * max(node.slot_cpus for node in self.nodes)}",
            *((f"--gpus-per-node={self.slots}",) if self.on_gpus else ()),
            *((f"--het-group={group}",) if group else ()),
            "--mem=0",  # all that the job has: else the first step takes it for itself
            *("--kill-on-bad-exit=1", "--wait=60", "--export=ALL"),
        )


def find_seat(config: Config, name: str, nodes: Sequence[Node], taken: Mapping[str, Seat]) -> Seat:
    """A seat on what the seats of others leave of the nodes; the first node is the launcher's.

    The learner takes the fewest nodes that hold as many ranks each, the launcher's first; an actor
    the node with most room. ConfigError when there is none.
    """
    launch, is_learner = config.launch, name == LEARNER
    slots = config.actor.tensor_parallel
    ranks, group = (launch.learners, LEARNERS) if is_learner else (slots, ACTORS)
    room = {node: node.slots for node in nodes if node.group in ("", group)}
    for seat in taken.values():
        room |= {node: room[node] - seat.slots for node in seat.nodes if node in room}
    for count in (n for n in range(1, ranks + 1 if is_learner else 2) if ranks % n == 0):
        found = [node for node, free in room.items() if free >= ranks // count]
        if not is_learner:  # of equals the one farthest from the launcher
            found = sorted(reversed(found), key=lambda node: -room[node])
        if len(found) >= count and (not is_learner or found[0] == nodes[0]):
            return Seat(nodes=tuple(found[:count]), slots=ranks // count, on_gpus=launch.gpus > 0)
    free = ", ".join(f"{node.name}: {slots}" for node, slots in room.items())
    each = f"{slot_cpus(config)} CPUs" + " and a GPU" * (launch.gpus > 0)
    where = " on the launcher's node, or as many there as on others"
    where = where if is_learner else " on one node" * (slots > 1)
    raise ConfigError(
        f"no room for {name}: it needs {ranks} slots of {each}{where}; free are {free or 0}: "
        "start fewer actors or learners, or ask Slurm for more"
    )


def find_seats(config: Config, nodes: Sequence[Node]) -> dict[str, Seat]:
    """A seat for everyone, as of find_seat."""
    seats: dict[str, Seat] = {}
    for name in (LEARNER, *(f"actor-{index}" for index in range(config.launch.actors))):
        seats[name] = find_seat(config, name, nodes, seats)
    return seats


def slot_cpus(config: Config) -> int:
    """CPUs of one slot."""
    return max(config.actor.threads, config.learner.threads)


def slots_per_node(learners: int, actors: int, num_nodes: int, width: int = 1) -> int:
    """The fewest slots on each node with which everyone finds a seat. width: slots of an actor."""
    evenly = [count for count in range(1, num_nodes + 1) if learners % count == 0]

    def places(slots: int) -> int:
        """For actors, beside the learner on its nodes and on the others."""
        count = next(count for count in evenly if learners // count <= slots)
        beside = (slots - learners // count) // width
        return count * beside + (num_nodes - count) * (slots // width)

    slots = learners // evenly[-1]
    while places(slots) < actors:
        slots += 1
    return slots


def parse_job(config: Config, job: str, nodes: str) -> tuple[Node, ...]:
    """The nodes of a job, that of its batch script first.

    job: `scontrol -o -d show job ID`, a line for each component; nodes: `scontrol -o show node`.
    """
    about = {fields["NodeName"]: fields for fields in map(_fields, nodes.splitlines())}
    found = []
    for line in job.splitlines():
        for names, cpu_ids, gres in SHARE.findall(line):
            for name in expand(names):
                core = int(about[name].get("ThreadsPerCore", 1))  # a step gets whole cores
                cpus = -(-slot_cpus(config) // core) * core
                slots = [len(expand(f"[{cpu_ids}]")) // cpus]
                slots += [sum(map(int, GPUS.findall(gres)))] * (config.launch.gpus > 0)
                node = Node(
                    name=name,
                    slots=min(slots),
                    slot_cpus=cpus,
                    address=about[name]["NodeAddr"],
                    group=_fields(line).get("HetJobOffset", ""),
                )
                found.append(node)
    head = _fields(job.partition("\n")[0])["BatchHost"]
    return tuple(sorted(found, key=lambda node: node.name != head))


def expand(nodelist: str) -> list[str]:
    """The names of "a[1-3,07]b,c": a1b a2b a3b a07b c."""
    names = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        head, bracket, rest = part.partition("[")
        ranges, _, tail = rest.partition("]")
        for first, last in re.findall(r"(\d+)-?(\d*)", ranges):
            numbers = range(int(first), int(last or first) + 1)
            middles = [str(number).zfill(len(first)) for number in numbers]
            names += [f"{head}{n}{t}" for n in middles for t in expand(tail) or [""]]
        names += [] if bracket else [head]
    return names


def _fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"(?<!\S)([\w:/]+)=(\S*)", line))
