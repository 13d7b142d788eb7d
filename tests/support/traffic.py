"""Bytes that a training step moves, counted operation by operation."""

import contextlib
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from tests.support.models import plain_losses, small_config
from workloads.attention import group_operator as grouped
from workloads.config import ExecutionConfig
from workloads.engines.engine import Engine
from workloads.training.setup import prepare_model

CONFIG = dict(
    vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4, head_dim=32
)


def family_config(family):
    """A configuration large enough that activations take most of the memory."""
    sizes = dict(CONFIG)
    if family in ("gpt_neox", "phi3"):
        del sizes["head_dim"]
    if family in ("gemma2", "gemma3_text"):
        sizes["layer_types"] = ["full_attention"] * 3
    return small_config(family, **sizes)


class CountTraffic(TorchDispatchMode):
    """Inside this context, sums the bytes that operations read and write.

    Without views, which move nothing, and without matrix products and attention, whose FLOPs give their time. Of this
    package's own operators it counts what they call.
    """

    def __init__(self):
        super().__init__()
        self.bytes = self.kernels = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "longspan":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(y) if isinstance(x, torch.Tensor)] for y in ((args, kwargs), result))
        known = {x.untyped_storage().data_ptr() for x in given}
        view = made and all(x.untyped_storage().data_ptr() in known for x in made) and not func._schema.is_mutable
        if not view and "empty" not in str(func):
            self.kernels += 1
            if "mm" not in str(func) and "scaled_dot" not in str(func):
                self.bytes += sum(x.numel() * x.element_size() for x in given + made)
        return result


def count_traffic(model_config, training, checkpointing=0):
    """Returns (bytes, kernels) of one forward and backward pass, without attention's products and scores.

    On a GPU its kernels keep them to themselves, and so does torch's on a CPU, which small groups do without.
    """
    bfloat16 = training.precision == "bfloat16"
    model = AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    model.config.use_cache = False
    execution = ExecutionConfig(gradient_checkpointing=checkpointing)
    model = prepare_model(model, training, Engine(torch.device("cpu"), training.precision), execution).train()
    tokens = torch.randint(8, 512, (1, training.context_length))
    with CountTraffic() as moved, patch.object(grouped, "LARGEST_BY_PRODUCTS", 0):
        with torch.autocast("cpu", torch.bfloat16) if bfloat16 else contextlib.nullcontext():
            logits = model(input_ids=tokens).logits
        plain_losses(logits, tokens).sum().backward()
    return moved.bytes, moved.kernels
