"""LoRA's arithmetic: PEFT's modules, with the same results for fewer passes over activations.

Linear layers that are given the same tensor are computed together: x is read once by all their matrices A, and its
gradient, a sum over the layers, is summed up where the matrix products end. Beside products it is memory's rate that
bounds a step, and on a GPU at its power limit each byte that is not moved leaves power for the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn.functional import linear

from workloads.models.families import SAME_INPUT


def spare_passes(model: nn.Module) -> None:
    """Has the LoRA layers of ``model``, and the frozen ones beside them, compute W x + B (A x) in few passes. A model
    without such layers stays as it is.

    Against PEFT's order of W x + s (B A x), s is multiplied into B, and not into a copy of each layer's whole gradient;
    A of q, k and v, one above the other, are one product forwards, and one for each gradient backwards; and B A x is
    added to W x, and to the gradient of x what comes from k, v, up and A, by the product that computes it. By its
    bytes, of 4.3 TB/s on an H200, the first saves Llama-2-7B 2.5 ms of a step of 8,192 tokens, the second 4, the third
    5. Results differ by rounding alone. To be called once nothing puts other modules in the place of these any more.
    """
    if not any(type(module) is LoraLinear for module in model.modules()):
        return
    for parent in list(model.modules()):
        for names in SAME_INPUT:
            together = [each for each in (getattr(parent, name, None) for name in names) if _is_linear(each)]
            if len(together) > 1:
                _SameInput(together)
    for module in model.modules():
        if type(module) is LoraLinear:
            _SameInput([module])


def compute_apart(model: nn.Module) -> None:
    """Undoes :func:`spare_passes`, for who takes LoRA layers out of the model."""
    for module in model.modules():
        if "together" in vars(module):
            module.__class__ = type(module).__bases__[0]
            del module.together


def _is_linear(module: nn.Module | None) -> bool:
    return type(module) in (nn.Linear, LoraLinear)


class _SameInput:
    """Linear layers that are given the same tensor, one after the other: the first to come computes all."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        self.input: torch.Tensor | None = None
        self.waiting: dict[int, torch.Tensor] = {}  # results, by the layer's place, until it comes for its own
        for layer in layers:
            layer.__class__, layer.together = _together(type(layer)), self

    def serves(self, x: torch.Tensor) -> bool:
        """Not where a layer is anything but W x + B A x; nor under ZeRO-3, which leaves of a matrix nothing but while
        its own module is called.
        """
        return all(_is_plain(layer) for layer in self.layers) and all(
            weight.numel() for weight in (*map(_weight, self.layers), *self._matrices("lora_A"))
        )

    def result(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Of one of them: (..., in) -> (..., out)."""
        place = next(index for index, each in enumerate(self.layers) if each is layer)
        if self.input is not x or place not in self.waiting:
            self.input, self.waiting = x, dict(enumerate(self._results(x)))
        mine = self.waiting.pop(place)
        if not self.waiting:
            self.input = None
        return mine

    def _results(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        bases = [_base(layer) for layer in self.layers]
        down = self._matrices("lora_A")
        # Of each layer that has LoRA matrices, the second; in the others' place None.
        up = [_up(layer) if _is_lora(layer) else None for layer in self.layers]
        number = _product_dtype(x)
        down = torch.cat(down).to(number) if down else None
        up = [None if each is None else each.to(number) for each in up]
        if all(_is_frozen_linear(base, number) for base in bases):
            weights, biases = [base.weight for base in bases], [base.bias for base in bases]
            return _Products.apply(x.to(number), down, len(bases), *up, *weights, *biases)
        plain = [layer.base_layer(x) if _is_lora(layer) else nn.Linear.forward(layer, x) for layer in self.layers]
        shares = _shares(linear(x, down) if down is not None else None, up)
        return [
            y if second is None else y + linear(mine, second).to(y.dtype) for y, mine, second in zip(plain, shares, up)
        ]

    def _matrices(self, name: str) -> list[torch.Tensor]:
        return [getattr(each, name)[each.active_adapters[0]].weight for each in self.layers if _is_lora(each)]


@cache
def _together(kind: type[nn.Module]) -> type[nn.Module]:
    """The same kind of layer, but for what is computed together; still PEFT's, to merge and to switch off."""

    class Together(kind):
        together: _SameInput

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if args or kwargs or not self.together.serves(x):
                return super().forward(x, *args, **kwargs)
            return self.together.result(self, x)

    Together.__name__ = Together.__qualname__ = kind.__name__
    return Together


def _is_lora(layer: nn.Module) -> bool:
    return isinstance(layer, LoraLinear)


def _is_plain(layer: nn.Module) -> bool:
    """Nothing but W x, or W x + s B A x with one adapter, which is switched on and not merged, and no dropout."""
    if not _is_lora(layer):
        return True
    plain = len(layer.active_adapters) == 1 and not (layer.disable_adapters or layer.merged or layer.lora_variant)
    return plain and all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())


def _base(layer: nn.Module) -> nn.Module:
    return layer.base_layer if _is_lora(layer) else layer


def _weight(layer: nn.Module) -> torch.Tensor:
    return _base(layer).weight


def _up(layer: LoraLinear) -> torch.Tensor:
    """S B."""
    (name,) = layer.active_adapters
    return layer.lora_B[name].weight * layer.scaling[name]


def _is_frozen_linear(base: nn.Module, number: torch.dtype) -> bool:
    return isinstance(base, nn.Linear) and base.weight.dtype == number and not base.weight.requires_grad


def _product_dtype(x: torch.Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Products(torch.autograd.Function):
    """W x + b + B (A x) of several layers with frozen W and b; A is theirs one above the other, in the layers' order.

    ``apply(x, A or None, number of layers, *B or None of each, *W of each, *b or None of each)``: x (..., in), A
    (ranks, in), B (out, rank), W (out, in), b (out,), all of one dtype -> as many results, (..., out).
    """

    @staticmethod
    def forward(ctx, x, down, count, *matrices):
        up, weights, biases = matrices[:count], matrices[count : 2 * count], matrices[2 * count :]
        rows = x.reshape(-1, x.shape[-1])
        reduced = rows @ down.t() if down is not None else None
        results = []
        for weight, bias, second, mine in zip(weights, biases, up, _shares(reduced, up)):
            lefts, rights = [rows], [weight.t()]
            if second is not None:
                lefts, rights = [rows, mine], [weight.t(), second.t()]
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
        for place, (gradient, second, mine) in enumerate(zip(lefts, up, _shares(reduced, up))):
            if second is not None:
                of_up[place] = gradient.t() @ mine
                of_reduced.append(gradient @ second)
        of_down = None
        if down is not None:
            lefts, rights = [*lefts, torch.cat(of_reduced, dim=-1)], [*rights, down]
            of_down = lefts[-1].t() @ rows
        of_x = sum_of_products(lefts, rights).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return of_x, of_down, None, *of_up, *[None] * (2 * ctx.count)


def _shares(reduced: torch.Tensor | None, up: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
    """Of A x of all layers, (rows, ranks), each one's: (rows, rank)."""
    if reduced is None:
        return [None] * len(up)
    return reduced.split([0 if each is None else each.shape[1] for each in up], dim=-1)


@torch.library.custom_op("longspan::sum_of_products", mutates_args=())
def sum_of_products(
    lefts: Sequence[torch.Tensor], rights: Sequence[torch.Tensor], bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The sum of lefts[i] (rows, k_i) times rights[i] (k_i, columns), and of a bias (columns,): each product is added
    where it is computed, in float32, to what is there, in the operands' dtype. As an operator, since torch.compile
    would make new memory for each sum, and a kernel to add.
    """
    first, *others = zip(lefts, rights, strict=True)
    total = first[0] @ first[1] if bias is None else torch.addmm(bias, *first)
    for left, right in others:
        total.addmm_(left, right)
    return total


@sum_of_products.register_fake
def _(lefts, rights, bias=None):
    return lefts[0].new_empty(lefts[0].shape[0], rights[0].shape[1])
