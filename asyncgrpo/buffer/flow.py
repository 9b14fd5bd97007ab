"""Who waits for whom since when: flow.json in the run directory, for the launcher to look at."""

from __future__ import annotations

import json
from pathlib import Path

from asyncgrpo.buffer.core import BufferCore
from asyncgrpo.rundir import FLOW_FILE


class FlowFile:
    """Written anew once in a while; what is waited for since then is found by comparing."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FLOW_FILE
        self._since: dict[tuple[str, str], float] = {}  # (who, for what) -> first seen

    def write(self, core: BufferCore, now: float) -> None:
        """Replaces the file; now: on the caller's clock."""
        waits = {wait: self._since.get(wait, now) for wait in core.waits()}
        self._since = waits
        lines = [
            f"{who} has waited {now - at:.0f} s for {what}" for (who, what), at in waits.items()
        ]
        draft = self._path.with_suffix(".part")
        draft.write_text(json.dumps({"events": core.events, "waits": lines}), encoding="utf-8")
        draft.rename(self._path)
