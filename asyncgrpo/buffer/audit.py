"""What a run's ledger and trajectories prove: each promise is a question for the rows that break it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncgrpo.buffer.ledger import LedgerReader
from asyncgrpo.buffer.leases import STATES
from asyncgrpo.rundir import RunDir

# Where a state may lead; anything else means that a lease ended twice or was trained twice.
MOVES = (
    *((None, "open"), ("open", "stored"), ("open", "filtered"), ("open", "expired")),
    *(("open", "failed"), ("stored", "taken"), ("stored", "evicted"), ("taken", "trained")),
)
SAMPLES = ("step", "ticket", "lease_id", "status", "num_completions", "num_tokens", "staleness")
ALLOWED = ", ".join(f"('{before or ''}', '{after}')" for before, after in MOVES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A promise, and SQL that finds what breaks it."""

    promise: str
    sql: str


CHECKS = {
    "one state": Check(
        promise="each lease is in one state, which its history ends in",
        sql=f"""
        WITH history AS (
            SELECT ticket, seq, state, lag(state, 1, '') OVER (PARTITION BY ticket ORDER BY seq)
            AS before FROM changes
        ), last AS (SELECT ticket, state, max(seq) FROM changes GROUP BY ticket)
        SELECT ticket, 'went from ' || before || ' to ' || state AS what FROM history
        WHERE (before, state) NOT IN (VALUES {ALLOWED})
        UNION ALL
        SELECT ticket, 'is ' || leases.state || ', its history ends ' || ifnull(last.state, 'nowhere')
        FROM leases LEFT JOIN last USING (ticket) WHERE leases.state IS NOT last.state
        UNION ALL
        SELECT ticket, 'has a history, but the lease is missing' FROM last
        WHERE ticket NOT IN (SELECT ticket FROM leases)
        """,
    ),
    "trained once": Check(
        promise="no group is trained twice",
        sql="""
        SELECT ticket, 'was trained ' || count(*) || ' times' AS what FROM changes
        WHERE state = 'trained' GROUP BY ticket HAVING count(*) > 1
        UNION ALL
        SELECT value, 'is in the batches of steps ' || group_concat(step)
        FROM steps, json_each(tickets) GROUP BY value HAVING count(*) > 1
        UNION ALL
        SELECT ticket, lease_id || ' is trained in the trajectories of steps ' || group_concat(step)
        FROM samples WHERE status = 'trained' GROUP BY lease_id HAVING count(*) > 1
        """,
    ),
    "staleness": Check(
        promise="no trained token is older than buffer.max_staleness versions",
        sql="""
        SELECT ticket, 'trained at step ' || step || ' with tokens of version ' || bound AS what
        FROM (SELECT *, iif(:mask, newest_version, oldest_version) AS bound FROM leases)
        WHERE state IN ('taken', 'trained') AND (bound IS NULL OR step - bound > :max_staleness)
        UNION ALL
        SELECT ticket, 'has tokens ' || staleness || ' versions old in the trajectories of step '
        || step FROM samples
        WHERE status = 'trained' AND NOT :mask AND staleness > :max_staleness
        """,
    ),
    "epochs": Check(
        promise="each prompt of the stream goes out in turn, again only if it brought no group",
        sql="""
        SELECT max(ticket) AS ticket, 'position ' || position || ' went out for '
        || count(DISTINCT prompt_id) || ' prompts and has ' || total(next_ticket IS NULL)
        || ' last leases' AS what FROM leases GROUP BY position
        HAVING count(DISTINCT prompt_id) > 1 OR total(next_ticket IS NULL) != 1
        UNION ALL
        SELECT a.ticket, 'went out again as ' || a.next_ticket || ', which is for another prompt, or '
        || 'it had brought a group' FROM leases a LEFT JOIN leases b ON b.ticket = a.next_ticket
        WHERE a.next_ticket IS NOT NULL AND (NOT a.again OR b.position IS NOT a.position)
        UNION ALL
        SELECT ticket, 'is at position ' || position || ', those since ' || before || ' are missing'
        FROM (SELECT ticket, position, lag(position, 1, -1) OVER (ORDER BY position) AS before
              FROM leases) WHERE position > before + 1
        UNION ALL
        SELECT max(ticket), 'prompt ' || prompt_id || ' is in epoch ' || epoch || ' ' || used
        || ' times, in others ' || most FROM (
            SELECT prompt_id, epoch, max(ticket) AS ticket, count(DISTINCT position) AS used,
                max(count(DISTINCT position)) OVER (PARTITION BY prompt_id) AS most,
                max(epoch) OVER (PARTITION BY prompt_id) AS newest
            FROM leases WHERE epoch IS NOT NULL GROUP BY prompt_id, epoch
        ) WHERE (used != most AND epoch < newest) OR epoch >= :epochs GROUP BY prompt_id, epoch
        UNION ALL
        SELECT max(ticket), 'prompt ' || prompt_id || ' was left out of an epoch' FROM leases
        WHERE epoch IS NOT NULL GROUP BY prompt_id HAVING count(DISTINCT epoch) < max(epoch) + 1
        """,
    ),
    "nothing lost": Check(
        promise="the groups of all stored and taken leases are there",
        sql="""
        SELECT ticket, 'is ' || state || ', but its group is lost' AS what
        FROM leases LEFT JOIN payloads USING (ticket)
        WHERE state IN ('stored', 'taken') AND packet IS NULL
        """,
    ),
    "steps": Check(
        promise="the batches of steps are the leases that were taken and trained",
        sql="""
        WITH batch AS (SELECT step, trained_at, value AS ticket FROM steps, json_each(tickets))
        SELECT ticket, 'in the batch of step ' || batch.step || ', but the lease is '
        || ifnull(state || ' at step ' || ifnull(leases.step, '-'), 'missing') AS what
        FROM batch LEFT JOIN leases USING (ticket) WHERE leases.step IS NOT batch.step
        OR state IS NOT iif(trained_at IS NULL, 'taken', 'trained')
        UNION ALL
        SELECT ticket, state || ', but in no batch' FROM leases
        WHERE state IN ('taken', 'trained') AND ticket NOT IN (SELECT ticket FROM batch)
        UNION ALL
        SELECT NULL, 'step ' || step || ' follows step ' || before FROM
        (SELECT step, lag(step, 1, step - 1) OVER (ORDER BY step) AS before FROM steps)
        WHERE step != before + 1
        """,
    ),
    "trajectories": Check(
        promise="the trajectories hold what the ledger says was trained, and nothing else",
        sql="""
        SELECT s.ticket, s.lease_id || ' is ' || s.status || ' in the trajectories of step ' || s.step
        || ' (' || s.num_completions || ' completions, ' || s.num_tokens || ' tokens), in the ledger '
        || ifnull(l.state || ' (' || l.num_completions || ', ' || l.num_tokens || ')', 'unknown')
        AS what FROM samples s LEFT JOIN leases l USING (lease_id, ticket)
        WHERE l.state IS NOT s.status OR l.num_completions != s.num_completions
        OR l.num_tokens != s.num_tokens OR (s.status = 'trained' AND l.step != s.step)
        UNION ALL
        SELECT ticket, 'was trained at step ' || step || ', but is not in its trajectories'
        FROM leases WHERE state = 'trained' AND :trajectories
        AND ticket NOT IN (SELECT ticket FROM samples WHERE status = 'trained')
        """,
    ),
}

GROUPED = """
SELECT state, reason, count(*) AS leases, total(num_completions) AS completions,
total(num_tokens) AS tokens, avg(reward_mean) AS reward_mean FROM leases GROUP BY state, reason
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What was found."""

    next_step: int  # the steps before it are trained and committed
    rows: dict[str, list[tuple[int | None, str]]]  # by check: ticket, and what is wrong with it
    groups: list[dict[str, Any]]  # by state and reason: leases, completions, tokens, reward_mean

    @property
    def num_leases(self) -> dict[str, int]:
        """By state."""
        of = {
            state: [row["leases"] for row in self.groups if row["state"] == state]
            for state in STATES
        }
        return {state: sum(counts) for state, counts in of.items()}

    @property
    def mean_tokens(self) -> dict[str, float]:
        """Tokens per completion of the groups in each state, where any are known."""
        means = {}
        for state in STATES:
            rows = [row for row in self.groups if row["state"] == state and row["completions"]]
            if rows:
                means[state] = sum(r["tokens"] for r in rows) / sum(r["completions"] for r in rows)
        return means


def audit(run: RunDir, timeout_seconds: float = 600.0) -> Audit:
    """Checks a run that is going on, done, or killed. What is under way is open, not wrong.

    Trajectories are checked up to the last step that is committed as trained.
    """
    files = _step_files(run.path)  # first: the ledger knows what was written before it is read
    reader = LedgerReader(run.path, timeout_seconds)
    _, ((next_step,),) = reader.query("SELECT ifnull(max(step) + 1, 0) FROM steps WHERE trained_at")
    checked = (row for step in files if step < next_step for row in _samples(files[step], step))
    reader.add_table("samples", SAMPLES, checked)
    values = {
        "max_staleness": run.config.buffer.max_staleness,
        "mask": run.config.buffer.staleness_action == "mask",
        "epochs": run.config.data.epochs,
        "trajectories": run.config.observe.trajectories,
    }
    rows = {name: reader.query(check.sql, values)[1] for name, check in CHECKS.items()}
    rows["trajectories"] += [
        (None, f"{file} is there, but the ledger is at step {next_step}")
        for step, file in files.items()
        if step > next_step
    ]
    columns, grouped = reader.query(GROUPED)
    reader.close()
    groups = [dict(zip(columns, row, strict=True)) for row in grouped]
    groups.sort(key=lambda row: (STATES.index(row["state"]), row["reason"]))
    return Audit(next_step=next_step, rows=rows, groups=groups)


def _step_files(run_dir: Path) -> dict[int, Path]:
    files = (run_dir / "trajectories").glob("step_*.jsonl")
    return dict(sorted((int(file.stem.removeprefix("step_")), file) for file in files))


def _samples(file: Path, step: int) -> Iterator[tuple[Any, ...]]:
    """One row per lease of a step's file: its completions together."""
    leases: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        leases.setdefault((row["lease_id"], row.get("status", "trained")), []).append(row)
    for (lease_id, status), rows in leases.items():
        number = lease_id[1:]
        yield (
            step,
            int(number) if number.isdecimal() else None,
            lease_id,
            status,
            len(rows),
            sum(row["num_tokens"] for row in rows),
            max(row["staleness"] or 0 for row in rows),
        )
