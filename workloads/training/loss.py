"""Next-token cross-entropy of a causal language model, a chunk of tokens at a time.

The logits of a whole sequence never exist at once: at 98k tokens and a vocabulary of 32k they would take 12 GB in
float32, and their gradient as much again. The decoder runs as a whole, then the output layer and the cross-entropy run
chunk by chunk. In training the gradient of a chunk is computed right after its loss, and its logits are freed (as in
Liger Kernel's fused linear cross-entropy, arXiv 2410.10989): nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from workloads.budget.loop import CHUNK_LOGITS
from workloads.models.families import logits_softcap
from workloads.training.compilation import compiled_like

# A GPU computes matrix products in tiles of up to this many rows; other chunk sizes would waste part of a tile.
TILE = 256
# (logits, targets) -> each token's cross-entropy.
CrossEntropy = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class NextTokenLoss(nn.Module):
    """A causal language model as engines train it: tokens in, loss out.

    The loss is computed inside, since DDP and DeepSpeed see only what the forward pass of their module uses.

    Args:
        model: of one of the families in workloads/models/families.py, with or without an adapter.
        recompute: computes the gradients of a chunk in the backward pass, from its hidden states, and its logits twice:
            for parameters that are whole only while their modules are called (ZeRO-3).
    """

    def __init__(self, model: nn.Module, recompute: bool = False) -> None:
        super().__init__()
        self.model, self.recompute = model, recompute
        self.cross_entropy = partial(compiled_like(model, _cross_entropy), softcap=logits_softcap(model.config))

    def forward(self, tokens: torch.Tensor, weights: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """The sum of each token's cross-entropy (nats) times its weight.

        Args:
            tokens: (batch, N).
            weights: (batch, N), float32; a sequence's first token has no context, and its weight is not read.
            inputs: other arguments of the model's call, such as ``attention_mask``.
        """
        hidden, targets = _hidden_states(self.model, tokens, inputs)
        head, entropy = self.model.get_output_embeddings(), self.cross_entropy
        weights = F.pad(weights[:, 1:], (0, 1)).flatten()
        if not self.recompute:
            parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
            return _ChunkedLoss.apply(hidden, targets, weights, head, entropy, *parameters)
        return sum(
            checkpoint(_loss, head, entropy, hidden[chunk], targets[chunk], weights[chunk], use_reentrant=False)
            for chunk in _chunks(head, len(hidden))
        )


def next_token_losses(model: nn.Module, tokens: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Cross-entropy (nats) of each token but the first, without gradients: tokens (batch, N) -> (batch, N - 1).

    Args:
        model, inputs: as of :class:`NextTokenLoss`.
    """
    with torch.no_grad():
        hidden, targets = _hidden_states(model, tokens, inputs)
        head, softcap = model.get_output_embeddings(), logits_softcap(model.config)
        chunks = _chunks(head, len(hidden))
        losses = torch.cat([_cross_entropy(head(hidden[chunk]), targets[chunk], softcap) for chunk in chunks])
    return losses.view(tokens.shape)[:, :-1]


class _ChunkedLoss(torch.autograd.Function):
    """The weighted loss, whose forward pass computes its gradients too.

    They are of the hidden states and of what trains in the output layer, and linear in the incoming gradient, a scalar.
    """

    @staticmethod
    def forward(ctx, hidden, targets, weights, head, cross_entropy, *parameters):
        loss = torch.zeros((), device=hidden.device, dtype=weights.dtype)
        gradients = [torch.empty_like(hidden), *(torch.zeros_like(parameter) for parameter in parameters)]
        for chunk in _chunks(head, len(hidden)):
            with torch.enable_grad():
                part = hidden[chunk].detach().requires_grad_()
                chunk_loss = _loss(head, cross_entropy, part, targets[chunk], weights[chunk])
            gradients[0][chunk], *others = torch.autograd.grad(chunk_loss, [part, *parameters])
            for gradient, other in zip(gradients[1:], others, strict=True):
                gradient += other
            loss += chunk_loss.detach()
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        of_hidden, *of_parameters = (gradient * saved for saved in ctx.saved_tensors)
        return of_hidden, None, None, None, None, *of_parameters


def _hidden_states(model: nn.Module, tokens: torch.Tensor, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The output layer's input, (batch x N, hidden size), and the token after each position, (batch x N,).

    A sequence's last position has no next token; its loss must not be read. Leaving it out would copy the others.
    """
    hidden = model.get_decoder()(input_ids=tokens, **inputs).last_hidden_state
    return hidden.flatten(0, 1), F.pad(tokens[:, 1:], (0, 1)).flatten()


def _chunks(head: nn.Module, num_tokens: int) -> Iterator[slice]:
    size = max(1, CHUNK_LOGITS // head.out_features)
    size -= size % TILE if size > TILE else 0
    return (slice(start, start + size) for start in range(0, num_tokens, size))


def _loss(
    head: nn.Module, cross_entropy: CrossEntropy, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    return (cross_entropy(head(hidden), targets) * weights).sum()


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, softcap: float | None) -> torch.Tensor:
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    # The softmax is computed in float32 at least, whatever the dtype of the matrix product.
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")
