"""The engine that a trial's execution settings name."""

from __future__ import annotations

import torch

from workloads.config import ExecutionConfig, Precision
from workloads.engines.engine import Engine


def make_engine(execution: ExecutionConfig, device: torch.device, precision: Precision) -> Engine:
    """The engine of ``execution``, for this worker.

    Raises:
        InputError: ZeRO is requested but DeepSpeed is not installed.
    """
    if execution.engine in ("zero2", "zero3"):
        from workloads.engines.zero import ZeroEngine  # DeepSpeed is optional, and takes seconds to import

        return ZeroEngine(device, precision, stage=int(execution.engine[-1]), offload=execution.offload)
    return Engine(device, precision)
