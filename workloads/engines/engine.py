"""Where a trial runs and how its workers train one model: alone, or with DDP; ZeRO is in ``zero.py``.

The training loop is written once, for every engine: it computes this worker's part of the loss. The engine turns that
into an update that is the same on all workers, and into a checkpoint that any engine can load.
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
from workloads.config import Precision
from workloads.training.loss import NextTokenLoss

# AdamW's state of a parameter, which a checkpoint holds beside the weight.
OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")


class AsyncScalars:
    """Numbers that a device is still computing, on their way to the host."""

    def __init__(self, scalars: torch.Tensor) -> None:
        self._scalars = scalars.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if scalars.is_cuda else None
        if self._arrived:
            self._arrived.record(torch.cuda.current_stream(scalars.device))

    def read(self) -> list[float]:
        """Waits until the device has computed them and all earlier work."""
        if self._arrived:
            self._arrived.synchronize()
        return self._scalars.tolist()


class Engine:
    """This worker's device and its place among the workers, which train with DDP where there are several.

    Reads torch.distributed if it is initialised (Ray Train and torchrun both do that), else it is the only worker.

    Args:
        device: of this worker.
        precision: of what does not train.

    Attributes:
        runs_ahead: whether the host queues a step before it knows the result of the last one; an asynchronous device
            would otherwise idle in between.
    """

    def __init__(self, device: torch.device, precision: Precision) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.device = device
        self.dtype = compute_dtype(precision)
        self.rank = dist.get_rank() if together else 0
        self.num_workers = dist.get_world_size() if together else 1
        self.runs_ahead = device.type == "cuda"
        self._optimizer: Optimizer | None = None

    @property
    def optimizer(self) -> Optimizer:
        """The optimiser that :meth:`prepare` was given."""
        if self._optimizer is None:
            raise RuntimeError("the engine was prepared without an optimizer, so it cannot train")
        return self._optimizer

    @property
    def home(self) -> torch.device:
        """Where weights are loaded to, and :meth:`prepare` expects a model: this worker's device."""
        return self.device

    def place(self, model: nn.Module) -> nn.Module:
        """Moves the model to :attr:`home`."""
        return model.to(self.home)

    def prepare(
        self, model: nn.Module, optimizer: Optimizer | None = None, max_grad_norm: float | None = None
    ) -> nn.Module:
        """The module to call in training: a :class:`NextTokenLoss`, or a wrapper around it.

        Without an optimizer nothing is trained, and only ``model`` itself is of use afterwards. A checkpoint's weights
        are loaded before; the optimiser's state after, by :meth:`load_optimizer_state`. It is a fused optimiser
        (:func:`workloads.training.optimization.build_optimizer`): others can neither clip nor skip an update.
        """
        self._optimizer, self.max_grad_norm = optimizer, max_grad_norm
        self.parameters = trainable_parameters(model)
        self.diverged = torch.zeros((), device=self.device)  # 1 from the first non-finite step on
        if self.num_workers == 1 or not self.parameters:
            return NextTokenLoss(model)
        devices = [self.device.index] if self.device.type == "cuda" else None
        # Buffers (positions, half of an FP8 weight) are constant and the same on all workers: broadcast once, not in
        # each step.
        return DistributedDataParallel(NextTokenLoss(model), device_ids=devices, broadcast_buffers=False)

    def autocast(self) -> AbstractContextManager:
        """Computes in bfloat16 where the precision says so; float32 parameters stay as they are."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """Around one of the forward and backward passes of a step; the update follows the last."""
        if last or not isinstance(model, DistributedDataParallel):
            return contextlib.nullcontext()
        return model.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of this worker's part of the loss; the step's loss is the sum over passes and workers."""
        (loss * self.num_workers).backward()  # DDP takes the mean of the workers' gradients

    def update(self, loss: torch.Tensor) -> AsyncScalars:
        """Clips the gradients, updates the parameters, and forgets the gradients.

        Args:
            loss: this worker's part of the step's loss.

        Returns the step's loss, and the norm of the whole gradient before clipping: the same on every worker. If one
        of them is not finite, no worker updates anything, in this step or later.
        """
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        scalars = torch.stack([self.sum(loss), norm])
        self.diverged = torch.maximum(self.diverged, 1 - scalars.isfinite().all().float())
        # As torch's GradScaler makes an optimiser skip an update: on the device, without waiting for the host, which
        # may already have queued the next step.
        self.optimizer.found_inf = self.diverged
        if self.max_grad_norm is not None:
            # The optimiser divides gradients by this while it reads them; clipping them first would be another pass.
            # The small number is clip_grad_norm_'s.
            self.optimizer.grad_scale = ((norm + 1e-6) / self.max_grad_norm).clamp(min=1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return AsyncScalars(scalars)

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
        """Loads what :meth:`optimizer_state` of any engine, with any number of workers, returned."""
        for name, parameter in self.parameters.items():
            # A copy: the tensor may be mapped from a file. The fused optimiser keeps its counter beside the parameter.
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
        """Whether it holds on any worker. Every worker waits here for all others."""
        return bool(self.sum(torch.tensor(int(condition))))

    def synchronize(self) -> None:
        """Waits until the device has finished all its work, so that a clock can be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def device_name(self) -> str:
        """The GPU's name in torch, or ``CPU``."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def peak_memory_gib(self) -> float:
        """The most memory used so far: allocated on the GPU, or else resident in this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux
