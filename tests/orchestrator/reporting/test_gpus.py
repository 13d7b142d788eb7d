"""The GPUs of this machine, as the driver reports them."""

import subprocess

import pytest

from orchestrator.records.provenance import nvidia_driver
from orchestrator.reporting.gpus import Gpu, gpus


def test_a_gpu_is_written_with_what_it_reports():
    assert str(Gpu(0, "NVIDIA H200", 97, 101.2, 140.4)) == "0 NVIDIA H200: 97% busy, 101.2 of 140.4 GiB"
    assert str(Gpu(1, "NVIDIA A100 MIG 1g.5gb", None, None, 4.75)) == "1 NVIDIA A100 MIG 1g.5gb: use unknown"


def test_a_machine_without_gpus_has_none_and_no_driver():
    assert bool(gpus()) == (nvidia_driver() is not None)


@pytest.mark.gpu
def test_gpus_and_driver_are_those_of_nvidia_smi():
    query = ["nvidia-smi", "--query-gpu=index,name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    expected = [line.split(", ") for line in lines]
    assert [[str(gpu.index), gpu.name, str(round(gpu.gib * 1024)), nvidia_driver()] for gpu in gpus()] == expected
