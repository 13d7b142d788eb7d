"""How the training loop computes beyond what a configuration states: memory and speed follow from both.

It describes workloads/training/loop.py, which imports :data:`CHUNK_LOGITS` and :func:`layers_compile` from here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from workloads.budget.activations import Widths
from workloads.budget.devices import Device
from workloads.budget.flops import training_flops
from workloads.budget.shape import ModelShape
from workloads.config import ExecutionConfig, TrainingConfig
from workloads.errors import InputError

# Logits of one chunk of the loss: 0.25 GiB in float32, about 1 GiB with their cross-entropy and its gradient. That is
# 2,097 tokens of a vocabulary of 32,000 and 512 of one of 128k, enough to keep a GPU's matrix units busy.
CHUNK_LOGITS = 2**26
# FLOPs of a worker in a whole trial above which compiling saves more than it costs: about five minutes of an H200.
# Compiling saves a quarter of them (14,621 against 10,898 tokens/s, Llama-2-7B at 8k) and takes up to one minute.
COMPILING_PAYS_FROM = 1e17


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """How the training loop computes; the defaults are those of transformers and PEFT.

    Args:
        widths: bytes of numbers.
        chunked_loss: :data:`CHUNK_LOGITS` exist at a time, and the gradient of the output layer's input is ready before
            the backward pass begins; else the logits of all tokens exist.
        compiled: each decoder layer is compiled separately; else each operation keeps what its gradient needs.
        one_operator: attention in groups is one operator that writes each result once
            (workloads/attention/group_operator.py); else autograd joins its parts.
    """

    widths: Widths
    chunked_loss: bool = False
    compiled: bool = False
    one_operator: bool = False

    @classmethod
    def of(
        cls,
        shape: ModelShape,
        training: TrainingConfig,
        execution: ExecutionConfig,
        workers: int = 1,
        device: Device | None = None,
    ) -> Loop:
        """Returns this package's loop on such devices; None stands for a CPU. A GPU's machine is assumed to compile.

        Raises:
            InputError: as :func:`layers_compile`.
        """
        on_gpu = device is not None and device.is_gpu
        widths = Widths.of(training.precision)
        return cls(
            widths=dataclasses.replace(widths, narrow=widths.autocast),
            chunked_loss=True,
            compiled=layers_compile(shape, training, execution, workers, on_gpu),
            one_operator=_has_operator(training, execution, device if on_gpu else None),
        )


def layers_compile(
    shape: ModelShape, training: TrainingConfig, execution: ExecutionConfig, workers: int, able: bool
) -> bool:
    """Whether a trial trains with compiled layers: as requested, or with ``auto`` where that pays.

    Args:
        able: the devices are GPUs whose machine can build kernels.

    Raises:
        InputError: it is requested with ZeRO-3, which fetches a layer's weights between its modules.
    """
    if training.steps == 0 or execution.compile_layers == "off":
        return False
    if execution.compile_layers == "on":
        if execution.engine == "zero3":
            raise InputError(
                "compile_layers is on with the engine zero3, which fetches weights in the middle of a layer; choose "
                "the engine zero2 or ddp, or compile_layers off"
            )
        return True
    # Each length is compiled again, and so may be each set of document boundaries.
    same_each_step = training.task == "pretraining" and not training.document_mask
    if not able or not same_each_step or training.quantization == "nf4" or execution.engine == "zero3":
        return False
    return training.steps * training.batch / workers * training_flops(shape, training).total >= COMPILING_PAYS_FROM


def _has_operator(training: TrainingConfig, execution: ExecutionConfig, gpu: Device | None) -> bool:
    """Whether workloads/attention/group_kernels.py uses the operator; ``gpu`` None means a CPU."""
    if training.document_mask or execution.attention_backend not in ("auto", "sdpa", "cudnn", "flash4"):
        return False
    return gpu is None or (training.precision == "bfloat16" and gpu.multiplies_bfloat16)
