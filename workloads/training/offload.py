"""Activations of some decoder layers in pinned host memory, between a layer's forward pass and its backward pass.

What such a layer saves for its backward pass is copied to the host while the layers after it compute, and back while
theirs do; only what is on its way is on the device. How many layers is chosen before a trial runs
(workloads/budget/fitting.py), which ones and when is the rule of workloads/budget/offloading.py.

How memory is kept safe without the host ever waiting. All device memory belongs to the stream that computes; two side
streams only copy, one out and one back. A side stream waits for what the computing one has been given before it begins,
and the computing stream waits for the copy before it goes on to use or give up that memory. So what is given up is free
for the very next kernel, in the order of the program: with ``record_stream`` it would be free once the host happens to
see that the copy is done, and the host is seconds ahead.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from workloads.adaptation.methods import decoder_layers
from workloads.budget.offloading import offloaded_layers
from workloads.errors import InputError
from workloads.training.recompute import layers_with_backward

SMALLEST = 2**20  # bytes: what is smaller stays, a copy of it would cost more than its memory is worth


def layers_to_offload(model: nn.Module, count: int) -> list[nn.Module]:
    """The layers whose activations :func:`offload_activations` moves.

    Raises:
        InputError: the model has fewer than ``count`` layers.
    """
    num_layers = len(decoder_layers(model)[1])
    if count > num_layers:
        raise InputError(f"offload_activations is {count}, but the model has {num_layers} layers")
    return [each.layer for each in offloaded_layers(layers_with_backward(model), count)]


def offload_activations(model: nn.Module, count: int, device: torch.device) -> None:
    """Has ``count`` of the layers that have a backward pass, spread evenly, keep their activations in host memory, in
    training; at most all but the last.

    Parameters and buffers stay where they are, and so does what all layers share: what they are called with by keyword
    (rotary positions, masks). A tensor that is saved several times, or in several views, is copied once. The result is
    bit for bit the same. Buffers are pinned in the first step, as large as what they take, and used again in each step;
    on a CPU they are ordinary memory, and copies are done when they are begun.

    Args:
        model: as :func:`workloads.adaptation.methods.adapt` returns it; layers that recompute do so already.
        device: where it trains.

    Raises:
        MemoryError: in the first step: the host's memory cannot be had.
    """
    if count == 0:
        return
    layers = layers_with_backward(model)
    plan = offloaded_layers(layers, count)
    copies = _Copies(device)
    away = {each.layer: _Away(copies, device) for each in plan}
    for layer in layers:
        layer._offloading = _Place(
            away=away.get(layer),
            forget=[*away.values()] if layer is layers[0] else [],
            release=[away[each.layer] for each in plan if each.released is layer],
            fetch=[away[each.layer] for each in plan if each.fetched is layer],
        )
        layer.__class__ = _offloading(type(layer))


class _Offloading:
    """In front of a module's class, outside of what recomputes or compiles it: what is due before and after a call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return super().__call__(*args, **kwargs)
        return self._offloading.call(super().__call__, self, args, kwargs)


@cache  # one class for all layers that are alike, so that torch.compile serves them with the same code
def _offloading(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Offloading, kind), {"__module__": kind.__module__})


@dataclass(frozen=True, slots=True)
class _Place:
    """What is to be done at one layer: with its own activations, and with those of others that it is the time of.

    Args:
        away: where its own activations go; None: they stay.
        forget: what a step before has left, if it was broken off.
        release: what must have left the device before this layer's forward pass.
        fetch: what begins to come back with its backward pass.
    """

    away: _Away | None
    forget: list[_Away]
    release: list[_Away]
    fetch: list[_Away]

    def call(self, forward: Callable[..., Any], layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        for each in self.forget:
            each.forget()
        for each in self.release:
            each.release()
        saving = self.away.saving(layer, kwargs) if self.away else contextlib.nullcontext()
        with saving:
            output = forward(*args, **kwargs)
        if self.fetch:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden.register_hook(self._fetch)  # its gradient is what the layer's backward pass begins with
        return output

    def _fetch(self, gradient: torch.Tensor) -> None:
        for each in self.fetch:
            each.fetch()


@dataclass(slots=True)
class _Stored:
    """A piece of memory that a layer saved tensors in: in host memory, and while it is wanted on the device."""

    host: torch.Tensor
    uses: int = 0  # saved tensors in it that the backward pass has not asked for yet
    device: torch.Tensor | None = None
    overwritten: bool = False  # by what a later forward pass saved


class _Saved(NamedTuple):
    """What autograd keeps of a tensor that is away: how it lies in its memory."""

    stored: _Stored
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


class _Away:
    """The activations of one layer: in host memory, or on their way."""

    def __init__(self, copies: _Copies, device: torch.device) -> None:
        self.copies, self.device = copies, device
        self.buffers: list[torch.Tensor] = []  # of every step: the first for what a layer saves first, and so on
        self.staying: set[int] = set()
        self.stored: dict[int, _Stored] = {}  # by the address that it has on the device while it leaves
        self.leaving: list[torch.Tensor] = []
        self.last: torch.cuda.Event | None = None  # the end of the last copy out
        self.back: torch.cuda.Event | None = None  # and of the last one back

    @contextlib.contextmanager
    def saving(self, layer: nn.Module, shared: dict[str, Any]) -> Iterator[None]:
        """Around the layer's forward pass. ``shared``: what other layers are given too."""
        self.forget()
        tensors = [*layer.parameters(), *layer.buffers(), *tree_leaves(shared)]
        self.staying = {_address(each) for each in tensors if isinstance(each, torch.Tensor)}
        with saved_tensors_hooks(self.pack, self.unpack):
            yield

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _Saved:
        plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided
        plain &= tensor.device.type == self.device.type
        if not plain or tensor.untyped_storage().nbytes() < SMALLEST or _address(tensor) in self.staying:
            # Detached, since an operation that saved its own result would never be freed.
            return tensor.detach() if tensor.grad_fn is not None else tensor
        address = _address(tensor)
        if address not in self.stored:
            memory = _bytes(tensor)
            self.stored[address] = _Stored(self._buffer(len(self.stored), memory.numel()))
            self.leaving.append(memory)
            self.last = self.copies.out([(self.stored[address].host, memory)])
        stored = self.stored[address]
        stored.uses += 1
        return _Saved(stored, tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride())

    def unpack(self, saved: torch.Tensor | _Saved) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        stored = saved.stored
        if stored.overwritten:
            raise RuntimeError(
                "the activations of an offloaded layer were overwritten: its backward pass has to come before its next "
                "forward pass"
            )
        if stored.device is None:
            self._bring([stored])
        self.copies.wait(self.back)
        memory = stored.device
        stored.uses -= 1
        if stored.uses <= 0:
            stored.device = None
        whole = torch.empty(0, dtype=saved.dtype, device=memory.device)
        return whole.set_(memory.untyped_storage(), saved.offset, saved.size, saved.stride)

    def release(self) -> None:
        """Gives up the device's memory once all is copied."""
        self.copies.wait(self.last)
        self.leaving.clear()

    def fetch(self) -> None:
        """Begins to copy back what the backward pass will ask for."""
        self._bring([each for each in self.stored.values() if each.uses > 0 and each.device is None])

    def forget(self) -> None:
        """What a step that was broken off has left, and what none has asked for."""
        self.release()
        self.copies.wait(self.back)
        for each in self.stored.values():
            each.device, each.overwritten = None, True
        self.stored.clear()

    def _bring(self, wanted: list[_Stored]) -> None:
        self.release()  # after it a copy back begins
        for each in wanted:
            each.device = torch.empty(each.host.numel(), dtype=torch.uint8, device=self.device)
        self.back = self.copies.back([(each.device, each.host) for each in wanted])

    def _buffer(self, number: int, num_bytes: int) -> torch.Tensor:
        """Host memory of this size: that of the step before, or new where it had less."""
        if number == len(self.buffers):
            self.buffers.append(_host_memory(num_bytes, self.device))
        elif len(self.buffers[number]) < num_bytes:
            self.buffers[number] = torch.empty(0)  # first given back, then asked for
            self.buffers[number] = _host_memory(num_bytes, self.device)
        return self.buffers[number][:num_bytes]


class _Copies:
    """Copies beside the stream that computes: one side stream for each direction; on a CPU there is none."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.streams = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if on_gpu else (None, None)

    def out(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.cuda.Event | None:
        return self._copy(self.streams[0], pairs)

    def back(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.cuda.Event | None:
        return self._copy(self.streams[1], pairs)

    @staticmethod
    def wait(event: torch.cuda.Event | None) -> None:
        """Has what is computed from here on wait for it; the host does not."""
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    @staticmethod
    def _copy(
        stream: torch.cuda.Stream | None, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.cuda.Event | None:
        """Copies (to, from) once all is done that the device has been given; returns the end of it."""
        if stream is None:
            for to, source in pairs:
                to.copy_(source)
            return None
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
            return stream.record_event()


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """All of the memory that it lies in."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _host_memory(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Bytes that the device copies to and from by itself.

    torch's own pinned memory is rounded up to a power of two, which would waste up to half; so pages are taken from the
    system, in large ones where it has them, and pinned as they are.

    Raises:
        MemoryError: it cannot be had.
    """
    if device.type != "cuda":
        return torch.empty(num_bytes, dtype=torch.uint8)
    try:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise _no_memory(num_bytes, str(error)) from error
    with contextlib.suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, 0)
    if int(status) != 0:
        raise _no_memory(num_bytes, f"cudaHostRegister: {torch.cuda.cudart().cudaGetErrorString(status)}")
    weakref.finalize(memory.untyped_storage(), _unpin, memory.data_ptr(), pages).atexit = False
    return memory


def _unpin(address: int, pages: mmap.mmap) -> None:
    """``pages`` is here so that they are not unmapped before."""
    torch.cuda.synchronize()  # a copy may be on its way
    torch.cuda.cudart().cudaHostUnregister(address)


def _no_memory(num_bytes: int, why: str) -> MemoryError:
    return MemoryError(
        f"{num_bytes / 2**30:.2f} GiB of pinned host memory for activations cannot be had ({why}); offload fewer "
        "layers (--offload-activations), or none"
    )
