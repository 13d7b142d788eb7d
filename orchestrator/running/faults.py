"""What an error means for a trial: final, retried, or retried with less memory.

    kind                for example                                      what follows
    configuration       a rank larger than the layer                     final
    not_finite          NaN or infinity in the loss or a gradient        final
    disk_full           no space left for a checkpoint                   final; the checkpoint before is whole
    error               any other Python exception                       final: it would come again
    out_of_memory       of the device                                    one retry with the next smaller memory plan
    out_of_host_memory  memory that cannot be pinned; Ray's own limit    one retry without activations in host memory
    transient           a hub or storage that does not answer            retried after pauses that grow
    lost                a worker, its node, or a peer that went silent   retried at once, ``max_failures`` times
    preempted           a node that is about to be taken away            retried at once, ``max_preemptions`` times

Ray Train replaces a lost worker or node, and Ray Tune a lost driver. The trial's driver
(:mod:`orchestrator.running.trial_launcher`) decides the rest, from what the worker wrote into the journal. "Final"
holds for this run of the command: the next run tries again, since the user may have removed the cause.
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
from workloads.budget import reduce_memory
from workloads.config import ExecutionConfig
from workloads.errors import InputError

# Seconds before each retry after a transient fault: two and a half minutes in all, longer than the restart of a file
# server and most throttling.
TRANSIENT_PAUSES = (5, 10, 20, 40, 80)

TRANSIENT_ERRNOS = {
    errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET,
    errno.ECONNABORTED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EPIPE, errno.EREMOTEIO,
}  # fmt: skip
# Errors of libraries that are not imported here, since they may not be installed, by class name.
TRANSIENT_NAMES = {
    "ConnectError", "ConnectTimeout", "ReadTimeout", "ReadError", "RemoteProtocolError", "PoolTimeout",  # httpx
    "ConnectionError", "Timeout", "ChunkedEncodingError",  # requests
    "EndpointConnectionError", "ConnectionClosedError", "ReadTimeoutError", "ConnectTimeoutError",  # botocore
    "ClientConnectorError", "ServerDisconnectedError", "ServerTimeoutError", "ClientPayloadError",  # aiohttp
}  # fmt: skip
# What torch says when memory runs out where it has no class for it: on the CPU, and in cuDNN and cuBLAS.
OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
)
# What gloo and NCCL say of a worker that is gone or silent, where torch has no class for it; and what torch says in a
# worker that Ray Train is about to end because another one has died.
LOST_PEER = re.compile(
    r"gloo|NCCL|Connection (closed|reset) by peer|Socket Timeout|Timed out waiting|Broken pipe"
    r"|Default process group has not been initialized",
    re.I,
)


def classify(error: BaseException) -> FaultKind:
    """The kind of fault that an error is, judged by the error and its causes."""
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
        if number in TRANSIENT_ERRNOS or name in TRANSIENT_NAMES or isinstance(cause, ConnectionError | TimeoutError):
            return "transient"
        status = _http_status(cause)
        if status in (408, 429) or status >= 500:
            return "transient"
    return "configuration" if any(isinstance(cause, InputError) for cause in chain) else "error"


def watch_exit() -> threading.Event:
    """Returns an event that is set as soon as this process begins to exit.

    An error in another thread may then come from the exit and not from the trial: torch removes the operators that
    Python defines under a step that is still running. Exit handlers run in reverse order of registration, so call this
    after all imports.
    """
    exiting = threading.Event()
    atexit.register(exiting.set)
    return exiting


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes, outermost first."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _http_status(error: BaseException) -> int:
    """The status of the HTTP response that an error holds; 0 if it holds none."""
    return getattr(getattr(error, "response", None), "status_code", None) or 0


@dataclass(frozen=True)
class Remedy:
    """What the next attempt does differently, after ``pause`` seconds. ``description`` is for the journal."""

    execution: ExecutionConfig
    pause: float
    description: str


def find_remedy(
    kind: FaultKind, execution: ExecutionConfig, worker_batch: int, layers: int, past_faults: list[FaultKind]
) -> Remedy | None:
    """How to continue after a fault; None if it is final.

    Args:
        execution: how the trial ran.
        worker_batch: sequences that each worker trains in a step.
        layers: decoder layers that have a backward pass.
        past_faults: the faults of this trial that had a remedy in this run of the command.
    """
    if kind == "transient" and (tried := past_faults.count("transient")) < len(TRANSIENT_PAUSES):
        pause = TRANSIENT_PAUSES[tried]
        return Remedy(execution, pause, f"tried again after {pause} s")
    if kind in ("out_of_memory", "out_of_host_memory") and kind not in past_faults:
        smaller = reduce_memory(execution, worker_batch, layers, of_host=kind == "out_of_host_memory")
        if smaller:
            return Remedy(smaller, 0, "tried again with " + _describe_difference(execution, smaller))
    return None


def _describe_difference(before: ExecutionConfig, after: ExecutionConfig) -> str:
    changed: dict[str, Any] = {
        field.name: getattr(after, field.name)
        for field in dataclasses.fields(after)
        if getattr(after, field.name) != getattr(before, field.name)
    }
    return ", ".join(name.replace("_", " ") + ("" if value is True else f" {value}") for name, value in changed.items())
