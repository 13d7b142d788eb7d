"""A finished default sweep that commit b1875aa wrote is read as before: same trials, same numbers, same answer."""

import json
import shutil
from pathlib import Path

import pytest

from orchestrator.cli import parse
from orchestrator.compare import Outcome, compare
from orchestrator.compare.runs import find_run
from orchestrator.planning.planner import plan_trials
from orchestrator.records.storage import Storage
from orchestrator.spec import SweepSpec
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


def test_a_default_sweep_still_has_these_trials(runs):
    identities = runs[0].trial.identities
    assert ModelSource.parse("builtin:tiny").identity == identities.model
    _, default, _ = parse([])
    saved = SweepSpec.from_json((SWEEP / "spec.json").read_text(), "spec.json")
    for spec in (default, saved):
        trials = spec.trials(identities, runs[0].trial.training.precision)
        assert [(t.fingerprint, t.label) for t in trials] == [(f, label) for f, (label, _) in PERPLEXITIES.items()]


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
