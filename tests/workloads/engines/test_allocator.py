"""Segments grow unless the user's setting says otherwise, and torch reads the setting."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from workloads.engines import allocator
from workloads.engines.allocator import VARIABLES, allocator_settings, allocator_variables, set_allocator

# Torch is there before the setting, as in a user's own program.
LATE = "import torch; import workloads; "


def told_torch(say: str, **environment: str) -> str:
    """What a process that prints ``say`` says."""
    clear = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", f"{LATE}print({say})"],
        cwd=Path(__file__).parents[3], env=clear | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


@pytest.mark.parametrize("package", ["workloads", "benchmarks"])
def test_it_is_set_before_torch_is_imported(package):
    """Once transformers has imported bitsandbytes, which looks at the GPU, it would be too late."""
    clear = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    code = f"import os, sys, {package}; print(os.environ['{VARIABLES[0]}'], 'torch' in sys.modules)"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=clear, capture_output=True, text=True)
    assert done.stdout.split() == ["expandable_segments:True", "False"], done.stderr


@pytest.mark.skipif(not hasattr(torch._C, "_accelerator_getAllocatorSettings"), reason="this torch does not tell")
def test_torch_takes_up_what_is_set_after_its_import():
    assert told_torch("torch._C._accelerator_getAllocatorSettings()") == "expandable_segments:True"


@pytest.mark.gpu
@pytest.mark.parametrize(("environment", "grow"), [({}, True), ({VARIABLES[1]: "expandable_segments:False"}, False)])
def test_segments_grow_on_a_gpu_unless_the_user_says_no(environment, grow):
    said = told_torch(
        "torch.zeros(1, device='cuda') is None or torch.cuda.memory._snapshot()['allocator_settings']"
        "['expandable_segments']",
        **environment,
    )
    assert said == str(grow)


@pytest.mark.parametrize("name", VARIABLES)
def test_what_the_user_has_set_stays_and_is_handed_on(name, monkeypatch):
    for each in VARIABLES:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:512")
    set_allocator()
    assert {each: os.environ.get(each) for each in VARIABLES if each != name} == dict.fromkeys({*VARIABLES} - {name})
    assert allocator_variables() == {name: "max_split_size_mb:512"}
    assert allocator_settings() == "max_split_size_mb:512"


def test_on_wsl_torch_keeps_its_default(monkeypatch):
    monkeypatch.setattr(allocator.platform, "release", lambda: "5.15.90.1-microsoft-standard-WSL2")
    assert allocator_variables({}) == {}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library has no such settings")
@pytest.mark.parametrize(("variables", "serves"), [({}, True), ({"MALLOC_MMAP_THRESHOLD_": str(2**17)}, False)])
def test_what_is_freed_on_a_cpu_serves_the_next_tensor_unless_the_user_has_said_otherwise(variables, serves):
    """In its own thread, as in a worker of Ray Train: counts pages that the system allocates again."""
    code = """
import resource, threading, torch
from workloads.engines.allocator import keep_freed_memory
def pages(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        blocks = [torch.ones(2**18) for _ in range(200)]
        del blocks
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // times
def run():
    keep_freed_memory()
    pages(10)
    print(pages(10))
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""
    clear = {name: value for name, value in os.environ.items() if name not in allocator.MALLOC_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[3], env=clear | variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (int(done.stdout) < 60) == serves  # 624 by glibc's own rules, of 51,200
