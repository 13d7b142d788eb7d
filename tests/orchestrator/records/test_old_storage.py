"""A finished default sweep of an earlier version (commit b1875aa) is read as before; the same sweep trains again."""

import json
import shutil
from pathlib import Path

import pytest

from orchestrator.cli import parse
from orchestrator.compare import Outcome, compare
from orchestrator.compare.runs import find_run
from orchestrator.expansion import expand
from orchestrator.planning.planner import plan_trials, superseded
from orchestrator.records.storage import Storage
from orchestrator.reporting.overview import Overview
from orchestrator.spec import SweepSpec
from tests.support.mlflow_store import PROVENANCE, connect, history
from tests.support.mlflow_store import runs as mlflow_runs
from tests.support.plans import an_estimator
from workloads.models.source import ModelSource

STORAGE = Path(__file__).parents[2] / "data" / "b1875aa"
SWEEP = STORAGE / "sweeps" / "convergence"
# The default sweep's fingerprints, with the final perplexity of each at its own context length.
PERPLEXITIES = {
    "d4c4430d32f39967": ("untuned none 1024", 9.9482),
    "48e174237fd90d67": ("untuned yarn 1024", 2.2107),
    "46800561ed3ef838": ("untuned linear 1024", 10.6341),
    "16415f28a88f689c": ("lora 1024", 2.5689),
    "b22679832e87c53e": ("lora+ 1024", 2.5071),
    "ea0eb1b30a7d5a65": ("full 1024", 2.7922),
    "59eceb0c6d3bec0f": ("untuned none 2048", 26.1333),
    "630dc6f970d121c2": ("untuned yarn 2048", 2.3401),
    "01bc3f9fa5ecab4b": ("untuned linear 2048", 16.1032),
    "429428a07f26a732": ("lora 2048", 3.4917),
    "3892212854511e59": ("lora+ 2048", 3.2050),
    "232085739fd4adf2": ("full 2048", 3.6196),
}
# Keys of comparison.json whose values are words, or come from MLflow.
WORDS = {"sentences", "label", "log", "mlflow_run_id", "source", "reason", "hours_unit"}
# That version had the bootstrap's interval from 16 documents too.
INTERVALS = {"low", "high"}


@pytest.fixture
def storage(tmp_path):
    return Storage.open(shutil.copytree(STORAGE, tmp_path / "runs").as_posix())


@pytest.fixture
def runs(storage):
    return [find_run(fingerprint, storage) for fingerprint in PERPLEXITIES]


def assert_same_numbers(new, old, where=""):
    """Everything in ``old`` is in ``new`` too, within rounding; ``new`` may hold more."""
    if isinstance(old, dict):
        for key in old.keys() - WORDS - INTERVALS:
            assert_same_numbers(new[key], old[key], f"{where}.{key}")
    elif isinstance(old, list):
        assert len(new) == len(old), where
        for number, (ours, theirs) in enumerate(zip(new, old)):
            assert_same_numbers(ours, theirs, f"{where}[{number}]")
    else:
        assert new == (pytest.approx(old, rel=1e-9) if isinstance(old, float) else old), where


def test_the_same_sweep_trains_anew_and_says_what_it_does_not_use(storage, runs):
    identities = runs[0].trial.identities
    assert ModelSource.parse("builtin:tiny").identity == identities.model
    _, default, _ = parse(["convergence"])
    saved = SweepSpec.of(json.loads((SWEEP / "spec.json").read_text()))
    for spec in (default, saved):
        trials = expand(spec, identities, runs[0].trial.training.precision).trials
        assert [trial.of_earlier_versions()[-1] for trial in trials] == [run.trial for run in runs]
        planned = plan_trials(trials, storage, an_estimator())
        assert {(each.action, each.reason) for each in planned} == {
            ("run", "not trained yet"), ("run", "not evaluated yet"),
        }  # fmt: skip
        assert superseded(planned, storage) == [label for label, _ in PERPLEXITIES.values()]


def test_its_status_is_that_of_a_finished_sweep(storage):
    overview = Overview(storage)
    (sweep,) = overview.sweeps()
    assert (sweep.state, sweep.finished, overview.storage.damaged) == ("finished", len(PERPLEXITIES), [])
    found = {trial.fingerprint: (trial.label, trial.perplexity) for trial in sweep.trials}
    assert found == {name: (label, pytest.approx(p, abs=5e-5)) for name, (label, p) in PERPLEXITIES.items()}
    assert overview.find("16415f28").hours == pytest.approx(sweep.trials[3].hours) != 0


def test_it_is_mirrored_into_mlflow_by_its_own_fingerprints(storage, runs):
    lora = next(run.trial for run in runs if run.trial.label == "lora 1024")
    tracker = connect(storage)
    tracker.follow([lora], "convergence", PROVENANCE)
    client, (run,) = mlflow_runs(tracker.uri)
    assert not tracker.refused and run.data.tags["longspan.fingerprint"] == "16415f28a88f689c"
    assert history(client, run, "eval/perplexity_1024")[-1] == (48, pytest.approx(2.5689, abs=5e-5))


def test_every_trial_is_finished_with_the_perplexity_it_had(storage, runs):
    for planned in plan_trials([run.trial for run in runs], storage, an_estimator()):
        assert (planned.action, planned.forced) == ("known", False)
    for run in runs:
        assert run.trial.fingerprint == run.folder.name and run.record.state == "finished"
        assert run.record.last_step == run.trial.training.steps
        final = run.record.curve(run.trial.training.context_length)[-1]
        assert final.perplexity == pytest.approx(PERPLEXITIES[run.folder.name][1], abs=5e-5)
        assert final.step == run.trial.training.steps


def test_the_comparison_gives_the_same_answer(runs):
    old = json.loads((SWEEP / "comparison.json").read_text())
    outcomes = [Outcome(run.trial, run.record, "log.txt") for run in runs]
    contexts = compare(outcomes, old["model"]["original_context_length"])
    assert [context["winner"] for context in contexts] == ["lora+", "lora+"]
    assert_same_numbers(contexts, old["contexts"])
