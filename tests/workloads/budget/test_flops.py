"""FLOPs: against the paper's table, and against what torch counts in real models."""

import itertools
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.support.budget import LLAMA2_7B, METHODS, on_gpu, training_config
from tests.support.models import random_tokens, small_model
from workloads.adaptation.lora_fusion import fuse_lora
from workloads.adaptation.methods import adapt
from workloads.attention.interface import use_pattern
from workloads.attention.masks import dense_mask
from workloads.attention.patterns import AttentionPattern
from workloads.budget import (
    ModelShape,
    attended_pairs,
    paper_flops,
    training_flops,
)
from workloads.config import Attention
from workloads.training.recompute import recompute_activations

# LongLoRA v3 table 11 (v1 table 7): Llama-2-7B, in 10^12.
PAPER = {
    (8192, None): (35.2, 35.2, 70.9, 2.2, 143.5),
    (8192, 2048): (8.8, 35.2, 70.9, 2.2, 117.1),
    (16384, None): (140.7, 70.4, 141.8, 4.3, 357.2),
    (16384, 4096): (35.2, 70.4, 141.8, 4.3, 251.7),
    (32768, None): (562.9, 140.7, 283.7, 8.7, 996.0),
    (32768, 8192): (140.7, 140.7, 283.7, 8.7, 573.8),
    (65536, None): (2251.8, 281.5, 567.4, 17.3, 3118.0),
    (65536, 16384): (562.9, 281.5, 567.4, 17.3, 1429.1),
}


@pytest.mark.parametrize(("tokens", "group_size"), PAPER)
def test_every_entry_of_the_papers_flop_table_to_its_printed_digit(tokens, group_size):
    """Its totals are sums of rounded entries: 357.2 is printed where the exact sum would be 357.3."""
    flops = paper_flops(LLAMA2_7B, tokens, group_size)
    entries = [round(x / 1e12, 1) for x in (flops.attention, flops.projections, flops.mlp, flops.others)]
    assert (*entries, round(sum(entries), 1)) == PAPER[tokens, group_size]


# GFLOP a token for LoRA+ on Llama-2-7B, calculated independently for an H200 study: attention causal, its backward
# pass 2.5 times its forward; (context, group size): (no recompute, full recompute).
A_TOKEN = {
    (8192, 2048): (28.2, 41.7),
    (8192, None): (34.0, 49.1),
    (32768, 8192): (33.5, 48.5),
    (32768, None): (56.5, 78.1),
    (102400, 25600): (48.5, 67.8),
    (102400, None): (120.4, 160.2),
}


@pytest.mark.parametrize(("context_length", "group_size"), A_TOKEN)
def test_flops_a_token_of_a_7b_step(context_length, group_size):
    """There, recompute repeats the whole layer; torch stops before its last product."""
    training = on_gpu(context_length, group_size=group_size)
    plain, recomputed = (training_flops(LLAMA2_7B, training, again).total / context_length for again in (0, "all"))
    last_product = 2 * 4096 * 11008 * 32
    assert (round(plain / 1e9, 1), round((recomputed + last_product) / 1e9, 1)) == A_TOKEN[context_length, group_size]


@pytest.mark.parametrize("name", Attention.__args__)
def test_attended_pairs_are_the_sum_of_the_dense_mask(name):
    for tokens, size, heads, layer in itertools.product((16, 30, 33, 64), (4, 8, 16, 64), (1, 4, 9), (0, 1)):
        group_size = None if name == "full" else size
        mask = dense_mask(AttentionPattern(name=name, group_size=group_size), heads, tokens, layer=layer)
        assert attended_pairs(name, group_size, heads, tokens, layer) == mask.sum(), (tokens, size, heads, layer)


def flop_counter():
    """One that knows what the products inside of the package's own operator are."""

    def flops(lefts, rights, bias=None, out_shape=None):
        return sum(2 * rows * inner * right[1] for (rows, inner), right in zip(lefts, rights, strict=True))

    return FlopCounterMode(display=False, custom_mapping={torch.ops.longspan.sum_of_products: flops})


def matrix_products(counter):
    counted = counter.get_flop_counts()["Global"].items()
    return sum(flops for operator, flops in counted if re.search("mm|sum_of_products", str(operator)))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("checkpointing", [0, 1, "all"])
def test_linear_flops_of_a_step_are_what_torch_counts(family, checkpointing):
    """To the last one, with LoRA, frozen weights, layers without a backward pass, tied embeddings, recompute."""
    for method, train_layers in itertools.product(METHODS, ("all", "last 1", "0")):
        model = small_model(family, tie_word_embeddings=method == "lora+").train()
        use_pattern(model, AttentionPattern())
        shape = ModelShape.of(model.config)
        model = adapt(model, method, train_layers=train_layers)
        fuse_lora(model)
        model.config.use_cache = False
        recompute_activations(model, checkpointing)
        with flop_counter() as forward:
            loss = model(random_tokens(1)).logits.sum()
        with flop_counter() as backward:
            loss.backward()
        flops = training_flops(shape, training_config(method=method, train_layers=train_layers), checkpointing)
        found = matrix_products(forward), matrix_products(backward)
        assert found == (flops.forward_linear, flops.backward_linear + flops.recomputed_linear), (method, train_layers)
