"""What an error means for a trial: final, tried again, or tried again in less memory.

    kind                for example                                      what follows
    configuration       a rank larger than the layer                     final
    not_finite          NaN or infinity in the loss or a gradient        final
    disk_full           no space left for a checkpoint                   final; the checkpoint before is whole
    error               anything else that Python raises                 final: it would come again
    out_of_memory       the device's                                     once more with the next smaller memory plan
    out_of_host_memory  what cannot be pinned; Ray's own limit           once more, with no activations there
    transient           a hub or storage that does not answer            again after a pause, which grows
    lost                a worker, its node, or a peer that went silent   again at once, ``max_failures`` times
    preempted           a node that is about to be taken away            again at once, ``max_preemptions`` times

A lost worker or node is Ray Train's to replace (and a lost driver Ray Tune's); the rest is decided here, by the driver
of the trial (:mod:`orchestrator.running.driver`), from what the worker wrote into the journal. "Final" is final for this run of
the command: the next one tries again, since the user may have mended the cause.
"""

from __future__ import annotations

import atexit
import dataclasses
import errno
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from orchestrator.records.events import FaultKind
from orchestrator.records.journal import DISK_FULL
from workloads.budget import less_memory
from workloads.config import ExecutionConfig
from workloads.errors import InputError

# Pauses before each further try after a transient fault, in seconds: two and a half minutes in all, which outlasts the restart
# of a file server and most throttling.
TRANSIENT_PAUSES = (5, 10, 20, 40, 80)

TRANSIENT = {
    errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET,
    errno.ECONNABORTED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EPIPE, errno.EREMOTEIO,
}  # fmt: skip
# Errors of libraries that are not imported here, by name: they may not be installed where this runs.
TRANSIENT_NAMES = {
    "ConnectError", "ConnectTimeout", "ReadTimeout", "ReadError", "RemoteProtocolError", "PoolTimeout",  # httpx
    "ConnectionError", "Timeout", "ChunkedEncodingError",  # requests
    "EndpointConnectionError", "ConnectionClosedError", "ReadTimeoutError", "ConnectTimeoutError",  # botocore
    "ClientConnectorError", "ServerDisconnectedError", "ServerTimeoutError", "ClientPayloadError",  # aiohttp
}  # fmt: skip
# How torch says that memory is out where it has no class of its own for it: on the CPU, and in cuDNN and cuBLAS.
OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
)
# How gloo and NCCL say that another worker is gone or silent, where torch raises no error of a class of its own; and
# what torch says in a worker that Ray Train is about to end because another one has died.
LOST_PEER = re.compile(
    r"gloo|NCCL|Connection (closed|reset) by peer|Socket Timeout|Timed out waiting|Broken pipe"
    r"|Default process group has not been initialized",
    re.I,
)


def classify(error: BaseException) -> FaultKind:
    """What kind of fault an error is, from itself or what caused it."""
    chain = list(_causes(error))
    for cause in chain:
        name, number = type(cause).__name__, getattr(cause, "errno", None)
        text = str(cause)
        if name == "NonFiniteLoss":
            return "not_finite"
        if isinstance(cause, MemoryError):
            return "out_of_host_memory"
        if name == "OutOfMemoryError" or OUT_OF_MEMORY.search(text):
            return "out_of_memory"
        if number in DISK_FULL or "No space left on device" in text:
            return "disk_full"
        if name in ("DistBackendError", "DistNetworkError", "DistStoreError", "DistError"):
            return "lost"
        if type(cause) in (RuntimeError, ValueError) and LOST_PEER.search(text):
            return "lost"
        if number in TRANSIENT or name in TRANSIENT_NAMES or isinstance(cause, (ConnectionError, TimeoutError)):
            return "transient"
        if _http_status(cause) in (408, 429) or (_http_status(cause) or 0) >= 500:
            return "transient"
    return "configuration" if any(isinstance(cause, InputError) for cause in chain) else "error"


def notice_the_end() -> threading.Event:
    """Set when this process begins to end. An error in another of its threads may then be the end's and not the
    trial's: torch takes the operators that Python defines away from under a step that is still running.

    Of what runs at a process's end the last registered comes first: this is to be called once all is imported.
    """
    ending = threading.Event()
    atexit.register(ending.set)
    return ending


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it says it came from, outermost first."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _http_status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


@dataclass(frozen=True)
class Remedy:
    """What the next try does differently."""

    execution: ExecutionConfig
    pause: float  # seconds before it
    words: str


def remedy(
    kind: FaultKind, execution: ExecutionConfig, share: int, layers: int, earlier: list[FaultKind]
) -> Remedy | None:
    """How to go on after a fault, or None where it is final.

    Args:
        execution: how the trial ran.
        share: sequences of the batch that each worker trains in a step.
        layers: decoder layers that have a backward pass.
        earlier: the kinds of fault that this run of the command has found a remedy for already, in this trial.
    """
    if kind == "transient" and (tried := earlier.count("transient")) < len(TRANSIENT_PAUSES):
        pause = TRANSIENT_PAUSES[tried]
        return Remedy(execution, pause, f"tried again after {pause} s")
    if kind in ("out_of_memory", "out_of_host_memory") and kind not in earlier:
        smaller = less_memory(execution, share, layers, of_host=kind == "out_of_host_memory")
        if smaller:
            return Remedy(smaller, 0, "tried again with " + _difference(execution, smaller))
    return None


def _difference(before: ExecutionConfig, after: ExecutionConfig) -> str:
    changed: dict[str, Any] = {
        field.name: getattr(after, field.name)
        for field in dataclasses.fields(after)
        if getattr(after, field.name) != getattr(before, field.name)
    }
    return ", ".join(name.replace("_", " ") + ("" if value is True else f" {value}") for name, value in changed.items())
