"""What a sweep was planned to take, compared with what it took, from journals as they are written."""

import pytest

from orchestrator.expansion import expand
from orchestrator.planning.cluster import Cluster, Node
from orchestrator.planning.cost import sum_up
from orchestrator.planning.estimate import Estimator
from orchestrator.planning.planner import plan_trials
from orchestrator.records.events import Failed, Finished, Launched, Preempted, Started, Step
from orchestrator.records.storage import Storage
from orchestrator.reporting.plan_vs_actual import compare_with_plan
from orchestrator.run_options import RunOptions
from orchestrator.spec import SweepSpec
from orchestrator.trial_spec import Identities
from tests.support.events import a_step
from workloads.budget import ModelShape
from workloads.models.source import ModelSource

HOUR = 3_600.0


def write(journal, launched, started, ended, end="finished", speeds=(), peak=None, price=None):
    journal.append(Launched(time=launched))
    journal.append(Started(time=started, hardware="as planned", workers=1, usd_per_device_hour=price))
    for number, speed in enumerate(speeds, start=1):
        measured = {"tokens_per_second": speed, "peak_memory_gib": peak}
        journal.append(Step(time=started + number, **a_step(number) | measured))
    if ended:
        ends = {
            "finished": Finished(time=ended),
            "failed": Failed(time=ended, reason="because"),
            "preempted": Preempted(time=ended, attempt="first"),
        }
        journal.append(ends[end])


@pytest.fixture
def plan_a_sweep(tmp_path):
    """Plans a sweep; then compares the plan with its journals."""
    shape = ModelShape.of(ModelSource.parse("builtin:tiny").config())
    spec = SweepSpec(
        model="builtin:tiny", data="builtin:stdlib", context_lengths=(1024,), methods=("lora", "full"),
        references=("none",), positions="linear", steps=3, batch=2,
    )  # fmt: skip
    storage = Storage.open(str(tmp_path / "runs"))
    trials = {t.label: t for t in expand(spec, Identities(model="m", tokenizer="t", data="d"), "float32").trials}

    class PlannedSweep:
        def __init__(self, cluster=None, price=None, failed_before=()):
            self.journals = {label: storage.add_trial(trial).journal for label, trial in trials.items()}
            for label in failed_before:
                write(self.journals[label], 100, 110, 200, "failed", speeds=(1.0,), peak=9.0)
            self.cluster = cluster or Cluster((Node(cpus=2, memory=2**35),))
            self.estimator = Estimator(shape, 512, self.cluster, RunOptions(), {"any": price} if price else {})
            self.planned = plan_trials(list(trials.values()), storage, self.estimator)
            self.total = sum_up(self.planned, [], self.estimator)

        def both(self, elapsed=10 * HOUR):
            both = compare_with_plan(self.planned, self.total, storage, self.cluster, elapsed)
            return both, {trial["label"]: trial for trial in both["trials"]}

    return PlannedSweep


def test_each_trials_seconds_and_speed_stand_beside_the_plans(plan_a_sweep):
    sweep = plan_a_sweep(failed_before=["full 1024"])  # in an earlier run of the sweep, which does not count
    estimates = {p.trial.label: p.estimate for p in sweep.planned}
    write(sweep.journals["untuned none 1024"], 1_010, 1_020, 1_030)
    write(sweep.journals["untuned linear 1024"], 1_010.5, 1_031, 1_038)  # in the same driver, after the other
    write(sweep.journals["lora 1024"], 1_012, 1_022, 1_072, speeds=(100.0, 300.0, 310.0), peak=0.5)
    write(sweep.journals["full 1024"], 1_040, 1_050, 1_060, "preempted", speeds=(50.0,), peak=0.5)
    write(sweep.journals["full 1024"], 1_070, 1_080, 1_130, speeds=(220.0, 210.0), peak=0.6)
    both, trials = sweep.both()
    truths = {label: trial["seconds"]["truth"] for label, trial in trials.items()}
    assert truths == {
        "untuned none 1024": 20, "untuned linear 1024": 8, "lora 1024": 60, "full 1024": 90,
    }  # fmt: skip
    assert trials["lora 1024"]["tokens_per_second"]["truth"] == 300.0
    assert trials["full 1024"]["tokens_per_second"]["truth"] == 210.0
    for label, trial in trials.items():
        assert trial["seconds"]["plan"] == estimates[label].seconds
        assert trial["tokens_per_second"]["plan"] == estimates[label].tokens_per_second
        assert "peak_memory_bytes" not in trial
    assert both["seconds"]["truth"] == 1_130 - 1_010
    assert both["hours"]["truth"] == pytest.approx(178 / 3600)
    assert both["summary"].startswith("The plan estimated ")
    assert both["summary"].endswith("; it took 2m00s and 0.05.")


def test_memory_is_compared_on_gpus_and_money_where_a_price_is_known(plan_a_sweep):
    gpu = Node(cpus=8, gpus=1, memory=2**37, gpu="NVIDIA L4", gpu_memory=22 * 2**30)
    sweep = plan_a_sweep(Cluster((gpu,)), price=1.5)
    write(sweep.journals["lora 1024"], 1_000, 1_010, 1_010 + 7_200, speeds=(5.0,), peak=3.0, price=1.5)
    both, trials = sweep.both()
    planned = next(p for p in sweep.planned if p.trial.label == "lora 1024")
    assert trials["lora 1024"]["peak_memory_bytes"] == {"plan": planned.estimate.memory.allocated, "truth": 3 * 2**30}
    assert both["usd"]["truth"] == pytest.approx(3.0)
    assert both["summary"].endswith("with 3 of 4 trials unfinished.") and "GPU hours" in both["summary"]


@pytest.mark.parametrize("by", [-HOUR, 10 * HOUR])
def test_a_clock_that_is_set_changes_no_actual_time(plan_a_sweep, by):
    """Between two lines of a worker, which have its process's monotonic clock beside the wall clock."""
    sweep = plan_a_sweep()
    labels = ["untuned none 1024", "untuned linear 1024", "lora 1024"]
    for label, process, uptime in zip(labels, ("a", "a", "b"), (10.0, 20.0, 10.0)):
        sweep.journals[label].append(Launched(time=10_000))
        sweep.journals[label].append(Started(time=10_000 + uptime, process=process, uptime=uptime, workers=1))
        sweep.journals[label].append(Finished(time=10_008 + uptime + by, process=process, uptime=uptime + 8))
    both, trials = sweep.both(elapsed=60.0)
    assert [trials[label]["seconds"]["truth"] for label in labels] == [18, 10, 18]
    assert 18 <= both["seconds"]["truth"] <= 60
    assert both["hours"]["truth"] == pytest.approx(46 / HOUR)


def test_where_nothing_ran_nothing_is_printed(plan_a_sweep):
    both, trials = plan_a_sweep().both()
    assert both["summary"] is None
    assert {trial["seconds"]["truth"] for trial in trials.values()} == {None}
