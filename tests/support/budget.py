"""Shapes, devices and configurations that the budget's tests share."""

from transformers import LlamaConfig

from workloads.budget import Device, ModelShape
from workloads.budget.activations import Widths
from workloads.budget.loop import Loop
from workloads.config import TrainingConfig

GIB = 2**30
LLAMA2_7B = ModelShape.of(
    LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )
)
H200 = Device.named("NVIDIA H200")
# transformers and PEFT as their users write it: everything in bfloat16, no autocast, LoRA's weights float32 (PEFT's
# default).
AS_USERS_WRITE_IT = Loop(widths=Widths(compute=2, frozen=2, trained=2, lora=4, autocast=False))
METHODS = ("lora", "lora+norm", "lora+embed", "lora+", "full")


def training_config(context_length=32, method="lora+", group_size=None, **overrides):
    """Two steps of one sequence; S²-Attn where there is a group size."""
    values = dict(
        context_length=context_length,
        method=method,
        attention="full" if group_size is None else "s2",
        group_size=group_size,
        eval_span=context_length,
        steps=2,
        batch=1,
    )
    return TrainingConfig(**{**values, **overrides})


def on_gpu(context_length, method="lora+", group_size=None, **overrides):
    """The same in bfloat16."""
    return training_config(context_length, method, group_size, **{"precision": "bfloat16", **overrides})
