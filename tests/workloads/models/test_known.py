"""The configurations that plans take without the hub, against the parameter counts that the hub states."""

import pytest

from workloads.budget import ModelShape
from workloads.models.known import KNOWN_MODELS, KnownModel
from workloads.models.positions import original_context_length

# As the hub counts the safetensors, tied embeddings once.
PARAMETERS = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
}


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_a_known_model_has_the_size_that_the_hub_states(name):
    assert ModelShape.of(KnownModel.named(name).config()).parameters == PARAMETERS[name]


def test_original_lengths():
    lengths = {name: original_context_length(KnownModel.named(name).config()) for name in KNOWN_MODELS}
    assert lengths["meta-llama/Llama-2-7b-hf"] == 4096
    assert lengths["meta-llama/Llama-3.1-8B"] == lengths["meta-llama/Llama-3.2-1B"] == 8192
    assert lengths["HuggingFaceTB/SmolLM2-135M"] == 8192
    assert KnownModel.named("someone/else") is None
