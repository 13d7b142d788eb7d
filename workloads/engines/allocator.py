"""How torch allocates memory: on a GPU in expandable segments; on a CPU from memory that was freed before.

On a GPU torch's allocator by default requests separate segments and never joins two: free memory in several of them
cannot hold a tensor that is larger than each. At long contexts tensors are large and differ in size, and a trial runs
out of memory that is free. An expandable segment (``expandable_segments``) is one address range into which memory is
mapped as needed.

Limits: on WSL the driver may refuse its calls, with an unknown error or as out of memory (pytorch issue 192330), so it
stays off there; and a tensor cannot be sent to another process over CUDA IPC in a container that forbids
``pidfd_getfd`` (pytorch issue 165685), which nothing here does. Where torch does not support it, it warns and continues
without. ``PYTORCH_ALLOC_CONF=expandable_segments:False`` switches it off.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping

# torch reads both when a process first allocates (torch 2.10 and newer); the second is the older name.
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
EXPANDABLE_SEGMENTS = "expandable_segments:True"
# Parameters of glibc's mallopt, by their numbers in malloc.h. A worker of Ray Train trains in a thread, whose heaps
# of at most 64 MiB are unmapped one by one unless M_TOP_PAD is as large.
MALLOPT = {
    -3: 32 * 2**20,  # M_MMAP_THRESHOLD: its largest, smaller blocks are not mapped one by one
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: the free end of a heap stays
    -2: 64 * 2**20,  # M_TOP_PAD
}
# A user's own settings of the same parameters.
MALLOC_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def allocator_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The allocator's environment variables: the user's own where set, else expandable segments.

    A process needs them at its start, or before it first uses a GPU.
    """
    own = {name: environment[name] for name in VARIABLES if name in environment}
    if own or "microsoft" in platform.release().lower():
        return own
    return {VARIABLES[0]: EXPANDABLE_SEGMENTS}


def set_allocator() -> None:
    """Sets :func:`allocator_variables` for this process and its children. Call it before the first use of a GPU."""
    os.environ.update(allocator_variables())


def allocator_settings() -> str | None:
    """The setting of this process's allocator; None without one."""
    return next((os.environ[name] for name in reversed(VARIABLES) if name in os.environ), None)


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next tensor, in a process that trains or evaluates on a CPU.

    glibc returns large blocks to the system when they are freed, and the system clears each page of the next ones
    again: 7,000 to 10,000 pages a step of builtin:tiny at 1,024 tokens (LoRA+, bfloat16, one thread of an AMD EPYC),
    which takes 0.350 s with them and 0.332 without. Not for a process with a GPU, which should release its host copies
    of a model. It does nothing without glibc, or if the user has set one of glibc's variables.
    """
    if any(name in os.environ for name in MALLOC_VARIABLES):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # neither macOS nor musl has it; Windows has no CDLL(None)
        return
    for parameter, value in MALLOPT.items():
        mallopt(parameter, value)
