"""What the NVIDIA driver (NVML) reports: its version, this machine's GPUs, and how busy they are.

Without torch, which takes seconds to import.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """``busy``: percent of the last second or less in which a kernel ran. None: the GPU does not report it (MIG)."""

    index: int
    name: str
    busy: int | None
    used_gib: float | None
    gib: float | None
    uuid: str = ""

    def __str__(self) -> str:
        busy = "use unknown" if self.busy is None else f"{self.busy}% busy"
        memory = "" if self.used_gib is None or self.gib is None else f", {self.used_gib:.1f} of {self.gib:.1f} GiB"
        return f"{self.index} {self.name}: {busy}{memory}"


def gpus() -> list[Gpu]:
    """The GPUs of this machine; empty without an NVIDIA driver, or if it does not answer."""
    import pynvml

    return _ask(lambda: [_gpu(index) for index in range(pynvml.nvmlDeviceGetCount())]) or []


def visible_gpus() -> list[tuple[str, float]]:
    """(name, bytes of memory) of the GPUs of this machine that a process may use (CUDA_VISIBLE_DEVICES)."""
    found = gpus()
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        wanted = [each.strip() for each in allowed.split(",") if each.strip()]
        found = [g for g in found if str(g.index) in wanted or any(g.uuid.startswith(each) for each in wanted)]
    return [(gpu.name, gpu.gib * GIB) for gpu in found if gpu.gib is not None]


def nvidia_driver() -> str | None:
    """The version of the NVIDIA driver, such as 580.65.06; None without one."""
    import pynvml

    return _ask(pynvml.nvmlSystemGetDriverVersion)


def _ask(call: Callable[[], T]) -> T | None:
    """What a call of NVML returns; None without a driver, or if it fails."""
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            return call()
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def _gpu(index: int) -> Gpu:
    import pynvml

    def unless_unknown(call: Callable[[], T]) -> T | None:
        try:
            return call()
        except pynvml.NVMLError:
            return None

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    use = unless_unknown(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle))
    memory = unless_unknown(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2))
    return Gpu(
        index,
        pynvml.nvmlDeviceGetName(handle),
        use.gpu if use else None,
        memory.used / GIB if memory else None,
        memory.total / GIB if memory else None,
        pynvml.nvmlDeviceGetUUID(handle),
    )
