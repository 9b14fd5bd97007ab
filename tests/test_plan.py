"""Who runs where: cores, GPUs, command lines and environments of a plan."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncgrpo.config import Config, from_mapping
from asyncgrpo.errors import ConfigError
from asyncgrpo.launch.placement import assign_cores, core_sharers
from asyncgrpo.launch.plan import (
    Host,
    Plan,
    ProcessSpec,
    lone_actor,
    make_plan,
    render_plan,
)
from asyncgrpo.rundir import Endpoints

DOORS = Endpoints(
    buffer="tcp://10.0.0.1:1", weights="tcp://10.0.0.1:2", store=("10.0.0.1", 3), rendezvous=5004
)
RUN_DIR = Path("/runs/one")


def settings(**rooms: Any) -> Config:
    return from_mapping({"launch": {"actors": 2, "learners": 2}, **rooms})


def plan_on(num_cores: int, config: Config | None = None) -> Plan:
    host = Host(cores=tuple(range(num_cores)))
    return make_plan(config or settings(), host, DOORS, RUN_DIR)


def spec(plan: Plan, name: str) -> ProcessSpec:
    return next(spec for spec in plan.specs if spec.name == name)


def test_with_a_core_for_everyone_nobody_shares_and_nothing_is_warned() -> None:
    plan = plan_on(4)
    assert plan.endpoints.cores == {
        "actor-0": (0,),
        "actor-1": (1,),
        "learner-0": (2,),
        "learner-1": (3,),
    }
    assert plan.warnings == ()
    assert spec(plan, "buffer").cores == ()
    assert spec(plan, "learner").cores == (2, 3)
    assert "OMP_WAIT_POLICY" not in spec(plan, "actor-0").environment


def test_spare_cores_go_to_the_learner_ranks() -> None:
    assert assign_cores(tuple(range(7)), 2, 2, 1) == {
        "actor-0": (0,),
        "actor-1": (1,),
        "learner-0": (2, 3, 4),
        "learner-1": (5, 6),
    }


def test_an_actor_gets_a_core_per_thread_where_there_are_enough() -> None:
    roomy = plan_on(6, settings(actor={"threads": 2}))
    assert roomy.endpoints.cores["actor-1"] == (2, 3)
    assert spec(roomy, "actor-1").environment["VLLM_CPU_OMP_THREADS_BIND"] == "2,3"
    assert spec(roomy, "actor-1").environment["OMP_NUM_THREADS"] == "2"
    tight = plan_on(5, settings(actor={"threads": 2}))
    assert tight.endpoints.cores["actor-1"] == (1,)
    assert spec(tight, "actor-1").environment["OMP_NUM_THREADS"] == "1"
    assert tight.warnings[0].startswith(
        "actor.threads=2 x actor.tensor_parallel=1, but each actor gets 1 of 5 cores"
    )


def test_more_roles_than_cores_share_and_the_warning_names_who_shares_what() -> None:
    plan = plan_on(2)
    assert plan.endpoints.cores == {
        "actor-0": (0,),
        "actor-1": (0,),
        "learner-0": (1,),
        "learner-1": (1,),
    }
    assert "core 0: actor-0, actor-1; core 1: learner-0, learner-1" in plan.warnings[0]
    assert spec(plan, "actor-0").environment["OMP_WAIT_POLICY"] == "PASSIVE"


def test_one_core_is_shared_by_all() -> None:
    assert set(assign_cores((5,), 2, 1, 4).values()) == {(5,)}


@given(
    cores=st.sets(st.integers(0, 200), min_size=1, max_size=40),
    actors=st.integers(1, 20),
    learners=st.integers(1, 20),
    threads=st.integers(1, 8),
)
def test_every_role_gets_cores_of_the_host_and_shares_only_when_it_must(
    cores: set[int], actors: int, learners: int, threads: int
) -> None:
    given_cores = assign_cores(tuple(sorted(cores)), actors, learners, threads)
    assert len(given_cores) == actors + learners
    assert all(mine and set(mine) <= cores for mine in given_cores.values())
    enough = actors + learners <= len(cores)
    assert bool(core_sharers(given_cores)) == (not enough)
    assert {core for mine in given_cores.values() for core in mine} == cores or enough


def test_actors_and_learners_never_share_with_each_other_on_two_cores_or_more() -> None:
    for num_cores in range(2, 12):
        for actors, learners in ((1, 8), (8, 1), (3, 3), (11, 2)):
            given_cores = assign_cores(tuple(range(num_cores)), actors, learners, 1)
            for names in core_sharers(given_cores).values():
                assert len({name.split("-")[0] for name in names}) == 1, (num_cores, names)


def test_the_command_lines_are_exactly_these() -> None:
    plan = plan_on(4)
    assert [spec.name for spec in plan.specs] == ["buffer", "learner", "actor-0", "actor-1"]
    role = "-m asyncgrpo.cli role {} --run-dir /runs/one"
    assert " ".join(spec(plan, "buffer").argv) == f"{sys.executable} {role.format('buffer')}"
    assert (
        " ".join(spec(plan, "actor-1").argv) == f"{sys.executable} {role.format('actor')} --index 1"
    )
    assert " ".join(spec(plan, "learner").argv) == (
        f"{sys.executable} -m asyncgrpo.learner.torchrun --nnodes 1 --nproc-per-node 2 "
        "--rdzv-backend asyncgrpo --rdzv-endpoint 127.0.0.1:5004 --max-restarts 0 "
        "--monitor-interval 0.2 " + role.format("learner")
    )
    assert spec(plan, "actor-1").log_file == RUN_DIR / "logs" / "actor-1.log"


def test_everything_stays_on_loopback_until_the_host_is_set() -> None:
    near = plan_on(4)
    assert spec(near, "learner").environment["NCCL_SOCKET_IFNAME"] == "lo"
    far = plan_on(4, from_mapping({"launch": {"host": "10.0.0.1"}}))
    assert "127.0.0.1:5004" in spec(far, "learner").argv
    for name in ("learner", "actor-0"):
        assert spec(far, name).environment["GLOO_SOCKET_IFNAME"] == "lo"
        assert "NCCL_SOCKET_IFNAME" not in spec(far, name).environment
    assert far.warnings == near.warnings == ()


def test_an_open_door_is_warned_of() -> None:
    launch = {"host": "10.0.0.1", "insecure": True}
    (warning,) = plan_on(4, from_mapping({"launch": launch})).warnings
    assert "whoever reaches 10.0.0.1 can read prompts" in warning


def test_only_vllm_actors_get_the_engine_environment() -> None:
    engine = spec(plan_on(4), "actor-0").environment
    assert engine["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert engine["TORCHDYNAMO_DISABLE"] == "1"
    assert engine["CUDA_VISIBLE_DEVICES"] == ""
    toy = spec(plan_on(4, settings(actor={"engine": "toy"})), "actor-0").environment
    assert not any(key.startswith("VLLM") for key in toy)


def test_only_local_models_keep_actors_off_the_hub(tmp_path: Path) -> None:
    for model, offline in (("Qwen/Qwen3-0.6B", None), (str(tmp_path), "1"), ("tiny", "1")):
        plan = plan_on(4, settings(model={"path": model}))
        assert spec(plan, "actor-0").environment.get("HF_HUB_OFFLINE") == offline


def gpu_plan(gpus: int, *present: str) -> Plan:
    config = settings(launch={"actors": 2, "learners": 2, "gpus": gpus})
    return make_plan(config, Host(cores=(0, 1), gpu_ids=present), DOORS, RUN_DIR)


def test_on_gpus_everyone_gets_one_and_nobody_is_pinned() -> None:
    plan = gpu_plan(4, "4", "5", "6", "7")
    assert spec(plan, "actor-1").environment["CUDA_VISIBLE_DEVICES"] == "5"
    assert spec(plan, "learner").environment["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert spec(plan, "learner").gpus == ("6", "7")
    assert plan.endpoints.cores == {}
    assert "TORCHDYNAMO_DISABLE" not in spec(plan, "actor-1").environment


def test_more_gpus_than_present_are_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"launch.gpus=4 must be <= 1"):
        gpu_plan(4, "0")


def test_more_roles_than_gpus_are_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"one GPU each = 4, but launch.gpus=2"):
        gpu_plan(2, "0", "1")


def test_sharing_gpus_that_are_not_used_is_said_to_do_nothing() -> None:
    launch = {"actors": 1, "learners": 1, "share_gpus": True}
    assert "share_gpus=true does nothing" in plan_on(4, settings(launch=launch)).warnings[0]


def test_the_rendered_plan_shows_cores_logs_command_lines_and_warnings() -> None:
    text = render_plan(plan_on(2))
    assert "actor-1    cores 0" in text
    assert "/runs/one/logs/learner.log" in text
    assert "OMP_WAIT_POLICY=PASSIVE" in text
    assert (
        f"run  {sys.executable} -m asyncgrpo.cli role actor --run-dir /runs/one --index 1" in text
    )
    assert "warning: launch.actors=2" in text


def test_the_launch_room_starts_without_torch() -> None:
    code = (
        "import sys, asyncgrpo.launch.plan, asyncgrpo.launch.local, asyncgrpo.launch.preflight, "
        "asyncgrpo.launch.environment, asyncgrpo.launch.model_folder\n"
        "print(sorted({'torch', 'vllm', 'transformers', 'zmq'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_lone_actor_takes_a_core_per_thread_or_one_gpu() -> None:
    host = Host(cores=(2, 3, 5, 7), gpu_ids=("4", "6"))
    alone = lone_actor(from_mapping({"actor": {"threads": 3}}), host)
    assert alone.cores == (2, 3, 5)
    assert alone.environment["OMP_NUM_THREADS"] == "3"
    assert alone.environment["VLLM_CPU_OMP_THREADS_BIND"] == "2,3,5"
    many = from_mapping({"launch": {"gpus": 8, "actors": 4, "learners": 4}})
    assert lone_actor(many, host).environment["CUDA_VISIBLE_DEVICES"] == "4"
    with pytest.raises(ConfigError, match=r"launch\.gpus=1 must be <= 0"):
        lone_actor(many, Host(cores=(0,)))
