"""The trained model as a folder that everyone can load."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedModel

from asyncgrpo.learner import ranks

if TYPE_CHECKING:
    from asyncgrpo.learner.lora import Adapter  # peft: an extra


def write_model(
    policy: PreTrainedModel, adapter: Adapter | None, origin: str, folder: Path | None
) -> None:
    """Writes the policy, or its adapter, and the tokenizer of `origin`; for from_pretrained.

    folder: None on ranks that only help to gather a sharded policy, one tensor after the other.
    """
    if adapter is not None:
        adapter.save(folder)
    else:
        own = dict(policy.named_parameters()).keys() | dict(policy.named_buffers()).keys()
        state = policy.state_dict().items()  # a tied output layer is not in own
        gathered = ((name, ranks.whole(tensor)) for name, tensor in state if name in own)
        tensors = {name: tensor.cpu() for name, tensor in gathered if folder is not None}
        if folder is not None:
            policy.save_pretrained(folder, state_dict=tensors)
    if folder is not None:
        AutoTokenizer.from_pretrained(origin).save_pretrained(folder)


@contextmanager
def whole_or_not(final: Path) -> Iterator[Path | None]:
    """A folder to write, which becomes `final` when all is there; None on all ranks but the first.

    What has that name is of a life that was rolled back, and replaced.
    """
    if ranks.rank():
        yield None
        return
    draft = final.with_name(f".{final.name}.part")
    yield draft
    shutil.rmtree(final, ignore_errors=True)
    draft.rename(final)
