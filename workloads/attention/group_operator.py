"""Causal attention inside groups as one operator of torch: kernels called on views, each result written once.

``longspan::grouped_attention`` and its backward pass call PyTorch's kernels directly on views of the heads and tokens
that form equal groups, and write into one output, one dQ, one dK and one dV. Left to autograd, the same calls would
each make a gradient of full size, filled with zeros, and add them up. Memory is laid out (batch, tokens, heads,
head_dim), as in transformers: inputs and outputs are transposed views, and neither the projections before nor the one
after it copies. ``torch.compile`` keeps the operator whole, without a graph break.

``cudnn``   cuDNN's, about twice as fast as FlashAttention-2 on a Hopper GPU
``flash4``  FlashAttention-4, the package flash-attn-4, whose kernels write into the views themselves
``flash``   torch's own FlashAttention-2
``cpu``     torch's on a CPU, float64 included; in bfloat16 the backward pass of small groups multiplies whole matrices

All support fewer key/value heads than query heads without copies. None has masks or dropout, for which
:mod:`workloads.attention.group_kernels` uses scaled dot-product attention.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import torch

from workloads.attention.group_layout import head_shifts, shared_heads

aten = torch.ops.aten
KernelName = Literal["cudnn", "flash4", "flash", "cpu"]
# Kernels may read statistics in vectors: those of each call begin at a multiple of this many numbers.
ALIGNMENT = 64
# On a CPU, in bfloat16: up to this group size, products of whole matrices make a faster backward pass (34 ms instead of
# 46 at 640 tokens, equal at 768; measured on an AMD EPYC).
LARGEST_BY_PRODUCTS = 640
# Numbers of these matrices that exist at a time, 4 MiB in bfloat16: memory does not grow with the sequence.
SCORES_AT_ONCE = 2**21


@torch.compiler.assume_constant_result
def kernel_for(preferred: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> KernelName | None:
    """The kernel to use: ``cudnn`` or ``flash4`` if preferred and supported, None if none is supported."""
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_dim % 8 or torch.version.hip:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return None
    # As torch chooses (sdp_utils.cpp): cuDNN's backward pass sums in no fixed order, and supports large heads on Hopper
    # only. FlashAttention-4's sums in no fixed order either.
    largest = 256 if capability == (9, 0) and torch.backends.cudnn.version() >= 91000 else 128
    if preferred in ("cudnn", "flash4") and head_dim <= largest and not torch.are_deterministic_algorithms_enabled():
        return "cudnn" if preferred == "cudnn" else "flash4"
    return "flash" if head_dim <= 256 and torch.backends.cuda.is_flash_attention_available() else None


# ---- the operator: (batch, heads, tokens, head_dim) and (batch, key_value_heads, tokens, head_dim)


@torch.library.custom_op("longspan::grouped_attention", mutates_args=())
def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group_size: int,
    first_shifted: int,
    scale: float,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention inside groups of consecutive tokens.

    Args:
        query: (batch, heads, tokens, head_dim).
        key, value: (batch, key_value_heads, tokens, head_dim); ``heads`` is a multiple of ``key_value_heads``.
        group_size: tokens in a group; the last may be shorter.
        first_shifted: query heads from this index on have groups shifted by half a group; ``heads`` for none. None are
            shifted if the sequence is not longer than a group.
        scale: factor on the scores.
        kernel: one that :func:`kernel_for` returned.

    Returns:
        The output, (batch, heads, tokens, head_dim), laid out (batch, tokens, heads, head_dim) in memory; and the
        statistics for its backward pass, which have no gradient.
    """
    query, key, value = _laid_out(query), _laid_out(key), _laid_out(value)
    calls = _calls(query.shape, key.shape[1], group_size, first_shifted)
    statistics = query.new_zeros(calls[-1].statistics.stop, dtype=_statistics_dtype(query))
    writes = kernel == "flash4"
    output = _empty(query) if len(calls) > 1 or writes else None
    for call in calls:
        inputs = call.of(query, call.heads), call.of(key, call.shared), call.of(value, call.shared), scale
        if writes and call.size > 1:
            _flash4_forward(*inputs, call.of(output, call.heads), statistics[call.statistics])
            continue
        piece, log_sum_exp = call.kernel(kernel).forward(*inputs)
        statistics[call.statistics].view(log_sum_exp.shape).copy_(log_sum_exp)
        if output is None:
            return _joined(piece, query.shape[0]), statistics
        _copy(call.of(output, call.heads), piece)
    return output, statistics


@torch.library.custom_op("longspan::grouped_attention_backward", mutates_args=())
def grouped_attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    statistics: torch.Tensor,
    group_size: int,
    first_shifted: int,
    scale: float,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of ``query``, ``key`` and ``value``, laid out (batch, tokens, heads, head_dim) in memory."""
    # cuDNN caches plans by the layouts of query, key and value alone; the other tensors' layouts must follow from them.
    gradient, query, key, value, output = (_laid_out(x) for x in (gradient, query, key, value, output))
    calls = _calls(query.shape, key.shape[1], group_size, first_shifted)
    writes = kernel == "flash4"

    def inputs(call: _Call) -> tuple:
        return (
            call.of(gradient, call.heads),
            call.of(query, call.heads),
            call.of(key, call.shared),
            call.of(value, call.shared),
            call.of(output, call.heads),
            statistics[call.statistics],
            scale,
        )

    if len(calls) == 1 and not writes:
        dq, dk, dv = calls[0].kernel(kernel).backward(*inputs(calls[0]))
        return _joined(dq, query.shape[0]), _joined(dk, query.shape[0]), _joined(dv, query.shape[0])
    gradients = _empty(query), _empty(key), _empty(value)
    for call in calls:
        if writes and call.size > 1 and not call.adds:
            wholes = zip(gradients, (call.heads, call.shared, call.shared), strict=True)
            _flash4_backward(*inputs(call), *(call.of(whole, heads) for whole, heads in wholes))
            continue
        pieces = call.kernel(kernel).backward(*inputs(call))
        _copy(call.of(gradients[0], call.heads), pieces[0])
        for whole, piece in zip(gradients[1:], pieces[1:], strict=True):
            # The query heads of a key/value head may be in two runs: the second adds to the first one's gradient.
            shared = call.of(whole, call.shared)
            shared.add_(piece) if call.adds else _copy(shared, piece)
    return gradients


@grouped_attention.register_fake
def _(query, key, value, group_size, first_shifted, scale, kernel):
    calls = _calls(query.shape, key.shape[1], group_size, first_shifted)
    return _empty(query), query.new_empty(calls[-1].statistics.stop, dtype=_statistics_dtype(query))


@grouped_attention_backward.register_fake
def _(gradient, query, key, value, output, statistics, group_size, first_shifted, scale, kernel):
    return _empty(query), _empty(key), _empty(value)


def _save(ctx, inputs, output):
    query, key, value, *settings = inputs
    ctx.settings = settings
    ctx.save_for_backward(query, key, value, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, gradient, _):
    if gradient is None:
        return (None,) * 7
    gradients = grouped_attention_backward(gradient, *ctx.saved_tensors, *ctx.settings)
    wanted = ctx.needs_input_grad
    return *(x if want else None for x, want in zip(gradients, wanted)), None, None, None, None


grouped_attention.register_autograd(_backward, setup_context=_save)


# ---- the heads and tokens of one call


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a kernel: consecutive heads in ``count`` runs of ``size`` tokens, each ``step`` after the last."""

    heads: slice
    shared: slice  # their key/value heads
    adds: bool  # to their gradients, which an earlier call has written
    rows: slice  # sequences of the batch
    first: int  # token
    size: int
    step: int
    count: int
    statistics: slice

    def of(self, x: torch.Tensor, heads: slice) -> torch.Tensor:
        """(batch, all heads, tokens, head_dim) -> (rows * count, heads, size, head_dim), always a view."""
        stop = self.first + (self.count - 1) * self.step + self.size
        runs = x[self.rows, heads, self.first : stop].unfold(2, self.size, self.step).permute(0, 2, 1, 4, 3)
        return runs.view(-1, *runs.shape[2:])

    def kernel(self, name: str) -> _Kernel:
        return _ONE_TOKEN if self.size == 1 else _KERNELS[name]


def _calls(shape: torch.Size, key_value_heads: int, group_size: int, first_shifted: int) -> list[_Call]:
    batch, heads, num_tokens, _ = shape
    if num_tokens <= group_size:
        group_size, first_shifted = num_tokens, heads
    calls: list[_Call] = []
    written = begin = 0
    for part, shift in head_shifts(heads, first_shifted, group_size):
        for run, shared in shared_heads(part, heads // key_value_heads):
            for rows, (first, size, step, count) in _runs_of_tokens(batch, num_tokens, group_size, shift):
                end = begin + (rows.stop - rows.start) * count * (run.stop - run.start) * size
                calls.append(
                    _Call(run, shared, shared.start < written, rows, first, size, step, count, slice(begin, end))
                )
                begin = -(-end // ALIGNMENT) * ALIGNMENT
            written = shared.stop
    return calls


def _runs_of_tokens(
    batch: int, num_tokens: int, group_size: int, shift: int
) -> Iterator[tuple[slice, tuple[int, int, int, int]]]:
    """Rows of the batch, with (first token, size, step, count) of groups that fold into the batch as a view."""
    for first, size, step, count in _equal_groups(num_tokens, group_size, shift):
        if batch == 1 or count == 1 or size * count == num_tokens:
            yield slice(0, batch), (first, size, step, count)
        elif batch <= count:
            for row in range(batch):
                yield slice(row, row + 1), (first, size, step, count)
        else:
            for begin in range(first, first + step * count, step):
                yield slice(0, batch), (begin, size, size, 1)


def _equal_groups(num_tokens: int, group_size: int, shift: int) -> Iterator[tuple[int, int, int, int]]:
    """The groups [0, shift), [shift, shift + G), ... by size, as (first token, size, step, count)."""
    num_whole = (num_tokens - shift) // group_size
    end = shift + num_whole * group_size
    if num_whole:
        yield shift, group_size, group_size, num_whole
    if shift and shift == num_tokens - end:
        yield 0, shift, end, 2
        return
    if shift:
        yield 0, shift, shift, 1
    if end < num_tokens:
        yield end, num_tokens - end, num_tokens - end, 1


# ---- memory: (batch, heads, tokens, head_dim), laid out (batch, tokens, heads, head_dim)


def _laid_out(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty(x: torch.Tensor) -> torch.Tensor:
    batch, heads, num_tokens, head_dim = x.shape
    return x.new_empty(batch, num_tokens, heads, head_dim).transpose(1, 2)


def _joined(piece: torch.Tensor, batch: int) -> torch.Tensor:
    """The tokens and heads of a single call, back as (batch, heads, tokens, head_dim); usually a view."""
    _, heads, _, head_dim = piece.shape
    return piece.transpose(1, 2).contiguous().view(batch, -1, heads, head_dim).transpose(1, 2)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies between strided views in elements of 16 bytes.

    For tensors that are not contiguous, torch's kernel takes time for each element: with bfloat16's 2 bytes it reached
    1.4 of an H200's 4.3 TB/s.
    """
    if target.shape[-1] * target.element_size() % torch.complex128.itemsize == 0 and source.stride(-1) == 1:
        target, source = target.view(torch.complex128), source.view(torch.complex128)
    target.copy_(source)


def _statistics_dtype(query: torch.Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


# ---- the kernels: (batch, heads, tokens, head_dim) each


class _Kernel(NamedTuple):
    """A kernel's two functions.

    Args:
        forward: of (query, key, value, scale), to the output and each query's log-sum-exp.
        backward: of (gradient, query, key, value, output, log-sum-exp flat, scale), to the gradients of query, key and
            value.
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def _cudnn_forward(query, key, value, scale):
    return aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, 0.0, True, False, scale=scale)[:2]


def _cudnn_backward(gradient, query, key, value, output, log_sum_exp, scale):
    tokens = query.shape[2]
    log_sum_exp = log_sum_exp.view(query.shape[:3])
    if _cudnn_statistics_dims(query.device) == 4:
        log_sum_exp = log_sum_exp.unsqueeze(-1)
    seed = offset = torch.empty((), dtype=torch.int64, device=query.device)  # unused: no dropout
    return aten._scaled_dot_product_cudnn_attention_backward(
        gradient, query, key, value, output, log_sum_exp, seed, offset, None, None, None, tokens, tokens, 0.0, True,
        scale=scale,
    )  # fmt: skip


@cache
def _cudnn_statistics_dims(device: torch.device) -> int:
    """Dimensions of cuDNN's log-sum-exp in this torch: (batch, heads, tokens) or (batch, heads, tokens, 1)."""
    x = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    return _cudnn_forward(x, x, x, 1.0)[1].dim()


def _flash_forward(query, key, value, scale):
    return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, False, scale=scale)[:2]


def _flash_backward(gradient, query, key, value, output, log_sum_exp, scale):
    tokens = query.shape[2]
    state = torch.empty(2, dtype=torch.uint64, device=query.device)  # unused: no dropout
    unused = torch.empty((), dtype=torch.uint64, device=query.device)
    return aten._scaled_dot_product_flash_attention_backward(
        gradient, query, key, value, output, log_sum_exp.view(query.shape[:3]), None, None, tokens, tokens, 0.0, True,
        state, unused, scale=scale,
    )  # fmt: skip


@cache
def _flash4():
    """The module whose functions, unlike the package's public ones, write into given tensors."""
    # Its kernels warn, when they are compiled, about an argument that is unused here.
    warnings.filterwarnings("ignore", message="Argument aux_data")
    return importlib.import_module("flash_attn.cute.interface")


def flash4_writes_into_views() -> bool:
    """Whether the installed version's functions accept our arguments: they are not public, and may change."""
    called = {"_flash_attn_fwd": {"out", "lse", "return_lse"}, "_flash_attn_bwd": {"dq", "dk", "dv"}}
    functions = {name: getattr(_flash4(), name, None) for name in called}
    return all(f and called[name] <= inspect.signature(f).parameters.keys() for name, f in functions.items())


def _flash4_forward(query, key, value, scale, output=None, log_sum_exp=None):
    """Writes into ``output`` and the log-sum-exp, flat, if they are given."""
    query, key, value, output = (x if x is None else x.transpose(1, 2) for x in (query, key, value, output))
    if log_sum_exp is not None:
        log_sum_exp = log_sum_exp.view(query.shape[0], query.shape[2], query.shape[1])
    output, log_sum_exp, *_ = _flash4()._flash_attn_fwd(
        query, key, value, softmax_scale=scale, causal=True, return_lse=True, out=output, lse=log_sum_exp
    )
    return output.transpose(1, 2), log_sum_exp


def _flash4_backward(gradient, query, key, value, output, log_sum_exp, scale, *targets):
    """Writes the gradients of query, key and value into ``targets`` if they are given."""
    log_sum_exp = log_sum_exp.view(query.shape[:3])
    gradient, query, key, value, output, *targets = (
        x.transpose(1, 2) for x in (gradient, query, key, value, output, *targets)
    )
    dq, dk, dv = targets or (None, None, None)
    gradients = _flash4()._flash_attn_bwd(
        query, key, value, output, gradient, log_sum_exp, scale, True, dq=dq, dk=dk, dv=dv
    )  # fmt: skip
    return tuple(x.transpose(1, 2) for x in gradients[:3])


def _cpu_forward(query, key, value, scale):
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scale)


def _cpu_backward(gradient, query, key, value, output, log_sum_exp, scale):
    if query.dtype == torch.bfloat16 and query.shape[2] <= LARGEST_BY_PRODUCTS:
        return _backward_by_products(gradient, query, key, value, output, scale)
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, query, key, value, output, log_sum_exp.view(query.shape[:3]), 0.0, True, scale=scale
    )


def _backward_by_products(gradient, query, key, value, output, scale):
    """The gradients by batched products of whole matrices; the query heads of a key/value head are one matrix.

    torch's kernel multiplies with MKL, which computes in float32 on an AMD EPYC. These products, oneDNN's, take 5.6 ms
    instead of 10.5 for 8 groups of 256 tokens and 2 heads, and 10.8 instead of 16.5 for 4 of 512, although they compute
    masked scores too. Errors against float64 are alike: 0.3% to 0.5%, and 0.2% to 0.6%.
    """
    rows, heads, tokens, head_dim = query.shape
    key_value_heads = key.shape[1]
    many = rows * key_value_heads
    gradient, query, output = (x.reshape(many, -1, head_dim) for x in (gradient, query, output))
    key, value = (x.reshape(many, tokens, head_dim) for x in (key, value))
    of_query, of_key, of_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    mask = torch.full((tokens, tokens), -torch.inf, dtype=query.dtype).triu_(1).repeat(heads // key_value_heads, 1)
    delta = (gradient * output).sum(dim=-1, keepdim=True)
    at_once = max(1, SCORES_AT_ONCE // mask.numel())
    for piece in (slice(start, start + at_once) for start in range(0, many, at_once)):
        q, k, v, g = query[piece], key[piece], value[piece], gradient[piece]
        weights = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale).softmax(dim=-1)
        of_scores = torch.baddbmm(delta[piece], g, v.transpose(1, 2), beta=-1).mul_(weights)
        torch.bmm(of_scores, k, out=of_query[piece])
        torch.bmm(of_scores.transpose(1, 2), q, out=of_key[piece])
        torch.bmm(weights.transpose(1, 2), g, out=of_value[piece])
    of_query.mul_(scale)
    of_key.mul_(scale)
    return (
        of_query.view(rows, heads, tokens, head_dim),
        of_key.view(rows, key_value_heads, tokens, head_dim),
        of_value.view(rows, key_value_heads, tokens, head_dim),
    )


def _one_token_forward(query, key, value, scale):
    """A single token attends to itself. cuDNN refuses it, and FlashAttention treats it as a step of generation."""
    output = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return output, output.new_zeros(query.shape[:3])


def _one_token_backward(gradient, query, key, value, output, log_sum_exp, scale):
    shared = gradient.unflatten(1, (value.shape[1], -1)).sum(dim=2)
    return torch.zeros_like(query), torch.zeros_like(key), shared


_KERNELS: dict[str, _Kernel] = {
    "cudnn": _Kernel(_cudnn_forward, _cudnn_backward),
    "flash4": _Kernel(_flash4_forward, _flash4_backward),
    "flash": _Kernel(_flash_forward, _flash_backward),
    "cpu": _Kernel(_cpu_forward, _cpu_backward),
}
_ONE_TOKEN = _Kernel(_one_token_forward, _one_token_backward)
