"""How torch takes memory: from a GPU in segments that grow; on a CPU from what was freed before.

On a GPU torch's allocator by default asks for one segment after the other and never joins two: what is free in several
of them serves no tensor that is larger than each. At long contexts tensors are large and differ in size, and a trial
runs out of memory that is there. A segment that grows (``expandable_segments``) is one range of addresses into which
memory is mapped as needed.

Where it does not serve: on WSL the driver may refuse the calls for it, with an unknown error or as out of memory
(pytorch issue 192330), so it is left out there; and a tensor cannot be handed to another process over CUDA IPC in a
container that forbids ``pidfd_getfd`` (pytorch issue 165685), which nothing here does. Where torch cannot do it at all
it warns and goes on without. ``PYTORCH_ALLOC_CONF=expandable_segments:False`` switches it off.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping

# torch reads both, the second name being the older one, when a process first allocates (torch 2.10 and newer).
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
SEGMENTS_GROW = "expandable_segments:True"
# Parameters of glibc's mallopt, by their numbers in malloc.h. A worker of Ray Train trains in a thread, whose heaps
# of at most 64 MiB are unmapped one by one unless M_TOP_PAD is as large.
MALLOPT = {
    -3: 32 * 2**20,  # M_MMAP_THRESHOLD: its largest, smaller blocks are not mapped one by one
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: the free end of a heap stays
    -2: 64 * 2**20,  # M_TOP_PAD
}
# Where a user sets the same.
MALLOC_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def allocator_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment that a process is to start with, or get before it first uses a GPU, for its allocator: what the
    user has set there himself, else segments that grow.
    """
    own = {name: environment[name] for name in VARIABLES if name in environment}
    if own or "microsoft" in platform.release().lower():
        return own
    return {VARIABLES[0]: SEGMENTS_GROW}


def set_allocator() -> None:
    """Sets them in this process, and so for those that it starts, before it first uses a GPU: torch reads them then."""
    os.environ.update(allocator_variables())


def allocator_settings() -> str | None:
    """What this process's allocator was told; None where nothing was."""
    return next((os.environ[name] for name in reversed(VARIABLES) if name in os.environ), None)


def keep_freed_memory() -> None:
    """Has the C library keep what this process frees, for the next tensor: for one that trains or evaluates on a CPU.

    glibc hands large blocks back to the system when they are freed, and the system clears each page of the next ones
    anew: 7,000 to 10,000 pages a step of builtin:tiny at 1,024 tokens (LoRA+, bfloat16, one thread of an AMD EPYC),
    which takes 0.350 s with them and 0.332 without. Not for a process with a GPU, whose copies of a model in the host's
    memory are to go once they are of no use. Where there is no glibc it does nothing, nor where the user has set one of
    its variables himself.
    """
    if any(name in os.environ for name in MALLOC_VARIABLES):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS has none, nor has musl; Windows cannot ask
        return
    for parameter, value in MALLOPT.items():
        mallopt(parameter, value)
