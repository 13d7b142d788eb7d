"""The GPUs of this machine, as the driver reports them."""

import subprocess

import pytest

from orchestrator import gpus as module
from orchestrator.gpus import Gpu, gpus, nvidia_driver, visible_gpus


def test_a_gpu_is_written_with_what_it_reports():
    assert str(Gpu(0, "NVIDIA H200", 97, 101.2, 140.4)) == "0 NVIDIA H200: 97% busy, 101.2 of 140.4 GiB"
    assert str(Gpu(1, "NVIDIA A100 MIG 1g.5gb", None, None, 4.75)) == "1 NVIDIA A100 MIG 1g.5gb: use unknown"


def test_a_machine_without_gpus_has_none_and_no_driver():
    assert bool(gpus()) == (nvidia_driver() is not None)


@pytest.mark.parametrize(
    ("allowed", "visible"),
    [(None, "AB"), ("", ""), ("1", "B"), (" 1 , 0", "AB"), ("GPU-1f", "A"), ("MIG-1f", "")],
)
def test_a_process_may_use_the_gpus_that_cuda_shows_it(monkeypatch, allowed, visible):
    two = [Gpu(0, "A", 0, 1.0, 2.0, "GPU-1f00"), Gpu(1, "B", 0, 1.0, 3.0, "GPU-2f00"), Gpu(2, "C", 0, None, None, "")]
    monkeypatch.setattr(module, "gpus", lambda: two)
    if allowed is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    assert visible_gpus() == [(gpu.name, gpu.gib * 2**30) for gpu in two if gpu.name in visible]


@pytest.mark.gpu
def test_gpus_and_driver_are_those_of_nvidia_smi():
    query = ["nvidia-smi", "--query-gpu=index,name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    expected = [line.split(", ") for line in lines]
    assert [[str(gpu.index), gpu.name, str(round(gpu.gib * 1024)), nvidia_driver()] for gpu in gpus()] == expected
