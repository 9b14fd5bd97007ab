"""Slurm without Slurm: node lists, seats, command lines, and batch scripts as bash reads them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncgrpo.config import Config, from_mapping
from asyncgrpo.errors import ConfigError
from asyncgrpo.launch.nodes import (
    Node,
    expand,
    find_seat,
    find_seats,
    parse_job,
    slots_per_node,
)
from asyncgrpo.launch.plan import Host, Plan, make_plan
from asyncgrpo.launch.sbatch import freeze, render
from asyncgrpo.launch.slurm import Job
from asyncgrpo.rundir import Endpoints

# What Slurm 22.05 prints, shortened: two nodes alike, the second one listed first.
JOB = (
    "JobId=7 JobName=x JobState=RUNNING PreemptEligibleTime=2026-11-21T10:05:58 PreemptTime=None "
    "ReqNodeList=(null) NodeList=n[0-1] BatchHost=n0 NumNodes=2 JOB_GRES=gpu:4   "
    "Nodes=n1 CPU_IDs=0,2-4 Mem=4000 GRES=gpu:a100:2(IDX:0-1) "
    "Nodes=n0 CPU_IDs=1-3 Mem=4000 GRES=gpu:1(IDX:0),shard:4 MinCPUsNode=3 Command=/a/Nodes=n9\n"
)
NODES = (
    "NodeName=n0 Arch=x86_64 CPUTot=4 NodeAddr=10.0.0.4 NodeHostName=a ThreadsPerCore=1\n"
    "NodeName=n1 Arch=x86_64 CPUTot=4 NodeAddr=10.0.0.5 NodeHostName=b ThreadsPerCore=2\n"
)


def settings(actors: int = 2, learners: int = 2, **rooms: Any) -> Config:
    launch = {"actors": actors, "learners": learners, **rooms.pop("launch", {})}
    return from_mapping({"launch": launch, "buffer": {"groups_per_step": 64}, **rooms})


def nodes_of(*slots: int) -> list[Node]:
    return [Node(name=f"n{index}", slots=number) for index, number in enumerate(slots)]


def seats(config: Config, nodes: list[Node]) -> dict[str, str]:
    """Name -> "n0" or "n0 n1 x2" (slots on each)."""
    found = find_seats(config, nodes)
    return {
        name: " ".join(node.name for node in seat.nodes) + f" x{seat.slots}"
        for name, seat in found.items()
    }


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("n0", ["n0"]),
        ("n[0-2]", ["n0", "n1", "n2"]),
        ("gpu[08-11,3],cpu7", ["gpu08", "gpu09", "gpu10", "gpu11", "gpu3", "cpu7"]),
        ("r[1-2]n[01-02]-ib", ["r1n01-ib", "r1n02-ib", "r2n01-ib", "r2n02-ib"]),
        ("a-1,b-[2]", ["a-1", "b-2"]),
    ],
)
def test_node_lists_are_expanded_as_slurm_means_them(nodelist: str, names: list[str]) -> None:
    assert expand(nodelist) == names


@given(st.lists(st.integers(0, 120), min_size=1, max_size=30, unique=True), st.integers(1, 4))
def test_every_list_of_numbers_comes_back_from_its_bracket(numbers: list[int], width: int) -> None:
    names = [f"node{str(number).zfill(width)}" for number in numbers]
    bracket = ",".join(str(number).zfill(width) for number in numbers)
    assert expand(f"node[{bracket}]") == names


def test_a_job_has_what_it_was_given_of_each_node_and_the_launchers_comes_first() -> None:
    cpu = parse_job(settings(), JOB, NODES)
    assert [(node.name, node.slots, node.address) for node in cpu] == [
        ("n0", 3, "10.0.0.4"),
        ("n1", 2, "10.0.0.5"),  # four hardware threads are two cores
    ]
    gpu = parse_job(settings(launch={"gpus": 4}), JOB, NODES)
    assert [node.slots for node in gpu] == [1, 2]
    wide = parse_job(settings(learner={"threads": 3}), JOB, NODES)
    assert [(node.slots, node.slot_cpus) for node in wide] == [(1, 3), (1, 4)]


def test_the_components_of_a_heterogeneous_job_are_told_apart() -> None:
    job = (
        "JobId=13 HetJobOffset=0 NodeList=n0 BatchHost=n0  Nodes=n0 CPU_IDs=0-1 Mem=0 GRES=\n"
        "JobId=14 HetJobOffset=1 NodeList=n1 BatchHost=n1  Nodes=n1 CPU_IDs=0-3 Mem=0 GRES=\n"
    )
    nodes = parse_job(settings(), job, NODES)
    assert [(node.name, node.group) for node in nodes] == [("n0", "0"), ("n1", "1")]
    found = find_seats(settings(), nodes)
    assert [node.name for node in found["learner"].nodes] == ["n0"]
    assert [node.name for node in found["actor-1"].nodes] == ["n1"]
    assert "--het-group=1" in found["actor-1"].srun("actor-1")


def test_the_learner_stays_together_on_the_launchers_node_and_actors_go_where_room_is() -> None:
    assert seats(settings(), nodes_of(4, 4)) == {
        "learner": "n0 x2",
        "actor-0": "n1 x1",
        "actor-1": "n1 x1",
    }
    assert seats(settings(4, 2), nodes_of(4, 2, 1)) == {
        "learner": "n0 x2",
        "actor-0": "n1 x1",
        "actor-1": "n0 x1",
        "actor-2": "n2 x1",
        "actor-3": "n1 x1",
    }


def test_ranks_that_do_not_fit_on_one_node_are_as_many_on_each_of_several() -> None:
    assert seats(settings(1, 6), nodes_of(3, 2, 4))["learner"] == "n0 n2 x3"
    assert seats(settings(1, 6), nodes_of(2, 3, 3))["learner"] == "n0 n1 n2 x2"


@pytest.mark.parametrize(
    ("actors", "learners", "slots", "message"),
    [
        (1, 5, (3, 8), "no room for learner: it needs 5 slots of 1 CPUs on the launcher's node"),
        (3, 2, (2, 2), "no room for actor-2: .* free are n0: 0, n1: 0: start fewer"),
    ],
)
def test_who_finds_no_room_is_told_what_is_free(actors, learners, slots, message) -> None:
    with pytest.raises(ConfigError, match=message):
        find_seats(settings(actors, learners), nodes_of(*slots))


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.integers(1, 3),
)
def test_nobody_is_seated_where_there_is_no_room(
    actors: int, learners: int, slots: list[int], width: int
) -> None:
    nodes = nodes_of(*slots)
    config = settings(actors, learners, actor={"tensor_parallel": width})
    try:
        found = find_seats(config, nodes)
    except ConfigError:
        return
    taken = dict.fromkeys(nodes, 0)
    for seat in found.values():
        for node in seat.nodes:
            taken[node] += seat.slots
    assert all(taken[node] <= node.slots for node in nodes)
    assert sum(taken.values()) == actors * width + learners
    assert all(len(found[f"actor-{index}"].nodes) == 1 for index in range(actors))
    assert found["learner"].nodes[0] == nodes[0]


@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 6), st.integers(1, 4))
def test_what_is_asked_for_is_enough_and_one_slot_less_is_not(
    actors: int, learners: int, count: int, width: int
) -> None:
    slots = slots_per_node(learners, actors, count, width)
    config = settings(actors, learners, actor={"tensor_parallel": width})
    find_seats(config, nodes_of(*[slots] * count))
    with pytest.raises(ConfigError):
        find_seats(config, nodes_of(*[slots - 1] * count))


def test_an_engine_of_several_gpus_is_seated_on_one_node() -> None:
    config = settings(2, 1, actor={"tensor_parallel": 2}, launch={"gpus": 5})
    assert seats(config, nodes_of(3, 2)) == {
        "learner": "n0 x1",
        "actor-0": "n1 x2",
        "actor-1": "n0 x2",
    }
    assert "--gpus-per-node=2" in find_seats(config, nodes_of(3, 2))["actor-0"].srun("actor-0")
    with pytest.raises(ConfigError, match="it needs 2 slots of 1 CPUs and a GPU on one node; free"):
        find_seats(config, nodes_of(2, 1, 1, 1))


def test_after_a_node_is_lost_its_roles_find_only_slots_that_others_leave_free() -> None:
    config, nodes = settings(4, 2), nodes_of(3, 2, 2)
    seats = find_seats(config, nodes)
    moved = [name for name, seat in seats.items() if nodes[2] in seat.nodes]
    assert len(moved) == 2
    first, second = moved
    others = {name: seat for name, seat in seats.items() if name != first}
    seats = {**others, first: find_seat(config, first, nodes[:2], others)}
    assert seats[first].nodes == (nodes[0],)
    others = {name: seat for name, seat in seats.items() if name != second}
    with pytest.raises(ConfigError, match=rf"no room for {second}.* n0: 0, n1: 0"):
        find_seat(config, second, nodes[:2], others)


def plan_on(config: Config, nodes: list[Node]) -> Plan:
    doors = Endpoints(buffer="", weights="", store=("", 5003), rendezvous=5004)
    run_dir = Path("/runs/one")
    return make_plan(
        config,
        Host(cores=(0, 1)),
        doors,
        run_dir,
        seats=find_seats(config, nodes),
        log_dir=run_dir / "logs" / "7.1",
    )


def test_roles_on_nodes_are_steps_with_exactly_these_command_lines() -> None:
    plan = plan_on(settings(launch={"host": "10.0.0.4"}), nodes_of(2, 2))
    lines = {spec.name: " ".join(spec.argv) for spec in plan.specs}
    assert lines["buffer"] == f"{sys.executable} -m asyncgrpo.cli role buffer --run-dir /runs/one"
    assert lines["actor-1"] == (
        "srun --job-name=actor-1 --nodelist=n1 --nodes=1 --ntasks=1 --ntasks-per-node=1 --exact "
        "--cpus-per-task=1 --mem=0 --kill-on-bad-exit=1 --wait=60 --export=ALL "
        f"{sys.executable} -m asyncgrpo.cli role actor --run-dir /runs/one --index 1"
    )
    assert "--nodelist=n0 --nodes=1 --ntasks=1" in lines["learner"]
    assert "--cpus-per-task=2" in lines["learner"]
    assert "--nnodes 1 --nproc-per-node 2 " in lines["learner"]
    assert "--rdzv-endpoint 127.0.0.1:5004" in lines["learner"]  # nobody else has to reach it
    assert plan.endpoints.cores == {}
    assert {spec.log_file.parent for spec in plan.specs} == {Path("/runs/one/logs/7.1")}
    assert {spec.name: spec.nodes for spec in plan.specs}["actor-0"] == ("n1",)


def test_ranks_on_several_nodes_meet_on_the_address_that_these_reach() -> None:
    plan = plan_on(settings(1, 4, launch={"host": "10.0.0.4"}), nodes_of(2, 3))
    words = next(" ".join(spec.argv) for spec in plan.specs if spec.name == "learner")
    assert "--nodelist=n0,n1 " in words
    assert "--nnodes 2 --nproc-per-node 2 " in words
    assert "--rdzv-endpoint 10.0.0.4:5004" in words


def test_gpus_and_cores_are_bound_by_slurm_not_by_us() -> None:
    gpu = plan_on(settings(launch={"gpus": 4}), nodes_of(2, 2))
    for spec in gpu.specs:
        assert "CUDA_VISIBLE_DEVICES" not in spec.environment
    words = {spec.name: spec.argv for spec in gpu.specs}
    assert "--gpus-per-node=2" in words["learner"]
    assert "--gpus-per-node=1" in words["actor-0"]
    cpu = {
        spec.name: spec for spec in plan_on(settings(actor={"threads": 3}), nodes_of(2, 2)).specs
    }
    assert cpu["actor-0"].environment["CUDA_VISIBLE_DEVICES"] == ""
    assert cpu["actor-0"].environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert cpu["actor-0"].environment["OMP_NUM_THREADS"] == "3"


def script_of(run_dir: Path, config: Config | None = None, **asked: Any) -> str:
    return render(config or settings(), run_dir, **asked)


def directives(script: str) -> list[str]:
    """What stands behind #SBATCH, comments left out."""
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH ")]
    return [line.removeprefix("#SBATCH ").partition("    #")[0].strip() for line in lines]


def test_a_script_asks_for_what_the_plan_needs_and_nothing_else(tmp_path: Path) -> None:
    config = settings(4, 4, launch={"grace_seconds": 30}, learner={"threads": 2})
    script = script_of(
        tmp_path, config, nodes=2, time="2:00:00", options=["partition=gpu", "--exclusive"]
    )
    assert directives(script) == [
        '--job-name="run"',
        f'--output="{tmp_path}/logs/slurm-%j.log"',
        "--open-mode=append",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=8",
        '--time="2:00:00"',
        "--signal=B:USR2@120",
        "--requeue",
        "--no-kill",
        "--partition=gpu",
        "--exclusive",
    ]
    assert "{{" not in script
    assert len(script.splitlines()) < 35


def test_gpus_are_asked_for_per_node() -> None:
    config = settings(4, 4, launch={"gpus": 8})
    assert "--gpus-per-node=4" in directives(script_of(Path("/r"), config, nodes=2))


def test_actors_on_nodes_of_their_own_are_a_second_component() -> None:
    config = settings(6, 4, launch={"gpus": 10})
    script = script_of(Path("/r"), config, nodes=2, actor_nodes=3, options=["qos=long"])
    parts = [part.split() for part in " ".join(directives(script)).split(" hetjob ")]
    assert {"--nodes=2", "--gpus-per-node=2", "--cpus-per-task=2", "--qos=long"} <= set(parts[0])
    assert {"--nodes=3", "--gpus-per-node=2", "--cpus-per-task=2", "--qos=long"} <= set(parts[1])
    assert all({"--requeue", "--no-kill"} <= set(part) for part in parts)


NASTY = """it's a $(touch gone) "run" `x` \\ *; & %j"""


def run_script(script: str, python: Path, **environment: str) -> dict[str, Any]:
    """What the launcher would be given: bash reads the script, a stand-in is started."""
    script = re.sub(r"^exec \S+", f"exec {shlex.quote(str(python))}", script, flags=re.MULTILINE)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n0", **environment}
    done = subprocess.run(
        ["bash"], input=script, env={**os.environ, **slurm}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    head, _, found = done.stdout.partition("\n")
    return {"head": head, **json.loads(found)}


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A stand-in for Python that tells how it was called."""
    file = tmp_path / "stand in"
    told = "dict(argv=sys.argv[1:], env=dict(os.environ), cwd=os.getcwd())"
    code = f"import json, os, sys; print(json.dumps({told}))"
    command = shlex.join([sys.executable, "-S", "-c", code])
    file.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    file.chmod(0o755)
    return file


def test_every_path_of_a_script_survives_bash(
    tmp_path: Path, python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / NASTY.replace('"', "'").replace("\\", "")
    folder.mkdir()
    monkeypatch.chdir(folder)
    run_dir = folder / "my run"
    script = script_of(run_dir)
    called = run_script(script, python, PYTHONPATH="/mine")
    config = str(run_dir / "submitted" / "config.json")
    assert called["argv"] == [
        *("-m", "asyncgrpo.cli", "slurm", "run", "--config", config, "--run-dir", str(run_dir))
    ]
    assert called["cwd"] == str(folder)
    assert called["env"]["PYTHONPATH"] == f"{run_dir}/submitted/code:{folder}:/mine"
    assert called["env"]["PYTHONSAFEPATH"] == "1"
    assert called["head"].startswith("== job 7, attempt 0, nodes n0")
    assert not (folder / "gone").exists()
    assert f'--output="{str(run_dir).replace("%", "%%")}/logs/slurm-%j.log"' in directives(script)


def test_an_array_makes_a_run_for_each_seed(tmp_path: Path, python: Path) -> None:
    script = script_of(tmp_path / "base", seeds="0,3,7")
    assert "--array=0,3,7" in directives(script)
    assert f'--output="{tmp_path}/base/logs/slurm-%A_%a.log"' in directives(script)
    called = run_script(script, python, SLURM_ARRAY_TASK_ID="3")
    assert called["argv"][-4:] == ["--run-dir", f"{tmp_path}/base/seed-3", "--seed", "3"]
    assert called["argv"][5] == f"{tmp_path}/base/submitted/config.json"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"seeds": "1-3"}, "--seeds '1-3' must look like 0,1,2"),
        ({"seeds": "1,2", "actor_nodes": 1}, "does not go with --actor-nodes"),
        ({"options": ["x\n#SBATCH --y"]}, "line ends cannot stand in a batch script"),
        ({"time": '1"'}, "quotes, backslashes and line ends"),
    ],
)
def test_what_cannot_stand_in_a_script_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        script_of(Path("/r"), **asked)


def test_a_frozen_run_uses_the_code_and_functions_of_its_submission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "lib").mkdir()
    for file in (
        "mine.py",
        "beside.py",
        "pack/__init__.py",
        "pack/deep.py",
        "lib/f.py",
        "lib/g.py",
    ):
        (tmp_path / file).write_text("def reward(completions, **columns): return []\n")
    monkeypatch.chdir(tmp_path)
    uses = ["mine:reward", "pack.deep:reward", "lib/f.py:reward", "task"]
    config = settings(
        reward={"functions": [{"use": use, "name": f"r{i}"} for i, use in enumerate(uses)]},
        run={"max_steps": 9},
    )
    run_dir = tmp_path / "my run"
    (run_dir / "submitted" / "code").mkdir(parents=True)
    (run_dir / "submitted" / "code" / "old.py").touch()
    freeze(config, run_dir)
    code = run_dir / "submitted" / "code"
    found = {str(f.relative_to(code)) for f in code.rglob("*.py") if f.parts[-2] != "asyncgrpo"}
    own = {name for name in found if not name.startswith("asyncgrpo/")}
    assert own == {
        *("mine.py", "beside.py", "pack/__init__.py", "pack/deep.py"),
        *("beside-f/f.py", "beside-f/g.py"),
    }
    saved = json.loads((run_dir / "submitted" / "config.json").read_text())
    assert [function["use"] for function in saved["reward"]["functions"]] == [
        *("mine:reward", "pack.deep:reward", f"{code}/beside-f/f.py:reward", "task")
    ]
    assert saved["run"]["max_steps"] == 9
    show = "import asyncgrpo, asyncgrpo.cli, mine; print(asyncgrpo.__file__, mine.__file__)"
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": f"{code}:{tmp_path}"}
    command = [sys.executable, "-c", show]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[0] == f"{code}/asyncgrpo/__init__.py {code}/mine.py"


def test_a_task_of_an_array_does_not_take_its_neighbours_for_itself() -> None:
    ids = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "5"}
    job = Job(settings(), {**ids, "SLURM_RESTART_COUNT": "2"})
    assert (job.id, job.attempt) == ("7_5", "7.2")
    assert Job(settings(), {"SLURM_JOB_ID": "7"}).id == "7"


def test_outside_of_a_job_the_command_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"SLURM_JOB_ID is not set.*slurm submit"):
        Job(settings(), {})
