"""Random inputs of attention, its definition by a dense mask, and what memory a call makes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from workloads.attention import group_operator as grouped
from workloads.attention.masks import dense_mask
from workloads.attention.patterns import PATTERNS, AttentionPattern

GROUPED = [name for name, pattern in PATTERNS.items() if pattern.is_grouped]


def make_pattern(name, group_size):
    return AttentionPattern(name=name, group_size=None if name == "full" else group_size)


def by_definition(query, key, value, pattern, **where):
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    mask = dense_mask(pattern, query.shape[1], query.shape[2], **where)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value


def random_inputs(batch, heads, key_value_heads, tokens, transformers_layout=False, seed=0, head_dim=8):
    generator = torch.Generator().manual_seed(seed)

    def tensor(num_heads):
        shape = (batch, tokens, num_heads, head_dim) if transformers_layout else (batch, num_heads, tokens, head_dim)
        x = torch.randn(shape, dtype=torch.float64, generator=generator)
        x = x.transpose(1, 2) if transformers_layout else x
        return x.detach().requires_grad_()

    return tensor(heads), tensor(key_value_heads), tensor(key_value_heads)


class Memory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, those inside our own operators included."""

    def __init__(self, *inputs):
        super().__init__()
        operators = (grouped.grouped_attention, grouped.grouped_attention_backward)
        self.inside = {operator._opoverload: operator._init_fn for operator in operators}
        self.storages = {x.untyped_storage()._cdata: x.untyped_storage() for x in inputs}
        self.largest = self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in self.inside:
            with self:
                return self.inside[function](*args, **(kwargs or {}))
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.storages:
                storage = self.storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
                self.largest = max(self.largest, storage.nbytes())
                self.total += storage.nbytes()
        return made
