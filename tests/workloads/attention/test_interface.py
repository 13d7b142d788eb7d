"""Models take a pattern: each supported family computes what its dense mask says, others are refused by name."""

from typing import get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend

from tests.support.models import random_tokens, small_model
from workloads.attention.documents import document_ids
from workloads.attention.interface import backend_of, full_attention, use_pattern
from workloads.attention.masks import dense_mask
from workloads.attention.patterns import AttentionPattern
from workloads.config import Attention
from workloads.errors import InputError
from workloads.models.families import FAMILIES

EOS = 7
PATTERN = AttentionPattern(name="s2", group_size=8)


def packed_tokens():
    tokens = random_tokens()
    tokens[0, [5, 6, 20]] = EOS
    tokens[1, 11] = EOS
    return tokens


def as_scores(mask):
    """A boolean mask as the eager attention of stock models takes it."""
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_dense_mask(family):
    """The whole model under a pattern against the stock model, eager, with the dense mask; with documents too."""
    model = small_model(family)
    tokens = packed_tokens()
    heads = model.config.num_attention_heads
    ids = document_ids(tokens, EOS)
    stock = model(tokens).logits
    expected = model(tokens, attention_mask=as_scores(dense_mask(PATTERN, heads, 32)[None])).logits
    inside = model(tokens, attention_mask=as_scores(dense_mask(PATTERN, heads, 32, document_ids=ids))).logits
    only_documents = dense_mask(AttentionPattern(), heads, 32, document_ids=ids)
    full_inside = model(tokens, attention_mask=as_scores(only_documents)).logits

    use_pattern(model, PATTERN)
    close = dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(tokens).logits, expected, **close)
    torch.testing.assert_close(model(tokens, document_ids=ids).logits, inside, **close)
    with full_attention(model):
        torch.testing.assert_close(model(tokens).logits, stock, **close)
        torch.testing.assert_close(model(tokens, document_ids=ids).logits, full_inside, **close)
    # They differ, so that each has taken effect.
    for one, other in ((expected, stock), (inside, expected), (full_inside, stock)):
        assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("name", sorted(set(get_args(Attention)) - {"full"}))
def test_a_model_takes_every_pattern_in_training(name):
    """Gradients, with gradient checkpointing; s2-layers in particular, where each layer has a mask of its own."""
    pattern = AttentionPattern(name=name, group_size=8)
    tokens = packed_tokens()
    ids = document_ids(tokens, EOS)
    gradients = []
    for checkpointing in (False, True):
        model = small_model(num_hidden_layers=1 if name != "s2-layers" else 2).train()
        use_pattern(model, pattern)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(tokens, document_ids=ids).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["full", "s2", "s2-layers"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_compute_the_same_without_a_graph_break(name, checkpointing):
    """Under autocast and with adapters, as in training.

    All layers share one graph; even and odd ones have one each where the pattern tells them apart.
    """
    tokens = random_tokens()
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = small_model(num_hidden_layers=3)
        use_pattern(model, AttentionPattern(name=name, group_size=None if name == "full" else 8))
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        model.train().enable_input_require_grads()  # else the first layer has a graph of its own
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        graphs = CompileCounterWithBackend("aot_eager")
        if compiled:
            for layer in model.base_model.model.model.layers:
                layer.compile(backend=graphs, fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, use_cache=False).logits.float().square().mean()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        assert graphs.frame_count == compiled * (2 if name == "s2-layers" else 1)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_layers_alternate_where_the_pattern_says_so():
    """Two layers of short attention keep groups apart; with the second one shifted, neighbouring groups meet."""
    model = small_model()
    for name, reaches in (("short", False), ("s2-layers", True)):
        use_pattern(model, AttentionPattern(name=name, group_size=8))
        embedded = model.get_input_embeddings()(random_tokens(1, 16)).detach().requires_grad_()
        model(inputs_embeds=embedded).logits[0, 8:12].sum().backward()
        assert (embedded.grad[0, :8].abs().max() > 0) == reaches


def test_a_model_takes_the_pattern_and_gives_it_back_for_evaluation():
    model = small_model()
    tokens = random_tokens()
    stock = model(tokens).logits
    use_pattern(model, PATTERN)
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


def test_a_document_under_full_attention_is_scored_as_if_alone():
    """Positions go on over a boundary, but rotary attention knows only their differences."""
    model = small_model()
    tokens = packed_tokens()[:1]
    alone = [model(tokens[:, begin:end]).logits for begin, end in ((0, 6), (6, 7), (7, 21), (21, 32))]
    use_pattern(model, AttentionPattern())
    together = model(tokens, document_ids=document_ids(tokens, EOS)).logits
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", get_args(Attention))
@pytest.mark.parametrize("length", [20, 5])
def test_right_padding_changes_nothing_for_the_real_tokens(name, length):
    """Also of a sequence that is shorter than a group, in a batch with a longer one."""
    model = small_model()
    use_pattern(model, AttentionPattern(name=name, group_size=None if name == "full" else 8))
    tokens = random_tokens()
    padding = torch.ones_like(tokens)
    padding[1, length:] = 0
    padded = model(tokens, attention_mask=padding).logits
    assert padded.isfinite().all()
    torch.testing.assert_close(padded[0], model(tokens).logits[0])
    torch.testing.assert_close(padded[1, :length], model(tokens[1:, :length]).logits[0])


def test_left_padding_is_masked():
    """The dense path: as the stock model with both masks."""
    model = small_model()
    tokens = random_tokens()
    padding = torch.ones_like(tokens)
    padding[1, :9] = 0
    positions = (padding.cumsum(-1) - 1).clamp(min=0)
    mask = dense_mask(PATTERN, 4, 32)[None] & padding[:, None, None, :].bool()
    expected = model(tokens, attention_mask=as_scores(mask), position_ids=positions).logits
    use_pattern(model, PATTERN)
    got = model(tokens, attention_mask=padding, position_ids=positions).logits
    assert got.isfinite().all()
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1, 9:], expected[1, 9:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("mistral", {"sliding_window": 16}, r"mistral.*window of 16 tokens"),
        ("phi3", {"sliding_window": 16}, r"phi3.*window of 16 tokens"),
        ("gemma2", {"attn_logit_softcapping": 50.0}, r"gemma2.*attn_logit_softcapping is 50"),
        ("gemma2", {"layer_types": ["sliding_attention", "full_attention"]}, r"gemma2.*sliding_attention"),
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"]}, r"gemma3_text.*sliding_attention"),
        ("gpt2", {"head_dim": None, "num_key_value_heads": None}, r"gpt2.*Llama, Mistral, Qwen2"),
        ("olmo2", {"head_dim": None}, r"olmo2.*Llama, Mistral, Qwen2"),
    ],
)
def test_models_that_cannot_take_a_pattern_are_refused_by_name(family, overrides, message):
    model = small_model(family, **overrides)
    for pattern in (PATTERN, AttentionPattern()):
        with pytest.raises(InputError, match=message):
            use_pattern(model, pattern)


def test_a_backend_that_is_not_here_is_refused_and_auto_says_which_it_took():
    model = small_model()
    with pytest.raises(InputError, match="'flash2' needs a CUDA device"):
        use_pattern(model, PATTERN, "flash2")
    use_pattern(model, PATTERN)
    assert backend_of(model) == "sdpa"


def test_generation_under_the_pattern_is_refused_rather_than_wrong():
    model = small_model()
    stock = model.generate(random_tokens(1, 16), max_new_tokens=4, do_sample=False)
    use_pattern(model, PATTERN)
    with pytest.raises(ValueError, match="full_attention"):
        model.generate(random_tokens(1, 16), max_new_tokens=4, do_sample=False)
    with full_attention(model):
        assert torch.equal(model.generate(random_tokens(1, 16), max_new_tokens=4, do_sample=False), stock)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["sdpa", "cudnn", "flash2", "flash3", "flash4", "varlen", "flex"])
def test_a_model_in_bfloat16_on_the_gpu_with_every_backend(backend):
    """Under autocast with float32 weights, as in training; documents, right padding, evaluation first."""
    model = small_model(hidden_size=128, head_dim=32).cuda()
    tokens = packed_tokens().cuda()
    ids = document_ids(tokens, EOS)
    padding = torch.ones_like(tokens)
    padding[1, 5:] = 0
    results = []
    for name in (backend, "sdpa"):
        try:
            use_pattern(model, PATTERN, name, dtype=torch.bfloat16, documents=True)
        except InputError as reason:
            pytest.skip(str(reason))
        with torch.autocast("cuda", torch.bfloat16):
            with torch.inference_mode(), full_attention(model):
                full = model(tokens).logits
            model.zero_grad()
            plain = model(tokens).logits
            inside = model(tokens, document_ids=ids).logits
            short = model(tokens, attention_mask=padding).logits[1, :5]
            (plain.float().square().mean() + inside.float().square().mean()).backward()
        gradient = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
        results.append([full, plain.detach(), inside.detach(), short.detach(), gradient])
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= 0.03 * other.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["full", "s2"])
@pytest.mark.parametrize("backend", ["cudnn", "flash4", "sdpa"])
def test_compiled_layers_on_the_gpu(backend, name):
    """By inductor, in bfloat16 under autocast; a length that is no multiple of the group."""
    tokens = random_tokens(1, 300).cuda()
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = small_model(hidden_size=256, head_dim=64, max_position_embeddings=512).cuda().train()
        pattern = AttentionPattern(name=name, group_size=None if name == "full" else 64)
        try:
            use_pattern(model, pattern, backend, dtype=torch.bfloat16)
        except InputError as reason:
            pytest.skip(str(reason))
        if compiled:
            for layer in model.model.layers:
                layer.compile(fullgraph=True)
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(tokens, use_cache=False).logits.float()
        logits.square().mean().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= 0.05 * one.abs().max()
