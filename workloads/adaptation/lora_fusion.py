"""Fused LoRA: the results of PEFT's modules, up to rounding, with fewer passes over activations.

Linear layers that share an input are computed together: x is read once by all their matrices A, and its gradient, a
sum over the layers, is accumulated by the matrix products themselves. Beside products, memory bandwidth bounds a step,
and on a GPU at its power limit each byte that is not moved leaves power for the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn.functional import linear

from workloads.adaptation.wrapping import WrapOrder, Wrapper, unwrap, wrap
from workloads.models.families import SAME_INPUT


def fuse_lora(model: nn.Module) -> None:
    """Makes the LoRA layers of ``model``, and frozen ones that share their input, compute W x + B (A x) in few passes.

    A model without LoRA layers stays as it is. PEFT computes W x + s (B A x). Here s is multiplied into B, instead of
    into a copy of each layer's whole gradient; the stacked A of q, k and v are one product in the forward pass, and one
    a gradient in the backward pass; and B A x is added to W x, and the parts from k, v, up and A to the gradient of x,
    by the product that computes them. By its bytes, at 4.3 TB/s on an H200, the first saves Llama-2-7B 2.5 ms of a step
    of 8,192 tokens, the second 4, the third 5. Results differ by rounding alone. Call it after every other replacement
    of linear modules (FP8).
    """
    if not any(type(module) is LoraLinear for module in model.modules()):
        return
    for parent in list(model.modules()):
        for names in SAME_INPUT:
            group = [child for child in (getattr(parent, name, None) for name in names) if _is_linear(child)]
            if len(group) > 1:
                _FusedGroup(group)
    for module in model.modules():
        if type(module) is LoraLinear:
            _FusedGroup([module])


def unfuse_lora(model: nn.Module) -> None:
    """Undoes :func:`fuse_lora`, before LoRA layers are taken out of the model."""
    for module in model.modules():
        if isinstance(module, _FusedLinear):
            unwrap(module, _FusedLinear)
            del module.fused_group


def _is_linear(module: nn.Module | None) -> bool:
    return type(module) in (nn.Linear, LoraLinear)


class _FusedGroup:
    """Linear layers that are called with the same tensor, one after the other: the first call computes all."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        self.input: torch.Tensor | None = None
        self.pending: dict[int, torch.Tensor] = {}  # results by the layer's index, until it is called for its own
        for layer in layers:
            wrap(layer, _FusedLinear)
            layer.fused_group = self

    def can_fuse(self) -> bool:
        """Whether every layer is W x + B A x now, and its weights are here.

        Under ZeRO-3 a weight is whole only while its own module is called.
        """
        return all(_is_plain(layer) for layer in self.layers) and all(
            weight.numel() for weight in (*map(_weight, self.layers), *self._lora_a())
        )

    def result(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The result of one of the layers: (..., in) -> (..., out)."""
        place = next(index for index, each in enumerate(self.layers) if each is layer)
        if self.input is not x or place not in self.pending:
            self.input, self.pending = x, dict(enumerate(self._results(x)))
        result = self.pending.pop(place)
        if not self.pending:
            self.input = None
        return result

    def _results(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        bases = [_base(layer) for layer in self.layers]
        dtype = _product_dtype(x)
        matrices = self._lora_a()
        down = torch.cat(matrices).to(dtype) if matrices else None
        up = [_scaled_lora_b(layer).to(dtype) if _is_lora(layer) else None for layer in self.layers]
        if all(_is_frozen_linear(base, dtype) for base in bases):
            weights, biases = [base.weight for base in bases], [base.bias for base in bases]
            return _Products.apply(x.to(dtype), down, len(bases), *up, *weights, *biases)
        plain = [layer.base_layer(x) if _is_lora(layer) else nn.Linear.forward(layer, x) for layer in self.layers]
        shares = _shares(linear(x, down) if down is not None else None, up)
        return [y if b is None else y + linear(share, b).to(y.dtype) for y, share, b in zip(plain, shares, up)]

    def _lora_a(self) -> list[torch.Tensor]:
        return [layer.lora_A[layer.active_adapters[0]].weight for layer in self.layers if _is_lora(layer)]


class _FusedLinear(Wrapper):
    """Around a linear layer; PEFT's stays PEFT's, to merge and to switch off."""

    order = WrapOrder.FUSED_LORA
    fused_group: _FusedGroup

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not self.fused_group.can_fuse():
            return super().forward(x, *args, **kwargs)
        return self.fused_group.result(self, x)


def _is_lora(layer: nn.Module) -> bool:
    return isinstance(layer, LoraLinear)


def _is_plain(layer: nn.Module) -> bool:
    """Whether it is W x, or W x + s B A x with one adapter that is enabled and not merged, and no dropout."""
    if not _is_lora(layer):
        return True
    plain = len(layer.active_adapters) == 1 and not (layer.disable_adapters or layer.merged or layer.lora_variant)
    return plain and all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())


def _base(layer: nn.Module) -> nn.Module:
    return layer.base_layer if _is_lora(layer) else layer


def _weight(layer: nn.Module) -> torch.Tensor:
    return _base(layer).weight


def _scaled_lora_b(layer: LoraLinear) -> torch.Tensor:
    """The product s B."""
    (name,) = layer.active_adapters
    return layer.lora_B[name].weight * layer.scaling[name]


def _is_frozen_linear(base: nn.Module, dtype: torch.dtype) -> bool:
    return isinstance(base, nn.Linear) and base.weight.dtype == dtype and not base.weight.requires_grad


def _product_dtype(x: torch.Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Products(torch.autograd.Function):
    """W x + b + B (A x) of several layers with frozen W and b; their A are stacked, in the layers' order.

    ``apply(x, A or None, number of layers, *B or None of each, *W of each, *b or None of each)``: x (..., in), A
    (ranks, in), B (out, rank), W (out, in), b (out,), all of one dtype -> as many results, (..., out).
    """

    @staticmethod
    def forward(ctx, x, down, count, *matrices):
        up, weights, biases = matrices[:count], matrices[count : 2 * count], matrices[2 * count :]
        rows = x.reshape(-1, x.shape[-1])
        reduced = rows @ down.t() if down is not None else None
        results = []
        for weight, bias, b, share in zip(weights, biases, up, _shares(reduced, up)):
            lefts, rights = [rows], [weight.t()]
            if b is not None:
                lefts, rights = [rows, share], [weight.t(), b.t()]
            results.append(sum_of_products(lefts, rights, bias).view(*x.shape[:-1], -1))
        ctx.shape, ctx.count = x.shape, count
        ctx.save_for_backward(rows if down is not None else None, reduced, down, *up, *weights)
        return tuple(results)

    @staticmethod
    def backward(ctx, *gradients):
        rows, reduced, down, *matrices = ctx.saved_tensors
        up, weights = matrices[: ctx.count], matrices[ctx.count :]
        lefts, rights = [each.reshape(-1, each.shape[-1]) for each in gradients], list(weights)
        of_up, of_reduced = [None] * ctx.count, []
        for place, (gradient, b, share) in enumerate(zip(lefts, up, _shares(reduced, up))):
            if b is not None:
                of_up[place] = gradient.t() @ share
                of_reduced.append(gradient @ b)
        of_down = None
        if down is not None:
            lefts, rights = [*lefts, torch.cat(of_reduced, dim=-1)], [*rights, down]
            of_down = lefts[-1].t() @ rows
        of_x = sum_of_products(lefts, rights).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return of_x, of_down, None, *of_up, *[None] * (2 * ctx.count)


def _shares(reduced: torch.Tensor | None, up: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
    """Splits A x of all layers, (rows, ranks), into each layer's part: (rows, rank)."""
    if reduced is None:
        return [None] * len(up)
    return reduced.split([0 if each is None else each.shape[1] for each in up], dim=-1)


@torch.library.custom_op("longspan::sum_of_products", mutates_args=())
def sum_of_products(
    lefts: Sequence[torch.Tensor], rights: Sequence[torch.Tensor], bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The sum of lefts[i] (rows, k_i) times rights[i] (k_i, columns), and of a bias (columns,).

    Each product is accumulated where it is computed, in float32, onto the sum so far, in the operands' dtype. It is an
    operator, since torch.compile would allocate memory for each sum, and add in a kernel of its own.
    """
    first, *others = zip(lefts, rights, strict=True)
    total = first[0] @ first[1] if bias is None else torch.addmm(bias, *first)
    for left, right in others:
        total.addmm_(left, right)
    return total


@sum_of_products.register_fake
def _(lefts, rights, bias=None):
    return lefts[0].new_empty(lefts[0].shape[0], rights[0].shape[1])
