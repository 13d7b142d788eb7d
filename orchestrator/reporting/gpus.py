"""The GPUs of this machine and how busy they are, from the NVIDIA driver (NVML): without torch, in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Gpu:
    """``busy``: percent of the last second or less in which a kernel ran. None: the GPU does not report it (MIG)."""

    index: int
    name: str
    busy: int | None
    used_gib: float | None
    gib: float | None

    def __str__(self) -> str:
        busy = "use unknown" if self.busy is None else f"{self.busy}% busy"
        memory = "" if self.used_gib is None or self.gib is None else f", {self.used_gib:.1f} of {self.gib:.1f} GiB"
        return f"{self.index} {self.name}: {busy}{memory}"


def gpus() -> list[Gpu]:
    """The GPUs of this machine; empty without an NVIDIA driver, or if it does not answer."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_gpu(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


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
        memory.used / 2**30 if memory else None,
        memory.total / 2**30 if memory else None,
    )
