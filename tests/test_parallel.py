"""However the policy lies on the ranks, it is trained, published, saved and restored alike."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import learner_case
import numpy as np
import pytest
import torch
import torch.distributed as dist
from learner_case import STEP, make_groups, on_ranks, shard_of
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from asyncgrpo.config import Config, from_mapping
from asyncgrpo.errors import ConfigError, ModelError
from asyncgrpo.launch import preflight
from asyncgrpo.learner.batch import pack
from asyncgrpo.learner.lora import Adapter
from asyncgrpo.learner.model import PolicyHead, load_policy, packed_row
from asyncgrpo.learner.saved import newest
from asyncgrpo.learner.update import PolicyUpdater
from asyncgrpo.settings.learner import LoraSettings
from asyncgrpo.settings.run import RunSettings
from asyncgrpo.types import Group
from asyncgrpo.weights.flat import FlatWeights, Manifest

Weights = dict[str, torch.Tensor]
Found = dict[str, Any]
# adam_eps: a step must not depend on the sign of a gradient that is zero but for rounding.
PLAIN = {"lr": 1e-3, "adam_eps": 1e-3, "weight_decay": 0.1, "max_tokens_per_microbatch": 60}
FSDP = {"parallel": "fsdp"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, each second block recomputed": {"checkpoint_activations": 2},
    "fsdp": FSDP,
    "fsdp, recomputed": {**FSDP, "checkpoint_activations": "full"},
    "fsdp, offloaded": {**FSDP, "cpu_offload": True},
    "reference on the CPU": {"reference": {"on_cpu": True}},
    "fsdp, reference on the CPU": {**FSDP, "reference": {"on_cpu": True}},
    "fsdp, adapter": {**FSDP, "lora": {"r": 4}},
    "fsdp, bfloat16": {**FSDP, "dtype": "bfloat16", "float32_head": True},
    "fsdp in pairs": {**FSDP, "shard_ranks": 2},
}
ON_TWO = [name for name in LAYOUTS if name != "fsdp in pairs"]
ON_FOUR = ["ddp", "fsdp", "fsdp in pairs"]


@pytest.fixture(scope="module")
def groups(folder: Path) -> list[Group]:
    return make_groups(folder, count=7)


@pytest.fixture
def lone_group() -> Iterator[None]:
    """What FSDP opens for a lone rank ends with the test."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def settings(folder: Path, learner: dict[str, Any], count: int = 1) -> Config:
    """A reference that moves with the policy; with an adapter it is the base."""
    learner = dict(learner)
    reference = {"sync_every": 0 if "lora" in learner else 2, **learner.pop("reference", {})}
    algo = {"kl_coef": 0.1, "reference": reference}
    return learner_case.settings(
        folder,
        algo=algo,
        learner={**PLAIN, **learner},
        data={"max_prompt_tokens": 16},
        buffer={"groups_per_step": 7, "max_staleness": 20},
        checkpoint={"export_every": STEP + 2},
        launch={"learners": count, "gpus": 8},  # for what is refused on a CPU, though it works
    )


def share(groups: list[Group], rank: int, count: int) -> list[Group]:
    """Uneven parts; the last of several ranks has nothing to train on."""
    if count == 1:
        return groups
    filled = max(count - 1, 1)
    return [g for i, g in enumerate(groups) if min(i, filled - 1) == rank]


def is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def published(updater: PolicyUpdater) -> Weights:
    """As senders take them: twice, on rank 0 alone."""
    weights = updater.weights()
    found: Weights = {}
    if is_first():
        flat = FlatWeights(Manifest.of(weights, "float32"))
        flat.fill(weights)
        found = {name: tensor.clone() for name, tensor in flat.views()}
    weights.help()
    return found


def held(updater: PolicyUpdater) -> int:
    """Numbers of the model that are on this rank."""
    weights = updater._policy.parameters()
    return sum((w.to_local() if isinstance(w, DTensor) else w).numel() for w in weights)


def train(config: Config, own: list[Group], whole: list[Group], run: Path) -> Found:
    """Three steps, then what everyone sees of the model."""
    updater = PolicyUpdater(config, run_dir=run)
    rows = []
    for step in range(STEP, STEP + 3):
        rows.append(updater.update(shard_of(own, whole, step)))
        updater.export(step + 1)
    found = {"rows": rows, "canaries": updater.canary_logprobs(), "held": held(updater)}
    found["weights"] = published(updater)
    updater.save()
    return found


def train_all(rank: int, count: int, names: list[str], folder: Path, out: Path) -> None:
    groups = make_groups(folder, count=7)
    found = {}
    for name in names:
        config = settings(folder, LAYOUTS[name], count)
        found[name] = train(config, share(groups, rank, count), groups, out / name)
    torch.save(found, out / f"rank_{rank}")


def assert_alike(found: Found, alone: Found, *, exact: bool = True) -> None:
    """Loss, gradient norms and all other metrics to 1e-3 of them, weights to 1e-5.

    Not exact, of two ways to round to bfloat16: loss and gradient norms to 1e-2, weights to 1e-4
    on average.
    """
    names = ("loss", "grad_norm", "objective/entropy")
    for row, expected in zip(found["rows"], alone["rows"], strict=True):
        for name in {*(expected if exact else names)} - {
            "padding_share",
            "rank_balance",
        }:  # of the ranks themselves
            rel, error = (1e-3, 1e-5) if exact else (1e-2, 1e-2)
            assert row[name] == pytest.approx(expected[name], rel=rel, abs=error), name
    assert found["weights"].keys() == alone["weights"].keys()
    for name, tensor in alone["weights"].items():
        error = (found["weights"][name] - tensor).abs()
        assert (error.max() < 1e-5) if exact else (error.mean() < 1e-4), name
    np.testing.assert_allclose(found["canaries"], alone["canaries"], atol=1e-4 if exact else 0.3)


def assert_saved(run: Path, found: Found) -> None:
    """RUN/model and the export after the second step load plainly."""
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, found["weights"][name]), name
    export = AutoModelForCausalLM.from_pretrained(run / "exports" / f"step_{STEP + 2}")
    changed = [
        name
        for name, tensor in export.named_parameters()
        if not torch.equal(tensor, found["weights"][name])
    ]
    assert changed
    assert [path.name for path in (run / "exports").iterdir()] == [f"step_{STEP + 2}"]
    assert (run / "exports" / f"step_{STEP + 2}" / "tokenizer_config.json").exists()


def alone(name: str, folder: Path, groups: list[Group], run: Path) -> Found:
    """What one rank with DDP makes of it."""
    kept = {k: v for k, v in LAYOUTS[name].items() if k in ("lora", "dtype", "float32_head")}
    return train(settings(folder, kept), groups, groups, run)


def test_a_lone_rank_may_be_sharded(folder, groups, tmp_path, lone_group):
    expected = alone("ddp", folder, groups, tmp_path / "ddp")
    assert_saved(tmp_path / "ddp", expected)
    learner = {**FSDP, "checkpoint_activations": 2}
    found = train(settings(folder, learner), groups, groups, tmp_path / "fsdp")
    assert_alike(found, expected)
    assert_saved(tmp_path / "fsdp", found)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "names"), [(2, ON_TWO), (4, ON_FOUR)])
def test_all_layouts_give_the_same_as_one_rank(folder, groups, tmp_path, count, names):
    on_ranks(count, train_all, names, folder, tmp_path)
    by_rank = [torch.load(tmp_path / f"rank_{r}", weights_only=False) for r in range(count)]
    for name in names:
        learner, found = LAYOUTS[name], by_rank[0][name]
        expected = alone(name, folder, groups, tmp_path / f"alone {name}")
        assert_alike(found, expected, exact="dtype" not in learner)
        assert_saved(tmp_path / name, found)
        parts = 1 if "parallel" not in learner else learner.get("shard_ranks", count)
        whole = by_rank[0]["ddp"]["held"]
        costs = [sum(g.cost for g in share(groups, r, count)) for r in range(count)]
        assert found["rows"][0]["rank_balance"] == pytest.approx(np.mean(costs) / max(costs))
        for other in by_rank:
            assert other[name]["rows"] == found["rows"]
            if "lora" not in learner:
                assert other[name]["held"] == pytest.approx(whole / parts, rel=0.05)


def go_on(rank: int, count: int, config: Config, folder: Path, run: Path) -> None:
    """Restores, trains two steps, saves a checkpoint, and on rank 0 what would be published."""
    groups = make_groups(folder, count=7)
    updater = PolicyUpdater(config, run_dir=run)
    first = updater.restore()
    for step in range(first, first + 2):
        updater.update(shard_of(share(groups, rank, count), groups, step + STEP))
    updater.checkpoint(first + 2)
    updater.save()
    weights = published(updater)
    if rank == 0:
        torch.save(weights, run / f"weights_{first + 2}")


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_other_ranks_and_layouts(folder, tmp_path):
    lives = [(2, FSDP), (1, {}), (4, {**FSDP, "shard_ranks": 2}), (1, FSDP), (2, {})]
    for name in ("alone", "changing"):
        run = tmp_path / name
        run.mkdir()
        for count, learner in lives:
            if name == "alone":
                count, learner = 1, {}
            on_ranks(count, go_on, settings(folder, learner, count), folder, run)
    for step in (2, 4, 6, 8, 10):
        one, two = (torch.load(tmp_path / n / f"weights_{step}") for n in ("alone", "changing"))
        for tensor in one:
            torch.testing.assert_close(two[tensor], one[tensor], rtol=0, atol=1e-5)
    found = newest(tmp_path / "changing" / "checkpoints")
    assert found is not None
    assert found.name == "step_10"


@pytest.mark.parametrize(("learner", "times"), [({}, 1), ({"checkpoint_activations": "full"}, 2)])
def test_recomputed_blocks_run_again_in_the_backward_pass(folder, groups, learner, times):
    config = settings(folder, {**learner, "max_tokens_per_microbatch": 4096})
    updater = PolicyUpdater(config)
    calls = []
    updater._policy.model.layers[1].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    updater.update(shard_of(groups))
    assert len(calls) == times


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of what torch does while it traces
def test_compiled_blocks_train_alike(folder, groups, tmp_path, monkeypatch, lone_group):
    """Traced, not translated to machine code: that takes a minute here."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    learner = {**FSDP, "compile": True, "checkpoint_activations": 2}
    config = settings(folder, learner)
    found = train(config, groups, groups, tmp_path / "compiled")
    assert_alike(found, alone("ddp", folder, groups, tmp_path / "plain"))


@pytest.mark.parametrize("float32_head", [False, True])
def test_a_float32_head_rounds_no_logits(folder, groups, float32_head):
    learner = {"dtype": "bfloat16", "float32_head": float32_head}
    updater = PolicyUpdater(settings(folder, learner))
    (batch,), _ = pack(groups[:2], STEP, from_mapping({"buffer": {"max_staleness": 9}}))
    seen = []
    updater._policy.model.norm.register_forward_hook(lambda m, i, out: seen.append(out[0]))
    row = packed_row(batch)
    with torch.no_grad():
        logprobs, _ = updater._plain_head(row)
        hidden = seen[0][row.loss_places].double()
        table = (hidden @ updater._policy.lm_head.weight.double().T).log_softmax(-1)
    expected = table.gather(-1, row.targets[:, None])[:, 0]
    error = (logprobs[row.loss_places] - expected).abs().max()
    assert logprobs.dtype == torch.float32
    assert (error < 1e-5) == float32_head


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function without the rest of its package, which needs Triton; in torch on a CPU."""
    folder = Path(sys.prefix) / "peers/liger_kernel"
    if not folder.exists():
        pytest.skip("make install puts liger-kernel there")
    for name, place in {"liger_kernel": folder, "liger_kernel.ops": folder / "ops"}.items():
        package = ModuleType(name)
        package.__path__ = [str(place)]
        monkeypatch.setitem(sys.modules, name, package)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_ligers_function_gives_our_scores_and_gradients(folder, liger, temperature):
    policy = load_policy(str(folder))
    kernel = PolicyHead(policy, fused=True)._fused
    head = PolicyHead(policy, temperature=temperature, entropy_gradient=True, chunk_tokens=100)
    weight, random = policy.lm_head.weight, torch.Generator().manual_seed(0)
    inputs = torch.randn(1100, weight.shape[1], generator=random, requires_grad=True)
    targets = torch.randint(0, len(weight), (1100,), generator=random)
    toll = torch.randn(2, 1100, generator=random)  # what a loss says of each score
    nll, entropy = kernel(inputs, weight, targets, temperature, return_entropy=True)
    results = []
    for scores in ((-nll, entropy), head._score(inputs, targets)):
        total = (torch.stack(scores) * toll).sum()
        results.append((*scores, *torch.autograd.grad(total, [inputs, weight])))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("how", [{}, FSDP, {"lora": {"r": 4}}])
def test_a_fused_output_layer_trains_as_the_chunks_do(folder, groups, how, liger, lone_group):
    rows, weights = [], []
    for fused in (False, True):
        learner = {**how, "dtype": "bfloat16", "fused_head": fused}
        config = settings(folder, learner)
        algo = config.algo.model_copy(update={"entropy_coef": 0.01})
        updater = PolicyUpdater(config.model_copy(update={"algo": algo}))
        rows.append(updater.update(shard_of(groups, groups, STEP)))
        weights.append(published(updater))
        if dist.is_initialized():
            dist.destroy_process_group()
    ours, theirs = rows
    assert ours != theirs
    for name in ("loss", "grad_norm", "objective/entropy", "objective/kl_ref"):
        assert theirs[name] == pytest.approx(ours[name], rel=0.02, abs=2e-3), name
    start = load_policy(str(folder)).state_dict()
    for name, tensor in weights[0].items():
        moved = float((tensor - start[name]).norm())
        assert float((weights[1][name] - tensor).norm()) <= 0.02 * moved, name


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
def test_a_fused_output_layer_that_is_more_than_a_matrix_is_refused(folder, liger):
    policy = load_policy(str(folder))
    policy.lm_head.bias = torch.nn.Parameter(torch.zeros(policy.vocab_size))
    with pytest.raises(ModelError, match="fused_head=true knows no output layer Linear"):
        PolicyHead(policy, fused=True)
    Adapter(policy, LoraSettings(targets=("lm_head",)))
    with pytest.raises(ModelError, match="fused_head=true knows no output layer lora"):
        PolicyHead(policy, fused=True)


def test_gradient_norm_and_learning_rate_are_reported_as_they_act(folder, groups):
    learner = {"max_grad_norm": 0.5, "schedule": "cosine", "warmup_ratio": 0.3, "lr": 2e-3}
    config = settings(folder, {**learner, "min_lr_ratio": 0.1})
    config = config.model_copy(update={"run": RunSettings(max_steps=10)})
    updater = PolicyUpdater(config)
    norms = []

    def note() -> None:
        weights = updater._policy.parameters()
        norms.append(math.sqrt(sum(float(weight.grad.square().sum()) for weight in weights)))

    for step in range(10):
        row = updater.update(shard_of(groups, step=step + STEP - 6), note)
        progress = (step - 3) / 7
        top = 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2
        assert row["lr"] == pytest.approx(2e-3 * ((step + 1) / 3 if step < 3 else top))
        assert row["grad_norm_clipped"] == pytest.approx(norms[-1], rel=1e-4)
        assert row["grad_norm"] > row["grad_norm_clipped"] == 0.5


def test_weight_decay_shrinks_matrices_only(folder, groups):
    updater = PolicyUpdater(settings(folder, {"weight_decay": 0.5, "lr": 1e-2}))
    before = published(updater)
    for group in groups:
        group.rewards[:] = 1.0  # no advantage, no gradient
    updater.update(shard_of(groups))
    for name, tensor in published(updater).items():
        kept = 1.0 - 1e-2 * 0.5 if tensor.ndim > 1 else 1.0
        torch.testing.assert_close(tensor, before[name] * kept, rtol=1e-6, atol=1e-7)


def test_the_padding_share_counts_what_attention_computes_for_nothing(folder, groups):
    config = settings(folder, {"max_tokens_per_microbatch": 9999})
    lengths = sorted(
        len(g.prompt_token_ids) + len(c.token_ids) - 1 for g in groups for c in g.completions
    )
    slots, begin = 0, 0
    for place, length in enumerate([*lengths, 10**9]):
        if length > 2 * lengths[begin]:  # sequences at most twice as long share a padded call
            slots += (place - begin) * lengths[place - 1]
            begin = place
    row = PolicyUpdater(config).update(shard_of(groups))
    assert row["padding_share"] == pytest.approx(1 - sum(lengths) / slots)
    assert 0 < row["padding_share"] < 0.5


@pytest.mark.parametrize(
    ("learner", "launch", "said"),
    [
        (
            {**FSDP, "shard_ranks": 3},
            {"learners": 4},
            "learner.shard_ranks=3 must divide launch.learners=4: use one of 1, 2, 4, or 0",
        ),
        ({"shard_ranks": 2}, {}, "learner.shard_ranks=2 needs learner.parallel = 'fsdp'"),
        (
            {"cpu_offload": True},
            {"gpus": 4},
            "learner.cpu_offload=True needs learner.parallel = 'fsdp'",
        ),
        (
            {**FSDP, "cpu_offload": True},
            {},
            "learner.cpu_offload=True needs CUDA, but launch.gpus=0",
        ),
        ({"compile": True}, {}, "learner.compile=True needs CUDA, but launch.gpus=0"),
        ({"optimizer": "adamw_8bit"}, {}, "learner.optimizer='adamw_8bit' needs CUDA"),
        (
            {**FSDP, "optimizer": "adamw_8bit"},
            {"gpus": 4},
            "learner.optimizer='adamw_8bit' needs learner.parallel = 'ddp' (FSDP knows no 8- or",
        ),
        (
            {**FSDP, "lora": {"quantize": "4bit"}},
            {"gpus": 4},
            "learner.lora.quantize='4bit' needs learner.parallel = 'ddp' (FSDP knows no 8- or",
        ),
        ({"checkpoint_activations": -1}, {}, "checkpoint_activations=-1 is not allowed"),
        ({"checkpoint_activations": "half"}, {}, "checkpoint_activations='half' is not allowed"),
        ({"parallel": "deepspeed"}, {}, "learner.parallel='deepspeed' is not allowed"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(learner, launch, said):
    with pytest.raises(ConfigError) as error:
        from_mapping({"learner": learner, "launch": launch})
    assert said in str(error.value)


def test_an_8bit_optimizer_that_is_not_installed_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    config = from_mapping({"learner": {"optimizer": "adamw_8bit"}, "launch": {"gpus": 4}})
    assert preflight.missing_extra(config) == (
        "learner.optimizer='adamw_8bit' needs bitsandbytes: pip install 'asyncgrpo[qlora]'"
    )
    assert preflight.missing_extra(from_mapping({})) == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "learner",
    [
        {**FSDP, "dtype": "bfloat16"},
        {**FSDP, "dtype": "bfloat16", "compile": True, "checkpoint_activations": "full"},
        {**FSDP, "cpu_offload": True},
        {"dtype": "bfloat16", "compile": True},
        {"reference": {"on_cpu": True}},
        {**FSDP, "reference": {"on_cpu": True}},
    ],
    ids=str,
)
def test_on_cuda_it_trains_as_in_float32(folder, groups, tmp_path, learner, lone_group):
    config = settings(folder, learner)
    found = train(config, groups, groups, tmp_path / "layout")
    assert_alike(found, alone("ddp", folder, groups, tmp_path / "plain"), exact=False)
    assert_saved(tmp_path / "layout", found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_8bit_optimizer_trains_and_goes_on_from_its_checkpoint(folder, groups, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = settings(folder, {"optimizer": "adamw_8bit", "lr": 1e-3})
    updater = PolicyUpdater(config, run_dir=tmp_path)
    before = published(updater)
    updater.update(shard_of(groups))
    updater.checkpoint(1)
    updater.update(shard_of(groups))
    updater.save()
    again = PolicyUpdater(config, run_dir=tmp_path)
    assert again.restore() == 1
    again.update(shard_of(groups))
    one, two = published(updater), published(again)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
