"""Models of four layers that are set up to train, and a count of the forward passes in a step."""

import torch

from tests.support.models import random_tokens, small_model
from workloads.adaptation.methods import decoder_layers
from workloads.config import ExecutionConfig, TrainingConfig
from workloads.engines.engine import Engine
from workloads.training.setup import prepare_model

LAYERS = 4


def set_up_model(method, train_layers="all", count=0, family="llama", **settings):
    """Returns (a trial's model, its configuration)."""
    training = TrainingConfig(
        context_length=32, method=method, train_layers=train_layers, group_size=8, steps=3, batch=2, eval_span=32,
        learning_rate=1e-2, warmup_steps=0, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    model = small_model(family, num_hidden_layers=LAYERS, **layer_types(family))
    model.config.use_cache = False
    engine = Engine(torch.device("cpu"), training.precision)
    return prepare_model(model, training, engine, ExecutionConfig(gradient_checkpointing=count)).train(), training


def layer_types(family):
    return {"layer_types": ["full_attention"] * LAYERS} if family in ("gemma2", "gemma3_text") else {}


def count_forwards(model):
    """Counts how often each layer's attention runs in a forward and a backward pass."""
    counts = [0] * LAYERS
    for index, layer in enumerate(decoder_layers(model)[1]):
        attention = layer.attention if hasattr(layer, "attention") else layer.self_attn

        def count(*_, index=index):
            counts[index] += 1

        attention.register_forward_pre_hook(count)
    tokens = random_tokens(1, 32)
    model(tokens).logits.square().mean().backward()
    return counts
