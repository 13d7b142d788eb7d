"""Positions that depend on a sequence's length: no loss depends on earlier computations or on the rest of the batch."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from tests.support.models import random_tokens, small_model
from workloads.attention.interface import use_pattern
from workloads.attention.patterns import AttentionPattern
from workloads.models.rotary import fixed_length, padded_inputs
from workloads.models.source import load_whole

LONG = dict(short_factor=[1.0, 1.0, 1.5, 2.0], long_factor=[1.0, 2.0, 3.0, 4.0])
ROPE = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 16, **LONG},
}
LENGTHS = (40, 16, 24, 9)  # longer than the original length of 16, equal to it, between, and shorter


@pytest.fixture(params=[("llama", kind) for kind in ROPE] + [("gpt_neox", "dynamic"), ("qwen3", "dynamic")])
def folder(request, tmp_path):
    family, kind = request.param
    rope = {"rope_type": kind, "rope_theta": 10_000.0, **ROPE[kind]}
    if family == "gpt_neox":
        rope["partial_rotary_factor"] = 0.5
    length = 16 if kind == "dynamic" else 64
    small_model(family, max_position_embeddings=length, rope_parameters=rope, initializer_range=0.2).save_pretrained(
        tmp_path
    )
    return tmp_path


def load(folder):
    return load_whole("a model", str(folder)).eval()


@torch.no_grad()
def stock_logits(folder, tokens):
    """Of stock transformers, freshly loaded."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=tokens).logits


def test_every_length_is_scored_as_by_a_freshly_loaded_model(folder):
    model = load(folder)
    for length in LENGTHS:
        tokens = random_tokens(1, length)
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=tokens).logits, stock_logits(folder, tokens), rtol=0, atol=0)


def test_a_padded_sequence_is_scored_as_by_itself(folder):
    model = load(folder)
    use_pattern(model, AttentionPattern(name="full"))
    tokens = random_tokens(len(LENGTHS), max(LENGTHS))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    with torch.no_grad():
        logits = model(input_ids=tokens, **padded_inputs(model, mask)).logits
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(logits[row, :length], stock_logits(folder, tokens[row : row + 1, :length])[0])


def test_an_answer_continues_with_the_frequencies_of_its_whole_length(folder):
    """Greedy generation with a cache gives the logits of one forward pass over prompt and answer."""
    model, tokens = load(folder), random_tokens(1, 40)
    with torch.no_grad(), fixed_length(model, 40):
        cache = DynamicCache(config=model.config)
        first = model(input_ids=tokens[:, :9], past_key_values=cache, use_cache=True).logits
        others = [model(input_ids=tokens[:, [i]], past_key_values=cache, use_cache=True).logits for i in range(9, 40)]
    torch.testing.assert_close(torch.cat([first, *others], dim=1), stock_logits(folder, tokens), rtol=1e-4, atol=1e-5)
