"""Activations of some decoder layers in pinned host memory, between a layer's forward pass and its backward pass.

Tensors that such a layer saves for its backward pass are copied to the host while later layers compute, and back
during their backward passes; only those being copied are on the device. The number of layers is chosen before a trial
runs (workloads/budget/fitting.py); workloads/budget/offloading.py has the rule for which and when.

Memory stays safe without the host ever waiting. All device memory belongs to the compute stream; two side streams only
copy, one out and one back. A side stream waits for all work queued on the compute stream before it begins, and the
compute stream waits for the copy before it uses or frees that memory. The next kernel in program order can then use
freed memory. With ``record_stream`` it could only once the host notices the end of the copy, and the host is seconds
ahead.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from workloads.adaptation.methods import decoder_layers
from workloads.adaptation.wrapping import WrapOrder, Wrapper, wrap
from workloads.budget.offloading import offloaded_layers
from workloads.errors import InputError
from workloads.training.recompute import layers_with_backward

SMALLEST = 2**20  # bytes; smaller tensors stay on the device, since a copy would cost more than it saves


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
    """Makes ``count`` layers that have a backward pass keep their activations in host memory, in training.

    The layers are spread evenly; at most all but the last. Parameters and buffers stay on the device, and so do the
    keyword arguments that all layers share (rotary positions, masks). A tensor that is saved several times, or in
    several views, is copied once. The result is bit for bit the same. Host buffers are pinned in the first step, at the
    size they need, and reused in each step; on a CPU they are ordinary memory, and copies are synchronous.

    Args:
        model: as :func:`workloads.adaptation.methods.adapt` returns it.
        device: where it trains.

    Raises:
        MemoryError: in the first step: host memory cannot be allocated.
    """
    if count == 0:
        return
    layers = layers_with_backward(model)
    plan = offloaded_layers(layers, count)
    copies = _Copies(device)
    offloaded = {each.layer: _HostActivations(copies, device) for each in plan}
    for layer in layers:
        layer.offload_schedule = _Schedule(
            own=offloaded.get(layer),
            discard=[*offloaded.values()] if layer is layers[0] else [],
            release=[offloaded[each.layer] for each in plan if each.released is layer],
            fetch=[offloaded[each.layer] for each in plan if each.fetched is layer],
        )
        wrap(layer, _Offload)


class _Offload(Wrapper):
    """Wraps a layer's call: runs what is due before and after it."""

    order = WrapOrder.OFFLOAD
    offload_schedule: _Schedule

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return super().__call__(*args, **kwargs)
        return self.offload_schedule.call(super().__call__, self, args, kwargs)


@dataclass(frozen=True, slots=True)
class _Schedule:
    """What is due at a layer, for its own activations and those of other layers.

    Args:
        own: where the layer's own activations go; None if they stay.
        discard: activations to discard, if an interrupted step has left any.
        release: activations that must have left the device before this layer's forward pass.
        fetch: activations whose copies back begin with this layer's backward pass.
    """

    own: _HostActivations | None
    discard: list[_HostActivations]
    release: list[_HostActivations]
    fetch: list[_HostActivations]

    def call(self, forward: Callable[..., Any], layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        for each in self.discard:
            each.discard()
        for each in self.release:
            each.release()
        with self.own.saving(layer, kwargs) if self.own else contextlib.nullcontext():
            output = forward(*args, **kwargs)
        if self.fetch:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden.register_hook(self._fetch)  # the layer's backward pass begins with the gradient of its output
        return output

    def _fetch(self, gradient: torch.Tensor) -> None:
        for each in self.fetch:
            each.fetch()


@dataclass(slots=True)
class _Stored:
    """A piece of memory that a layer saved tensors in: in host memory, and on the device while it is needed there."""

    host: torch.Tensor
    uses: int = 0  # saved tensors in it that the backward pass has not read yet
    device: torch.Tensor | None = None
    overwritten: bool = False  # by a later forward pass


class _Saved(NamedTuple):
    """What autograd keeps for an offloaded tensor: its layout in its memory."""

    stored: _Stored
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


class _HostActivations:
    """The activations of one layer: in host memory, or being copied."""

    def __init__(self, copies: _Copies, device: torch.device) -> None:
        self.copies, self.device = copies, device
        self.buffers: list[torch.Tensor] = []  # reused by every step, in the order in which a layer saves
        self.excluded: set[int] = set()  # addresses of tensors that stay on the device
        self.stored: dict[int, _Stored] = {}  # by address on the device at the time of saving
        self.leaving: list[torch.Tensor] = []
        self.last_out: torch.cuda.Event | None = None  # the end of the last copy out
        self.last_back: torch.cuda.Event | None = None

    @contextlib.contextmanager
    def saving(self, layer: nn.Module, shared: dict[str, Any]) -> Iterator[None]:
        """A context for the layer's forward pass. ``shared``: arguments that other layers are called with too."""
        self.discard()
        tensors = [*layer.parameters(), *layer.buffers(), *tree_leaves(shared)]
        self.excluded = {_address(each) for each in tensors if isinstance(each, torch.Tensor)}
        with saved_tensors_hooks(self.pack, self.unpack):
            yield

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _Saved:
        """Begins to copy a saved tensor to the host, unless it stays."""
        plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided
        plain &= tensor.device.type == self.device.type
        if not plain or tensor.untyped_storage().nbytes() < SMALLEST or _address(tensor) in self.excluded:
            # Detached, since an operation that saved its own result would never be freed.
            return tensor.detach() if tensor.grad_fn is not None else tensor
        address = _address(tensor)
        if address not in self.stored:
            memory = _bytes(tensor)
            self.stored[address] = _Stored(self._buffer(len(self.stored), memory.numel()))
            self.leaving.append(memory)
            self.last_out = self.copies.out([(self.stored[address].host, memory)])
        stored = self.stored[address]
        stored.uses += 1
        return _Saved(stored, tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride())

    def unpack(self, saved: torch.Tensor | _Saved) -> torch.Tensor:
        """The saved tensor, on the device."""
        if isinstance(saved, torch.Tensor):
            return saved
        stored = saved.stored
        if stored.overwritten:
            raise RuntimeError(
                "the activations of an offloaded layer were overwritten: its backward pass has to come before its next "
                "forward pass"
            )
        memory = stored.device
        if memory is None:
            (memory,) = self._copy_back([stored])
        self.copies.wait(self.last_back)
        stored.uses -= 1
        if stored.uses <= 0:
            stored.device = None
        whole = torch.empty(0, dtype=saved.dtype, device=memory.device)
        return whole.set_(memory.untyped_storage(), saved.offset, saved.size, saved.stride)

    def release(self) -> None:
        """Frees device memory once all copies to the host are done."""
        self.copies.wait(self.last_out)
        self.leaving.clear()

    def fetch(self) -> None:
        """Begins to copy back what the backward pass will read."""
        self._copy_back([each for each in self.stored.values() if each.uses > 0 and each.device is None])

    def discard(self) -> None:
        """Drops what an interrupted step has left, and what no backward pass has read."""
        self.release()
        self.copies.wait(self.last_back)
        for each in self.stored.values():
            each.device, each.overwritten = None, True
        self.stored.clear()

    def _copy_back(self, wanted: list[_Stored]) -> list[torch.Tensor]:
        self.release()  # a copy back begins after the last copy out
        memories = [torch.empty(each.host.numel(), dtype=torch.uint8, device=self.device) for each in wanted]
        for each, memory in zip(wanted, memories):
            each.device = memory
        self.last_back = self.copies.back([(memory, each.host) for each, memory in zip(wanted, memories)])
        return memories

    def _buffer(self, index: int, num_bytes: int) -> torch.Tensor:
        """Host memory of this size: the previous step's, or new memory if that is too small."""
        if index == len(self.buffers):
            self.buffers.append(_host_memory(num_bytes, self.device))
        elif len(self.buffers[index]) < num_bytes:
            self.buffers[index] = torch.empty(0)  # freed before the larger one is allocated
            self.buffers[index] = _host_memory(num_bytes, self.device)
        return self.buffers[index][:num_bytes]


class _Copies:
    """Copies on a side stream for each direction, beside the compute stream; on a CPU without streams."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.streams = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if on_gpu else (None, None)

    def out(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.cuda.Event | None:
        return self._copy(self.streams[0], pairs)

    def back(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.cuda.Event | None:
        return self._copy(self.streams[1], pairs)

    @staticmethod
    def wait(event: torch.cuda.Event | None) -> None:
        """Makes all later computation wait for the event, without the host."""
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    @staticmethod
    def _copy(
        stream: torch.cuda.Stream | None, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.cuda.Event | None:
        """Copies (to, from) after all work queued on the compute stream; returns the event at the end."""
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
    """The whole memory that holds a tensor."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _host_memory(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Pinned memory, which the device copies to and from by itself; ordinary memory on a CPU.

    torch rounds its own pinned memory up to a power of two, which would waste up to half. Pages come from the system
    instead, large ones where it has them, and are pinned as they are.

    Raises:
        MemoryError: it cannot be allocated.
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
    """Unpins memory; ``pages`` is an argument to keep them mapped until then."""
    torch.cuda.synchronize()  # a copy may be running
    torch.cuda.cudart().cudaHostUnregister(address)


def _no_memory(num_bytes: int, why: str) -> MemoryError:
    return MemoryError(
        f"{num_bytes / 2**30:.2f} GiB of pinned host memory for activations cannot be allocated ({why}); offload fewer "
        "layers (--offload-activations), or none"
    )
