"""The prompts in the order in which they go out: those that came back first, then the stream."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncgrpo.buffer.journal import Remembered
from asyncgrpo.errors import LedgerError
from asyncgrpo.types import Prompt

if TYPE_CHECKING:
    from asyncgrpo.data.prompts import PromptSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A prompt that is due."""

    position: int  # in the training stream
    epoch: int | None  # None: the stream has no epochs
    prompt: Prompt


class PromptQueue:
    """A cursor in the training stream, and the turns that ended without a group."""

    def __init__(self, source: PromptSource) -> None:
        self._source = source
        self._position = 0
        self._again: deque[Turn] = deque()

    def __bool__(self) -> bool:
        """Whether a prompt is left."""
        return bool(self._again) or self._source.get(self._position) is not None

    def next(self) -> Turn | None:
        """Removes and returns the next turn; None when no prompt is left."""
        if self._again:
            return self._again.popleft()
        turn = self._turn(self._position)
        self._position += turn is not None
        return turn

    def put_back(self, turn: Turn) -> None:
        """No group came of it: it goes out again."""
        self._again.append(turn)

    def restore(self, past: Remembered) -> None:
        """Goes on where a former life of the buffer ended; LedgerError when the data changed."""
        self._position = past.position
        self._again += [self.at(position, prompt_id) for position, prompt_id in past.again]

    def at(self, position: int, prompt_id: str) -> Turn:
        """The turn that was handed out earlier; LedgerError when another prompt is there now."""
        turn = self._turn(position)
        if turn is None or turn.prompt.prompt_id != prompt_id:
            found = turn and turn.prompt.prompt_id
            raise LedgerError(
                f"position {position} of data.train was prompt {prompt_id!r} and is {found!r} now: "
                "the data changed while the run was going; put the former data back"
            )
        return turn

    def _turn(self, position: int) -> Turn | None:
        prompt = self._source.get(position)
        if prompt is None:
            return None
        return Turn(position=position, epoch=self._source.epoch(position), prompt=prompt)
