"""The live table of a sweep with more trials than a screen has lines."""

from orchestrator.reporting.live_view import most_active
from orchestrator.reporting.progress import Progress, progress_line

STATES = ["known", "finished", "training", "finished", "waiting", "evaluating", "waiting"]


def test_trials_at_work_are_shown_before_those_that_wait_and_those_that_ended():
    trials = [Progress(fingerprint=str(n), label=f"lora {n}", state=state) for n, state in enumerate(STATES)]
    assert most_active(trials, 7) == trials
    assert [trial.fingerprint for trial in most_active(trials, 3)] == ["2", "4", "5"]
    assert [trial.fingerprint for trial in most_active(trials, 0)] == ["2"]


def test_a_log_gets_one_line_with_what_is_done_what_trains_and_the_time_left():
    made = [Progress(fingerprint=str(n), label=f"lora {n}", state=state) for n, state in enumerate(STATES)]
    made[2] = Progress(fingerprint="2", label="full 2048", state="training", step=12, steps=32)
    made[3] = Progress(fingerprint="3", label="lora 3", state="failed")
    assert progress_line(made, 200.0, 250.0) == (
        "3m20s: 3 of 7 trials done (1 failed); training full 2048 12/32, evaluating lora 5; about 4m10s left"
    )
    waiting = [Progress(fingerprint="0", label="lora 0", state="waiting", why="for its turn")]
    assert progress_line(waiting, 60.0, None) == "1m00s: 0 of 1 trials done; 1 waiting for its turn"
