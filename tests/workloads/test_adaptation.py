"""What trains under each method, by count and by name."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from workloads.adaptation import adapt, count_parameters, trainable_parameters
from workloads.errors import InputError


def small_llama(**overrides):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            **{
                "vocab_size": 64,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                **overrides,
            }
        )
    )


def test_lora_plus_on_llama2_7b_trains_what_the_papers_code_trains():
    """embedding 131,076,096 + norms 266,240 + LoRA (rank 8 on q, k, v, o) 8,388,608; the authors added a token."""
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=32001, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
        )
        adapted = adapt(model, "lora+", lora_rank=8)
    by_kind = {"lora": 0, "norm": 0, "embed": 0}
    for name, parameter in trainable_parameters(adapted).items():
        by_kind[next(kind for kind in by_kind if kind in name)] += parameter.numel()
    assert by_kind == {"embed": 131_076_096, "norm": 266_240, "lora": 8_388_608}


def test_lora_trains_its_matrices_alone_and_full_trains_everything():
    assert all("lora_" in name for name in trainable_parameters(adapt(small_llama(), "lora")))
    total, trainable = count_parameters(adapt(small_llama(), "full"))
    assert total == trainable
    assert not trainable_parameters(adapt(small_llama(), "untuned"))


def test_lora_plus_keeps_the_output_layer_frozen():
    names = trainable_parameters(adapt(small_llama(), "lora+"))
    assert not any("lm_head" in name for name in names)
    assert sum("embed_tokens" in name for name in names) == 1
    assert sum("norm" in name for name in names) == 2 * 2 + 1


def test_tied_embeddings_stay_tied():
    model = adapt(small_llama(tie_word_embeddings=True), "lora+")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("method", ["lora", "lora+", "full"])
def test_an_untrained_adaptation_changes_no_output(method):
    tokens = torch.arange(16)[None]
    before = small_llama()(tokens).logits
    torch.testing.assert_close(adapt(small_llama(), method)(tokens).logits, before)


@pytest.mark.parametrize("method", ["lora", "lora+", "full"])
def test_trainable_parameters_are_float32_and_keep_an_update_that_bfloat16_would_lose(method):
    model = adapt(small_llama().bfloat16(), method)
    trainable = trainable_parameters(model)
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    optimizer = torch.optim.AdamW(trainable.values(), lr=2e-5, weight_decay=0)
    before = {name: p.detach().clone() for name, p in trainable.items()}
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.arange(16)[None]).logits.float().square().mean().backward()
    optimizer.step()
    norms = [n for n in trainable if "norm" in n] or list(trainable)
    moved = [n for n in norms if not torch.equal(before[n], trainable[n])]
    assert moved
    assert all(torch.equal(before[n].bfloat16(), trainable[n].bfloat16()) for n in moved if "norm" in n)


def test_a_model_without_known_projections_is_refused_by_name():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"Sequential.*attention projections"):
        adapt(model, "lora")
