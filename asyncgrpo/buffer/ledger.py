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

from asyncgrpo.buffer.journal import Batch, Journal, Remembered
from asyncgrpo.buffer.leases import OpenLease
from asyncgrpo.errors import ConfigError, LedgerError, WireError
from asyncgrpo.types import Group
from asyncgrpo.wire.codec import checked, group_from, pack_group

FILE = "ledger.sqlite"
VERSION = 4  # of the tables and of the frames in them
BUSY_SECONDS, CHECKPOINT_SECONDS = 5.0, 0.5
TABLES = Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
# batches of some steps whose groups are all still there
KEPT = (
    "step BETWEEN ?1 AND ?2 AND step NOT IN (SELECT step FROM batches"
    " LEFT JOIN payloads USING (ticket) WHERE step BETWEEN ?1 AND ?2 AND frame IS NULL)"
)
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


class Ledger(Journal):
    """A journal in a file, open for writing."""

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.time) -> None:
        """Opens or begins a run's ledger; LedgerError or, of another release, ConfigError."""
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
        elif state == "trained":
            self._write("UPDATE steps SET trained_at = ? WHERE step = ?", now, step)

    def formed(self, step: int, batch: Batch) -> None:
        self._write(
            "INSERT INTO steps (step, formed_at, tickets, num_new) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (step) DO UPDATE SET trained_at = NULL",
            *(step, self._clock(), json.dumps(batch.tickets), batch.num_new),
        )

    def covered(self, step: int) -> None:
        self._write(
            "DELETE FROM payloads WHERE ticket IN (SELECT ticket FROM payloads JOIN leases"
            " USING (ticket) WHERE state = 'trained' AND step < ?)",
            step,
        )

    def batches(self, first: int, last: int) -> dict[int, Batch]:
        with _explained(self._path):
            return _batches(self._db, KEPT, first, last)

    def began(self, step: int) -> None:
        self._write("UPDATE evaluations SET is_lost = 1 WHERE version > ?", step)
        self._write(
            "INSERT INTO changes (ticket, state, reason, step, time)"
            " SELECT ticket, 'returned', '', step, ? FROM batches"
            " WHERE step >= ? AND trained_at IS NOT NULL AND is_new ORDER BY step, place",
            *(self._clock(), step),
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

    def __init__(self, run_dir: Path) -> None:
        """ConfigError: there is no ledger, or one of another release; LedgerError: it is broken."""
        self._path = run_dir / FILE
        if not self._path.is_file():
            raise ConfigError(f"{run_dir} holds no {FILE}; give the directory of a run")
        with _explained(self._path):
            address = f"file:{quote(str(self._path.absolute()))}?mode=ro"
            self._db = sqlite3.connect(address, uri=True, isolation_level=None)
            self._db.execute("BEGIN")
            _version(self._db, self._path)

    def add_table(self, table: str, rows: Iterable[Sequence[Any]]) -> None:
        """Puts rows beside the ledger's tables, for this reader only; table: "name (columns)"."""
        self._db.execute(f"CREATE TEMP TABLE {table}")
        places = ", ".join("?" for _ in table.split(","))
        self._db.executemany(f"INSERT INTO {table} VALUES ({places})", rows)

    def query(
        self, sql: str, values: Sequence[Any] | Mapping[str, Any] = ()
    ) -> tuple[list[str], list[tuple[Any, ...]]]:
        """Column names and rows. ConfigError when it is not a question."""
        try:
            found = self._db.execute(sql, values)
            return [column[0] for column in found.description or ()], found.fetchall()
        except (sqlite3.Error, sqlite3.Warning) as error:
            raise ConfigError(f"{error}: {sql}; `asyncgrpo ledger RUN` lists the tables") from None

    def batches(self, first: int, last: int) -> dict[int, list[Group]]:
        """Groups of the steps whose groups are all still kept, in the batch's order."""
        found = _batches(self._db, KEPT, first, last)
        return {step: list(batch.groups) for step, batch in found.items()}

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
            "release of asyncgrpo that wrote it, or start another run"
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
    ((step, last_step),) = db.execute(
        "SELECT coalesce(max(step) FILTER (WHERE trained_at IS NOT NULL) + 1, 0),"
        " coalesce(max(step) + 1, 0) FROM steps"
    )
    return Remembered(
        counts=counts,
        reasons=reasons,
        arrived={name: past[name] for name in ("groups", "tokens", "reward")},
        last_number=max([past["number"], *(number for _, _, number, *_ in evaluations)]),
        position=past["position"],
        step=step,
        last_step=last_step,
        groups_stored=past["groups_stored"],
        tokens_stored=int(past["tokens_stored"]),
        held=db.execute(
            "SELECT ticket, position, prompt_id, peer, version FROM leases WHERE state = 'open'"
            " ORDER BY ticket"
        ).fetchall(),
        again=db.execute(
            "SELECT position, prompt_id FROM (SELECT *, max(ticket) FROM leases WHERE position IN"
            " (SELECT position FROM leases WHERE again = 1) GROUP BY position)"
            " WHERE again = 1 ORDER BY ended_at, ticket"
        ).fetchall(),
        stored=[
            (ticket, _group(ticket, *sealed))
            for ticket, *sealed in db.execute(
                "SELECT ticket, frame, checksum FROM leases LEFT JOIN payloads USING (ticket)"
                " WHERE state = 'stored' ORDER BY arrival"
            )
        ],
        batches=_batches(db, "trained_at IS NULL"),
        uses=dict(
            db.execute(
                "SELECT ticket, count(*) FROM batches WHERE NOT is_new AND step >="
                " (SELECT min(step) FROM leases JOIN payloads USING (ticket)) GROUP BY ticket"
            ).fetchall()
        ),
        reports={
            (version, name): report and json.loads(report)
            for version, name, _, report, is_lost in evaluations
            if not is_lost
        },
    )


def _batches(db: sqlite3.Connection, which: str, *values: Any) -> dict[int, Batch]:
    found: dict[int, list[tuple[int, Group, bool]]] = {}
    for step, ticket, is_new, *sealed in db.execute(
        "SELECT step, ticket, is_new, frame, checksum FROM batches LEFT JOIN payloads"
        f" USING (ticket) WHERE {which} ORDER BY step, place",
        values,
    ):
        found.setdefault(step, []).append((ticket, _group(ticket, *sealed), is_new))
    columns = {step: tuple(zip(*rows, strict=True)) for step, rows in found.items()}
    return {
        step: Batch(tickets=tickets, groups=groups, num_new=sum(are_new))
        for step, (tickets, groups, are_new) in columns.items()
    }


def _group(ticket: int, frame: bytes | None, checksum: int) -> Group:
    try:
        return group_from(checked(frame or b"", checksum))
    except WireError as error:
        raise sqlite3.DatabaseError(f"malformed group of lease t{ticket}: {error}") from None
