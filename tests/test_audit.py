"""The audit finds every lie, damage is noticed, and any question can be asked."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sqlite3

import pytest
from fakes import make_run
from test_ledger import Killed
from typer.testing import CliRunner

from asyncgrpo.buffer.ledger import FILE, Ledger, LedgerReader
from asyncgrpo.cli import app
from asyncgrpo.errors import ConfigError, LedgerError
from asyncgrpo.observe.trajectories import TrajectoryWriter


@pytest.fixture(scope="module")
def halted(tmp_path_factory):
    """The directory of a run that was rolled back once, from step 5 to step 3, and was killed with
    groups stored and a batch taken.
    """
    folder = tmp_path_factory.mktemp("halted")
    run = Killed(5, folder, kill_share=0.004, run={"max_steps": 8}, data={"epochs": 20})
    make_run(folder, run.config)
    run.record = TrajectoryWriter(folder, run.config)
    run.rewind = lambda step: run.record.rewind(step, run.ledger.state)
    run.core = run.new_core()
    run.restart_learner = lambda step: None
    while run.core.step < 5:
        run.act()
    Killed.restart_learner(run, 3)
    while run.core.step < 6 or len(run.core.replay) < 3:
        run.act()
        run.shards = {step: ranks for step, ranks in run.shards.items() if step < 6}
    run.ledger.close()
    return folder


def spoilt(halted, folder, sql="", edit=None):
    """A copy of the run in which somebody changed something."""
    copy = shutil.copytree(halted, folder / "copy")
    if sql:
        database = sqlite3.connect(copy / FILE)
        assert database.execute(sql).rowcount != 0, sql
        database.commit()
        database.close()
    if edit:
        edit(copy / "trajectories")
    return copy


def change_row(change):
    """Edits the last row of step 2, which is trained, with a function from the row to rows."""

    def edit(folder):
        file = folder / "step_2.jsonl"
        *others, last = map(json.loads, file.read_text().splitlines())
        assert last["status"] == "trained"
        file.write_text("".join(json.dumps(row) + "\n" for row in [*others, *change(last)]))

    return edit


SOME = "(SELECT min(ticket) FROM leases WHERE state = 'trained' AND step = 3)"
LIES = {
    "a second training": (
        f"INSERT INTO changes (ticket, state, reason, time) VALUES ({SOME}, 'trained', '', 0)",
        {"one state", "trained once"},
    ),
    "a roll-back that nobody noted": (
        "DELETE FROM changes WHERE state = 'returned'",
        {"one state", "trained once"},
    ),
    "in two batches": (
        f"UPDATE steps SET tickets = json_insert(tickets, '$[#]', {SOME}),"
        " num_new = num_new + 1 WHERE step = 4",
        {"trained once", "steps"},
    ),
    "a stale token": (
        f"UPDATE leases SET oldest_version = step - 3 WHERE ticket = {SOME}",
        {"staleness"},
    ),
    "a missing lease": (
        f"DELETE FROM leases WHERE ticket = {SOME}",
        {"one state", "steps", "trajectories", "epochs"},
    ),
    "another end": (
        f"UPDATE leases SET state = 'evicted' WHERE ticket = {SOME}",
        {"one state", "steps", "trajectories"},
    ),
    "no history": (f"DELETE FROM changes WHERE ticket = {SOME}", {"one state"}),
    "a lost group": (
        "DELETE FROM payloads WHERE ticket IN (SELECT max(ticket) FROM leases"
        " WHERE state = 'stored')",
        {"nothing lost"},
    ),
    "a prompt that went out twice": (
        f"UPDATE leases SET position = 1 WHERE ticket = {SOME}",
        {"epochs"},
    ),
    "an epoch without a prompt": (
        "UPDATE leases SET epoch = 1 WHERE position = 0",
        {"epochs"},
    ),
    "a missing step": ("DELETE FROM steps WHERE step = 3", {"steps"}),
    "too many epochs": (
        "UPDATE leases SET epoch = 20 WHERE ticket = (SELECT max(ticket) FROM leases)",
        {"epochs"},
    ),
    "a prompt that went out again though it had brought a group": (
        "UPDATE leases SET again = 0 WHERE again = 1",
        {"epochs"},
    ),
    "an unknown row": (
        change_row(lambda row: [row, {**row, "lease_id": "t900"}]),
        {"trajectories"},
    ),
    "no lease at all": (change_row(lambda row: [row, {**row, "lease_id": "x"}]), {"trajectories"}),
    "a lost row": (change_row(lambda row: []), {"trajectories"}),
    "a repeated row": (change_row(lambda row: [row, row]), {"trajectories"}),
    "an old row": (change_row(lambda row: [{**row, "staleness": 3}]), {"staleness"}),
    "a step from nowhere": (
        lambda folder: (folder / "step_8.jsonl").write_text(""),
        {"trajectories"},
    ),
    "a lost step": (lambda folder: (folder / "step_1.jsonl").unlink(), {"trajectories"}),
}


def test_the_audit_of_a_killed_run_is_green_and_shows_what_is_open(halted):
    result = CliRunner().invoke(app, ["audit", str(halted)])
    assert result.exit_code == 0, result.output
    assert "WRONG" not in result.output
    assert "6 steps trained" in result.output
    assert "2 steps rolled back and given again, in 1 roll-backs" in result.output
    for state in ("open", "stored", "trained", "filtered"):
        assert f" {state}" in result.output
    assert re.search(r"filtered completions are \d+% (short|long)er than trained", result.output)


def test_what_a_killed_buffer_wrote_and_did_not_commit_is_not_wrong(halted, tmp_path):
    """Step 6 was trained, and something became too old for step 7, in one turn."""
    copy = spoilt(halted, tmp_path, edit=lambda folder: (folder / "step_7.jsonl").write_text(""))
    assert CliRunner().invoke(app, ["audit", str(copy)]).exit_code == 0


@pytest.mark.parametrize("lie", LIES)
def test_the_audit_finds(lie, halted, tmp_path):
    change, checks = LIES[lie]
    copy = spoilt(
        halted, tmp_path, **({"sql": change} if isinstance(change, str) else {"edit": change})
    )
    result = CliRunner().invoke(app, ["audit", str(copy), "--json"])
    assert result.exit_code == 1
    assert set(json.loads(result.output)["wrong"]) == checks


def test_the_same_prompt_trained_at_two_steps_of_the_trajectories_is_found(halted, tmp_path):
    def copy_row(folder):
        row = (folder / "step_2.jsonl").read_text().splitlines()[-1]
        with (folder / "step_3.jsonl").open("a") as file:
            file.write(row + "\n")

    copy = spoilt(halted, tmp_path, edit=copy_row)
    result = CliRunner().invoke(app, ["audit", str(copy)])
    assert result.exit_code == 1
    assert re.search(
        r"WRONG trained once.*\n +t\d+ is in the trajectories of steps 2,3", result.output
    )


# -- questions ----------------------------------------------------------------------------------


def ask(folder, *arguments):
    return CliRunner().invoke(app, ["ledger", str(folder), *arguments])


def test_any_question_can_be_asked_and_the_answer_has_two_forms(halted):
    sql = "SELECT state, count(*) AS n FROM leases WHERE step = 2 GROUP BY state"
    assert json.loads(ask(halted, "--sql", sql, "--json").output) == [{"state": "trained", "n": 4}]
    assert ask(halted, "--sql", sql).output.split() == ["state", "n", "trained", "4"]
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_DFL


def test_without_a_question_the_tables_are_shown_with_their_meaning(halted):
    shown = ask(halted).output
    tables = "SELECT name FROM sqlite_master WHERE type = 'table'"
    names = {name for (name,) in LedgerReader(halted).query(tables)[1]}
    assert names == {
        "leases",
        "changes",
        "steps",
        "payloads",
        "evaluations",
        "lives",
    }
    assert all(f"CREATE TABLE {name} (" in shown for name in names)
    assert "-- policy version that the actor held then" in shown


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("DELETE FROM leases", "readonly"),
        ("SELECT colour FROM leases", "no such column: colour: SELECT"),
        ("SELECT 1; SELECT 2", "one statement"),
    ],
)
def test_what_is_no_question_is_refused(sql, message, halted):
    with pytest.raises(ConfigError, match=message):
        LedgerReader(halted).query(sql)


def test_a_folder_without_a_ledger_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no ledger.sqlite; give the directory of a run"):
        LedgerReader(tmp_path)


def test_a_reader_sees_one_moment_while_the_buffer_writes_on(tmp_path):
    run = Killed(1, tmp_path, kill_share=1e-9)
    while run.core.leases.counts["stored"] < 2:
        run.act()
    reader = LedgerReader(tmp_path)
    before = reader.query("SELECT count(*) FROM changes")
    for _ in range(40):
        run.act()
    assert reader.query("SELECT count(*) FROM changes") == before
    assert LedgerReader(tmp_path).query("SELECT count(*) FROM changes")[1] > before[1]
    run.ledger.close()


# -- damage --------------------------------------------------------------------------------------


def test_pages_that_were_overwritten_are_noticed(halted, tmp_path):
    file = shutil.copytree(halted, tmp_path / "copy") / FILE
    where = "SELECT rootpage FROM sqlite_master WHERE name = 'changes'"  # not needed to restart
    ((page,),) = LedgerReader(halted).query(where)[1]
    with file.open("r+b") as raw:
        raw.seek((page - 1) * 16384)
        raw.write(b"\x55" * 16384)
    with pytest.raises(LedgerError, match=r"malformed.*; it is damaged"):
        Ledger(file.parent).remembered()


@pytest.mark.parametrize("sql", ["UPDATE payloads SET frame = x'00'", "DELETE FROM payloads"])
def test_a_lost_or_damaged_group_is_refused_with_its_lease(sql, halted, tmp_path):
    copy = spoilt(halted, tmp_path, sql)
    with pytest.raises(LedgerError, match=r"malformed group of lease t\d+"):
        Ledger(copy).remembered()
