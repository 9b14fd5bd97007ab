"""Packed rows give what plain per-sequence forwards give: log-probs, entropy, gradients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fakes import completion_of, group_of, shard_of
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from asyncgrpo.config import from_mapping
from asyncgrpo.errors import ModelError
from asyncgrpo.learner.attention import MAX_PADDED_TOKENS, packed_attention
from asyncgrpo.learner.batch import Batch, PackReport, pack, with_advantages
from asyncgrpo.learner.inputs import Totals
from asyncgrpo.learner.model import PolicyHead, load_policy, packed_row
from asyncgrpo.learner.objective import objective
from asyncgrpo.learner.parallel import Published
from asyncgrpo.learner.prepare import OptimizerBatch
from asyncgrpo.types import Shard

VOCAB = 97


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(10.0)  # far from uniform distributions
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(10.0)  # attention matters
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


@pytest.fixture
def policy(folder: Path) -> PreTrainedModel:
    return load_policy(str(folder))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_shard(lengths: list[int], seed: int = 0, prompt: int = 3) -> Shard:
    """One group per two completions; behaviour log-probs are made up."""
    random = np.random.default_rng(seed)
    groups = []
    for first in range(0, len(lengths), 2):
        completions = [
            completion_of(random.integers(0, VOCAB, n), 0, -5 * random.random(n))
            for n in lengths[first : first + 2]
        ]
        rewards = random.normal(size=len(completions))
        groups.append(group_of(first, random.integers(0, VOCAB, prompt), completions, rewards))
    return shard_of(groups, 0)


def packed(shard: Shard, max_tokens: int = 10_000) -> tuple[Batch, ...]:
    longest = {"data": {"max_prompt_tokens": 4}, "sampling": {"max_completion_tokens": 4}}
    budget = {"learner": {"max_tokens_per_microbatch": max_tokens}}
    batches, _ = pack(shard.groups, shard.step, from_mapping({**longest, **budget}))
    centred = np.concatenate([group.rewards - group.rewards.mean() for group in shard.groups])
    return tuple(with_advantages(batch, centred) for batch in batches)


def loss_of(batch: Batch, scored: tuple[torch.Tensor, torch.Tensor], count: int) -> torch.Tensor:
    """The default loss of one micro-batch, divided by count."""
    ready = OptimizerBatch(
        groups=(),
        batches=(batch,),
        rows=(),
        report=PackReport(),
        totals=Totals(num_tokens=count, num_sequences=1),
    )
    config = from_mapping({})
    return objective(ready.inputs(0, *scored, config), config.algo, 0.0).loss


def slow_scores(folder: Path, batch: Batch, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs and entropies by plain forwards of one sequence each, then float64 loops."""
    plain = Qwen3ForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    logprobs, entropies = np.zeros(len(batch.input_ids)), np.zeros(len(batch.input_ids))
    for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        with torch.no_grad():
            tokens = torch.from_numpy(batch.input_ids[start:end])[None]
            logits = plain(input_ids=tokens).logits[0].double().numpy() / temperature
        for s, row in zip(range(start, end), logits, strict=True):
            if batch.loss_mask[s]:
                top = row.max()
                table = row - top - np.log(np.exp(row - top).sum())
                logprobs[s] = table[batch.target_ids[s]]
                entropies[s] = -sum(np.exp(x) * x for x in table)
    return logprobs, entropies


def gradients(head: torch.nn.Module, batches: tuple[Batch, ...], count: int) -> torch.Tensor:
    head.zero_grad()
    for batch in batches:
        loss_of(batch, head(packed_row(batch)), count).backward()
    return torch.cat([p.grad.flatten() for p in head.parameters()])


MIXED = [1, 1, 2, 5, 9, 9, 14, 30, 31, 60, 100, 126, 127, 200]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("lengths", [[1], [1, 1], [4, 4, 4], MIXED], ids=str)
def test_packed_scores_equal_those_of_plain_forwards(
    folder: Path, policy: PreTrainedModel, lengths: list[int], temperature: float
) -> None:
    (batch,) = packed(make_shard(lengths))
    with torch.no_grad():
        logprobs, entropy = PolicyHead(policy, temperature=temperature)(packed_row(batch))
    expected, expected_entropy = slow_scores(folder, batch, temperature)
    assert logprobs.dtype == entropy.dtype == torch.float32
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)
    np.testing.assert_allclose(entropy, expected_entropy, atol=1e-5)


def test_the_mixed_row_uses_shared_and_single_attention_calls() -> None:
    (batch,) = packed(make_shard(MIXED))
    blocks = packed_row(batch).packing.blocks
    assert sum(block.shape[0] for block in blocks) == len(MIXED)
    assert [block.shape[0] > 1 for block in blocks].count(True) >= 3
    for count, longest in (block.shape for block in blocks):
        assert count == 1 or longest <= MAX_PADDED_TOKENS


def test_a_changed_sequence_leaves_the_others_exactly_as_they_were(policy: PreTrainedModel) -> None:
    (batch,) = packed(make_shard([5, 6, 7, 8, 9, 140]))
    row = packed_row(batch)
    head = PolicyHead(policy)
    with torch.no_grad():
        before, _ = head(row)
        for changed in range(len(batch.cu_seqlens) - 1):
            start = int(batch.cu_seqlens[changed])
            row.input_ids[0, start] = (row.input_ids[0, start] + 1) % VOCAB
            after, _ = head(row)
            same = torch.from_numpy(batch.sequence_ids != changed)
            assert torch.equal(before[same], after[same])
            assert not torch.equal(before[~same], after[~same])
            before = after


def test_scores_in_chunks_equal_scores_at_once_with_their_gradients(folder: Path) -> None:
    shard = make_shard([3, 5, 8, 12])
    batches = packed(shard)
    results = []
    for chunk_tokens in (None, 5):
        head = PolicyHead(load_policy(str(folder)), chunk_tokens=chunk_tokens)
        logprobs, entropy = head(packed_row(batches[0]))
        assert not entropy.requires_grad
        scores = logprobs.detach(), entropy
        results.append((*scores, gradients(head, batches, shard.num_loss_tokens_global)))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked, atol=1e-6, rtol=1e-5)


def test_loss_and_gradient_do_not_depend_on_the_split_into_micro_batches(
    policy: PreTrainedModel,
) -> None:
    shard = make_shard([1, 2, 3, 8, 9, 20, 33, 40])
    head = PolicyHead(policy)
    losses, slopes = [], []
    for max_tokens in (42, 60, 1000):
        batches = packed(shard, max_tokens)
        slopes.append(gradients(head, batches, shard.num_loss_tokens_global))
        losses.append(
            sum(
                loss_of(batch, head(packed_row(batch)), shard.num_loss_tokens_global).item()
                for batch in batches
            )
        )
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)
    for slope in slopes[1:]:
        assert (slope - slopes[0]).abs().max() <= 1e-6 * max(1.0, slopes[0].abs().max().item())


def test_the_gradient_is_the_slope_of_the_loss_along_random_directions(folder: Path) -> None:
    shard = make_shard([4, 9])
    (batch,) = packed(shard)
    head = PolicyHead(load_policy(str(folder), dtype=torch.float64))
    slope = gradients(head, (batch,), shard.num_loss_tokens_global)
    advantages, behavior = batch.advantages, batch.behavior_logprobs
    with torch.no_grad():
        start = head(packed_row(batch))[0].double().numpy()
    # weights of truncated importance sampling, held fixed while the parameters move
    weights = np.minimum(np.exp(start - behavior), 2.0) * batch.loss_mask

    def loss() -> float:
        with torch.no_grad():
            now = head(packed_row(batch))[0].double().numpy()
        ratio = np.exp(now - start)
        return float(-(weights * ratio * advantages).sum() / shard.num_loss_tokens_global)

    torch.manual_seed(1)
    for _ in range(3):
        direction = [torch.randn_like(p) for p in head.parameters()]
        ends = []
        for shift in (1e-4, -2e-4):
            with torch.no_grad():
                for parameter, step in zip(head.parameters(), direction, strict=True):
                    parameter.add_(shift * step)
            ends.append(loss())
        with torch.no_grad():
            for parameter, step in zip(head.parameters(), direction, strict=True):
                parameter.add_(1e-4 * step)
        along = torch.cat([step.flatten() for step in direction]) @ slope
        assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(along.item(), rel=1e-3, abs=5e-3)


def test_an_empty_mask_gives_zero_gradients_for_every_parameter(policy: PreTrainedModel) -> None:
    batches = packed(make_shard([0, 0]))
    assert not gradients(PolicyHead(policy), batches, 0).any()


def test_gradient_hooks_fire_when_the_head_is_wrapped_for_several_ranks(
    policy: PreTrainedModel, tmp_path: Path
) -> None:
    shard = make_shard([4, 9])
    batches = packed(shard)
    head = PolicyHead(policy, chunk_tokens=5)
    expected = gradients(head, batches, shard.num_loss_tokens_global).clone()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(head)
        seen: list[int] = []

        def count(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            seen.append(len(bucket.parameters()))
            future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        count.__annotations__ = {}  # torch compares them with types, not with their names
        wrapped.register_comm_hook(None, count)
        found = gradients(wrapped, batches, shard.num_loss_tokens_global)
    finally:
        dist.destroy_process_group()
    assert sum(seen) == len(list(policy.parameters()))
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)


def test_published_names_are_those_of_hugging_face_without_the_tied_output_layer(
    policy: PreTrainedModel,
) -> None:
    published = dict(Published(policy, is_sharded=False))
    assert published.keys() == dict(policy.named_parameters()).keys()
    assert "model.embed_tokens.weight" in published
    assert "lm_head.weight" not in published
    assert published["model.norm.weight"].data_ptr() == policy.model.norm.weight.data_ptr()


def test_bfloat16_weights_still_give_float32_scores(folder: Path) -> None:
    (batch,) = packed(make_shard([4, 9]))
    head = PolicyHead(load_policy(str(folder), dtype=torch.bfloat16))
    logprobs, entropy = head(packed_row(batch))
    expected, _ = slow_scores(folder, batch, 1.0)
    assert logprobs.dtype == entropy.dtype == torch.float32
    np.testing.assert_allclose(logprobs.detach(), expected, atol=1.0)


def test_a_folder_that_holds_no_model_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_policy(str(tmp_path))


def test_a_model_that_ignores_the_registered_attention_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaky(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: object,
    ) -> tuple[torch.Tensor, None]:
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        return out.transpose(1, 2), None

    from transformers import AttentionInterface

    AttentionInterface.register("packed", leaky)
    try:
        with pytest.raises(ModelError, match="see each other"):
            load_policy(str(folder))
    finally:
        AttentionInterface.register("packed", packed_attention)


def test_attention_with_a_short_sliding_window_is_refused(policy: PreTrainedModel) -> None:
    (batch,) = packed(make_shard([4, 9]))
    for layer in policy.model.layers:
        layer.self_attn.sliding_window = 8
    with pytest.raises(ModelError, match="sliding window of 8"):
        PolicyHead(policy)(packed_row(batch))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_packed_kernel_on_cuda_agrees_with_calls_per_block(folder: Path) -> None:
    (batch,) = packed(make_shard(MIXED))
    on_cpu, _ = PolicyHead(load_policy(str(folder)))(packed_row(batch))
    on_gpu = PolicyHead(load_policy(str(folder), dtype=torch.bfloat16, device="cuda"))
    logprobs, _ = on_gpu(packed_row(batch, "cuda"))
    assert (logprobs.detach().cpu() - on_cpu.detach()).abs().mean() < 0.1
