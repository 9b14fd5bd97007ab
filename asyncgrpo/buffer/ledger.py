"""The ledger: what became of every training lease, in RUN/ledger.sqlite; the only sqlite3 import.

The buffer process alone writes. A transaction holds all changes since the last commit and is in
the write-ahead log before anything about them is sent: `kill -9` loses nothing that anybody saw.
(A power cut may lose the last seconds, never the order.) Anybody may read at any time.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import quote

from asyncgrpo.buffer.journal import Batches, Remembered
from asyncgrpo.buffer.leases import OpenLease
from asyncgrpo.errors import ConfigError, LedgerError, WireError
from asyncgrpo.types import Group
from asyncgrpo.wire.codec import checked, group_from, pack_group

FILE = "ledger.sqlite"
VERSION = 3  # of the tables and of the frames in them
BUSY_SECONDS, CHECKPOINT_SECONDS = 5.0, 0.5
PROGRESS_STEPS = 100_000  # of SQLite's machine between two looks at the time limit
TABLES = """
CREATE TABLE leases (           -- every training lease as it is now
    ticket INTEGER PRIMARY KEY, -- its number; evaluations use up numbers, too
    lease_id TEXT NOT NULL,     -- as in trajectories and logs
    position INTEGER NOT NULL,  -- of its prompt in the training stream
    epoch INTEGER,              -- of the data; null: generated tasks
    prompt_id TEXT NOT NULL,
    data_source TEXT NOT NULL,
    peer TEXT NOT NULL,         -- who got it: actor.process
    version INTEGER NOT NULL,   -- policy version that the actor held then
    life INTEGER NOT NULL,      -- of the buffer, see lives
    state TEXT NOT NULL,        -- open, stored, taken, trained, filtered, expired, failed, evicted
    reason TEXT NOT NULL DEFAULT '',
    step INTEGER,               -- whose batch took it
    again INTEGER NOT NULL DEFAULT 0, -- 1: it brought no group and its prompt goes out again
    next_ticket INTEGER,        -- the lease under which it did
    leased_at REAL NOT NULL,    -- all times in seconds since 1970
    arrived_at REAL,
    taken_at REAL,
    ended_at REAL,
    num_completions INTEGER,    -- of its group; null: none came
    num_tokens INTEGER,         -- of all completions
    reward_mean REAL,
    oldest_version INTEGER,     -- policy versions that sampled its tokens
    newest_version INTEGER
);
CREATE INDEX leases_on_the_way ON leases (state) WHERE state IN ('open', 'stored', 'taken');
CREATE INDEX leases_to_repeat ON leases (ended_at) WHERE again = 1 AND next_ticket IS NULL;
CREATE TABLE changes (          -- every change of a lease's state, in order; never altered
    seq INTEGER PRIMARY KEY,
    ticket INTEGER NOT NULL,
    state TEXT NOT NULL,
    reason TEXT NOT NULL,
    step INTEGER,
    time REAL NOT NULL
);
CREATE TABLE steps (            -- every batch
    step INTEGER PRIMARY KEY,
    formed_at REAL NOT NULL,
    trained_at REAL,
    num_tokens INTEGER NOT NULL,
    tickets TEXT NOT NULL       -- JSON list in the batch's order; see json_each
);
CREATE TABLE replays (          -- groups that were trained before and trained once more
    step INTEGER NOT NULL,
    ticket INTEGER NOT NULL,
    PRIMARY KEY (step, ticket)
);
CREATE TABLE payloads (         -- groups that a restart needs
    arrival INTEGER PRIMARY KEY,
    ticket INTEGER NOT NULL UNIQUE,
    frame BLOB NOT NULL,        -- see wire/codec.py
    checksum INTEGER NOT NULL   -- of the frame
);
CREATE TABLE evaluations (
    version INTEGER NOT NULL,
    name TEXT NOT NULL,         -- of the block
    last_number INTEGER NOT NULL, -- of any lease when it began
    report TEXT,                -- JSON; null: not done
    is_lost INTEGER NOT NULL DEFAULT 0, -- 1: of a policy that a roll-back took away
    PRIMARY KEY (version, name)
);
CREATE TABLE rollbacks (        -- every time that a learner began at a step before the last
    seq INTEGER PRIMARY KEY,    -- of the last change before
    life INTEGER NOT NULL,
    time REAL NOT NULL,
    step INTEGER NOT NULL,      -- where it began
    former_step INTEGER NOT NULL, -- the next step until then
    num_groups INTEGER NOT NULL -- taken again: the next changes
);
CREATE TABLE lives (            -- every start of the buffer process
    life INTEGER PRIMARY KEY,
    started_at REAL NOT NULL
);
"""
PRAGMAS = (
    "page_size = 16384",  # a group has some 50 KB: with small pages it takes twice as long
    "journal_mode = WAL",
    "synchronous = NORMAL",
    "wal_autocheckpoint = 4000",  # pages
    "secure_delete = OFF",  # some builds overwrite what is deleted: a step's groups, at once
)
CHANGE = "INSERT INTO changes (ticket, state, reason, step, time) VALUES (?, ?, ?, ?, ?)"
ENDS = ("trained", "filtered", "expired", "failed", "evicted")
TIME_OF = {"stored": "arrived_at", "taken": "taken_at", **dict.fromkeys(ENDS, "ended_at")}
DAMAGED = "it is damaged: put a copy back, or start a new run directory"
REMEDIES = {
    "full": "free space there and start again: nothing committed is lost",
    "locked": "another process writes it, and only this run's buffer may; end that process",
    "not a database": DAMAGED,
    "malformed": DAMAGED,
}


class Ledger:
    """A journal.Journal in a file, open for writing."""

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.time) -> None:
        """Opens or begins the ledger of a run directory; LedgerError when that cannot be.

        ConfigError for that of another release: no restart of the buffer would help.
        """
        self._path, self._clock = run_dir / FILE, clock
        self._closing, self._aside = Event(), Thread(target=self._checkpoints, daemon=True)
        with _explained(self._path):
            self._db = sqlite3.connect(self._path, isolation_level=None, timeout=BUSY_SECONDS)
            for setting in PRAGMAS:
                self._db.execute(f"PRAGMA {setting}")
            if _version(self._db, self._path) == 0:
                self._db.executescript(f"BEGIN; {TABLES} PRAGMA user_version = {VERSION}; COMMIT;")
            (self.life,) = self._db.execute("SELECT count(*) + 1 FROM lives").fetchone()
        self._write("INSERT INTO lives VALUES (?, ?)", self.life, clock())

    def checkpoint_aside(self) -> None:
        """From now on a thread carries the log into the tables, so that no answer waits for it."""
        self._aside.start()

    def remembered(self) -> Remembered:
        with _explained(self._path):
            (fault,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
            if fault != "ok":
                raise sqlite3.DatabaseError(f"malformed: {' '.join(fault.split())}")
            return _remembered(self._db)

    def leased(self, lease: OpenLease) -> None:
        turn, prompt, now = lease.turn, lease.lease.prompt, self._clock()
        assert turn is not None, "evaluation leases are not in the ledger"
        self._write(
            "INSERT INTO leases (ticket, lease_id, position, epoch, prompt_id, data_source, peer,"
            " version, life, state, leased_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 'open', ?)",
            *(lease.ticket, lease.lease.lease_id, turn.position, turn.epoch, prompt.prompt_id),
            *(prompt.data_source, lease.peer, lease.lease.version, self.life, now),
        )
        self._write(CHANGE, lease.ticket, "open", "", None, now)
        if turn.former is not None:
            again = "UPDATE leases SET next_ticket = ? WHERE ticket = ?"
            self._write(again, lease.ticket, turn.former)

    def arrived(self, group: Group, *, keep: bool) -> None:
        lease_id = group.lease.lease_id
        span = group.completions.version_span if group.num_tokens else (None, None)
        self._write(
            "UPDATE leases SET arrived_at = ?, num_completions = ?, num_tokens = ?,"
            " reward_mean = ?, oldest_version = ?, newest_version = ?"
            " WHERE ticket = CAST(substr(?, 2) AS INTEGER) AND lease_id = ? AND num_tokens IS NULL",
            *(self._clock(), len(group.completions), group.num_tokens),
            *(group.mean_reward, *span, lease_id, lease_id),
        )
        if keep:
            keeping = "INSERT INTO payloads (ticket, frame, checksum) VALUES (?, ?, ?)"
            self._write(keeping, int(lease_id[1:]), *pack_group(group))

    def moved(
        self, tickets: Sequence[int], state: str, reason: str, step: int | None, again: bool
    ) -> None:
        now, time_of = self._clock(), TIME_OF[state]
        lease = (
            "UPDATE leases SET state = ?, reason = ?, step = coalesce(?, step), again = ?,"
            f" ended_at = NULL, {time_of} = ? WHERE ticket = ?"
        )
        self._write_all(CHANGE, [(ticket, state, reason, step, now) for ticket in tickets])
        self._write_all(lease, [(state, reason, step, again, now, ticket) for ticket in tickets])
        if state == "evicted":
            dropped = "DELETE FROM payloads WHERE ticket = ?"
            self._write_all(dropped, [(ticket,) for ticket in tickets])
        elif state == "taken":
            batch = json.dumps(tickets)
            self._write(
                "INSERT INTO steps (step, formed_at, num_tokens, tickets) SELECT ?, ?,"
                " sum(num_tokens), ? FROM leases JOIN json_each(?) ON ticket = value WHERE true"
                " ON CONFLICT (step) DO UPDATE SET trained_at = NULL",
                *(step, now, batch, batch),
            )
        elif state == "trained":
            self._write("UPDATE steps SET trained_at = ? WHERE step = ?", now, step)

    def covered(self, step: int) -> None:
        self._write(
            "DELETE FROM payloads WHERE ticket IN (SELECT ticket FROM payloads JOIN leases"
            " USING (ticket) WHERE state = 'trained' AND step < ?)",
            step,
        )

    def batches(self, step: int) -> Batches:
        with _explained(self._path):
            return _batches(
                self._db,
                "trained_at AND step >= ? AND NOT EXISTS (SELECT * FROM json_each(tickets)"
                " LEFT JOIN payloads ON ticket = value WHERE frame IS NULL)",
                step,
            )

    def replayed(self, step: int, tickets: Sequence[int]) -> None:
        self._write("DELETE FROM replays WHERE step = ?", step)
        self._write_all("INSERT INTO replays VALUES (?, ?)", [(step, t) for t in tickets])

    def replays(self, step: int) -> Batches:
        with _explained(self._path):
            return _replays(self._db, step)

    def began(self, step: int) -> None:
        self._write("UPDATE evaluations SET is_lost = 1 WHERE version > ?", step)
        self._write(
            "INSERT INTO rollbacks SELECT (SELECT max(seq) FROM changes), ?, ?, ?, former, num FROM"
            " (SELECT max(step) + 1 AS former, sum(json_array_length(tickets)) AS num FROM steps"
            " WHERE trained_at AND step >= ?) WHERE num",
            *(self.life, self._clock(), step, step),
        )

    def evaluating(self, version: int, name: str, last_number: int) -> None:
        begun = "REPLACE INTO evaluations (version, name, last_number) VALUES (?, ?, ?)"
        self._write(begun, version, name, last_number)

    def evaluated(self, report: Mapping[str, Any]) -> None:
        done = "UPDATE evaluations SET report = ? WHERE version = ? AND name = ?"
        self._write(done, json.dumps(report), report["version"], report["name"])

    def state(self, lease_id: str) -> str | None:
        """What a training lease is now, committed or not; None when it is unknown."""
        sql = "SELECT state FROM leases WHERE lease_id = ? AND ticket = ?"
        with _explained(self._path):
            row = self._db.execute(sql, (lease_id, lease_id[1:])).fetchone()
        return row and str(row[0])

    def counts(self) -> Mapping[str, int]:
        counted = (
            "SELECT state, count(*) FROM leases WHERE state IN ('open', 'stored', 'taken')"
            " GROUP BY state"
        )
        with _explained(self._path):
            return {"open": 0, "stored": 0, "taken": 0, **dict(self._db.execute(counted))}

    def commit(self) -> None:
        """Makes everything noted since the last commit durable, or nothing of it."""
        if self._db.in_transaction:
            with _explained(self._path):
                self._db.execute("COMMIT")

    def copy_to(self, path: Path) -> None:
        """Writes all that is committed into another file."""
        with _explained(path), closing(sqlite3.connect(path)) as copy:
            self._db.backup(copy)

    def close(self) -> None:
        """Leaves a single file that can be read anywhere. What is not committed is lost."""
        self._closing.set()
        if self._aside.is_alive():
            self._aside.join()
        with suppress(sqlite3.OperationalError):  # somebody reads: then the log stays beside it
            self._db.execute("PRAGMA journal_mode = DELETE")
        self._db.close()

    def _checkpoints(self) -> None:
        with closing(sqlite3.connect(self._path)) as db:
            while not self._closing.wait(CHECKPOINT_SECONDS):
                db.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def _write(self, sql: str, *values: Any) -> None:
        self._write_all(sql, [values])

    def _write_all(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        try:  # a context manager would take as long as a statement
            if not self._db.in_transaction:
                self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(sql, rows)
        except sqlite3.Error as error:
            raise _explanation(self._path, error) from error


def put_back(copy: Path, run_dir: Path) -> None:
    """Makes a copy that `copy_to` wrote the ledger of a run directory again."""
    for end in ("-wal", "-shm"):  # the log of the file that goes would be read into the copy
        (run_dir / f"{FILE}{end}").unlink(missing_ok=True)
    shutil.copy(copy, run_dir / FILE)


class LedgerReader:
    """Questions to one moment of a ledger, also while the buffer writes on. Changes nothing."""

    def __init__(self, run_dir: Path, timeout_seconds: float = 60.0) -> None:
        """ConfigError: no ledger, or another release's; LedgerError when it cannot be read."""
        self._path, self._timeout_seconds = run_dir / FILE, timeout_seconds
        if not self._path.is_file():
            raise ConfigError(f"{run_dir} holds no {FILE}; give the directory of a run")
        with _explained(self._path):
            address = f"file:{quote(str(self._path.absolute()))}?mode=ro"
            self._db = sqlite3.connect(address, uri=True, isolation_level=None)
            self._db.execute("BEGIN")
            _version(self._db, self._path)
        self._deadline = float("inf")
        self._db.set_progress_handler(lambda: time.monotonic() > self._deadline, PROGRESS_STEPS)

    def add_table(self, table: str, rows: Iterable[Sequence[Any]]) -> None:
        """Puts rows beside the ledger's tables, for this reader only; table: "name (columns)"."""
        self._db.execute(f"CREATE TEMP TABLE {table}")
        places = ", ".join("?" for _ in table.split(","))
        self._db.executemany(f"INSERT INTO {table} VALUES ({places})", rows)

    def query(
        self, sql: str, values: Sequence[Any] | Mapping[str, Any] = ()
    ) -> tuple[list[str], list[tuple[Any, ...]]]:
        """Column names and rows. ConfigError: not a question; LedgerError: it took too long."""
        self._deadline = time.monotonic() + self._timeout_seconds
        try:
            found = self._db.execute(sql, values)
            return [column[0] for column in found.description or ()], found.fetchall()
        except (sqlite3.Error, sqlite3.Warning) as error:
            if str(error) == "interrupted":
                limit = f"{self._timeout_seconds:g} s"
                raise LedgerError(f"the question took longer than {limit}: {sql}") from None
            raise ConfigError(f"{error}: {sql}; `asyncgrpo ledger RUN` lists the tables") from None

    def batches(self, first: int, last: int) -> dict[int, list[Group]]:
        """Groups of the steps whose groups are all still kept, in the batch's order."""
        found = _batches(
            self._db,
            "step BETWEEN ? AND ? AND NOT EXISTS (SELECT 1 FROM json_each(tickets)"
            " LEFT JOIN payloads ON ticket = value WHERE frame IS NULL)",
            *(first, last),
        )
        added = _replays(self._db, first)
        whole = {step: [*batch, *added.get(step, ())] for step, batch in found.items()}
        return {step: [group for _, group in batch] for step, batch in whole.items()}

    def close(self) -> None:
        self._db.close()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise _explanation(path, error) from error


def _explanation(path: Path, error: sqlite3.Error) -> LedgerError:
    usual = "the file and its folder must be readable and writable"
    remedy = next((r for word, r in REMEDIES.items() if word in str(error)), usual)
    return LedgerError(f"ledger {path}: {error}; {remedy}")


def _version(db: sqlite3.Connection, path: Path) -> int:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version not in (0, VERSION):
        raise ConfigError(
            f"ledger {path} has tables of version {version}, not {VERSION}: use the "
            "release of asyncgrpo that wrote it"
        )
    return int(version)


def _remembered(db: sqlite3.Connection) -> Remembered:
    past = Counter[str]()
    counts, reasons = Counter[str](), Counter[str]()
    for state, reason, leases, position, ticket, groups, tokens, reward in db.execute(
        "SELECT state, reason, count(*), max(position), max(ticket), count(num_tokens),"
        " total(num_tokens), total(reward_mean) FROM leases GROUP BY state, reason"
    ):
        counts[state] += leases
        if reason:
            reasons[f"{state}/{reason}"] += leases
        past["position"] = max(past["position"], position + 1)
        past["number"] = max(past["number"], ticket)
        if state not in ("expired", "failed"):  # their groups came too late
            past.update(groups=groups, tokens=tokens, reward=reward)
        if state not in ("expired", "failed", "filtered"):
            past.update(groups_stored=groups, tokens_stored=tokens)
    evaluations = db.execute("SELECT * FROM evaluations").fetchall()
    trained = "SELECT coalesce(max(step) + 1, 0) FROM steps WHERE trained_at IS NOT NULL"
    (step,) = db.execute(trained).fetchone()
    (former_step,) = db.execute("SELECT coalesce(max(former_step), 0) FROM rollbacks").fetchone()
    return Remembered(
        counts=counts,
        reasons=reasons,
        arrived={name: past[name] for name in ("groups", "tokens", "reward")},
        last_number=max([past["number"], *(number for _, _, number, *_ in evaluations)]),
        position=past["position"],
        step=step,
        last_step=max(step, former_step),
        num_formed=db.execute("SELECT count(*) FROM steps").fetchone()[0],
        groups_stored=past["groups_stored"],
        tokens_stored=int(past["tokens_stored"]),
        held=db.execute(
            "SELECT ticket, position, prompt_id, peer, version FROM leases WHERE state = 'open'"
            " ORDER BY ticket"
        ).fetchall(),
        again=db.execute(
            "SELECT position, prompt_id, ticket FROM leases WHERE again = 1"
            " AND next_ticket IS NULL ORDER BY ended_at, ticket"
        ).fetchall(),
        stored=_groups(
            db,
            "SELECT ticket, frame, checksum FROM leases LEFT JOIN payloads USING (ticket)"
            " WHERE state = 'stored' ORDER BY arrival",
        ),
        batches=_batches(db, "trained_at IS NULL"),
        replays=_replays(db, step),
        uses=dict(
            db.execute(
                "SELECT ticket, count(*) FROM replays JOIN payloads USING (ticket) GROUP BY ticket"
            ).fetchall()
        ),
        reports={
            (version, name): report and json.loads(report)
            for version, name, _, report, is_lost in evaluations
            if not is_lost
        },
    )


def _batches(db: sqlite3.Connection, which: str, *values: Any) -> Batches:
    batch = (
        "SELECT value, frame, checksum FROM json_each(?) LEFT JOIN payloads ON ticket = value"
        " ORDER BY key"
    )
    rows = db.execute(f"SELECT step, tickets FROM steps WHERE {which} ORDER BY step", values)
    return {step: _groups(db, batch, tickets) for step, tickets in rows.fetchall()}


def _replays(db: sqlite3.Connection, step: int) -> Batches:
    added = (
        "SELECT ticket, frame, checksum FROM replays LEFT JOIN payloads USING (ticket)"
        " WHERE step = ? ORDER BY ticket"
    )
    steps = db.execute("SELECT DISTINCT step FROM replays WHERE step >= ?", (step,)).fetchall()
    return {number: _groups(db, added, number) for (number,) in steps}


def _groups(db: sqlite3.Connection, sql: str, *values: Any) -> list[tuple[int, Group]]:
    found = []
    for ticket, frame, checksum in db.execute(sql, values):
        try:
            group = group_from(checked(frame or b"", checksum))
        except WireError as error:
            raise sqlite3.DatabaseError(f"malformed group of lease t{ticket}: {error}") from None
        found.append((ticket, group))
    return found
