"""How torch's allocator takes memory from a GPU: in segments that grow.

By default it asks for one segment after the other and never joins two: what is free in several of them serves no tensor
that is larger than each. At long contexts tensors are large and differ in size, and a trial runs out of memory that is
there. A segment that grows (``expandable_segments``) is one range of addresses into which memory is mapped as needed.

Where it does not serve: on WSL the driver may refuse the calls for it, with an unknown error or as out of memory
(pytorch issue 192330), so it is left out there; and a tensor cannot be handed to another process over CUDA IPC in a
container that forbids ``pidfd_getfd`` (pytorch issue 165685), which nothing here does. Where torch cannot do it at all
it warns and goes on without. ``PYTORCH_ALLOC_CONF=expandable_segments:False`` switches it off.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping

# torch reads both, the second name being the older one, when a process first allocates (torch 2.10 and newer).
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
SEGMENTS_GROW = "expandable_segments:True"


def allocator_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment that a process is to start with, or get before it first uses a GPU, for its allocator: what the
    user has set there himself, else segments that grow."""
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
