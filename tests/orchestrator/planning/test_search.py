"""Search: what is suggested, that a rebuilt search goes on as it would have, and a real one that is killed."""

import itertools
import json
import math
import os
import signal
from statistics import median

import pytest

from orchestrator.cli import parse
from orchestrator.expansion import expand
from orchestrator.planning.search import Search, Space
from orchestrator.records.events import Eval, Failed, Finished, Stopped
from orchestrator.records.storage import Storage
from orchestrator.spec import SweepSpec
from orchestrator.trial_spec import Identities
from tests.support.commands import SweepCommand, wait_for
from tests.support.events import evaluation
from tests.support.storage import records
from workloads.errors import InputError

IDENTITIES = Identities(model="m", tokenizer="t", data="d")


def spec(**fields):
    values = dict(context_lengths=(1024,), methods=("lora",), references=(), search="optuna", search_trials=24)
    return SweepSpec(**{**values, **fields})


def open_search(folder, spec):
    storage = Storage.open(str(folder))
    storage.sweep("s").mkdir(parents=True, exist_ok=True)
    bases = expand(spec, IDENTITIES, "float32").trials
    return storage, Search(spec, bases, storage, storage.search_journal("s"))


def perplexity(training):
    """Lowest, 2, at a learning rate of 1e-4 and rank 16."""
    return 2 + (math.log10(training.learning_rate) + 4) ** 2 + abs(math.log2(training.lora_rank) - 4) / 10


def train(storage, trial, outcome="finished"):
    journal = storage.add_trial(trial).journal
    if outcome == "diverged":
        journal.append(Failed(reason="NonFiniteLoss: step 3: loss nan", attempt="a"))
        return
    scored = evaluation(trial.training.steps, perplexity(trial.training), trial.training.context_length)
    journal.append(Eval(**scored))
    journal.append(Finished() if outcome == "finished" else Stopped(reason="worse", step=1, sweep="s"))


def run(folder, spec, killed_after=(), outcome=lambda trial: "finished"):
    """A search to its end, one trial at a time; after the given number of trials it is rebuilt from disk."""
    storage, search = open_search(folder, spec)
    while trial := search.next():
        train(storage, trial, outcome(trial))
        if len(search.trials) in killed_after:
            storage, search = open_search(folder, spec)
    return [trial.training for trial in search.trials]


@pytest.mark.parametrize("kind", ["random", "optuna"])
def test_a_search_that_is_rebuilt_after_any_trial_goes_on_as_it_would_have(kind, tmp_path):
    asked = spec(search=kind, search_trials=12)
    undisturbed = run(tmp_path / "one", asked)
    assert run(tmp_path / "other", asked, killed_after=range(1, 12)) == undisturbed
    assert len(set(undisturbed)) == 12
    assert run(tmp_path / "seed", spec(search=kind, search_trials=12, seeds=(1,)))[1:] != undisturbed[1:]


def test_one_that_died_after_writing_a_suggestion_down_trains_that_one(tmp_path):
    _, search = open_search(tmp_path, spec())
    written = search.next()
    _, again = open_search(tmp_path, spec())
    assert again.trials == [written] and again.to_come == 23
    (line,) = again.journal.read().events
    assert (line.study, line.number, line.fingerprint) == ("lora 1024", 0, written.fingerprint)


def test_tpe_looks_where_it_was_good_and_random_does_not(tmp_path):
    distances = {}
    for kind in ("random", "optuna"):
        found = run(tmp_path / kind, spec(search=kind, search_learning_rate=(1e-6, 1e-2)))[12:]
        distances[kind] = median(perplexity(training) for training in found)
    assert distances["optuna"] < distances["random"] - 0.3


@pytest.mark.parametrize("bad", ["diverged", "stopped"])
def test_tpe_avoids_where_trials_diverged_or_were_stopped(bad, tmp_path):
    def outcome(trial):
        return bad if trial.training.learning_rate > 3e-4 else "finished"

    found = run(tmp_path, spec(search_learning_rate=(1e-6, 1e-2), learning_rate_lora=1e-2), outcome=outcome)
    assert found[0].learning_rate == 1e-2
    assert sum(training.learning_rate > 3e-4 for training in found[12:]) <= 2


def test_what_another_sweep_has_finished_is_learned_from_at_once(tmp_path):
    """A second search on the same storage suggests the same without training anything again."""
    first = run(tmp_path, spec())
    storage = Storage.open(str(tmp_path))
    storage.sweep("other").mkdir()
    second = Search(spec(), expand(spec(), IDENTITIES, "float32").trials, storage, storage.search_journal("other"))
    assert [second.next().training for _ in first] == first
    nothing_known = open_search(tmp_path / "elsewhere", spec())[1]
    assert [nothing_known.next().training for _ in first] != first


def test_each_method_and_length_has_its_own_study_and_they_go_on_side_by_side(tmp_path):
    asked = spec(context_lengths=(1024, 2048), methods=("lora", "full"), search="random", search_trials=3)
    trainings = run(tmp_path, asked)
    studies = [(training.method, training.context_length) for training in trainings]
    assert sorted(studies[:4]) == sorted(studies[4:8]) == sorted(studies[8:])
    assert len(set(studies[:4])) == 4 and studies[0][1] == 2048
    assert len({training.lora_rank for training in trainings if training.method == "full"}) == 1
    assert {t.group_size / t.context_length for t in trainings} <= {0.125, 0.25, 0.5}


def test_each_combination_of_axes_has_its_own_study(tmp_path):
    axes = dict(positions=["linear", "yarn"], train_layers=["all", "last 2"], attention=["s2", "full"])
    asked = spec(search="random", search_trials=3).changed(**axes)
    _, search = open_search(tmp_path, asked)
    assert [study.to_come for study in search.studies] == [3] * 8
    found = run(tmp_path, asked)
    studies = [(t.positions, t.train_layers, t.attention) for t in found]
    assert set(studies[:8]) == set(studies[8:16]) == set(studies[16:]) == set(itertools.product(*axes.values()))
    labels = [trial.label for trial in open_search(tmp_path, asked)[1].trials]
    assert len(set(labels)) == 24 and labels[0].startswith("lora 1024 linear layers all attention s2 lr ")


def test_what_is_searched_cannot_be_an_axis():
    for name, other in (("lora_rank", "search_rank"), ("group_size", "search_group_size")):
        axis = {name: [256, 512]}
        with pytest.raises(InputError, match=f"256 512 with --search optuna.*--{other.replace('_', '-')} without any"):
            spec().changed(**axis)
        assert spec().changed(**axis, **{other: []}).axes


def test_the_methods_own_setting_comes_first_where_it_lies_in_the_ranges(tmp_path):
    own = spec(learning_rate_lora=3e-3)
    (base,) = expand(own, IDENTITIES, "float32").trials
    _, search = open_search(tmp_path / "in", own)
    assert search.next().fingerprint == base.fingerprint
    outside = spec(learning_rate_lora=3e-3, search_learning_rate=(1e-5, 1e-4))
    _, search = open_search(tmp_path / "out", outside)
    assert 1e-5 <= search.next().training.learning_rate <= 1e-4


def test_rates_are_short_numbers_inside_their_range_and_name_the_trial(tmp_path):
    asked = spec(search="random", search_learning_rate=(1.2345e-5, 1.3e-5), search_group_size=(256,), search_rank=())
    _, search = open_search(tmp_path, asked)
    labels = [search.next().label for _ in range(8)]
    allowed = ["1.2345e-5", "1.24e-5", "1.25e-5", "1.26e-5", "1.27e-5", "1.28e-5", "1.29e-5", "1.3e-5"]
    assert sorted(labels) == [f"lora 1024 lr {rate}" for rate in allowed]


def test_a_small_space_is_used_up_without_repeating_and_then_ends(tmp_path):
    asked = spec(search_learning_rate=(1e-4, 1e-4), search_rank=(4, 8, 16), search_group_size=(0.25, 0.5))
    with pytest.raises(InputError, match="--search-trials 24: lora 1024 has fewer settings"):
        open_search(tmp_path, asked)
    assert len(set(run(tmp_path / "all", spec(**{**vars(asked), "search_trials": 6})))) == 6
    narrow = spec(search_learning_rate=(1.01e-4, 1.03e-4), search_rank=(8,), search_group_size=(0.25,))
    assert {t.learning_rate for t in run(tmp_path / "narrow", narrow)} == {1.01e-4, 1.02e-4, 1.03e-4}


def test_suggestions_of_another_search_under_the_same_name_are_passed_over(tmp_path):
    run(tmp_path, spec(search_trials=4))
    for other in (spec(steps=5), spec(search_rank=(3,)), spec(methods=("lora+",))):
        _, search = open_search(tmp_path, other)
        assert search.trials == []
    _, search = open_search(tmp_path, spec(search_trials=6))
    assert (len(search.trials), search.to_come) == (4, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"search_learning_rate": (1e-2, 1e-4)}, "--search-learning-rate 0.01 0.0001"),
        ({"search_trials": 0}, "--search-trials 0"),
        ({"seeds": (0, 1)}, "a search compares settings of one seed"),
    ],
)
def test_what_no_search_can_be_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        spec(**fields)


def test_ranges_can_be_given_on_the_command_line():
    flags = ["--search", "random", "--search-learning-rate", "1e-4", "1e-2", "--search-rank", "4", "8"]
    _, given, _ = parse(["convergence", *flags, "--search-group-size", "0.25", "512"])
    assert (given.search_learning_rate, given.search_rank) == ((1e-4, 1e-2), (4, 8))
    (base,) = (trial for trial in expand(given, IDENTITIES, "float32").trials if trial.label == "lora 2048")
    space = Space.of(given, base)
    assert space.choices == {"lora_rank": (4, 8), "group_size": (512.0,)}


def test_a_group_size_that_a_context_length_cannot_have_is_refused():
    (base,) = expand(spec(), IDENTITIES, "float32").trials
    with pytest.raises(InputError, match="group size 300 at context length 1024"):
        Space.of(spec(search_group_size=(0.25, 300)), base)


@pytest.mark.ray
def test_a_killed_search_ends_with_as_many_trials_as_asked_and_none_twice(tmp_path, text_folder):
    command = SweepCommand(
        tmp_path / "runs", "--data", str(text_folder), "--context-lengths", "512", "--methods", "lora",
        "--references", "--steps", "3", "--batch", "2", "--eval-every", "3", "--eval-documents", "2",
        "--warmup-steps", "1", "--search", "random", "--search-trials", "3", "--search-group-size", "0.25", "0.5",
        "--max-concurrent", "1", "--name", "searches",
    )  # fmt: skip
    process = command.start()

    def second_runs():
        found = records(command.storage)
        return len(found) == 2 and {"finished", "running"} == {record.state for record in found.values()}

    wait_for(second_runs, process, "the second trial", seconds=300)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = {name: record.journal.path.read_bytes() for name, record in records(command.storage).items()
              if record.state == "finished"}  # fmt: skip

    status, output = command.run()
    assert status == 0, output
    assert "lora 512 lr" in output and "and 1 more, to be suggested by the search (random)" in output
    after = records(command.storage)
    assert {name: after[name].journal.path.read_bytes() for name in before} == before
    assert [record.state for record in after.values()] == ["finished"] * 3
    lines = Storage(command.storage).search_journal("searches").read().events
    assert [line.number for line in lines] == [0, 1, 2]
    assert {line.fingerprint for line in lines} == set(after)
    listed = json.loads((command.storage / "sweeps" / "searches" / "sweep.json").read_text())["trials"]
    assert sorted(listed) == sorted(after)
