"""What memory and speed follow from and a trial's configuration leaves open: how the training loop computes.

It says of the loop (workloads/training.py) what is so, and changes with it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from workloads.budget.activations import Widths
from workloads.budget.devices import Device
from workloads.config import ExecutionConfig, TrainingConfig

# Whether the loss is computed in chunks, all that runs through the layers is of the compute type, and decoder layers
# are compiled on a GPU.
CHUNKED_LOSS = True
NARROW_STREAM = True
COMPILED_LAYERS = True
# Logits that exist at the same time in a chunked loss: those of 2,097 tokens with a vocabulary of 32,000. It has to be
# the training loop's.
CHUNK_LOGITS = 2**26


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """How the training loop computes.

    Args:
        widths: bytes of numbers.
        chunked_loss: :data:`CHUNK_LOGITS` exist at a time, and the gradient of what the output layer reads is ready
            before the backward pass begins; else those of all tokens do.
        compiled: each decoder layer is compiled by itself; else every operation keeps what its own gradient needs.
    """

    widths: Widths
    chunked_loss: bool = False
    compiled: bool = False

    @classmethod
    def of(cls, training: TrainingConfig, execution: ExecutionConfig, device: Device | None = None) -> Loop:
        """This package's own, on a device; None stands for one where layers are not compiled."""
        widths = Widths.of(training.precision)
        if NARROW_STREAM and widths.autocast:
            widths = dataclasses.replace(widths, narrow=True)
        return cls(
            widths=widths,
            chunked_loss=CHUNKED_LOSS,
            compiled=COMPILED_LAYERS and device is not None and device.is_gpu and execution.engine != "zero3",
        )
