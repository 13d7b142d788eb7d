"""Rotary positions against the formulas of their papers, relative to the original length.

They are computed by stock transformers from the model's own configuration.
"""

import math

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    PhiConfig,
)

from workloads.errors import InputError
from workloads.models.positions import extend, max_context_length, original_context_length

EXTENDING = ("linear", "ntk", "dynamic", "yarn", "llama3")
SHAPE = dict(vocab_size=32, hidden_size=128, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
THETA = 10_000.0


def llama_config(**overrides):
    return LlamaConfig(**{**SHAPE, "max_position_embeddings": 4096, **overrides})


# (configuration, rotated dimensions of its heads of 64): all of them, or a part.
FAMILIES = {
    "llama": (lambda **more: llama_config(**more), 64),
    "gpt_neox": (lambda **more: GPTNeoXConfig(**SHAPE, **more), 16),
    "phi": (lambda **more: PhiConfig(**SHAPE, **more), 32),
}


def plain(d, theta=THETA):
    """Rotary embedding (arXiv 2104.09864): theta ** (-2i / d)."""
    return theta ** (-np.arange(0, d, 2) / d)


def ntk(d, factor):
    """NTK-aware: the base that stretches the slowest dimension, i = d / 2 - 1, by the factor.

    The factor is (b' / b) ** ((d - 2) / d).
    """
    return plain(d, THETA * factor ** (d / (d - 2)))


def dynamic(d, factor, length, original):
    """Dynamic NTK: NTK-aware with a factor that grows with the sequence, from 1 at the original length."""
    return ntk(d, factor * length / original - (factor - 1))


def yarn(d, factor, original):
    """YaRN (arXiv 2309.00071, section 3.2).

    Over the original length, dimensions of more than 32 turns stay, those of less than 1 are stretched. In between the
    authors' code, which transformers follows, blends along the dimension's index between the whole indices around these
    two, where the paper's text blends along the number of turns.
    """
    base = plain(d)

    def index_of(turns):  # where original * base[i] / (2 pi) == turns
        return d * math.log(original / (2 * math.pi * turns)) / (2 * math.log(THETA))

    first, last = max(math.floor(index_of(32)), 0), min(math.ceil(index_of(1)), d - 1)
    stretched = np.clip((np.arange(d // 2) - first) / (last - first), 0, 1)
    return base * (1 - stretched) + base / factor * stretched


def llama3(d, factor, original):
    """Llama 3.1: wavelengths above the original length are stretched, those below a quarter of it stay.

    In between the inverse frequency is blended along original / wavelength.
    """
    found = []
    for frequency in plain(d):
        wavelength = 2 * math.pi / frequency
        kept = min(max((original / wavelength - 1) / (4 - 1), 0), 1)
        found.append(kept * frequency + (1 - kept) * frequency / factor)
    return np.array(found)


def expected(positions, d, factor, original):
    """(inverse frequencies at the full length factor * original, what cosine and sine are scaled by)."""
    return {
        "none": (plain(d), 1),
        "linear": (plain(d) / factor, 1),
        "ntk": (ntk(d, factor), 1),
        "dynamic": (dynamic(d, factor, factor * original, original), 1),
        "yarn": (yarn(d, factor, original), 0.1 * math.log(factor) + 1),
        "llama3": (llama3(d, factor, original), 1),
    }[positions]


def rotary(model, length):
    """(inverse frequencies, scaling of cosine and sine) that a model uses on a sequence of ``length`` tokens."""
    module = next(module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding"))
    cosine, _ = module(torch.zeros(1, 1, 32), torch.arange(length)[None])
    assert cosine[0, 0].tolist() == pytest.approx([module.attention_scaling] * cosine.shape[-1])
    return module.inv_freq.double().numpy(), module.attention_scaling


@pytest.mark.parametrize("positions", ["none", *EXTENDING])
@pytest.mark.parametrize("family", FAMILIES)
def test_frequencies_follow_the_papers_before_and_after_saving(family, positions, tmp_path):
    make, d = FAMILIES[family]
    config = make(max_position_embeddings=512)
    extend(config, 2048, positions)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    frequencies, scaling = expected(positions, d, 4, 512)
    for each in (model, again):
        found, found_scaling = rotary(each, 2048)
        np.testing.assert_allclose(found, frequencies, rtol=1e-5)
        assert found_scaling == pytest.approx(scaling)
    assert again.config.rope_parameters == config.rope_parameters
    tokens = torch.arange(600)[None] % 32
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)


def test_dynamic_ntk_changes_nothing_up_to_the_original_length():
    config = llama_config(max_position_embeddings=512)
    extend(config, 2048, "dynamic")
    model = AutoModelForCausalLM.from_config(config)
    np.testing.assert_allclose(rotary(model, 512)[0], plain(64), rtol=1e-5)
    np.testing.assert_allclose(rotary(model, 1024)[0], dynamic(64, 4, 1024, 512), rtol=1e-5)


# The paper's factors (its code rounds up to whole numbers).
@pytest.mark.parametrize(("length", "factor"), [(8192, 2), (16384, 4), (32768, 8), (65536, 16), (100_000, 25)])
def test_linear_interpolation_takes_the_papers_factors(length, factor):
    config = llama_config()
    extend(config, length, "linear")
    assert config.rope_parameters["rope_type"] == "linear"
    assert config.rope_parameters["factor"] == factor
    assert max_context_length(config) >= length


@pytest.mark.parametrize("first", EXTENDING)
@pytest.mark.parametrize("second", EXTENDING)
def test_a_base_that_was_already_extended_is_extended_from_its_original_length(first, second, tmp_path):
    """The published code takes the factor relative to the extended length: 2 here instead of 16."""
    config = llama_config(rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    once = llama_config(rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    extend(config, 32768, first)
    config.save_pretrained(tmp_path)
    twice = AutoConfig.from_pretrained(tmp_path)
    assert (original_context_length(twice), max_context_length(twice)) == (4096, 32768)
    extend(twice, 32768, second)
    assert twice.rope_parameters == config.rope_parameters  # it reaches that far already
    extend(twice, 65536, second)
    extend(once, 65536, second)
    assert twice.rope_parameters == once.rope_parameters
    assert twice.max_position_embeddings == once.max_position_embeddings
    assert (original_context_length(twice), max_context_length(twice)) == (4096, 65536)


def test_llama_3_1_is_extended_from_the_8192_tokens_it_was_pretrained_on():
    """Its configuration has a factor of 8 and yet is made for 16 times as much."""
    rope = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    config = llama_config(
        max_position_embeddings=131_072, rope_parameters={**rope, "original_max_position_embeddings": 8192}
    )
    assert (original_context_length(config), max_context_length(config)) == (8192, 131_072)
    extend(config, 262_144, "yarn")
    assert config.rope_parameters["factor"] == 32


def test_the_papers_released_form_a_linear_factor_with_the_original_length_unchanged():
    config = llama_config(rope_parameters={"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0})
    assert (original_context_length(config), max_context_length(config)) == (4096, 32768)
    extend(config, 8192, "linear")  # training a 32k base on 8k keeps its factor
    assert config.rope_parameters["factor"] == 8
    extend(config, 65536, "linear")
    assert config.rope_parameters["factor"] == 16


def test_nothing_changes_without_need():
    config = llama_config(rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    extend(config, 4096, "linear")
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500_000.0}
    extend(config, 8192, "none")
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500_000.0}


def test_a_model_without_rotary_positions_is_refused_by_name():
    with pytest.raises(InputError, match=r"gpt2.*RoPE"):
        extend(GPT2Config(), 2048, "linear")


@pytest.mark.parametrize("positions", ["linear", "dynamic", "yarn", "llama3"])
def test_positions_that_a_family_would_not_load_again_are_refused_and_ntk_is_offered(positions):
    """Phi-3's configuration allows its own kind alone, and reads yarn as that."""
    shape = dict(**SHAPE, max_position_embeddings=4096, pad_token_id=0)
    with pytest.raises(InputError, match=rf"'{positions}': a phi3 model's configuration does not take them.*ntk"):
        extend(Phi3Config(**shape), 8192, positions)
    config = Phi3Config(**shape)
    extend(config, 8192, "ntk")
    assert max_context_length(config) == 8192
