"""Grouped attention as one operator: torch's rules for one, its memory, gradients and recompute."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.support.attention import GROUPED, Memory, by_definition, make_pattern, random_inputs
from workloads.attention import group_operator as grouped
from workloads.attention.backends import attention


@pytest.mark.parametrize("transformers_layout", [True, False])
@pytest.mark.parametrize(
    ("batch", "heads", "key_value_heads", "tokens", "group_size", "first_shifted"),
    [(1, 4, 4, 32, 8, 2), (2, 9, 3, 29, 8, 4), (3, 4, 2, 13, 6, 0), (2, 2, 1, 9, 16, 1), (1, 4, 2, 9, 2, 2)],
)
def test_the_operator_keeps_torchs_rules(
    batch, heads, key_value_heads, tokens, group_size, first_shifted, transformers_layout
):
    """Its schema, its shapes and strides before it runs, its registered backward pass, with dynamic shapes too."""
    inputs = random_inputs(batch, heads, key_value_heads, tokens, transformers_layout)
    torch.library.opcheck(grouped.grouped_attention, (*inputs, group_size, first_shifted, 0.3, "cpu"))


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("heads", [(4, 4), (9, 3)])
def test_every_result_is_written_once_and_laid_out_for_the_projections(name, heads):
    """Twice an output and three gradients: as kernels return them, and where they belong.

    Once where one call computes them whole. Nothing else is made, but for a key/value head whose query heads are cut in
    two: it has a gradient from each half.
    """
    inputs = random_inputs(1, *heads, 96, transformers_layout=True, head_dim=64)
    weights = torch.randn(1, 96, heads[0], 64, dtype=torch.float64).transpose(1, 2)
    with Memory(*inputs, weights) as memory:
        output = attention(*inputs, make_pattern(name, 16), layer=1)
        gradients = torch.autograd.grad(output, inputs, weights)
    results = [output, *gradients]
    assert all(x.transpose(1, 2).is_contiguous() for x in results)
    cut = 2 * 8 * 96 * 64 if name == "s2" and heads == (9, 3) else 0
    statistics = 2 * 8 * (96 * heads[0] + 6 * grouped.ALIGNMENT)
    copies = 1 if name in ("full", "short") else 2
    assert memory.total <= copies * sum(x.nbytes for x in results) + cut + statistics


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_a_gradient_of_one_input_alone(wanted):
    inputs = random_inputs(2, 4, 2, 20)
    expected = torch.autograd.grad(by_definition(*inputs, make_pattern("s2", 8)).square().sum(), inputs)[wanted]
    inputs = [x.detach().requires_grad_(position == wanted) for position, x in enumerate(inputs)]
    attention(*inputs, make_pattern("s2", 8)).square().sum().backward()
    torch.testing.assert_close(inputs[wanted].grad, expected)


def test_inference_and_checkpointing_change_nothing():
    inputs, pattern = random_inputs(2, 4, 2, 20), make_pattern("s2", 8)
    expected = attention(*inputs, pattern)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert torch.equal(attention(*inputs, pattern), expected)
    recomputed = checkpoint(attention, *inputs, pattern, use_reentrant=False)
    gradients = (torch.autograd.grad(output.square().sum(), inputs) for output in (expected, recomputed))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
