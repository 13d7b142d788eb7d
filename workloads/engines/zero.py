"""ZeRO with DeepSpeed: workers shard what each would replicate under DDP (Rajbhandari et al., 2020).

Stage 2 shards gradients and optimiser state, stage 3 the weights too, frozen ones included; offload keeps the shards in
host memory, and updates there.

Precision: what trains is float32, what is frozen bfloat16. DeepSpeed's own bf16 mode would cast every parameter to
bfloat16, with float32 master copies of what trains. Its float32 mode, used here, leaves each parameter as it is: what
trains is its own master copy, and both are communicated in their dtypes. It computes under torch.autocast, which
DeepSpeed's configuration has to name: it disables any other.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import pad
from torch.optim import Optimizer

from workloads.adaptation.methods import trainable_parameters
from workloads.config import Precision
from workloads.engines.engine import OPTIMIZER_STATE, AsyncScalars, Engine
from workloads.errors import InputError
from workloads.training.loss import NextTokenLoss


class ZeroEngine(Engine):
    """Workers that train with ZeRO; also a single one, which can train a model beyond its device with ``offload``."""

    def __init__(self, device: torch.device, precision: Precision, stage: int, offload: bool = False) -> None:
        # DeepSpeed reads its device from the environment, the first variable when it is imported.
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        os.environ["LOCAL_RANK"] = str(device.index or 0)
        try:
            import deepspeed
        except ImportError as error:
            raise InputError(
                f"the engine zero{stage} needs DeepSpeed, which cannot be imported ({error}); install it with "
                "pip install 'longspan[deepspeed]', or choose the engine ddp"
            ) from error
        # Needed in inference only; DeepSpeed would compile it, for minutes, where workers communicate on a CPU.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.deepspeed = deepspeed
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        super().__init__(device, precision)
        self.stage, self.offload = stage, offload
        # DeepSpeed's update waits for the norm anyway, and it would apply an update after a failed one.
        self.runs_ahead = False

    @property
    def home(self) -> torch.device:
        """Host memory under stage 3, until :meth:`prepare` shards the model: whole, it may not fit the device."""
        return torch.device("cpu") if self.stage == 3 else super().home

    def prepare(
        self, model: nn.Module, optimizer: Optimizer | None = None, max_grad_norm: float | None = None
    ) -> nn.Module:
        """Shards the model and its training state; returns DeepSpeed's engine, which is the module to call."""
        if optimizer is None and self.stage == 2:
            return super().prepare(model)
        self.parameters = trainable_parameters(model)
        configuration = self._configuration(max_grad_norm)
        if self.stage == 3:
            # One parameter at a time; deepspeed.initialize would first move the whole model to the device.
            self.deepspeed.zero.Init(module=model, config_dict_or_path=configuration)
            for buffer in model.buffers():
                buffer.data = buffer.data.to(self.device)
        self.engine, *_ = self.deepspeed.initialize(
            args=SimpleNamespace(device_rank=self.device.index or 0),
            # Under stage 3 a weight has its shape only while its module runs, and its gradient would have another.
            model=NextTokenLoss(model, recompute=self.stage == 3),
            optimizer=optimizer,
            config=configuration,
            dist_init_required=False,
        )
        self._optimizer = optimizer
        return self.engine

    def _configuration(self, max_grad_norm: float | None) -> dict[str, Any]:
        on_host = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        return {
            "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own log: the loop splits its batches itself
            "gradient_clipping": max_grad_norm or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own would have to be compiled first
            "zero_optimization": {
                "stage": self.stage,
                # Elements: 200 MB of float32. DeepSpeed's 500 million would take 2 GB, twice with overlap.
                "reduce_bucket_size": 50_000_000,
                "allgather_bucket_size": 50_000_000,
                **({"offload_optimizer": on_host} if self.offload else {}),
                **({"offload_param": on_host} if self.offload and self.stage == 3 else {}),
            },
            "torch_autocast": {
                "enabled": self.dtype != torch.float32,
                "dtype": str(self.dtype).removeprefix("torch."),
                "lower_precision_safe_modules": [],  # their gradients would be summed in bfloat16
            },
        }

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """Tells DeepSpeed whether the update follows."""
        self.engine.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of this worker's part of the loss, through DeepSpeed."""
        self.engine.backward(loss * self.num_workers, scale_wrt_gas=False)  # it takes the workers' mean, like DDP

    def update(self, loss: torch.Tensor) -> AsyncScalars:
        """Clips, updates and clears through DeepSpeed, after waiting for the loss."""
        loss_value, norm = self.sum(loss).item(), math.nan
        if math.isfinite(loss_value):
            self.engine.step()  # finds the norm first, and skips the update if it is not finite
            norm = float(self.engine.get_global_grad_norm()) if self.engine.was_step_applied() else math.inf
        return AsyncScalars(torch.tensor([loss_value, norm], dtype=torch.float64))

    def weights(self) -> dict[str, torch.Tensor]:
        """The trainable parameters, gathered on worker 0."""
        return self._on_first(
            (name, self.deepspeed.utils.safe_get_full_fp32_param(parameter))
            for name, parameter in self.parameters.items()
        )

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """The optimiser's state, gathered on worker 0."""
        step, *moments = OPTIMIZER_STATE
        if self.stage == 2:
            # DeepSpeed links parameters to their state after the first parameter group's update, when the other groups
            # have no state yet.
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        count = next(iter(self.optimizer.state.values()))[step]
        return {f"{step}/{name}": count.cpu().clone() for name in self.parameters} | self._on_first(
            (f"{key}/{name}", self.deepspeed.utils.safe_get_full_optimizer_state(parameter, key))
            for key in moments
            for name, parameter in self.parameters.items()
        )

    def _on_first(self, gathered) -> dict[str, torch.Tensor]:
        """Keeps each tensor in worker 0's host memory as it is gathered; all at once may not fit the device."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in gathered if self.rank == 0}

    def load_optimizer_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Shards a checkpoint's state of the optimiser."""
        step, *moments = OPTIMIZER_STATE
        zero = self.engine.optimizer
        # DeepSpeed creates the state of its flat partitions in the first update, which comes later.
        flat = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        count = tensors[f"{step}/{next(iter(self.parameters))}"]
        for partition in flat:
            self.optimizer.state[partition] = {step: count.to(partition.device, torch.float32, copy=True)} | {
                key: torch.zeros_like(partition) for key in moments
            }
        if self.stage == 2:
            zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.parameters.items():
            for key in moments:
                self._set_state(parameter, key, tensors[f"{key}/{name}"])

    def _set_state(self, parameter: nn.Parameter, key: str, whole: torch.Tensor) -> None:
        whole = whole.to(self.device, torch.float32)
        if self.stage == 2:
            self.deepspeed.utils.safe_set_full_optimizer_state(parameter, whole, key)
            return
        # safe_set_full_optimizer_state fails under stage 3 if the size does not divide among the workers.
        size = parameter.ds_tensor.numel()
        padded = pad(whole.flatten(), (0, size * self.num_workers - whole.numel()))
        mine = padded[self.rank * size : (self.rank + 1) * size]
        self.deepspeed.utils.safe_set_local_optimizer_state(parameter, mine, key)
