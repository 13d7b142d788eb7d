"""What a sweep does that only a GPU shows: shares of one, its memory running out, its driver in the record."""

import subprocess
import sys
from contextlib import contextmanager

import pytest

from tests.support.commands import SweepCommand
from tests.support.storage import records
from workloads.budget import ModelShape, memory
from workloads.config import ExecutionConfig, TrainingConfig
from workloads.models.source import ModelSource

pytestmark = [pytest.mark.gpu, pytest.mark.ray]
GIB = 2**30
# Leaves so many bytes of the GPU free, says so, and holds the rest until it is told to end.
HOLD = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(free - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def free_memory(size: int):
    """Another job on the GPU leaves ``size`` bytes of it."""
    arguments = [sys.executable, "-c", HOLD, str(size)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "held\n"
        yield
        job.stdin.close()


def test_two_trials_share_a_gpu_at_the_same_time(tmp_path, text_folder):
    flags = ("--context-lengths", "1024", "--steps", "300", "--batch", "2", "--methods", "lora", "full")
    flags += ("--references", "--eval-every", "300", "--eval-documents", "2", "--gpus-per-worker", "0.5")
    status, output = SweepCommand(tmp_path / "runs", *flags, "--data", str(text_folder)).run()
    assert status == 0, output
    one, other = records(tmp_path / "runs").values()
    assert one.state == other.state == "finished"
    times = [[event.time for event in record.journal.read().events if event.name == "step"] for record in (one, other)]
    assert max(times[0][0], times[1][0]) < min(times[0][-1], times[1][-1]), "they trained one after the other"
    for record in (one, other):
        assert record.started.driver and record.started.cuda and record.started.device == "gpu"
        assert record.started.allocator == "expandable_segments:True"


def test_memory_that_another_job_has_taken_costs_one_attempt(tmp_path, text_folder):
    sizes = {"context_length": 1024, "steps": 4, "batch": 512, "eval_span": 1024, "group_size": 256}
    training = TrainingConfig(**sizes, method="full", precision="bfloat16")
    shape = ModelShape.of(ModelSource.parse("builtin:tiny").config())
    wanted = memory(shape, training, ExecutionConfig()).allocated
    flags = ("--context-lengths", "1024", "--steps", "4", "--batch", "512", "--methods", "full", "--references")
    flags += ("--eval-every", "4", "--eval-documents", "2", "--precision", "bfloat16", "--data", str(text_folder))
    with free_memory(wanted // 2 + 2 * GIB):  # CUDA itself and its libraries take part of the 2 GiB
        status, output = SweepCommand(tmp_path / "runs", *flags).run()
    assert status == 0, output
    (record,) = records(tmp_path / "runs").values()
    assert record.state == "finished" and len(record.attempts) == 2
    assert record.remedies == ["out of memory: tried again with micro batch 128"]
