"""What becomes of a measurement whose process fails, dies or hangs. Its functions import nothing heavy."""

import os
import time

import pytest

from benchmarks.processes import Failed, Worker


def double(number):
    return 2 * number, os.getpid()


def fail(_):
    raise ValueError("no such thing\nand more")


def die(_):
    os._exit(7)


def hang(_):
    time.sleep(600)


def test_a_function_is_called_in_another_process():
    answer, process = Worker(double).call(21, seconds=60)
    assert answer == 42
    assert process != os.getpid()


@pytest.mark.parametrize(
    ("function", "seconds", "reason"),
    [(fail, 60, "^ValueError: no such thing$"), (die, 60, "its process ended with 7"), (hang, 1, "its time limit")],
)
def test_a_failure_is_told_in_one_line(function, seconds, reason):
    with pytest.raises(Failed, match=reason):
        Worker(function).call(0, seconds=seconds)


def test_a_process_that_was_never_called_ends():
    worker = Worker(double)
    worker.close()
    assert worker._process.exitcode == 0
