"""Wrappers: modules of a loaded model get another forward pass, and keep their names, parameters and class name.

A wrapper is a class put in front of a module's own class. All wrappers of a module are combined into one class, ordered
by :class:`WrapOrder` however they were put on. Modules of the same kind share that class, so torch.compile serves them
with the same code; a wrapper set on each module (``module.forward = ...``) would be compiled once per module.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache
from typing import ClassVar

from torch import nn


class WrapOrder(IntEnum):
    """Where a wrapper runs, from the outside in.

    A decoder layer is offloaded around its ``__call__``, outside the compiled region: copies between streams are not
    compiled. It recomputes around its ``forward``, inside that region, where the compiler can choose what to compute
    again. Fused LoRA wraps the ``forward`` of linear modules, inside their layer.
    """

    OFFLOAD = 0
    RECOMPUTE = 1
    FUSED_LORA = 2


class Wrapper(nn.Module):
    """Base of wrappers, which override ``__call__`` or ``forward`` and call ``super()`` for the module's own."""

    order: ClassVar[WrapOrder]


def wrap(module: nn.Module, wrapper: type[Wrapper]) -> None:
    """Puts ``wrapper`` around a module, in its order among the module's other wrappers."""
    _set_wrappers(module, {*_wrappers(module), wrapper})


def unwrap(module: nn.Module, wrapper: type[Wrapper]) -> None:
    """Takes ``wrapper`` off a module, if it has it; its other wrappers stay."""
    _set_wrappers(module, {*_wrappers(module)} - {wrapper})


def _wrappers(module: nn.Module) -> tuple[type[Wrapper], ...]:
    return getattr(type(module), "_wrappers", ())


def _set_wrappers(module: nn.Module, wrappers: set[type[Wrapper]]) -> None:
    own: type = getattr(type(module), "_unwrapped", type(module))
    ordered = tuple(sorted(wrappers, key=lambda wrapper: wrapper.order))
    module.__class__ = _wrapped_class(own, ordered) if ordered else own


@cache
def _wrapped_class(own: type, wrappers: tuple[type[Wrapper], ...]) -> type:
    attributes = {"__module__": own.__module__, "_wrappers": wrappers, "_unwrapped": own}
    return type(own.__name__, (*wrappers, own), attributes)
