"""Position interpolation through the model's own RoPE configuration, relative to the original length."""

import pytest
import torch
from transformers import AutoConfig, GPT2Config, LlamaConfig, LlamaForCausalLM

from workloads.errors import InputError
from workloads.positions import extend, original_context_length, reach


def llama_config(**overrides):
    return LlamaConfig(
        **{
            "vocab_size": 32,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 4096,
            **overrides,
        }
    )


# The paper's factors (its code rounds up to whole numbers).
@pytest.mark.parametrize(("length", "factor"), [(8192, 2), (16384, 4), (32768, 8), (65536, 16), (100_000, 25)])
def test_linear_interpolation_takes_the_papers_factors(length, factor):
    config = llama_config()
    extend(config, length, "linear")
    assert config.rope_parameters["rope_type"] == "linear"
    assert config.rope_parameters["factor"] == factor
    assert reach(config) >= length


def test_interpolated_angles_are_those_of_a_stretched_position():
    plain, stretched = llama_config(), llama_config()
    extend(stretched, 16384, "linear")
    rope, rope_stretched = (LlamaForCausalLM(c).model.rotary_emb for c in (plain, stretched))
    x = torch.zeros(1, 1, 32)
    for at_4x, at_1x in zip(rope_stretched(x, torch.tensor([[4000]])), rope(x, torch.tensor([[1000]])), strict=True):
        torch.testing.assert_close(at_4x, at_1x)


@pytest.mark.parametrize("positions", ["linear", "yarn"])
def test_a_base_that_was_already_extended_gets_a_factor_relative_to_its_original_length(positions, tmp_path):
    config = llama_config()
    extend(config, 32768, positions)
    config.save_pretrained(tmp_path)
    extended = AutoConfig.from_pretrained(tmp_path)
    assert original_context_length(extended) == 4096
    extend(extended, 65536, positions)
    assert extended.rope_parameters["factor"] == 16  # the published code puts 2 here
    assert original_context_length(extended) == 4096


def test_the_papers_released_form_a_linear_factor_with_the_original_length_unchanged():
    config = llama_config(rope_parameters={"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0})
    assert (original_context_length(config), reach(config)) == (4096, 32768)
    extend(config, 8192, "linear")  # training a 32k base on 8k keeps its factor
    assert config.rope_parameters["factor"] == 8
    extend(config, 65536, "linear")
    assert config.rope_parameters["factor"] == 16


def test_theta_survives_and_nothing_changes_without_need():
    config = llama_config(rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    extend(config, 4096, "linear")
    assert config.rope_parameters["rope_type"] == "default"
    extend(config, 8192, "none")
    assert config.rope_parameters["rope_type"] == "default"
    extend(config, 8192, "yarn")
    assert config.rope_parameters["rope_theta"] == 500_000.0


def test_a_model_without_rotary_positions_is_refused_by_name():
    with pytest.raises(InputError, match=r"gpt2.*RoPE"):
        extend(GPT2Config(), 2048, "linear")
