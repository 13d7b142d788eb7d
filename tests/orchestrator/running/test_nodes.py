"""A cluster of two nodes loses one in the middle of a trial, with and without notice."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.records.trial_record import TrialRecord
from tests.support.commands import SweepCommand, wait_for
from tests.support.ray_nodes import WATCHER_TITLE, RayNodes, paused
from tests.support.storage import records, running_trial

pytestmark = pytest.mark.ray
STEPS = 24


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


def flags(cluster, text_folder, *methods, checkpoint_every):
    return (
        "--context-lengths", "1024", "--batch", "2", "--steps", str(STEPS), "--eval-every", "50",
        "--eval-documents", "2", "--references", "--methods", *methods, "--checkpoint-every", str(checkpoint_every),
        "--data", str(text_folder), "--address", cluster.address,
    )  # fmt: skip


def full(storage, at_step):
    """The record of the trial with full fine-tuning, once it has come to this step."""
    for name, record in records(storage).items():
        if method(storage / "trials" / name) == "full" and record.last_step >= at_step:
            return record
    return None


def method(trial):
    return json.loads((trial / "trial.json").read_text())["training"]["method"]


def weights(record):
    return load_file(max(record.journal.path.parent.glob("checkpoints/step-*")) / "tensors.safetensors")


def test_trials_continue_on_another_node_when_theirs_is_lost_without_notice(cluster, results, tmp_path, text_folder):
    """Two other trials compete for the node that is left, which has room for one."""
    settings = flags(cluster, text_folder, "full", "lora+", "lora", checkpoint_every=2)
    command = SweepCommand(tmp_path / "runs", *settings, environment=cluster.environment)
    process = command.start()
    lost = wait_for(lambda: full(command.storage, at_step=4), process, "step 4")
    cluster.kill(cluster.node_of(lost.started.pid))
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert [record.state for record in records(command.storage).values()] == ["finished"] * 3
    record = TrialRecord.of(lost.journal)
    assert len(record.attempts) == 2 and record.resumed_at >= lost.last_step - 2
    results["full"] = weights(record)


# Keep this the last test of the cluster: Ray removes the node when its deadline is over.
def test_a_trial_continues_on_another_node_after_a_notice_and_repeats_no_step(cluster, results, tmp_path, text_folder):
    # A notice must be enough, and no failure may be charged to the trial.
    settings = (*flags(cluster, text_folder, "full", checkpoint_every=1000), "--max-failures", "0")
    command = SweepCommand(tmp_path / "runs", *settings, environment=cluster.environment)
    if len(cluster.alive()) < 3:
        cluster.add(cpus=1)
    process = command.start()
    record = wait_for(lambda: running_trial(command.storage, 3), process, "step 3")
    # A fast machine would finish the trial before Ray Train's watcher for notices has started.
    with paused(record.started.pid):
        wait_for(lambda: cluster.runs(WATCHER_TITLE), process, "the watcher for notices")
        cluster.drain(record.started.node, seconds=30)
        time.sleep(2)  # ten checks at PREEMPTION_POLL of ray_nodes
    lost_at = TrialRecord.of(record.journal).last_step
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    record = TrialRecord.of(record.journal)
    assert record.state == "finished" and len(record.attempts) == 2
    events = [event.name for event in record.journal.read().events]
    assert "preempted" in events and record.resumed_at >= lost_at
    assert events.count("step") == STEPS, "no step was trained twice"
    one, other = results["full"], weights(record)
    assert all(torch.equal(one[name], other[name]) for name in one)
