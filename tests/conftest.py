"""What every test has: one thread, temporary folders in memory, and no Ray unless it is marked."""

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported. On tensors as small as these, two threads take up to eight times the CPU time of one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where there is room. On a disk, syncing MLflow's tables, journals and checkpoints takes most of a small sweep's time.
MEMORY, ROOM = Path("/dev/shm"), 4 * 2**30
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
gc.disable()  # while modules are imported, of which it would find nothing to collect
WITHOUT_RAY = "/dev/null/a-test-that-starts-Ray-needs-the-marker-ray"


def pytest_collection_finish() -> None:
    """From here the garbage collector looks at what tests make, and at nothing that was imported for them."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A Ray that a test without the marker ``ray`` starts cannot create its session's folder, here or in a command."""
    with pytest.MonkeyPatch.context() as patch:
        if not item.get_closest_marker("ray"):
            patch.setenv("RAY_TMPDIR", WITHOUT_RAY)
        return (yield)
