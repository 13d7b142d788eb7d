"""``python -m orchestrator.compare``: what differs between runs, before which is better."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from orchestrator.compare import __main__ as command
from orchestrator.compare.runs import find_run
from orchestrator.expansion import expand
from orchestrator.records.events import Eval, Finished, Started, Step
from orchestrator.records.json_files import write_json
from orchestrator.records.storage import Storage
from orchestrator.spec import SweepSpec
from orchestrator.trial_spec import Identities
from tests.support.commands import ROOT
from tests.support.events import TOKENS, a_step, document_evaluation
from workloads.errors import InputError
from workloads.evaluation.intervals import gap_interval

MACHINE = {
    "hardware": "1 x NVIDIA L4", "device": "gpu", "devices": 1, "device_name": "NVIDIA L4", "workers": 1, "host": "a",
    "git_commit": "abc", "packages": {"torch": "2.11.0", "ray": "2.60.0"}, "execution": {"micro_batch": None},
}  # fmt: skip


def add(storage, perplexities, data="d", finished=True, machine=MACHINE, **fields):
    """A trial with its journal: ``perplexities`` by step; ``fields`` of the sweep."""
    spec = SweepSpec(**{"context_lengths": (1024,), "methods": ("lora",), "references": (), **fields})
    (trial,) = expand(spec, Identities(model="m", tokenizer="t", data=data), "float32").trials
    folder = storage.add_trial(trial)
    folder.journal.append(Started(**machine))
    for step, perplexity in perplexities.items():
        event = document_evaluation(step, perplexity, trial.training.context_length)
        event["nll"] = (np.array(event["nll"]) + 0.001 * TOKENS * np.sin(step + np.arange(6))).tolist()
        folder.journal.append(Eval(**event))
    folder.journal.append(Step(**a_step(max(perplexities)) | {"seconds": 3600.0}))
    if finished:
        folder.journal.append(Finished())
    return trial


@pytest.fixture
def storage(tmp_path):
    return Storage.open(str(tmp_path / "runs"))


@pytest.fixture
def pair(storage):
    """Two trials that differ in their learning rate, and by accident in a package, the machine and its number."""
    slow = add(storage, {0: 10.0, 10: 3.0, 20: 2.6})
    other = MACHINE | {"packages": {"torch": "2.13.0", "ray": "2.60.0"}, "host": "b", "driver": "580.65.06"}
    fast = add(storage, {0: 10.0, 10: 2.9, 20: 2.5}, learning_rate_lora=4e-5, machine=other)
    write_json(storage.sweep("rates") / "sweep.json", {"name": "rates", "trials": [slow.fingerprint]})
    return slow, fast


def compared(capsys, storage, *runs):
    assert command.main([*runs, "--storage", str(storage.root), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_differs_is_all_that_differs(storage, pair, capsys):
    found = compared(capsys, storage, *(trial.fingerprint for trial in pair))
    assert {(one["section"], one["field"]): one["values"] for one in found["differences"]} == {
        ("training", "learning_rate"): [2e-5, 4e-5],
        ("packages", "torch"): ["2.11.0", "2.13.0"],
        ("machine", "host"): ["a", "b"],
        ("machine", "driver"): [None, "580.65.06"],
    }
    assert found["same"]["training"] > 20 and found["same"]["packages"] == 1


def test_the_curves_stand_side_by_side_with_the_paired_gap(storage, pair, capsys):
    found = compared(capsys, storage, *(trial.fingerprint for trial in pair))
    assert [row["step"] for row in found["curve"]] == [0, 10, 20]
    curves = [find_run(trial.fingerprint, storage).record.curve(1024) for trial in pair]
    for row, ours, theirs in zip(found["curve"], *curves[::-1]):
        (gap,), expected = row["gaps"], gap_interval(ours.scores, theirs.scores)
        assert [gap["low"], gap["high"]] == pytest.approx([100 * expected.low, 100 * expected.high])
    assert found["winner"] == 1
    assert "lora 1024" in found["verdict"][0] and "4.00% above" in found["verdict"][0]
    assert found["verdict"][-1].endswith("is better.")


def test_a_person_reads_the_differences_before_the_verdict(storage, pair):
    arguments = [sys.executable, "-m", "orchestrator.compare", *(trial.fingerprint[:6] for trial in pair)]
    done = subprocess.run(
        [*arguments, "--storage", str(storage.root)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    places = [done.stdout.index(text) for text in ("What differs", "learning_rate", "Perplexity", "is better.")]
    assert places == sorted(places)
    assert "A  lora 1024" in done.stdout and "1 GPU hours" in done.stdout


@pytest.mark.parametrize("what", [{"data": "other"}, {"eval_documents": 50}, {"eval_span": 2048}])
def test_no_winner_where_other_documents_were_scored(storage, pair, capsys, what):
    other = add(storage, {0: 9.0, 20: 1.5}, **what)
    found = compared(capsys, storage, pair[0].fingerprint, other.fingerprint)
    assert found["winner"] is None and not found["scored_on_the_same_documents"]
    assert all(gap is None for row in found["curve"] for gap in row["gaps"])
    assert "No winner" in found["verdict"][-1] and "differs" in found["verdict"][-1]


def test_no_winner_where_the_documents_do_not_tell_them_apart(storage, pair, capsys):
    alike = add(storage, {0: 10.0, 20: 2.6}, learning_rate_lora=3e-5)
    with find_run(alike.fingerprint, storage).record.journal.path.open("a") as journal:
        event = document_evaluation(20, 2.6, 1024)
        event["nll"] = (np.array(event["nll"]) + TOKENS * np.array([0.05, -0.05, 0.04, -0.06, 0.03, -0.02])).tolist()
        journal.write(json.dumps({"event": "eval", "time": 0.0, **event}) + "\n")
    found = compared(capsys, storage, pair[0].fingerprint, alike.fingerprint)
    assert found["winner"] is None
    assert "not distinguishable" in " ".join(found["verdict"])


def test_what_has_not_finished_does_not_compete(storage, pair, capsys):
    running = add(storage, {0: 10.0, 10: 1.2}, finished=False, learning_rate_lora=1e-4)
    found = compared(capsys, storage, *(t.fingerprint for t in (*pair, running)))
    assert found["winner"] == 1
    assert "is running at step 10 and does not compete" in found["verdict"][0]
    found = compared(capsys, storage, pair[0].fingerprint, running.fingerprint)
    assert found["winner"] is None and "fewer than two" in found["verdict"][-1]


def test_a_run_is_found_by_whatever_it_is_called(storage, pair):
    trial = pair[0]
    folder = storage.trial(trial.fingerprint)
    write_json(folder.mlflow_state, {"sqlite:///x 1": {"run_id": "0" * 31 + "a", "logged": {}}})
    for name in (trial.fingerprint, trial.fingerprint[:5], str(folder.path), "rates/lora 1024", "0" * 31 + "a"):
        assert find_run(name, storage).trial == trial


def test_who_asks_for_what_is_not_there_is_told_what_there_is(storage, pair, tmp_path, capsys):
    slow = pair[0].fingerprint
    for text, message in (
        ("ffff0000ffff", r"no run 'ffff0000ffff' in .*expected a trial's folder"),
        ("rates/lora+ 1024", "the sweep rates has no trial 'lora\\+ 1024'; it has lora 1024"),
        ("rats/lora 1024", "no sweep 'rats' in .*; it has rates"),
        ("../rates/lora 1024", "no sweep '..'"),
    ):
        with pytest.raises(InputError, match=message):
            find_run(text, storage)
    write_json(storage.trial(slow[:6] + "0" * 10).path / "trial.json", dataclasses.asdict(pair[1]))
    with pytest.raises(InputError, match=r"may mean .*; give more digits"):
        find_run(slow[:6], storage)
    for arguments, message in (
        ([slow], "expected at least two runs"),
        ([slow, slow], "are the same run"),
        ([slow, slow, "--storage", str(tmp_path / "nowhere")], "holds no trials; name a sweep's storage root"),
    ):
        assert command.main([*arguments, *(() if "--storage" in arguments else ("--storage", str(storage.root)))]) == 2
        assert message in capsys.readouterr().err
