"""Where a trial runs: one device, or one of several workers that train the same model in parallel (DDP)."""

from __future__ import annotations

import contextlib
import resource
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from workloads.adaptation import compute_dtype
from workloads.config import Precision


class Engine:
    """This worker's device and its place among the workers.

    Reads torch.distributed if it is initialised (Ray Train and torchrun both do that), else it is alone.
    """

    def __init__(self, device: torch.device, precision: Precision) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.device = device
        self.dtype = compute_dtype(precision)
        self.rank = dist.get_rank() if together else 0
        self.num_workers = dist.get_world_size() if together else 1

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module whose forward pass to call in training: gradients are averaged over the workers."""
        if self.num_workers == 1 or not any(parameter.requires_grad for parameter in model.parameters()):
            return model
        return DistributedDataParallel(model, device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def autocast(self):
        """Computes in bfloat16 where the precision says so; float32 parameters stay as they are."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def accumulate(self, model: nn.Module, last: bool):
        """Gradients are exchanged in the last of the backward passes that make up a step."""
        if last or not isinstance(model, DistributedDataParallel):
            return contextlib.nullcontext()
        return model.no_sync()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over workers of a small CPU tensor."""
        if self.num_workers == 1:
            return tensor
        on_device = tensor.to(self.device)
        dist.all_reduce(on_device)
        return on_device.to(tensor.device)

    def barrier(self) -> None:
        if self.num_workers > 1:
            dist.barrier()

    def synchronize(self) -> None:
        """Waits for the device, so that a clock read next means something."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_memory_gib(self) -> float:
        """The most memory used so far: allocated on the GPU, or resident in this process where there is none."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux
