"""One bad file stops no sweep: it is named and set apart, and every command goes on with the rest."""

import errno
import json
import math
import os

import pytest

from orchestrator.compare.runs import find_run
from orchestrator.expansion import expand
from orchestrator.planning.early_stopping import EarlyStopping, Rungs
from orchestrator.planning.planner import plan_trials
from orchestrator.records import cancellation
from orchestrator.records.events import Finished, Started, Step
from orchestrator.records.json_files import write_json
from orchestrator.records.storage import Storage
from orchestrator.records.trial_record import TrialRecord
from orchestrator.reporting.overview import Overview
from orchestrator.run_options import RunOptions
from orchestrator.spec import SweepSpec
from orchestrator.status import as_json, status
from orchestrator.trial_spec import Identities
from tests.support.events import a_step
from tests.support.plans import an_estimator

SPEC = SweepSpec(context_lengths=(1024,), methods=("lora", "lora+"), references=(), steps=9, eval_every=3)
MINE, OTHER = expand(SPEC, Identities(model="m", tokenizer="t", data="d"), "float32").trials


@pytest.fixture
def storage(tmp_path):
    """Two finished sweeps of a trial each."""
    storage = Storage.open(str(tmp_path / "runs"))
    for name, trial in (("mine", MINE), ("other", OTHER)):
        folder = storage.add_trial(trial)
        for event in (Started(hardware="here"), Step(**a_step(1)), Finished()):
            folder.journal.append(event)
        storage.write(f"sweeps/{name}/sweep.json", {"name": name, "trials": [trial.fingerprint]})
        storage.write(
            f"sweeps/{name}/plan.json", {"trials": [{"fingerprint": trial.fingerprint, "label": trial.label}]}
        )
    return storage


def everything_goes_on(storage, named):
    """The plan and the status of ``mine`` are as ever, and what is damaged is named."""
    (planned,) = plan_trials([MINE], storage, an_estimator())
    assert planned.action == "known"
    overview = Overview(storage)
    shown = as_json(overview)
    (mine,) = (sweep for sweep in shown["sweeps"] if sweep["name"] == "mine")
    assert [trial["state"] for trial in mine["trials"]] == ["finished"]
    status(overview, None, 120)
    assert find_run(MINE.fingerprint, storage).trial == MINE
    assert any(named in what for what in shown["damaged"])


LINES = {
    "a number": b"12",
    "null": b"null",
    "a list": b"[]",
    "no event": b'{"time": 1}',
    "no time": b'{"event": "finished"}',
    "no fields": b'{"event": "step", "time": 1}',
    "a time beyond all clocks": b'{"event": "finished", "time": 1e300}',
    "a word for a number": json.dumps({"event": "step", "time": 1, **a_step(2), "step": "two"}).encode(),
    "no number": json.dumps({"event": "step", "time": 1, **a_step(2), "seconds": None}).encode(),
    "too many digits": b'{"event": "saved", "time": 1, "step": ' + b"9" * 5000 + b"}",
    "a huge number": b'{"event": "saved", "time": 1, "step": ' + b"9" * 400 + b"}",
    "scores of other documents": (
        b'{"event": "eval", "time": 1, "step": 1, "tokens": 1, "context_length": 1024, "perplexity": 1.0,'
        b' "nll": [1.0], "num_tokens": [1, 2]}'
    ),
    "deep": b"[" * 100_000,
    "bytes": bytes(range(128, 256)),
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
@pytest.mark.parametrize("trial", [MINE, OTHER], ids=["own", "another sweep's"])
def test_a_damaged_line_of_a_journal(storage, line, trial):
    with storage.trial(trial.fingerprint).journal.path.open("ab") as journal:
        journal.write(line + b"\n")
    everything_goes_on(storage, f"trials/{trial.fingerprint}/journal.jsonl: 1 line is damaged")
    record = TrialRecord.of(storage.trial(trial.fingerprint).journal)
    assert (record.state, record.last_step, math.isfinite(record.heard)) == ("finished", 1, True)


def test_a_line_that_a_killed_process_cut_off_is_no_damage(storage):
    with storage.trial(MINE.fingerprint).journal.path.open("ab") as journal:
        journal.write(b'{"event": "st\n')
    record = TrialRecord.of(storage.trial(MINE.fingerprint).journal)
    assert (record.state, record.last_step, record.damage) == ("finished", 1, None)


BROKEN = {"empty": b"", "no JSON": b"{", "null": b"null", "a list": b"[1]", "no fields": b"{}", "deep": b"[" * 100_000}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("file", ["sweep.json", "command.json", "plan.json"])
def test_a_damaged_file_of_another_sweep(storage, file, content):
    (storage.root / "sweeps" / "other" / file).write_bytes(content)
    everything_goes_on(storage, f"sweeps/other/{file}")


@pytest.mark.parametrize("content", [None, *BROKEN.values()], ids=["missing", *BROKEN])
def test_a_trial_without_its_trial_json(storage, content):
    path = storage.trial(OTHER.fingerprint).path / "trial.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    everything_goes_on(storage, OTHER.fingerprint)
    (trial,) = Overview(storage).sweep("other").trials
    assert (trial.state, trial.label) == ("damaged", OTHER.label) and "trial.json" in trial.why


def test_a_list_that_leads_out_of_the_storage(storage):
    write_json(storage.root / "sweeps" / "other" / "sweep.json", {"trials": ["../../elsewhere"]})
    everything_goes_on(storage, "../../elsewhere")


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_damaged_request_to_cancel_is_a_request(storage, content):
    (storage.trial(MINE.fingerprint).path / "cancel.json").write_bytes(content)
    assert cancellation.pending_request(storage, f"trials/{MINE.fingerprint}")["by"]


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_damaged_rung_counts_as_none(storage, content):
    rungs = Rungs(storage, "mine", EarlyStopping.of(RunOptions(early_stopping="asha", min_trials=2), SPEC))
    file = storage.root / rungs.file(OTHER, 3)
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert rungs.judge(MINE, 3, {3: 5.0})["compared_with"] == {}
    assert rungs.judge(OTHER, 3, {3: 4.0})["compared_with"] == {MINE.fingerprint: 5.0}  # written again


def test_a_replaced_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """After the machine stops there is the earlier content or the new one, and no empty file."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    write_json(tmp_path / "a.json", {"first": 1})
    (file, folder) = synced
    assert (os.path.dirname(file), folder) == (str(tmp_path), str(tmp_path))

    def full(descriptor):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_json(tmp_path / "a.json", {"second": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"first": 1}
