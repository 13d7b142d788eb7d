"""A frozen base that multiplies in FP8: twice the rate of bfloat16 on a GPU that has it.

Weights are quantised once to e4m3 (Micikevicius et al., arXiv 2209.05433) with a scale a row; the other operand is
quantised in each product with a scale a token. A frozen weight W has two products: y = x Wᵀ, and in the backward pass
dx = dy W. Hopper's FP8 units sum along the last dimension of both operands, so the second needs W transposed, with its
own scales: two copies of a byte each, as much memory as in bfloat16.

Gradients are e4m3 as well: with a scale a token its range of 2^18 is enough, and e5m2 would double the rounding
(DeepSeek-V3, arXiv 2412.19437, section 3.3.2, does the same).

It is faster only if layers are compiled: scales and casts are then fused into the kernels beside the products.

In the forward pass only the MLP's products are in FP8, two thirds of Llama-2-7B's. Those of attention's projections
stay in bfloat16 there: their errors change what is attended to. With all products in FP8, 300 steps of SmolLM2-135M
have losses 0.5% above bfloat16's in the mean of five runs, without these 0.2% in the mean of three
(docs/performance.md); Llama-2-7B does 28,001 and 26,362 tokens/s on an H200. Their weights take three bytes, not two.

With three bits of mantissa it matters where a row's numbers fall between the powers of two: each row of a weight gets
the one of 16 scales within a factor of two with the least error. Over four texts (SmolLM2-135M, all layers but the
last, 2,048 or 4,096 tokens each) the divergence from the unquantised model is 0.0194, 0.0162, 0.0216 and 0.0156 nats;
with each row's largest number as 448 it was 0.0221, 0.0194, 0.0244 and 0.0165.

The last decoder layer is not quantised: no layer after it dampens its error. For SmolLM2-135M, over 8,192 tokens of
books, FP8 in all layers makes the loss 0.0289 nats worse, in all but the last 0.0191, in all but the last two 0.0187;
in the last alone 0.0092, in each of the others tried (0, 1, 25 to 28) at most 0.0022. Products were simulated in
float32.
"""

from __future__ import annotations

import torch
from torch import nn

from workloads.adaptation.methods import decoder_layers
from workloads.budget.shape import FLOAT8_SIDES, NOT_FLOAT8, ModelShape
from workloads.errors import InputError

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # 448
# The largest number of a token of zeros: 448 over it is still finite.
NOT_ZERO = 1e-30

# Scales tried for each row of a weight.
CANDIDATES = 16

# Whether sums stay in Hopper's matrix unit, which keeps 13 fractional bits, for all of K; else they move to float32
# every 128 terms. Simulated (no GPU): sums of terms of either sign are 0.13% (K = 4,096) and 0.28% (11,008) off, where
# quantisation alone makes 3.7%; of terms mostly of one sign, 1.5% and 5% too small; with the move 0.01%. As
# Transformer Engine and torchao do by default: yes in the forward pass; no for gradients, whose errors accumulate over
# layers. On an H200 it makes a product 1.03 to 1.06 times as fast (benchmarks/float8_products.py).
FAST_FORWARD, FAST_BACKWARD = True, False


class Float8Linear(nn.Module):
    """A frozen linear module: (..., in) -> (..., out), in bfloat16, with gradients for its input alone.

    ``weight`` counts, and moves, as any frozen parameter. FP8 is held as bytes, for NCCL and Gloo, which need not know
    the dtype. The transposed copy and the scales are buffers, so a model has as many parameters as without FP8.
    """

    def __init__(self, linear: nn.Linear, device: torch.device, *, forwards: bool = True) -> None:
        """Quantises a linear module on ``device``, where the result stays.

        Args:
            linear: frozen, both sides multiples of 16.
            forwards: False keeps the weight in bfloat16 as well, and multiplies with that in the forward pass.
        """
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().to(device)
        if forwards:
            quantised, scale = quantise_weight(weight)
            self.weight = nn.Parameter(quantised.view(torch.uint8), requires_grad=False)
            self.register_buffer("scale", scale.flatten(), persistent=False)  # (out,)
        else:
            self.weight, self.scale = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False), None
        transposed, transposed_scale = quantise_weight(weight.t())
        self.register_buffer("transposed", transposed.view(torch.uint8), persistent=False)  # (in, out)
        self.register_buffer("transposed_scale", transposed_scale.flatten(), persistent=False)  # (in,)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        operands = (self.weight, self.scale, self.transposed, self.transposed_scale)
        return _Float8Product.apply(x, *operands, self.bias)

    def extra_repr(self) -> str:
        """Its sides, as ``nn.Linear`` prints them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Float8Product(torch.autograd.Function):
    """The product, which keeps only the weight for the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, scale, transposed, transposed_scale, bias):
        ctx.save_for_backward(transposed, transposed_scale)
        ctx.input_dtype = x.dtype
        if scale is None:
            return nn.functional.linear(x.to(torch.bfloat16), weight, bias)
        return scaled_product(x, weight, scale, bias, fast=FAST_FORWARD).to(torch.bfloat16)

    @staticmethod
    def backward(ctx, gradient):
        of_input = scaled_product(gradient, *ctx.saved_tensors, fast=FAST_BACKWARD).to(ctx.input_dtype)
        return of_input, None, None, None, None, None


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises (rows, K) to FP8, contiguous; returns it with each row's scale, (rows, 1) in float32.

    A row of zeros stays zeros; one that is not finite gives NaN.
    """
    largest = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=NOT_ZERO)
    return (x * (LARGEST / largest)).to(FLOAT8).contiguous(), largest / LARGEST


def quantise_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`quantise_rows`, with the scale of each row that has the least squared error among several."""
    weight = weight.float()
    smallest = weight.abs().amax(dim=-1, keepdim=True).clamp(min=NOT_ZERO) / LARGEST
    best, least = smallest, torch.full_like(smallest, torch.inf)
    # FP8's numbers are spaced alike between any two powers of two, but for the smallest: scales beyond a factor of two
    # give nothing new.
    for candidate in range(CANDIDATES):
        scale = smallest * 2 ** (candidate / CANDIDATES)
        error = ((weight / scale).to(FLOAT8).float() * scale - weight).square_().sum(dim=-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return (weight / best).to(FLOAT8).contiguous(), best


def scaled_product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None, *, fast: bool
) -> torch.Tensor:
    """X Wᵀ + bias in float32: x (..., K); W (N, K), given as FP8 bytes ``weight`` and row scales ``scale`` (N,).

    The product itself has no scales: on Hopper that kernel is faster than the one with row scales, the more so with
    exact sums (pytorch/pytorch issue 147971); the result is multiplied by them. Its sums are at most 448² K, in the
    range of bfloat16, whose relative rounding does not depend on their size.
    """
    rows, row_scale = quantise_rows(x.reshape(-1, x.shape[-1]))
    one = torch.ones((), device=x.device)
    sums = torch._scaled_mm(
        rows, weight.view(FLOAT8).t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast
    )
    product = sums * row_scale * scale
    if bias is not None:
        product = product + bias
    return product.view(*x.shape[:-1], -1)


def quantise_base(model: nn.Module, device: torch.device) -> None:
    """Replaces frozen linear modules in all decoder layers but the last by :class:`Float8Linear` on ``device``.

    That is each whose sides are multiples of 16, also inside LoRA's; those of attention use FP8 in the backward pass
    alone. The output layer stays: an error there is an error of the logits. On a CPU it is slow, with the same results.

    Raises:
        InputError: the device has no FP8, or no module has such sides.
    """
    refuse_without_float8(device)
    forwards = {linear.name for linear in ModelShape.of(model.config).linears if linear.float8_forwards}
    count = 0
    for path, parent in list(decoder_layers(model)[1][:-NOT_FLOAT8].named_modules()):
        for name, child in list(parent.named_children()):
            if _can_be_float8(child):
                # LoRA's module has the name of the module that it wraps.
                original = path.rpartition(".")[2] if name == "base_layer" else name
                setattr(parent, name, Float8Linear(child, device, forwards=original in forwards))
                count += 1
    if not count:
        raise InputError(
            f"quantization fp8 takes linear modules whose sides are multiples of {FLOAT8_SIDES}, in all layers but the "
            "last, and this model has none; choose quantization none"
        )


def refuse_without_float8(device: torch.device) -> None:
    """Raises InputError if the device has no products in FP8."""
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        raise InputError(
            f"quantization fp8 needs a GPU that multiplies in FP8 (compute capability 8.9 or higher), but "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}; choose quantization none or nf4"
        )


def _can_be_float8(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear) or module.weight.requires_grad:
        return False
    return module.in_features % FLOAT8_SIDES == 0 and module.out_features % FLOAT8_SIDES == 0
