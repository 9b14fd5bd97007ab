"""What ledger and trajectories prove: each promise is a question for the rows that break it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncgrpo.buffer.leases import STATES
from asyncgrpo.buffer.ledger import LedgerReader
from asyncgrpo.observe.trajectories import step_files
from asyncgrpo.rows import whole_rows
from asyncgrpo.rundir import RunDir
from asyncgrpo.staleness import bound_of

# name -> the promise, and SQL for (ticket, what is wrong). `samples` are the trajectories.
CHECKS = {
    "one state": (
        "each lease is in one state, which its history leads to",
        """
        WITH history AS (
            SELECT ticket, state,
            lag(state, 1, '') OVER (PARTITION BY ticket ORDER BY seq) AS before FROM changes
        ), last AS (SELECT ticket, state, max(seq) FROM changes GROUP BY ticket)
        SELECT ticket, 'went from ' || before || ' to ' || state FROM history
        WHERE (before, state) NOT IN (VALUES ('', 'open'), ('open', 'stored'), ('open', 'filtered'),
            ('open', 'expired'), ('open', 'failed'), ('stored', 'evicted'), ('stored', 'taken'),
            ('taken', 'trained'), ('trained', 'returned'), ('returned', 'taken'))
        UNION ALL SELECT ticket, 'is ' || leases.state || ', and ' || ifnull(last.state, 'nothing')
            || ' in its history' FROM leases LEFT JOIN last USING (ticket)
        WHERE leases.state IS NOT last.state
        UNION ALL SELECT ticket, 'has a history, but the lease is missing' FROM last
        WHERE ticket NOT IN (SELECT ticket FROM leases)
        """,
    ),
    "trained once": (
        "no group is trained twice, but for steps that were rolled back and buffer.replay_ratio",
        """
        SELECT ticket, 'was trained ' || total(state = 'trained') || ' times' FROM changes
        GROUP BY ticket HAVING total(state = 'trained') > 1 + total(state = 'returned')
        UNION ALL SELECT ticket, 'is in the batches of steps ' || group_concat(step)
        FROM batches WHERE is_new GROUP BY ticket HAVING count(*) > 1
        UNION ALL SELECT ticket, 'is in the trajectories of steps ' || group_concat(step)
        FROM samples WHERE status = 'trained' GROUP BY lease_id HAVING count(*) > 1
        UNION ALL SELECT ticket, 'is trained again ' || count(*) || ' times, first at step '
            || min(b.step) || '; it was trained at step ' || ifnull(l.step, 'never')
        FROM batches b LEFT JOIN leases l USING (ticket) WHERE NOT is_new
        GROUP BY ticket HAVING count(*) > :most_replays OR NOT min(b.step) > l.step
        """,
    ),
    "staleness": (
        "no trained token is older than buffer.max_staleness versions (twice that with downweight)",
        """
        SELECT ticket, 'is trained at step ' || step || ' with tokens of version ' || oldest FROM
        (SELECT *, iif(:mask, newest_version, oldest_version) AS oldest FROM leases)
        WHERE state IN ('taken', 'trained') AND (oldest IS NULL OR step - oldest > :max_staleness)
        UNION ALL SELECT ticket, 'is trained at step ' || step || ' with tokens ' || staleness
            || ' versions old, say the trajectories' FROM samples
        WHERE status IN ('trained', 'replayed') AND staleness > :max_staleness AND NOT :mask
        UNION ALL SELECT ticket, 'is trained again at step ' || b.step
            || ' with tokens of version ' || oldest_version
        FROM batches b JOIN leases USING (ticket)
        WHERE NOT is_new AND b.step - oldest_version > :max_staleness
        """,
    ),
    "epochs": (
        "every prompt of the stream goes out in turn, and again only if it brought no group",
        """
        SELECT max(ticket), 'position ' || position || ' went out for ' || count(DISTINCT prompt_id)
            || ' prompts, or again though it had brought a group' FROM leases GROUP BY position
        HAVING count(DISTINCT prompt_id) > 1 OR min(ticket) FILTER (WHERE NOT again) < max(ticket)
        UNION ALL SELECT ticket, 'is at position ' || position || ', the last before it is ' || last
        FROM (SELECT ticket, position, lag(position, 1, -1) OVER (ORDER BY position) AS last
            FROM leases) WHERE position > last + 1
        UNION ALL SELECT last, prompt_id || ' is ' || used || ' times in epoch ' || epoch || ' of '
            || ifnull(:epochs, 'any number') || ', in others ' || most
        FROM (SELECT prompt_id, epoch, max(ticket) AS last, count(DISTINCT position) AS used,
            max(count(DISTINCT position)) OVER (PARTITION BY prompt_id) AS most,
            max(epoch) OVER (PARTITION BY prompt_id) AS newest
            FROM leases WHERE epoch IS NOT NULL GROUP BY prompt_id, epoch)
        WHERE (used != most AND epoch < newest) OR epoch >= :epochs
        UNION ALL SELECT max(ticket), prompt_id || ' is missing in an epoch before ' || max(epoch)
        FROM leases GROUP BY prompt_id HAVING count(DISTINCT epoch) < max(epoch) + 1
        """,
    ),
    "nothing lost": (
        "the groups of all stored and taken leases are there",
        """
        SELECT ticket, 'is ' || state || ', but its group is lost'
        FROM leases LEFT JOIN payloads USING (ticket)
        WHERE state IN ('stored', 'taken') AND frame IS NULL
        """,
    ),
    "steps": (
        "the batches are made of the leases that are taken and trained",
        """
        SELECT ticket, 'is in the batch of step ' || b.step || ', but the lease is '
            || ifnull(state || ' at step ' || ifnull(l.step, '-'), 'missing')
        FROM batches b LEFT JOIN leases l USING (ticket) WHERE is_new
        AND (l.step IS NOT b.step OR state IS NOT iif(trained_at IS NULL, 'taken', 'trained'))
        UNION ALL SELECT ticket, 'is ' || state || ', but in no batch' FROM leases
        WHERE state IN ('taken', 'trained')
        AND ticket NOT IN (SELECT ticket FROM batches WHERE is_new)
        UNION ALL SELECT NULL, 'step ' || step || ' follows step ' || last
        FROM (SELECT step, lag(step, 1, step - 1) OVER (ORDER BY step) AS last FROM steps)
        WHERE step != last + 1
        """,
    ),
    "trajectories": (
        "the trajectories hold what the ledger says was trained, and nothing else",
        """
        SELECT s.ticket, s.lease_id || ' is ' || s.status || ' in the trajectories of step '
            || s.step || ': ' || s.num_completions || ' completions, ' || s.num_tokens
            || ' tokens; in the ledger ' || ifnull(l.state || ' at step ' || ifnull(l.step, '-')
            || ': ' || l.num_completions || ', ' || l.num_tokens, 'unknown')
        FROM samples s LEFT JOIN leases l USING (ticket, lease_id)
        WHERE l.state IS NOT iif(s.status = 'replayed', 'trained', s.status)
        OR (s.status = 'trained' AND l.step != s.step)
        OR l.num_completions != s.num_completions OR l.num_tokens != s.num_tokens
        UNION ALL SELECT ticket, 'is trained at step ' || step || ', but not in its trajectories'
        FROM leases WHERE state = 'trained' AND :trajectories
        AND ticket NOT IN (SELECT ticket FROM samples WHERE status = 'trained')
        """,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What was found."""

    next_step: int  # the steps before it are trained and committed
    rollbacks: list[tuple[int, int]]  # the step where a learner began, the next one until then
    wrong: dict[str, list[tuple[int | None, str]]]  # by check: ticket, and what is wrong with it
    groups: list[dict[str, Any]]  # state, reason, leases, completions, tokens, reward_mean

    def total(self, column: str) -> dict[str, float]:
        """Sums over reasons, by state."""
        return {s: sum(g[column] for g in self.groups if g["state"] == s) for s in STATES}


def audit(run: RunDir) -> Audit:
    """Checks a run that is going on, done, or killed. What is under way is open, not wrong.

    Trajectories are checked up to the last step that is committed as trained. A buffer that was
    killed may have written those of one more, and what became too old for the one after that.
    """
    buffer = run.config.buffer
    files = step_files(run.path)
    reader = LedgerReader(run.path)  # after the look at the files
    _, ((next_step,),) = reader.query("SELECT ifnull(max(step) + 1, 0) FROM steps WHERE trained_at")
    _, rollbacks = reader.query(
        "SELECT min(step), max(step) + 1 FROM changes WHERE state = 'returned' GROUP BY time"
    )
    reader.add_table(
        "samples (step, ticket, lease_id, status, num_completions, num_tokens, staleness)",
        (row for step in files if step < next_step for row in _samples(step, files[step])),
    )
    values = {
        "max_staleness": bound_of(buffer.max_staleness, buffer.staleness_action),
        "mask": buffer.staleness_action == "mask",
        "most_replays": math.ceil(buffer.replay_ratio),
        "epochs": run.config.data.epochs,
        "trajectories": run.config.observe.trajectories,
    }
    wrong = {name: reader.query(sql, values)[1] for name, (_, sql) in CHECKS.items()}
    wrong["trajectories"] += [
        (None, f"{files[step]} is there, but the next step is {next_step}")
        for step in files
        if step > max([next_step + 1, *(former for _, former in rollbacks)])
    ]
    columns, rows = reader.query(
        "SELECT state, reason, count(*) AS leases, total(num_completions) AS completions,"
        " total(num_tokens) AS tokens, avg(reward_mean) AS reward_mean FROM leases"
        " GROUP BY state, reason ORDER BY min(ticket)"
    )
    reader.close()
    groups = [dict(zip(columns, row, strict=True)) for row in rows]
    groups.sort(key=lambda group: STATES.index(group["state"]))
    return Audit(next_step=next_step, rollbacks=rollbacks, wrong=wrong, groups=groups)


def _samples(step: int, file: Path) -> Iterator[tuple[Any, ...]]:
    """One row per lease of a step's file."""
    leases: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in whole_rows(file):
        leases.setdefault((row["lease_id"], row.get("status", "trained")), []).append(row)
    for (lease_id, status), rows in leases.items():
        ticket = int(lease_id[1:]) if lease_id[1:].isdecimal() else None
        tokens, oldest = sum(r["num_tokens"] for r in rows), max(r["staleness"] or 0 for r in rows)
        yield step, ticket, lease_id, status, len(rows), tokens, oldest
