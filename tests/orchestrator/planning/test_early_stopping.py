"""Early stopping: the rules against slow references in any order of arrival, restarts, and a real sweep."""

import dataclasses
import math
import re
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.planning.early_stopping import EarlyStopping, Rungs
from orchestrator.planning.planner import plan_trials
from orchestrator.records.events import Eval, Finished, Saved, Started, Step, Stopped
from orchestrator.records.journal import Journal
from orchestrator.records.storage import Storage
from orchestrator.records.trial_record import TrialRecord
from orchestrator.running.judge import Judge
from orchestrator.trial_spec import Identities, TrialSpec
from tests.support.commands import SweepCommand
from tests.support.events import a_step, evaluation
from tests.support.plans import an_estimator
from tests.support.storage import mlflow_runs, records
from workloads.config import TrainingConfig
from workloads.errors import InputError
from workloads.training.checkpoint import load_checkpoint

IDENTITIES = Identities(model="m", tokenizer="t", data="d")
ASHA = EarlyStopping(rule="asha", reduction_factor=2, first_rung=0.125, min_trials=3)
MEDIAN = EarlyStopping(rule="median", first_rung=0.125, min_trials=3)


def trial(number=0, **training):
    values = dict(context_length=1024, method="lora", group_size=256, steps=80, eval_every=10, batch=2, eval_span=1024)
    config = TrainingConfig(**{**values, "learning_rate": 1e-3 + number * 1e-6, **training})
    return TrialSpec(model="m", data="d", identities=IDENTITIES, training=config)


@pytest.mark.parametrize(
    ("rule", "first_rung", "factor", "steps", "every", "expected"),
    [
        ("asha", 1 / 9, 3, 900, 100, [100, 300]),
        ("asha", 1 / 9, 3, 1000, 100, [200, 400]),
        ("asha", 1 / 9, 3, 48, 16, [16]),
        ("asha", 0.125, 2, 80, 10, [10, 20, 40]),
        ("asha", 25 * 2 * 1024, 4, 1000, 10, [30, 100, 400]),  # in tokens: 25 steps of 2 x 1,024
        ("median", 0.25, 3, 80, 10, [20, 30, 40, 50, 60, 70]),
        ("asha", 0.5, 3, 10, 10, []),
    ],
)
def test_rungs_are_evaluations_at_growing_shares_of_a_trial(rule, first_rung, factor, steps, every, expected):
    rungs = EarlyStopping(rule=rule, first_rung=first_rung, reduction_factor=factor)
    assert rungs.rungs(trial(steps=steps, eval_every=every).training) == expected


def test_an_untuned_trial_has_no_rungs():
    untuned = TrainingConfig(context_length=1024, method="untuned", attention="full", eval_span=1024)
    assert ASHA.rungs(untuned) == MEDIAN.rungs(untuned) == []


scores = st.lists(st.floats(1, 100) | st.just(math.inf), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(scores, st.sampled_from([2, 3, 4]), st.integers(2, 4))
def test_asha_at_a_rung_is_the_best_share_of_those_that_have_come(tmp_path_factory, arriving, factor, least):
    rule = EarlyStopping(rule="asha", reduction_factor=factor, min_trials=least)
    with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as folder:
        rungs = Rungs(Storage(Path(folder)), "s", rule)
        stopped = [rungs.judge(trial(i), 10, {10: score})["stop"] for i, score in enumerate(arriving)]
    for i, score in enumerate(arriving):
        come = arriving[: i + 1]
        better = sum(other < score for other in come)
        places = max(1, len(come) // factor)
        assert stopped[i] == (len(come) >= least and better >= places)
    assert not stopped[arriving.index(min(arriving))]  # the best is never stopped


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(1, 100), min_size=3, max_size=3), min_size=1, max_size=9), st.integers(2, 4))
def test_the_median_rule_compares_bests_so_far(tmp_path_factory, arriving, least):
    rule = EarlyStopping(rule="median", min_trials=least)
    with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as folder:
        rungs = Rungs(Storage(Path(folder)), "s", rule)
        curves = [dict(zip((10, 20, 30), values)) for values in arriving]
        stopped = [rungs.judge(trial(i), 30, curve)["stop"] for i, curve in enumerate(curves)]
    for i, values in enumerate(arriving):
        best, others = min(values), sorted(min(other) for other in arriving[:i])
        too_few = len(others) + 1 < least
        above_half = not too_few and best > (others[(len(others) - 1) // 2] + others[len(others) // 2]) / 2
        assert stopped[i] == above_half


def tell(judge, journal, step, perplexity):
    """Records a step with an evaluation in the journal and shows it to the judge, as a worker does."""
    for event in (Step(**a_step(step)), Eval(**evaluation(step, perplexity))):
        journal.append(event)
        judge.on_event(event)


def play(folder, rule, curves, order, restarts=()):
    """Runs trials whose evaluations come in a given order; returns the journal's ``stopped`` of each that was.

    ``order`` names the trial that evaluates next. At the places ``restarts`` every process dies and starts again, each
    trial from two evaluations before, where it then scores a little otherwise, as on another machine.
    """
    rungs = Rungs(Storage(folder), "s", rule)
    journals = [Journal(folder / f"{number}.jsonl") for number in range(len(curves))]
    evaluated, stopped = [0] * len(curves), {}

    def start(number):
        return Judge(rungs, trial(number), TrialRecord.of(journals[number]))

    judges = [start(number) for number in range(len(curves))]
    noise = 1.0
    for place, number in enumerate(order):
        if place in restarts:
            noise *= 1.1
            judges = [start(each) for each in range(len(curves))]
            for each in range(len(curves)):
                for again in range(max(0, evaluated[each] - 2), evaluated[each]):
                    if each not in stopped:
                        tell(judges[each], journals[each], 10 * (again + 1), curves[each][again] * noise)
                        assert judges[each].poll_request() is None
        if number in stopped or evaluated[number] == len(curves[number]):
            continue
        step = 10 * (evaluated[number] + 1)
        tell(judges[number], journals[number], step, curves[number][evaluated[number]])
        evaluated[number] += 1
        if judges[number].poll_request() == "stop":
            stopped[number] = judges[number].verdict
    return stopped


def brute_force(rule, curves, order):
    """The same from scratch, without files: at each rung everything that came there before is looked at again."""
    come, evaluated, stopped = [], [0] * len(curves), {}
    for number in order:
        if number in stopped or evaluated[number] == len(curves[number]):
            continue
        evaluated[number] += 1
        step = 10 * evaluated[number]
        if step not in rule.rungs(trial().training):
            continue
        so_far = curves[number][: evaluated[number]]
        score = so_far[-1] if rule.rule == "asha" else min(so_far)
        others = [other for at, other in come if at == step]
        come.append((step, score))
        if len(others) + 1 < rule.min_trials:
            continue
        if rule.rule == "asha":
            places = max(1, int((len(others) + 1) / rule.reduction_factor))
            worse = sum(other < score for other in others) >= places
        else:
            half = sorted(others)
            worse = score > (half[(len(half) - 1) // 2] + half[len(half) // 2]) / 2
        if worse:
            stopped[number] = step
    return stopped


@st.composite
def games(draw):
    num_trials = draw(st.integers(1, 6))
    curve = st.lists(st.floats(1, 50), min_size=8, max_size=8)
    curves = [draw(curve) for _ in range(num_trials)]
    order = draw(st.permutations([number for number in range(num_trials) for _ in range(8)]))
    restarts = draw(st.sets(st.integers(0, 8 * num_trials), max_size=3))
    return curves, order, restarts


@pytest.mark.parametrize("rule", [ASHA, MEDIAN], ids=["asha", "median"])
@settings(max_examples=40, deadline=None)
@given(games())
# Scored worse after the restart than before it: what stands at the rung counts.
@example(([[1.0] * 8, [1.0, 1.0, 2.0] + [1.0] * 5, [1.0] * 8], [0] * 6 + [2] * 3 + [1] * 8, {11}))
def test_a_sweep_in_any_order_and_with_restarts_stops_whom_the_reference_stops(tmp_path_factory, rule, game):
    curves, order, restarts = game
    expected = brute_force(rule, curves, order)
    for killed in ((), restarts):
        with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as folder:
            stopped = play(Path(folder), rule, curves, order, killed)
        assert {number: verdict.step for number, verdict in stopped.items()} == expected
        for verdict in stopped.values():
            assert verdict.score > verdict.cutoff
            assert verdict.rung == verdict.step * 2 * 1024 and len(verdict.compared_with) >= 2


def test_one_killed_between_its_checkpoint_and_its_judgement_is_judged_a_step_later(tmp_path):
    rungs = Rungs(Storage(tmp_path), "s", ASHA)
    for number in (1, 2):
        rungs.judge(trial(number), 10, {10: 2.0})
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(Eval(**evaluation(10, 9.0)))
    judge = Judge(rungs, trial(0), TrialRecord.of(journal))
    judge.on_event(Step(**a_step(11)))
    assert judge.poll_request() == "stop"
    assert (judge.verdict.step, judge.verdict.rung) == (11, 10 * 2 * 1024)


def test_only_trials_that_were_scored_alike_are_compared(tmp_path):
    rungs = Rungs(Storage(tmp_path), "s", ASHA)
    others = [
        trial(1, context_length=2048, eval_span=2048, batch=1),  # as many tokens, another context
        trial(2, eval_documents=7),
        dataclasses.replace(trial(3), identities=dataclasses.replace(IDENTITIES, data="other")),
        trial(4),
    ]
    for other in others:
        assert not rungs.judge(other, 10, {10: 2.0})["stop"]
    verdict = rungs.judge(trial(0), 10, {10: 9.0})
    assert list(verdict["compared_with"]) == [trial(4).fingerprint] and not verdict["stop"]


def test_within_a_method_a_better_other_method_stops_nobody(tmp_path):
    for within, stopped in ((False, True), (True, False)):
        rungs = Rungs(Storage(tmp_path / str(within)), "s", dataclasses.replace(ASHA, within_method=within))
        for number in (1, 2):
            rungs.judge(trial(number, method="full"), 10, {10: 2.0})
        assert rungs.judge(trial(0), 10, {10: 9.0})["stop"] == stopped


def test_within_a_method_only_the_same_values_of_axes_are_compared(tmp_path):
    settings = dataclasses.replace(ASHA, within_method=True, axes=("positions", "lora_rank"))
    rungs = Rungs(Storage(tmp_path), "s", settings)
    others = [trial(1, positions="yarn"), trial(2, lora_rank=32), trial(3), trial(4, learning_rate=2e-3)]
    for other in others:
        rungs.judge(other, 10, {10: 2.0})
    verdict = rungs.judge(trial(0), 10, {10: 9.0})
    assert set(verdict["compared_with"]) == {trial(3).fingerprint, trial(4, learning_rate=2e-3).fingerprint}
    assert verdict["stop"]


def test_trials_finished_by_an_earlier_sweep_count_at_every_rung(tmp_path):
    rungs = Rungs(Storage(tmp_path), "s", ASHA)
    for number in (1, 2):
        journal = Journal(tmp_path / f"{number}.jsonl")
        for step in range(0, 90, 10):
            journal.append(Eval(**evaluation(step, 2.0)))
        rungs.enter(trial(number), TrialRecord.of(journal))
    for step in ASHA.rungs(trial().training):
        assert rungs.judge(trial(100 + step), step, {step: 9.0})["stop"]


def test_a_trial_that_begins_anew_is_judged_anew(tmp_path):
    rungs = Rungs(Storage(tmp_path), "s", ASHA)
    for number, score in enumerate((1.0, 2.0, 3.0)):
        verdict = rungs.judge(trial(number), 10, {10: score})
    assert verdict["stop"] and rungs.judge(trial(2), 10, {10: 0.5})["stop"], "what was judged stands"
    rungs.forget(trial(2))
    assert not rungs.judge(trial(2), 10, {10: 0.5})["stop"]


def test_a_trial_that_diverges_to_nan_is_stopped(tmp_path):
    for rule in (ASHA, MEDIAN):
        rungs = Rungs(Storage(tmp_path / rule.rule), "s", rule)
        for number in (1, 2):
            rungs.judge(trial(number), 10, {10: 2.0})
        assert rungs.judge(trial(0), 10, {10: math.nan})["stop"]


@pytest.mark.parametrize("values", [{"reduction_factor": 1}, {"first_rung": 0}, {"min_trials": 1}])
def test_values_that_judge_nothing_sensibly_are_refused(values):
    (flag,) = values
    with pytest.raises(InputError, match=f"--{flag.replace('_', '-')}"):
        EarlyStopping(rule="asha", **values)


def test_the_sweep_that_stopped_a_trial_leaves_it_and_any_other_goes_on_with_it(tmp_path):
    storage = Storage.open(str(tmp_path))
    journal = storage.add_trial(trial()).journal
    journal.append(Started())
    journal.append(Saved(step=10))
    journal.append(Stopped(step=10, sweep="mine", reason="worse"))
    for stopping, action in (("mine", "stopped"), ("other", "resume"), (None, "resume")):
        (planned,) = plan_trials([trial()], storage, an_estimator(), stopping_sweep=stopping)
        assert planned.action == action
    journal.append(Finished())
    assert plan_trials([trial()], storage, an_estimator(), stopping_sweep="mine")[0].action == "known"


FLAGS = (
    "--context-lengths", "512", "--methods", "lora", "full", "--references", "--steps", "8", "--batch", "2",
    "--eval-every", "2", "--eval-documents", "2", "--warmup-steps", "1", "--learning-rate-lora", "0.3",
    "--max-concurrent", "1", "--name", "stops",
)  # fmt: skip
STOPPING = ("--early-stopping", "asha", "--reduction-factor", "2", "--min-trials", "2")


@pytest.mark.ray
def test_a_bad_learning_rate_is_stopped_stays_so_and_can_be_finished_as_if_it_never_had_been(tmp_path, text_folder):
    flags = (*FLAGS, "--data", str(text_folder))
    undisturbed = SweepCommand(tmp_path / "whole", *flags, "--methods", "lora").start()
    stopping = SweepCommand(tmp_path / "runs", *flags, *STOPPING)
    status, output = stopping.run()
    assert status == 0, output
    assert re.search(r"stopped early: lora 512 at step 2 of 8: perplexity \d+", output), output
    bad, good = sorted(records(stopping.storage).values(), key=lambda record: -len(record.curve(512)))[::-1]
    assert (bad.state, good.state) == ("stopped", "finished")
    assert (bad.saved_step, sorted(bad.steps), good.last_step) == (2, [1, 2], 8)
    assert bad.stopped.compared_with == {good.journal.path.parent.name: good.curve(512)[1].perplexity}
    assert bad.stopped.score == bad.curve(512)[1].perplexity > bad.stopped.cutoff
    rung = stopping.storage / "sweeps" / "stops" / "rungs" / "512" / str(2 * 2 * 512)
    assert len(list(rung.glob("*.json"))) == 2
    _, runs, _ = mlflow_runs(stopping.storage)
    (stopped,) = [run for run in runs if run.info.run_name == "lora 512"]
    assert (stopped.info.status, stopped.data.tags["stopped_early"]) == ("KILLED", bad.reason)

    before = bad.journal.path.read_bytes()
    status, output = stopping.run()
    assert status == 0 and "stopped early at step 2: perplexity" in " ".join(output.split()), output
    assert "Nothing is left to train" in output and bad.journal.path.read_bytes() == before

    status, output = SweepCommand(stopping.storage, *flags, "--early-stopping", "none").run()
    assert status == 0, output
    resumed = TrialRecord.of(bad.journal)
    assert (resumed.state, resumed.resumed_at) == ("finished", 2)
    _, runs, _ = mlflow_runs(stopping.storage)
    assert {run.info.status for run in runs} == {"FINISHED"}

    output, _ = undisturbed.communicate(timeout=400)
    assert undisturbed.returncode == 0, output
    ((name, whole),) = records(tmp_path / "whole").items()
    assert name == bad.journal.path.parent.name
    assert [e.nll for e in resumed.curve(512)] == [e.nll for e in whole.curve(512)]
    assert [e.loss for e in resumed.steps.values()] == [e.loss for e in whole.steps.values()]
    ours, theirs = (load_checkpoint(r.journal.path.parent / "checkpoints", 8)[0] for r in (resumed, whole))
    assert ours.keys() == theirs.keys()  # weights, optimiser and random state
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
