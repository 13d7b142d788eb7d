"""What memory and speed follow from and a trial's configuration leaves open: how the training loop computes.

It says of the loop (workloads/training.py) what is so, and changes with it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from workloads.budget.activations import Widths
from workloads.budget.devices import Device
from workloads.budget.shape import ModelShape
from workloads.config import ExecutionConfig, TrainingConfig

# Whether the loss is computed in chunks, the residual stream is bfloat16 where the computation is, and decoder layers
# are compiled on a GPU.
CHUNKED_LOSS = False
NARROW_RESIDUAL = False
COMPILED_LAYERS = False
# Tokens whose logits exist at the same time in a chunked loss: at most as many as the training loop's own chunk.
LOSS_CHUNK = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """How the training loop computes.

    Args:
        widths: bytes of numbers.
        chunked_loss: logits exist of :data:`LOSS_CHUNK` tokens at a time, and the gradient of what the output layer
            reads is ready before the backward pass begins; else of all tokens at once.
        compiled: each decoder layer is compiled by itself; else every operation keeps what its own gradient needs.
    """

    widths: Widths
    chunked_loss: bool = False
    compiled: bool = False

    @classmethod
    def of(
        cls, shape: ModelShape, training: TrainingConfig, execution: ExecutionConfig, device: Device | None = None
    ) -> Loop:
        """This package's own, on a device; None stands for one where layers are not compiled."""
        widths = Widths.of(training.precision)
        if NARROW_RESIDUAL:
            widths = dataclasses.replace(widths, residual=widths.compute)
        return cls(
            widths=widths,
            # Softcapped logits, and an output layer that ZeRO-3 has shared out, take the plain way.
            chunked_loss=CHUNKED_LOSS and not shape.softcapped and execution.engine != "zero3",
            compiled=COMPILED_LAYERS and device is not None and device.is_gpu,
        )
