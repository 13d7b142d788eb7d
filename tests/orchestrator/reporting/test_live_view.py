"""The live table of a sweep with more trials than a screen has lines."""

from orchestrator.reporting.live_view import most_active
from orchestrator.reporting.progress import Progress

STATES = ["known", "finished", "training", "finished", "waiting", "evaluating", "waiting"]


def test_trials_at_work_are_shown_before_those_that_wait_and_those_that_ended():
    trials = [Progress(fingerprint=str(n), label=f"lora {n}", state=state) for n, state in enumerate(STATES)]
    assert most_active(trials, 7) == trials
    assert [trial.fingerprint for trial in most_active(trials, 3)] == ["2", "4", "5"]
    assert [trial.fingerprint for trial in most_active(trials, 0)] == ["2"]
