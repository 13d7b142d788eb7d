"""A cluster of two nodes that loses one in the middle of a trial, with a notice and without."""

import contextlib
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.journal import TrialRecord
from tests.orchestrator.conftest import SweepCommand, wait_for
from tests.orchestrator.ray_nodes import RayNodes
from tests.orchestrator.test_sweep import ONE_TRIAL, running_trial


@pytest.fixture(scope="module")
def cluster():
    nodes = RayNodes()
    try:
        nodes.add(cpus=1)
        nodes.add(cpus=1)
        yield nodes
    finally:
        nodes.close()


@pytest.fixture(scope="module")
def results():
    return {}


@contextlib.contextmanager
def paused(pid):
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


# The node that is drained last is the last that can be: Ray takes it out of the cluster when its time is over.
@pytest.mark.parametrize("how", ["without a word", "after a notice"])
def test_a_trial_goes_on_elsewhere_when_its_node_goes(how, cluster, results, tmp_path, text_folder):
    flags = (*ONE_TRIAL, "--steps", "40", "--data", str(text_folder), "--address", cluster.address)
    if how == "after a notice":
        # A notice must be enough, and no failure may be charged to the trial.
        flags += ("--checkpoint-every", "1000", "--max-failures", "0")
    command = SweepCommand(tmp_path / "runs", *flags, environment=cluster.environment)
    if len(cluster.alive()) < 3:
        cluster.add(cpus=1)
    process = command.start()
    record = wait_for(lambda: running_trial(command.storage, 3), process, "step 3")
    if how == "after a notice":
        with paused(record.started["pid"]):  # or a quick machine ends the trial before the notice is through
            cluster.drain(record.started["node"], seconds=30)
            time.sleep(2)  # Ray Train looks for notices ten times in that: PREEMPTION_POLL of ray_nodes
    else:
        cluster.kill(cluster.node_of(record.started["pid"]))
    lost_at = TrialRecord.of(record.journal).last_step
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    record = TrialRecord.of(record.journal)
    assert record.state == "finished" and len(record.attempts) == 2
    events = [event["event"] for event in record.journal.read()[0]]
    if how == "after a notice":
        assert "preempted" in events and record.resumed_at >= lost_at
        assert events.count("step") == 40, "no step was trained twice"
    else:
        assert record.resumed_at >= lost_at - 2
    checkpoint = max(command.storage.glob("trials/*/checkpoints/step-*"))
    results[how] = load_file(checkpoint / "tensors.safetensors")
    if len(results) == 2:
        one, other = results.values()
        assert all(torch.equal(one[name], other[name]) for name in one)
