"""``status`` in another terminal, from journals, leases and plans as a sweep leaves them."""

import contextlib
import json
import math
import subprocess
import sys
import time

import pytest

from orchestrator import cancel, status
from orchestrator.expansion import expand
from orchestrator.planning.planner import plan_trials
from orchestrator.records import cancellation, leases
from orchestrator.records.events import make_event
from orchestrator.records.heartbeat import Heartbeat
from orchestrator.records.leases import owner
from orchestrator.records.storage import Storage
from orchestrator.reporting.disk_usage import disk_usage
from orchestrator.reporting.overview import Overview
from orchestrator.spec import SweepSpec
from orchestrator.trial_spec import Identities
from tests.support.commands import ROOT
from tests.support.events import a_step, evaluation
from tests.support.plans import an_estimator
from workloads.errors import InputError

NOW = time.time()
MODEL = {"parameters": 1, "trainable_parameters": 1}
STARTED = {"host": "node-7", "workers": 1, "devices": 8, "device": "gpu", "device_name": "H200", "sweep": "mine"}


@pytest.fixture
def storage(tmp_path):
    return Storage.open(str(tmp_path / "runs"))


@pytest.fixture
def trials(storage):
    """The trials of the sweep ``mine``, as it lists them when it begins, by their method."""
    spec = SweepSpec(context_lengths=(1024,), steps=100, batch=4, references=(), eval_every=50)
    made = expand(spec, Identities(model="m", tokenizer="t", data="d"), "float32").trials
    listed(storage, "mine", made)
    return {trial.training.method: trial for trial in made}


def listed(storage, sweep, trials):
    for trial in trials:
        storage.add_trial(trial)
    storage.write(f"sweeps/{sweep}/sweep.json", {"name": sweep, "trials": [trial.fingerprint for trial in trials]})
    planned = [{"fingerprint": t.fingerprint, "label": t.label, "seconds": 360.0, "workers": 8} for t in trials]
    storage.write(f"sweeps/{sweep}/plan.json", {"trials": planned})


@contextlib.contextmanager
def running(storage, sweep):
    """A command of this very process that says that it runs the sweep."""
    with Heartbeat(storage, sweep, lambda: {"doing": None, "concurrency": 2, "tokens_to_come": 0}):
        yield


def write(journal, *events, began=NOW - 100):
    """Events a second apart."""
    for second, (event, fields) in enumerate(events):
        journal.append(make_event(event, time=began + second, **fields))


def launched(**fields):
    return "launched", {"sweep": "mine", "resources": {"workers": 2, "cpus": 0, "gpus": 4}, **fields}


def steps(first, last):
    return [("step", a_step(step)) for step in range(first, last + 1)]


def held(folder, sweep="mine", **changed):
    """The trial's lease, as a process of this machine holds it, or another."""
    return folder.lease(owner("drive", sweep) | changed)


def seen(storage, trial, sweep="mine"):
    return next(t for t in Overview(storage).sweep(sweep).trials if t.fingerprint == trial.fingerprint)


def test_a_trial_trains_while_its_worker_lives_restarts_without_it_and_is_interrupted_without_its_command(
    storage, trials
):
    folder = storage.trial(trials["lora"].fingerprint)
    write(
        folder.journal, launched(), ("started", STARTED), ("model", MODEL), ("eval", evaluation(0, 9.0)), *steps(1, 20)
    )
    with running(storage, "mine"):
        with held(folder):
            training = seen(storage, trials["lora"])
        assert (training.state, training.step, training.host, training.attempts) == ("training", 20, "node-7", 1)
        assert (training.loss, training.perplexity, training.saved_step) == (1.0, 9.0, None)
        # From the attempt's start to step 20 it took 22 seconds.
        assert training.seconds_left == pytest.approx(80 * 22 / 20)
        assert training.heard == NOW - 77
        assert seen(storage, trials["lora"]).state == "restarting"
        # Begun again, and what it trained before it was lost is still the last that is known of it.
        write(folder.journal, ("started", STARTED), began=NOW - 20)
        with held(folder):
            again = seen(storage, trials["lora"])
        assert (again.state, again.seconds_left) == ("loading", None)
        assert Overview(storage).sweep("mine").left_seconds > 0
    assert seen(storage, trials["lora"]).state == "interrupted"
    assert Overview(storage).sweep("mine").state == "interrupted"


def test_a_worker_elsewhere_is_known_by_its_journal_alone(storage, trials):
    """Whether a process on another machine lives is not to be seen; one that has written nothing for long is gone."""
    for method, silent in (("lora", 200), ("full", 2000)):
        folder = storage.trial(trials[method].fingerprint)
        events = [launched(), ("started", STARTED), ("model", MODEL), ("eval", evaluation(0, 9.0)), *steps(1, 3)]
        write(folder.journal, *events, began=time.time() - silent)
        held(folder, machine="elsewhere").acquire()
    assert seen(storage, trials["lora"]).state == "training"
    assert seen(storage, trials["full"]).state == "interrupted"


def test_what_waits_says_for_what(storage, trials):
    journals = {method: storage.trial(trial.fingerprint).journal for method, trial in trials.items()}
    retry = {"kind": "transient", "remedy": "tried again after 80 s", "pause": 10_000}
    write(journals["lora+"], launched())
    write(journals["full"], launched(), ("started", STARTED), ("failed", {"reason": "OSError"}), began=NOW - 10)
    write(journals["full"], ("retry", retry), began=time.time() - 5)  # of its pause, what is left is shown
    with running(storage, "mine"):
        seen_now = {method: seen(storage, trial) for method, trial in trials.items()}
    assert (seen_now["lora"].state, seen_now["lora"].why) == ("waiting", "for its turn")
    assert (seen_now["lora+"].state, seen_now["lora+"].why) == ("starting", "for 2 workers with 4 GPUs each to start")
    assert seen_now["full"].state == "pausing" and seen_now["full"].remedies == ("transient: tried again after 80 s",)
    assert seen_now["full"].why.startswith("transient: tried again after 80 s, 2h4")
    assert seen(storage, trials["lora"]).state == "not started"


def test_a_trial_that_another_sweep_trains_names_it(storage, trials):
    folder = storage.trial(trials["lora"].fingerprint)
    listed(storage, "theirs", [trials["lora"]])
    write(folder.journal, launched(sweep="theirs"), ("started", {**STARTED, "sweep": "theirs"}), ("model", MODEL))
    with running(storage, "mine"), running(storage, "theirs"), held(folder, "theirs"):
        assert seen(storage, trials["lora"]).elsewhere == "by theirs on node-7"
        write(folder.journal, launched(), began=NOW - 50)
        waits = seen(storage, trials["lora"])
        assert waits.state == "waiting" and waits.why.startswith("the sweep theirs trains it on ")
    # Its hours are theirs.
    assert seen(storage, trials["lora"]).hours == 0 and seen(storage, trials["lora"], "theirs").hours > 0


def test_hours_and_money_are_those_in_which_devices_were_held(storage, trials):
    journal = storage.trial(trials["lora"].fingerprint).journal
    priced = {**STARTED, "usd_per_device_hour": 9.0}
    # Two attempts of 10 and 20 seconds on 8 GPUs; what lies between them, and a step made twice, is no matter.
    write(journal, launched(), ("started", priced), *steps(1, 10), began=NOW - 1000)
    write(journal, launched(), ("started", priced), ("resume", {"step": 5}), *steps(6, 24), began=NOW - 500)
    sweep = Overview(storage).sweep("mine")
    assert sweep.hours == pytest.approx(8 * 30 / 3600) and sweep.usd == pytest.approx(8 * 30 / 3600 * 9)
    assert sweep.unit == "GPU hours"
    # 19 steps in 20 s since it went on. Nothing of it is saved; two more trials have not begun.
    pace = 20 / 19
    assert sweep.left_hours == pytest.approx(8 * pace * (76 + 100 + 100) / 3600)
    assert sweep.left_usd == pytest.approx(sweep.left_hours * 9)


def test_money_left_counts_whole_machines_as_money_spent_does(storage, trials):
    half = {**STARTED, "devices": 4, "machine_devices": 8, "usd_per_device_hour": 9.0}
    write(storage.trial(trials["lora"].fingerprint).journal, launched(), ("started", half), *steps(1, 10))
    sweep = Overview(storage).sweep("mine")
    assert sweep.usd == pytest.approx(sweep.hours * 18) and sweep.left_usd == pytest.approx(sweep.left_hours * 18)


def test_what_is_left_is_as_planned_where_nothing_has_run(storage, trials):
    sweep = Overview(storage).sweep("mine")
    assert (sweep.state, sweep.finished) == ("unfinished", 0)
    assert sweep.left_hours == pytest.approx(3 * 8 * 360 / 3600) and sweep.left_seconds == 3 * 360
    with running(storage, "mine"):
        assert Overview(storage).sweep("mine").left_seconds == 3 * 360 / 2  # two at a time


def test_a_sweep_that_prepares_says_what_it_is_at(storage):
    with Heartbeat(storage, "new", lambda: {"doing": "tokenising ./books"}):
        sweep = Overview(storage).sweep("new")
        assert (sweep.state, sweep.doing) == ("preparing", "tokenising ./books")
    assert Overview(storage).sweep("new").state == "unfinished"


def test_a_command_on_another_machine_runs_while_it_beats(storage, trials):
    elsewhere = owner("", "mine") | {"machine": "elsewhere", "host": "head"}
    for age, runs in ((20, True), (100, False)):
        storage.write("sweeps/mine/command.json", {"owner": elsewhere, "began": NOW - 500, "beat": time.time() - age})
        assert Overview(storage).sweep("mine").runs == runs


@pytest.mark.parametrize("width", [80, 120])
def test_the_page_fits_its_width_and_holds_what_there_is_to_know(storage, trials, width, monkeypatch, capsys):
    journals = {method: storage.trial(trial.fingerprint).journal for method, trial in trials.items()}
    write(journals["lora"], launched(), ("started", STARTED), ("model", MODEL), *steps(1, 50), ("saved", {"step": 50}))
    diverged = ("step", a_step(3, loss=math.nan))
    write(journals["full"], launched(), ("started", STARTED), diverged, ("failed", {"reason": "NonFiniteLoss: step 3"}))
    write(journals["lora+"], launched(), ("started", STARTED), *steps(1, 2), ("saved", {"step": 2}))
    write(journals["lora+"], ("cancelled", {"step": 2, "by": "somebody on head"}))
    monkeypatch.setenv("COLUMNS", str(width))
    status.show(storage=str(storage.root))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    words = " ".join(printed.split())
    for fact in ("lora 1024 interrupted 50/100 1.000", "full 1024 failed: NonFiniteLoss: step 3", "node-7"):
        assert fact in words
    assert "cancelled 2/100" in words and "lora+ 1024 cancelled: by somebody on head" in words
    assert ("saved at 50" in words) == (width == 80)
    status.show("mine", storage=str(storage.root), json=True)
    (described,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["sweeps"]  # at a bare NaN
    assert {trial["label"]: trial["loss"] for trial in described["trials"]}["full 1024"] is None
    assert {trial["label"]: trial["saved_step"] for trial in described["trials"]} == {
        "lora 1024": 50, "lora+ 1024": 2, "full 1024": None,
    }  # fmt: skip


def test_the_newest_sweep_is_first(storage, trials):
    for number, name in enumerate(("older", "newer")):
        storage.write(
            f"sweeps/{name}/command.json", {"owner": owner("", name), "began": NOW + number, "ended": NOW + 9}
        )
    assert [sweep.name for sweep in Overview(storage).sweeps()] == ["newer", "older", "mine"]


def test_only_what_runs_can_be_cancelled_and_what_is_meant_is_clear(storage, trials):
    where = str(storage.root)
    overview = Overview(storage)
    with pytest.raises(InputError, match=r"lora 1024 \(.*\) is not started; nothing to cancel"):
        cancel.cancel("mine/lora 1024", where)
    with pytest.raises(InputError, match="the sweep mine is not running"):
        cancel.cancel("mine", where)
    with pytest.raises(InputError, match=r"no trial or sweep 'yours'.*Trials: mine/lora 1024"):
        cancel.cancel("yours", where)
    digits = trials["lora"].fingerprint[:8]
    assert overview.find(digits).label == "lora 1024" == overview.find("mine/lora 1024").label
    with running(storage, "mine"):
        cancel.cancel(digits, where)
        assert cancellation.pending_request(storage, f"trials/{trials['lora'].fingerprint}")["by"]
        assert seen(storage, trials["lora"]).state == "cancelling"
        assert cancellation.cancel_before_start(storage, storage.trial(trials["lora"].fingerprint))
        assert not cancellation.cancel_before_start(storage, storage.trial(trials["full"].fingerprint))
        cancel.cancel("mine", where)
    assert seen(storage, trials["lora"]).state == "cancelled"
    assert cancellation.pending_request(storage, f"trials/{trials['full'].fingerprint}")
    # The same sweep goes on with it.
    (planned,) = plan_trials([trials["lora"]], storage, an_estimator())
    assert planned.action == "run" and planned.reason.startswith("cancelled before by ")


def test_what_is_put_aside_is_whole_also_where_that_was_interrupted(storage, trials):
    folder = storage.trial(trials["lora"].fingerprint)
    write(folder.journal, launched(), *steps(1, 3), ("finished", {}))
    (folder.checkpoints / "step-00000003").mkdir(parents=True)
    (planned,) = plan_trials([trials["lora"]], storage, an_estimator(), forced={trials["lora"].fingerprint})
    assert (planned.action, planned.forced) == ("run", True) and "finished at step 3" in planned.reason
    # A process that died when it had moved the checkpoints alone: the trial is what it was, and the next one goes on.
    (folder.path / "earlier-1").mkdir()
    folder.checkpoints.rename(folder.path / "earlier-1" / "checkpoints")
    assert folder.times_put_aside == 0 and plan_trials([trials["lora"]], storage, an_estimator())[0].action == "known"
    assert folder.put_aside() == folder.path / "earlier-1"
    kept = {path.relative_to(folder.path).as_posix() for path in (folder.path / "earlier-1").glob("*")}
    assert kept == {"earlier-1/checkpoints", "earlier-1/journal.jsonl"}
    assert (
        plan_trials([trials["lora"]], storage, an_estimator(), forced={trials["lora"].fingerprint})[0].forced is False
    )
    write(folder.journal, launched(), *steps(1, 3), ("finished", {}))
    assert folder.put_aside().name == "earlier-2" and (folder.path / "trial.json").exists()


def test_disk_use_is_shown_by_trial(storage, trials):
    first, second = (storage.trial(trials[method].fingerprint) for method in ("lora", "full"))
    for name, size in (("checkpoints/step-00000010/a", 3000), ("checkpoints/step-00000020/a", 2000)):
        (first.path / name).parent.mkdir(parents=True)
        (first.path / name).write_bytes(bytes(size))
    (second.path / "earlier-1").mkdir()
    (second.path / "earlier-1" / "journal.jsonl").write_bytes(bytes(700))
    (storage.data / "abc").mkdir(parents=True)
    (storage.data / "abc" / "tokens").write_bytes(bytes(5000))
    usage = disk_usage(storage)
    assert (usage.trials[first.path.name].checkpoints, usage.trials[first.path.name].num_checkpoints) == (5000, 2)
    assert usage.trials[second.path.name].earlier == 700 and usage.data == {"abc": 5000}
    assert usage.total == sum(path.stat().st_size for path in storage.root.rglob("*") if path.is_file())


def test_a_look_starts_no_ray_and_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'ray', 'mlflow', 'datasets', 'matplotlib'}"
    code = f"import sys, orchestrator.status, orchestrator.cancel; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_holder_of_a_lease_is_named_until_it_is_released_or_dead(storage, trials):
    folder = storage.trial(trials["lora"].fingerprint)
    assert folder.holder() is None
    with held(folder):
        assert folder.holder()["sweep"] == "mine"
    assert folder.holder() is None
    dead = owner("drive", "mine") | {"process_start": "0"}
    assert leases.is_dead(dead)
    folder.lease(dead).acquire()
    assert folder.holder() is None
