"""Attention patterns: what they are, by hand; and that every backend computes what their dense masks say."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_error import CASES, max_errors
from tests.support.attention import GROUPED, Memory, by_definition, make_pattern, random_inputs
from workloads.attention import backends
from workloads.attention import group_operator as grouped
from workloads.attention.backends import BACKENDS, attention, choose_backend, masked_attention, missing
from workloads.attention.documents import document_ids
from workloads.attention.group_kernels import shifted_sparse_attention
from workloads.attention.masks import dense_mask
from workloads.attention.options import Options
from workloads.attention.patterns import PATTERNS, AttentionPattern
from workloads.attention.varlen import varlen_attention
from workloads.errors import InputError


def one_sequence_after_the_other(query, key, value, boundaries, longest, scale, dropout):
    """What a variable-length kernel is to compute: (tokens, heads, head_dim), causal from boundary to boundary."""
    lengths = boundaries.diff().tolist()
    assert dropout == 0 and min(lengths) > 0 and max(lengths) <= longest and sum(lengths) == len(query)
    outputs = [
        scaled_dot_product_attention(*(x.transpose(0, 1) for x in qkv), is_causal=True, scale=scale, enable_gqa=True)
        for qkv in zip(*(x.split(lengths) for x in (query, key, value)))
    ]
    return torch.cat(outputs, dim=1).transpose(0, 1)


def by_varlen(query, key, value, pattern, **where):
    return varlen_attention(one_sequence_after_the_other, query, key, value, pattern, Options(**where))


# The ways that run, and back-propagate, on a CPU.
WAYS = [(attention, name) for name in PATTERNS] + [(by_varlen, name) for name in GROUPED]


# ---- the definitions, by hand


def groups_by_hand(moved):
    groups = [0, 0, 1, 1, 1, 1, 2, 2] if moved else [0, 0, 0, 0, 1, 1, 1, 1]
    return lambda query, key: groups[query] == groups[key]


def keys_by_hand(keys):
    return lambda query, key: key in keys[query]


LOCAL = [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {1, 2, 3, 4}, {2, 3, 4, 5}, {3, 4, 5, 6}, {4, 5, 6, 7}]
EVERY_SECOND = [{0}, {1}, {0, 2}, {1, 3}, {0, 2, 4}, {1, 3, 5}, {0, 2, 4, 6}, {1, 3, 5, 7}]
# Three heads, 8 tokens, G = 4: what each head's queries attend to (all of it causal).
BY_HAND = {
    ("full", 0): [lambda query, key: True] * 3,
    ("short", 0): [groups_by_hand(False)] * 3,
    ("shifted", 0): [groups_by_hand(True)] * 3,
    ("s2", 0): [groups_by_hand(False), groups_by_hand(True), groups_by_hand(True)],
    ("s2-layers", 0): [groups_by_hand(False)] * 3,
    ("s2-layers", 1): [groups_by_hand(True)] * 3,
    ("s2-layers", 2): [groups_by_hand(False)] * 3,
    ("dilated", 0): [keys_by_hand(LOCAL), keys_by_hand(EVERY_SECOND), keys_by_hand(EVERY_SECOND)],
    # floor(sqrt(8)) = 2
    ("stride-sparse", 0): [keys_by_hand(LOCAL), keys_by_hand(EVERY_SECOND), keys_by_hand(EVERY_SECOND)],
}


@pytest.mark.parametrize(("name", "layer"), BY_HAND)
def test_a_definition_by_hand(name, layer):
    mask = dense_mask(make_pattern(name, 4), 3, 8, layer=layer)
    for head, expected in enumerate(BY_HAND[name, layer]):
        for query in range(8):
            for key in range(8):
                assert mask[head, query, key] == (key <= query and expected(query, key)), (head, query, key)


def test_block_sparse_by_hand():
    """Four blocks of two tokens: mask s pairs block i with block (i + s) mod 4, reflected to below the diagonal."""
    blocks_of = [
        [{0}, {1}, {2}, {3}],
        [{0}, {0}, {1}, {0, 2}],  # (0,1) (1,2) (2,3) go to (1,0) (2,1) (3,2), (3,0) stays; block 0 keeps itself
        [{0}, {1}, {0}, {1}],  # (0,2) (1,3) fall on (2,0) (3,1); blocks 0 and 1 keep themselves
        [{0}, {0}, {1}, {0, 2}],  # (0,3) goes to (3,0); (1,0) (2,1) (3,2) stay; block 0 keeps itself
    ]
    mask = dense_mask(make_pattern("block-sparse", 2), 6, 8)
    for head in range(6):
        for query in range(8):
            for key in range(8):
                expected = key == query or (key < query and key // 2 in blocks_of[head % 4][query // 2])
                assert mask[head, query, key] == expected, (head, query, key)


def test_the_stride_is_the_root_of_the_sequences_own_length():
    lengths = [1, 8, 9, 24, 25, 40]
    masks = dense_mask(make_pattern("stride-sparse", 2), 2, 40, lengths=lengths)
    for length, mask in zip(lengths, masks, strict=True):
        keys = mask[1, length - 1].nonzero().flatten().tolist()
        assert keys == sorted(range(length - 1, -1, -math.isqrt(length)))


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 30])
def test_every_query_attends_to_something_and_to_nothing_later(name, tokens):
    for layer in (0, 1):
        mask = dense_mask(make_pattern(name, 8), 5, tokens, layer=layer)
        assert mask.any(-1).all() and not mask.triu(1).any()


# ---- the backends against the definition


@settings(max_examples=150, deadline=None)
@given(
    way=st.sampled_from(WAYS),
    batch=st.integers(1, 3),
    head_counts=st.sampled_from([(1, 1), (2, 2), (3, 3), (4, 2), (4, 1), (6, 2), (9, 3), (8, 4)]),
    tokens=st.integers(1, 40),
    group_size=st.sampled_from([2, 4, 6, 8, 16, 64]),
    layer=st.integers(0, 2),
    transformers_layout=st.booleans(),
    data=st.data(),
)
def test_equals_the_dense_mask_in_values_and_gradients(
    way, batch, head_counts, tokens, group_size, layer, transformers_layout, data
):
    compute, name = way
    where = {"layer": layer}
    if data.draw(st.booleans(), "right padding"):
        where["lengths"] = data.draw(st.lists(st.integers(1, tokens), min_size=batch, max_size=batch), "lengths")
        where["lengths"] = tuple(where["lengths"])
    if data.draw(st.booleans(), "documents"):
        ends = data.draw(st.lists(st.booleans(), min_size=batch * tokens, max_size=batch * tokens), "ends")
        where["document_ids"] = torch.tensor(ends).view(batch, tokens).cumsum(-1)
    pattern = make_pattern(name, group_size)
    inputs = random_inputs(batch, *head_counts, tokens, transformers_layout)
    got, expected = compute(*inputs, pattern, **where), by_definition(*inputs, pattern, **where)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(1))
    got_gradients = torch.autograd.grad((got * weights).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    for got, expected in zip(got_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", PATTERNS)
def test_flex_attention_equals_the_dense_mask(name):
    """On a CPU it is not compiled and has no backward pass; gradients and the compiled kernel are tested on a GPU."""
    inputs = [x.detach() for x in random_inputs(2, 9, 3, 37, head_dim=16)]
    pattern = make_pattern(name, 8)
    documents = (torch.arange(74) // 11).view(2, 37)
    for where in ({}, {"layer": 1, "lengths": (37, 6), "document_ids": documents}):
        got = attention(*inputs, pattern, backend="flex", **where)
        torch.testing.assert_close(got, by_definition(*inputs, pattern, **where), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("compute", "name"), WAYS)
def test_no_output_depends_on_a_later_input(compute, name):
    inputs = random_inputs(1, 4, 2, 30)
    for layer in (0, 1):
        output = compute(*inputs, make_pattern(name, 8), layer=layer)
        for position in range(30):
            gradients = torch.autograd.grad(output[:, :, position].sum(), inputs, retain_graph=True)
            for gradient in gradients:
                later = gradient[:, :, position + 1 :]
                assert later.numel() == 0 or later.abs().max() == 0


@pytest.mark.parametrize(("compute", "name"), WAYS)
def test_a_padded_sequence_gets_what_it_gets_alone(compute, name):
    """Also where it alone is shorter than a group and its batch is not."""
    inputs = random_inputs(3, 9, 3, 40)
    lengths = (40, 7, 26)
    pattern = make_pattern(name, 8)
    padded = compute(*inputs, pattern, layer=1, lengths=lengths)
    for row, length in enumerate(lengths):
        alone = attention(*(x[row : row + 1, :, :length] for x in inputs), pattern, layer=1)
        torch.testing.assert_close(padded[row : row + 1, :, :length], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("compute", "name"), WAYS)
def test_nothing_crosses_a_document_boundary(compute, name):
    inputs = random_inputs(1, 4, 2, 30)
    output = compute(*inputs, make_pattern(name, 8), layer=1, document_ids=(torch.arange(30) // 13)[None])
    gradients = torch.autograd.grad(output[:, :, 13:26].sum(), inputs)
    for gradient in gradients:
        touched = gradient.abs().amax(dim=(0, 1, 3)).nonzero().flatten()
        assert 13 <= touched.min() and touched.max() < 26


@pytest.mark.parametrize("name", GROUPED)
def test_no_fast_path_makes_anything_of_the_size_of_tokens_squared(name):
    tokens = 4096
    inputs = [x.detach().float().requires_grad_() for x in random_inputs(2, 3, 3, tokens)]
    cases = [{}, {"lengths": (tokens, 40)}]
    if name != "full":
        cases.append({"document_ids": (torch.arange(2 * tokens) // 700).view(2, tokens)})
    for where in cases:
        with Memory() as memory:
            attention(*inputs, make_pattern(name, 64), layer=1, **where).sum().backward()
        assert memory.largest < tokens**2 / 4


# ---- documents, settings, and the choice of a backend


def test_an_end_of_sequence_token_belongs_to_the_document_that_it_ends():
    tokens = torch.tensor([[5, 9, 6, 6, 9, 9, 7, 8], [9, 1, 2, 3, 4, 5, 6, 9]])
    expected = [[0, 0, 1, 1, 1, 2, 3, 3], [0, 1, 1, 1, 1, 1, 1, 1]]
    assert document_ids(tokens, eos_token_id=9).tolist() == expected


@pytest.mark.parametrize("group_size", [0, -4, 3, None, 2.5])
def test_a_group_size_that_cannot_be_halved_is_refused(group_size):
    with pytest.raises(InputError, match="even"):
        shifted_sparse_attention(*random_inputs(1, 2, 2, 8), group_size)
    for name in set(PATTERNS) - {"full"}:
        with pytest.raises(InputError, match="even"):
            AttentionPattern(name=name, group_size=group_size)


def test_a_pattern_that_is_none():
    with pytest.raises(InputError, match="expected one of"):
        AttentionPattern(name="s3", group_size=8)
    with pytest.raises(InputError, match="no meaning"):
        AttentionPattern(name="full", group_size=8)


@pytest.mark.parametrize("name", PATTERNS)
def test_on_a_cpu_every_pattern_is_computed_by_sdpa(name):
    cpu, pattern = torch.device("cpu"), make_pattern(name, 8)
    assert choose_backend("auto", pattern, cpu, torch.float32) == "sdpa"
    assert choose_backend("auto", pattern, cpu, torch.bfloat16, documents=True) == "sdpa"
    for backend in set(BACKENDS) - {"sdpa"}:
        with pytest.raises(InputError, match=rf"{backend}.*CUDA device.*sdpa would work"):
            choose_backend(backend, pattern, cpu, torch.bfloat16)
    with pytest.raises(InputError, match="expected one of auto, sdpa"):
        choose_backend("flash5", pattern, cpu, torch.bfloat16)


@pytest.mark.parametrize(
    ("documents", "order"),
    [
        (False, ["flash4", "cudnn", "flash2", "varlen", "flash3", "sdpa"]),
        (True, ["flash2", "varlen", "flash3", "flex", "sdpa"]),
    ],
)
def test_auto_takes_flash3_which_has_not_run_after_what_has(documents, order, monkeypatch):
    able = list(BACKENDS)
    monkeypatch.setattr(backends, "missing", lambda backend, *facts: None if backend in able else "what is not here")
    monkeypatch.setattr(backends, "_is_hopper", lambda device: True)
    for backend in order:
        gpu = torch.device("cuda")
        assert choose_backend("auto", make_pattern("s2", 8), gpu, torch.bfloat16, documents=documents) == backend
        able.remove(backend)


def test_a_query_whose_keys_are_all_masked_attends_to_itself():
    """Padding on the left: the dense path."""
    inputs = random_inputs(1, 2, 2, 12)
    allowed = torch.ones(12, 12, dtype=torch.bool).tril() & (torch.arange(12) >= 5)
    output = masked_attention(*inputs, make_pattern("s2", 4), Options(), allowed=allowed[None, None])
    assert output.isfinite().all()
    torch.testing.assert_close(output[:, :, :5], inputs[2][:, :, :5])


@pytest.mark.parametrize("at_once", [1, 2**21])
@pytest.mark.parametrize(("heads", "key_value_heads", "tokens"), [(4, 2, 256), (9, 3, 300), (4, 4, 100), (8, 1, 40)])
@pytest.mark.parametrize("name", GROUPED)
def test_bfloat16_on_a_cpu_equals_the_definition_within_rounding(
    name, heads, key_value_heads, tokens, at_once, monkeypatch
):
    """Small groups have a backward pass of their own there."""
    monkeypatch.setattr(grouped, "SCORES_AT_ONCE", at_once)
    pattern = make_pattern(name, 64)
    exact = random_inputs(2, heads, key_value_heads, tokens, transformers_layout=True, head_dim=32)
    inputs = [x.detach().bfloat16().requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    weights = random_inputs(2, heads, heads, tokens, seed=1, head_dim=32)[0].detach().bfloat16()
    output, expected = attention(*inputs, pattern, layer=1), by_definition(*exact, pattern, layer=1)
    found = [output.detach(), *torch.autograd.grad(output, inputs, weights)]
    for a, b in zip(found, [expected.detach(), *torch.autograd.grad(expected, exact, weights.double())], strict=True):
        assert (a.double() - b).norm() < 0.008 * b.norm()


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_on_the_gpu_equals_the_definition_within_rounding(backend, name, case):
    try:
        errors = max_errors(backend, name, case)
    except InputError as reason:
        pytest.skip(str(reason))
    assert max(errors.values()) < 0.03, errors


@pytest.mark.gpu
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_the_gpu_no_output_depends_on_a_later_input(backend, name):
    """Exactly: what is masked has the weight zero, not a small one."""
    pattern, tokens = make_pattern(name, 64), 200
    if reason := missing(backend, pattern, torch.device("cuda"), torch.bfloat16):
        pytest.skip(f"needs {reason}")
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, heads, tokens, 64, generator=generator).cuda().bfloat16() for heads in (4, 2, 2)]
    inputs = [x.requires_grad_() for x in inputs]
    output = attention(*inputs, pattern, layer=1, backend=backend)
    for position in (0, 1, 31, 32, 63, 64, 95, 96, 127, 128, 150, 198):
        gradients = torch.autograd.grad(output[:, :, position].sum(), inputs, retain_graph=True)
        assert gradients[2].abs().max() > 0
        for gradient in gradients:
            assert gradient[:, :, position + 1 :].abs().max() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cudnn", "flash4", "sdpa"])
def test_on_the_gpu_no_layout_in_memory_changes_a_result(backend):
    """CuDNN's plans are cached by the layouts of query, key and value alone."""
    pattern = make_pattern("s2", 64)
    if reason := missing(backend, pattern, torch.device("cuda"), torch.bfloat16):
        pytest.skip(f"needs {reason}")
    results = []
    for transposed in ((False,) * 4, (True,) * 4, (True, False, False, True), (False, True, True, False)):
        generator = torch.Generator().manual_seed(0)
        tensors = []
        for heads, swap in zip((4, 2, 2, 4), transposed, strict=True):
            x = torch.randn(1, heads, 200, 64, generator=generator).cuda().bfloat16()
            tensors.append(x.transpose(1, 2).contiguous().transpose(1, 2) if swap else x)
        inputs = [x.requires_grad_() for x in tensors[:3]]
        output = attention(*inputs, pattern, backend=backend)
        results.append([output, *torch.autograd.grad(output, inputs, tensors[3])])
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            assert (one - other).abs().max() <= 0.02 * one.abs().max()  # gradients are summed in no fixed order


@pytest.mark.gpu
def test_on_the_gpu_the_fast_kernels_are_chosen_and_what_is_missing_is_named():
    gpu = torch.device("cuda")
    assert grouped.kernel_for("cudnn", gpu, torch.bfloat16, 128) == "cudnn"
    assert grouped.kernel_for("flash", gpu, torch.bfloat16, 128) == "flash"
    assert grouped.kernel_for("cudnn", gpu, torch.float32, 128) is None
    hopper = torch.cuda.get_device_capability()[0] == 9
    flash4 = hopper and missing("flash4", make_pattern("s2", 8), gpu, torch.bfloat16) is None
    assert choose_backend("auto", make_pattern("s2", 8), gpu, torch.bfloat16) == ("flash4" if flash4 else "cudnn")
    assert choose_backend("auto", make_pattern("s2", 8), gpu, torch.float32) == "sdpa"
    assert choose_backend("auto", make_pattern("dilated", 8), gpu, torch.bfloat16) == "flex"
    assert choose_backend("auto", make_pattern("s2", 8), gpu, torch.bfloat16, documents=True) in (
        "flash2", "varlen",
    )  # fmt: skip
    with pytest.raises(InputError, match="made of groups"):
        choose_backend("cudnn", make_pattern("dilated", 8), gpu, torch.bfloat16)
    with pytest.raises(InputError, match="bfloat16 or float16"):
        choose_backend("varlen", make_pattern("s2", 8), gpu, torch.float32)
