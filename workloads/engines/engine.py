"""Where a trial runs and how its workers train one model together: alone, or with DDP; with ZeRO in ``deepspeed.py``.

The training loop is written once, for every engine: it computes this worker's part of the loss, and the engine knows
how to turn it into an update that is the same on all workers, and into a checkpoint that any engine can take up.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from workloads.adaptation.methods import compute_dtype, trainable_parameters
from workloads.config import ExecutionConfig, Precision
from workloads.training.loss import NextTokenLoss

# What AdamW remembers of a parameter, and so what a checkpoint holds of it beside the weight.
OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")


def make_engine(execution: ExecutionConfig, device: torch.device, precision: Precision) -> Engine:
    """The engine of ``execution``, for this worker.

    Raises:
        InputError: ZeRO is asked for and DeepSpeed is not installed.
    """
    if execution.engine in ("zero2", "zero3"):
        from workloads.engines.zero import ZeroEngine  # DeepSpeed is optional, and takes seconds to import

        return ZeroEngine(device, precision, stage=int(execution.engine[-1]), offload=execution.offload)
    return Engine(device, precision)


class Awaited:
    """Numbers that a device is still computing: nobody waits before they are read."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self._numbers = numbers.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if numbers.is_cuda else None
        if self._arrived:
            self._arrived.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> list[float]:
        """The numbers, once the device has come to them and to all that it was given before."""
        if self._arrived:
            self._arrived.synchronize()
        return self._numbers.tolist()


class Engine:
    """This worker's device and its place among the workers, which train with DDP where there are several.

    Reads torch.distributed if it is initialised (Ray Train and torchrun both do that), else it is alone.

    Args:
        device: of this worker.
        precision: of what does not train.

    Attributes:
        runs_ahead: whether the host gives the device a step before it knows how the last one ended: a device that works
            by itself would wait for it in between.
    """

    def __init__(self, device: torch.device, precision: Precision) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.device = device
        self.dtype = compute_dtype(precision)
        self.rank = dist.get_rank() if together else 0
        self.num_workers = dist.get_world_size() if together else 1
        self.runs_ahead = device.type == "cuda"

    @property
    def home(self) -> torch.device:
        """Where :meth:`prepare` wants a model, and its weights are best loaded to: this worker's device."""
        return self.device

    def place(self, model: nn.Module) -> nn.Module:
        """All of the model at :attr:`home`."""
        return model.to(self.home)

    def prepare(
        self, model: nn.Module, optimizer: Optimizer | None = None, max_grad_norm: float | None = None
    ) -> nn.Module:
        """The module whose forward pass to call in training: a :class:`NextTokenLoss`, or what stands around it.

        Without an optimizer nothing is trained, and only ``model`` itself is of use afterwards. Weights that a
        checkpoint holds are in the model by now; the optimiser's state comes after, :meth:`load_optimizer_state`. It is
        a fused one (:func:`workloads.training.optimization.build_optimizer`): others cannot clip, nor leave an update out.
        """
        self.optimizer, self.max_grad_norm = optimizer, max_grad_norm
        self.parameters = trainable_parameters(model)
        self.diverged = torch.zeros((), device=self.device)  # 1 from the first step on that is not finite
        if self.num_workers == 1 or not self.parameters:
            return NextTokenLoss(model)
        devices = [self.device.index] if self.device.type == "cuda" else None
        # Buffers (positions, half of what FP8 weights are) are the same on all workers and stay so: broadcast once, not
        # in each step.
        return DistributedDataParallel(NextTokenLoss(model), device_ids=devices, broadcast_buffers=False)

    def autocast(self) -> AbstractContextManager:
        """Computes in bfloat16 where the precision says so; float32 parameters stay as they are."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """Around one of the forward and backward passes that make up a step; after the last comes the update."""
        if last or not isinstance(model, DistributedDataParallel):
            return contextlib.nullcontext()
        return model.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of this worker's part of the loss; the step's loss is the sum over passes and workers."""
        (loss * self.num_workers).backward()  # DDP takes the mean of the workers' gradients

    def update(self, loss: torch.Tensor) -> Awaited:
        """Clips the gradients, updates the parameters, and forgets the gradients.

        Args:
            loss: this worker's part of the step's loss.

        Returns the step's loss, and the norm of the whole gradient before clipping: the same on every worker. If one
        of them is not finite nothing is updated, on any worker, then or later.
        """
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        numbers = torch.stack([self.sum(loss), norm])
        self.diverged = torch.maximum(self.diverged, 1 - numbers.isfinite().all().float())
        # As torch's GradScaler tells an optimiser to leave all as it is: on the device, which need not wait for a host
        # that looks at the numbers. By the time the host does, the next step may be under way.
        self.optimizer.found_inf = self.diverged
        if self.max_grad_norm is not None:
            # What the optimiser divides gradients by while it reads them: clipping them first would pass over them once
            # more. The small number is clip_grad_norm_'s.
            self.optimizer.grad_scale = ((norm + 1e-6) / self.max_grad_norm).clamp(min=1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Awaited(numbers)

    def weights(self) -> dict[str, torch.Tensor]:
        """The trainable parameters by name, whole, in float32. All workers call it; worker 0 gets them."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """The optimiser's state as ``key/parameter``, whole, in float32. All workers call it; worker 0 gets it."""
        return {
            f"{key}/{name}": self.optimizer.state[parameter][key]
            for key in OPTIMIZER_STATE
            for name, parameter in self.parameters.items()
        }

    def load_optimizer_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes up what :meth:`optimizer_state` of any engine, with any number of workers, gave."""
        for name, parameter in self.parameters.items():
            # A copy: what is loaded may lie in a file. The fused optimiser keeps its counter where the parameter is.
            self.optimizer.state[parameter] = {
                key: tensors[f"{key}/{name}"].to(parameter.device, torch.float32, copy=True) for key in OPTIMIZER_STATE
            }

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over workers of a small tensor."""
        if self.num_workers == 1:
            return tensor
        on_device = tensor.to(self.device, copy=True)
        dist.all_reduce(on_device)
        return on_device.to(tensor.device)

    def any(self, condition: bool) -> bool:
        """Whether it holds on any worker. Every worker waits here for all."""
        return bool(self.sum(torch.tensor(int(condition))))

    def synchronize(self) -> None:
        """Waits for the device, so that a clock read next means something."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def device_name(self) -> str:
        """As torch names a GPU; ``CPU`` where there is none."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def peak_memory_gib(self) -> float:
        """The most memory used so far: allocated on the GPU, or resident in this process where there is none."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux
