"""How errors are classified, and how a trial continues after real faults: killed, stopped and starved processes."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.records.trial_record import TrialRecord
from orchestrator.running.faults import TRANSIENT_PAUSES, classify, find_remedy
from tests.support.commands import ONE_TRIAL, ROOT, SweepCommand, wait_for
from tests.support.ray_nodes import DRIVER_TITLE, paused, processes_beside, worker_processes
from tests.support.storage import mlflow_runs, running_trial
from workloads.config import ExecutionConfig
from workloads.errors import InputError
from workloads.training.checkpoint import newest_step
from workloads.training.loop import NonFiniteLoss

TWO_WORKERS = (*ONE_TRIAL, "--steps", "10", "--workers", "2")


def raised_from(error, cause):
    try:
        raise error from cause
    except type(error) as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InputError("lora_rank is 512; expected at most 64"), "configuration"),
        (NonFiniteLoss("step 3"), "not_finite"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory"),
        (MemoryError(), "out_of_host_memory"),
        (raised_from(OSError("checkpoint of 5 bytes"), OSError(errno.ENOSPC, "No space left")), "disk_full"),
        (raised_from(InputError("model x could not be loaded"), ConnectionResetError()), "transient"),
        (OSError(errno.ESTALE, "Stale file handle"), "transient"),
        (torch.distributed.DistBackendError("NCCL communicator was aborted"), "lost"),
        (ValueError("Default process group has not been initialized, please make sure to call"), "lost"),
        (KeyError("weight"), "error"),
        (PermissionError(errno.EACCES, "Permission denied"), "error"),
    ],
)
def test_an_error_is_classified(error, kind):
    assert classify(error) == kind


def test_errors_of_the_cpu_allocator_and_of_gloo_are_classified():
    with pytest.raises(RuntimeError) as allocation:
        torch.empty(2**60, dtype=torch.uint8)
    assert classify(allocation.value) == "out_of_memory"
    script = """
        import datetime, os, sys, torch.distributed as dist
        rank = int(sys.argv[1])
        store = dist.FileStore(sys.argv[2], 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(minutes=5))
        dist.barrier()
        if rank == 1:
            os.kill(os.getpid(), 9)
        from orchestrator.running.faults import classify
        try:
            dist.barrier()
        except Exception as error:
            print(classify(error))
    """

    with tempfile.TemporaryDirectory() as folder:
        arguments = [sys.executable, "-c", textwrap.dedent(script)]
        peers = [
            subprocess.Popen([*arguments, str(rank), f"{folder}/store"], stdout=subprocess.PIPE, text=True)
            for rank in (0, 1)
        ]
        assert peers[0].communicate(timeout=400)[0] == "lost\n"
        peers[1].wait()


def test_remedies_save_memory_step_by_step_and_wait_for_transient_faults():
    pieces = []
    execution = ExecutionConfig(engine="zero2")
    while plan := find_remedy("out_of_memory", execution, 8, 32, []):
        execution = plan.execution
        pieces.append((execution.micro_batch, execution.gradient_checkpointing, execution.offload))
    assert pieces == [(2, 0, False), (1, 0, False), *((1, n, False) for n in (16, 24, 28, 32)), (1, 32, True)]
    for before, words in ((0, "gradient checkpointing 16"), (13, "gradient checkpointing 23"), (31, "32")):
        again = find_remedy("out_of_memory", ExecutionConfig(gradient_checkpointing=before), 1, 32, [])
        assert again.description.endswith(words)
    whole = ExecutionConfig(gradient_checkpointing="all")
    assert find_remedy("out_of_memory", whole, 1, 32, []) is None
    assert find_remedy("out_of_memory", ExecutionConfig(), 1, 0, []) is None, (
        "an untuned trial has nothing to recompute"
    )
    assert find_remedy("out_of_memory", ExecutionConfig(), 8, 32, ["out_of_memory"]) is None, "once is enough"
    with_host = ExecutionConfig(gradient_checkpointing=14, offload_activations=8)
    assert (
        find_remedy("out_of_memory", with_host, 1, 32, []).description == "tried again with gradient checkpointing 19"
    )
    given_up = find_remedy("out_of_host_memory", with_host, 1, 32, ["out_of_memory"]).execution
    assert (given_up.gradient_checkpointing, given_up.layers_offloaded) == (32, 0)
    assert find_remedy("out_of_host_memory", ExecutionConfig(), 8, 32, []).execution.micro_batch == 2
    pauses = [
        find_remedy("transient", execution, 8, 32, ["transient"] * tried).pause
        for tried in range(len(TRANSIENT_PAUSES))
    ]
    assert pauses == sorted(pauses) and sum(pauses) > 120
    assert find_remedy("transient", execution, 8, 32, ["transient"] * len(TRANSIENT_PAUSES)) is None
    for final in ("configuration", "not_finite", "disk_full", "error"):
        assert find_remedy(final, execution, 8, 32, []) is None


def last_checkpoint(command):
    return load_file(max(command.storage.glob("trials/*/checkpoints/step-*")) / "tensors.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.ray
def test_a_killed_or_silent_process_costs_one_interval_and_changes_no_result(tmp_path, text_folder):
    """SIGSTOP simulates a hang: the stopped rank is alive but silent, and the other must not wait for it forever.

    The driver is the trial's process under Tune. Ray's own files are truncated at the same time: nothing may depend on
    them.
    """
    flags = (*TWO_WORKERS, "--data", str(text_folder))
    undisturbed = SweepCommand(tmp_path / "undisturbed", *flags)
    status, output = undisturbed.run()
    assert status == 0, output
    command = SweepCommand(tmp_path / "runs", *flags, "--hang-timeout", "10")
    process = command.start()
    faults = (("rank 0", signal.SIGKILL, 4), ("driver", signal.SIGKILL, 7), ("rank 1", signal.SIGSTOP, 8))
    for attempt, (who, how, at_step) in enumerate(faults, start=1):
        record = wait_for(partial(in_attempt, command.storage, attempt, at_step), process, f"step {at_step}")
        for file in (path for path in (command.storage / ".ray").rglob("*") if path.is_file()):
            os.truncate(file, file.stat().st_size // 2)
        ranks, (driver,) = worker_processes(record), processes_beside(record.started.pid, DRIVER_TITLE)
        os.kill(driver if who == "driver" else ranks[int(who[-1])], how)
        struck_at = TrialRecord.of(record.journal).last_step
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    record = TrialRecord.of(record.journal)
    assert record.state == "finished" and len(record.attempts) == len(faults) + 1
    assert record.resumed_at >= struck_at - 2
    assert_same(last_checkpoint(command), last_checkpoint(undisturbed))
    client, (run,), _ = mlflow_runs(command.storage)
    assert run.info.status == "FINISHED"
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(steps) == list(range(1, 11))


def in_attempt(storage, attempt, at_step):
    record = running_trial(storage, at_step)
    return record if record and len(record.attempts) == attempt else None


def test_an_error_that_process_exit_causes_in_a_thread_is_recognised():
    """On Ctrl-C Ray ends a worker in the middle of a step, and torch removes its operators before the step is over.

    Like torch's operators, ``operators`` is removed by ``weakref.finalize``. The handler that waits for the step is
    registered first, so it runs last.
    """
    code = """
    import atexit, threading, weakref
    atexit.register(lambda: worker.join(60))
    import torch
    from orchestrator.running.faults import watch_exit

    class Operators: ...

    def step():
        begun.set()
        removed.wait(60)
        print("error", exiting.is_set(), flush=True)

    operators, begun, removed = Operators(), threading.Event(), threading.Event()
    weakref.finalize(operators, removed.set)
    exiting = watch_exit()
    worker = threading.Thread(target=step, daemon=True)
    worker.start()
    begun.wait()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "error True\n", (done.returncode, done.stderr)


@pytest.mark.ray
def test_out_of_memory_is_retried_once_with_less_memory_and_recorded(tmp_path, text_folder):
    """The worker may take no more memory than it has. Its allocator returns what is freed, so it really fails."""
    small_blocks = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
    flags = (*ONE_TRIAL, "--steps", "6", "--data", str(text_folder))
    command = SweepCommand(tmp_path / "runs", *flags, environment=small_blocks)
    process = command.start()
    record = wait_for(lambda: running_trial(command.storage, 2), process, "step 2")
    pid = record.started.pid
    resource.prlimit(pid, resource.RLIMIT_DATA, (2**20, resource.RLIM_INFINITY))
    output, _ = process.communicate(timeout=400)
    record = TrialRecord.of(record.journal)
    assert process.returncode == 0, output
    assert record.state == "finished"
    assert record.remedies == ["out of memory: tried again with micro batch 1"]


@pytest.fixture
def small_disk(tmp_path):
    """A small file system that a test can fill."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700m", "none", disk], capture_output=True).returncode:
        pytest.skip("only root can mount a file system")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.ray
def test_a_full_disk_is_reported_and_training_resumes_from_the_checkpoint_before(small_disk, text_folder):
    flags = (*ONE_TRIAL, "--steps", "8", "--data", str(text_folder))
    command = SweepCommand(small_disk / "runs", *flags)
    process = command.start()
    record = wait_for(lambda: running_trial(command.storage, 3), process, "step 3")
    filler = small_disk / "filler"
    with paused(record.started.pid), contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 1 and "Traceback" not in output, output
    assert "No space left on device" in " ".join(output.split())
    folder = record.journal.path.parent
    record = TrialRecord.of(record.journal)
    assert record.failure_kind == "disk_full" and len(record.attempts) == 1, "a full disk is not tried again"
    kept = newest_step(folder / "checkpoints")
    assert kept >= 2 and not list((folder / "checkpoints").glob(".*")), "nothing partial stays"

    filler.unlink()
    status, output = command.run()
    assert status == 0, output
    record = TrialRecord.of(record.journal)
    assert record.state == "finished" and record.resumed_at == kept
