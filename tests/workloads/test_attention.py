"""Shifted sparse attention against its definition, a dense mask; and that models really take it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from workloads.attention import AttentionPattern, dense_mask, full_attention, shifted_sparse_attention, use_pattern
from workloads.errors import InputError


def by_definition(query, key, value, group_size):
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    mask = dense_mask(AttentionPattern(name="s2", group_size=group_size), query.shape[1], query.shape[2])
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value


def random_inputs(batch, heads, key_value_heads, tokens, transformers_layout=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tensor(num_heads):
        shape = (batch, tokens, num_heads, 8) if transformers_layout else (batch, num_heads, tokens, 8)
        x = torch.randn(shape, dtype=torch.float64, generator=generator)
        x = x.transpose(1, 2) if transformers_layout else x
        return x.detach().requires_grad_()

    return tensor(heads), tensor(key_value_heads), tensor(key_value_heads)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    head_counts=st.sampled_from([(1, 1), (2, 2), (3, 3), (4, 2), (4, 1), (6, 2), (9, 3), (8, 4)]),
    tokens=st.integers(1, 40),
    group_size=st.sampled_from([2, 4, 6, 8, 16, 64]),
    transformers_layout=st.booleans(),
)
def test_equals_the_dense_mask_in_values_and_gradients(batch, head_counts, tokens, group_size, transformers_layout):
    inputs = random_inputs(batch, *head_counts, tokens, transformers_layout)
    fast, slow = shifted_sparse_attention(*inputs, group_size), by_definition(*inputs, group_size)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    weights = torch.randn(fast.shape, dtype=fast.dtype, generator=torch.Generator().manual_seed(1))
    fast_gradients = torch.autograd.grad((fast * weights).sum(), inputs)
    slow_gradients = torch.autograd.grad((slow * weights).sum(), inputs)
    for got, expected in zip(fast_gradients, slow_gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_the_definition_itself_by_hand():
    """8 tokens in groups of 4, three heads: the first keeps its groups, the other two shift by two tokens."""
    mask = dense_mask(AttentionPattern(name="s2", group_size=4), 3, 8)
    groups = [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1, 2, 2]]
    for head in range(3):
        for query in range(8):
            for key in range(8):
                assert mask[head, query, key] == (key <= query and groups[head][query] == groups[head][key])


def test_no_output_depends_on_a_later_input():
    inputs = random_inputs(1, 4, 2, 32)
    output = shifted_sparse_attention(*inputs, 8)
    for position in range(32):
        gradients = torch.autograd.grad(output[:, :, position].sum(), inputs, retain_graph=True)
        for gradient in gradients:
            later = gradient[:, :, position + 1 :]
            assert later.numel() == 0 or later.abs().max() == 0


@pytest.mark.parametrize("group_size", [0, -4, 3, None, 2.5])
def test_a_group_size_that_cannot_be_halved_is_refused(group_size):
    with pytest.raises(InputError, match="even"):
        shifted_sparse_attention(*random_inputs(1, 2, 2, 8), group_size)


def small_llama(**overrides):
    torch.manual_seed(0)
    settings = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).eval()


def test_a_model_takes_the_pattern_and_gives_it_back_for_evaluation():
    model = small_llama()
    tokens = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(0))
    stock = model(tokens).logits
    use_pattern(model, AttentionPattern(name="s2", group_size=8))
    sparse = model(tokens).logits
    with full_attention(model):
        full = model(tokens).logits
    again = model(tokens).logits

    torch.testing.assert_close(full, stock)
    torch.testing.assert_close(sparse, again, rtol=0, atol=0)
    # Token 3 lies in the first half group of every head: there sparse and full attention are the same.
    torch.testing.assert_close(sparse[:, :4], stock[:, :4])
    assert (sparse[:, 8:] - stock[:, 8:]).abs().max() > 1e-3

    use_pattern(model, AttentionPattern(name="s2", group_size=16))
    assert (model(tokens).logits - sparse).abs().max() > 1e-3


def test_the_model_computes_the_dense_mask():
    """The whole model under the pattern equals the stock model given the dense mask."""
    model = small_llama(num_attention_heads=2, num_key_value_heads=1)
    tokens = torch.randint(64, (1, 24), generator=torch.Generator().manual_seed(0))
    pattern = AttentionPattern(name="s2", group_size=8)
    stock = model(tokens, attention_mask=dense_mask(pattern, 2, 24)[None]).logits
    use_pattern(model, pattern)
    torch.testing.assert_close(model(tokens).logits, stock)


def test_right_padding_changes_nothing_for_the_real_tokens():
    model = small_llama()
    use_pattern(model, AttentionPattern(name="s2", group_size=8))
    tokens = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(0))
    padding = torch.ones_like(tokens)
    padding[1, 20:] = 0
    padded = model(tokens, attention_mask=padding).logits
    assert padded.isfinite().all()
    torch.testing.assert_close(padded[0], model(tokens).logits[0])
    torch.testing.assert_close(padded[1, :20], model(tokens[1:, :20]).logits[0])


def test_models_that_cannot_take_a_pattern_are_refused_by_name():
    windowed = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "mistral",
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            sliding_window=16,
        )
    )
    with pytest.raises(InputError, match=r"mistral.*window of 16 tokens"):
        use_pattern(windowed, AttentionPattern(name="s2", group_size=8))


def test_generation_under_the_pattern_is_refused_rather_than_wrong():
    model = small_llama()
    use_pattern(model, AttentionPattern(name="s2", group_size=8))
    tokens = torch.randint(64, (1, 16))
    with pytest.raises(ValueError, match="full_attention"):
        model.generate(tokens, max_new_tokens=4, do_sample=False)
    with full_attention(model):
        assert model.generate(tokens, max_new_tokens=4, do_sample=False).shape == (1, 20)


@pytest.mark.gpu
@pytest.mark.parametrize("head_counts", [(8, 8), (8, 2), (9, 3)])
def test_bfloat16_on_the_gpu_equals_the_definition_within_rounding(head_counts):
    inputs = [x.detach() for x in random_inputs(2, *head_counts, 300)]
    expected = by_definition(*inputs, 64)
    got = shifted_sparse_attention(*(x.to("cuda", torch.bfloat16) for x in inputs), 64)
    assert (got.double().cpu() - expected).abs().max() < 0.02
