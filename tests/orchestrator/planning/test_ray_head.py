"""A cluster that cannot be joined is one error that says why, within seconds, and signals end the wait."""

import signal
import subprocess
import sys

import pytest

from orchestrator.planning import ray_head
from orchestrator.planning.cluster import join_or_start
from orchestrator.run_options import RunOptions
from tests.support.commands import ROOT, SweepCommand
from tests.support.ray_head import head_of, silent_listener
from tests.support.ray_nodes import free_port
from workloads.errors import InputError


@pytest.fixture(autouse=True)
def no_ray_settings(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("the cluster was joined"))


def refused(address=None):
    with pytest.raises(InputError) as error:
        join_or_start(RunOptions(address=address))
    return str(error.value)


def test_nothing_listens(monkeypatch):
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    message = refused()
    assert message.startswith(f"RAY_ADDRESS={address}: nothing listens at ")
    assert "ray start --head" in message and "unset RAY_ADDRESS" in message


def test_something_else_listens_and_is_silent(monkeypatch):
    assert ray_head.DEADLINE_S <= 10
    monkeypatch.setattr(ray_head, "DEADLINE_S", 2)
    with silent_listener() as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        message = refused(address)
    assert message.startswith(f"--address {address}: what listens at ")
    assert "does not answer as a Ray head within 2 s" in message


@pytest.mark.parametrize(
    ("ray_version", "python_version"), [("2.9.3", ".".join(map(str, sys.version_info[:3]))), (None, "3.8.1")]
)
def test_another_version(ray_version, python_version):
    import ray

    there = ray_version or ray.__version__
    with head_of(there, python_version) as port:
        message = refused(f"127.0.0.1:{port}")
    assert f"runs Ray {there} on Python {python_version}, and this is Ray {ray.__version__}" in message
    assert "install the same versions" in message


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("no-such-host.invalid:6379", "no machine of that name is known"),
        ("127.0.0.1", "expected HOST:PORT"),
        ("127.0.0.1:99999999", "99999999 is no port; expected HOST:PORT"),
        ("http://127.0.0.1:8265", "is the dashboard's"),
        ("ray://127.0.0.1:10001", "is Ray Client's"),
    ],
)
def test_addresses_that_lead_nowhere(address, reason):
    message = refused(address)
    assert message.startswith(f"--address {address}: ") and reason in message


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_for_a_head(number, tmp_path, text_folder):
    with silent_listener() as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        process = SweepCommand(tmp_path, "--address", address, "--data", str(text_folder)).start()
        listener.accept()  # the command has found it, and waits for its answer
        process.send_signal(number)
        printed, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and "interrupted." in printed


def test_a_signal_ends_a_call_that_python_cannot_interrupt():
    """``ray.init`` waits like this, should the head go while it joins."""
    code = """
import ctypes
from orchestrator.process import end_on_signal, stop_on_signals
stop_on_signals()
with end_on_signal(seconds=1):
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
    lock(mutex)
    try:
        print("waits", flush=True)
        lock(mutex)
    except KeyboardInterrupt:  # the signal came before it waited
        lock(mutex)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"waits\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130 and b"interrupted." in errors
