"""Which layers keep their activations in host memory, and when they are copied there and back.

One rule for the plan (memory.py) and for training (workloads/training/offload.py). It goes by the order in which layers
are computed, not by time, so the memory of a step is known before it runs, however fast the copies are. Where they are
slower than planned, the device waits for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Layer = TypeVar("Layer")  # a layer's index, or the layer itself

# The copy back begins with the backward pass of the layer this many after the offloaded one: it has the time of two
# backward passes (2 x 120 ms for Llama-2-7B at 98,304 tokens on an H200, where a layer's 9 GB take 166 ms), and takes
# the memory of later layers that are done.
FETCHED_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Offloaded(Generic[Layer]):
    """A layer whose activations go to host memory.

    Args:
        layer: which.
        released: its copies must be done before the forward pass of this one, and free the device's memory.
        fetched: its copies begin to come back with the backward pass of this one.
    """

    layer: Layer
    released: Layer
    fetched: Layer


def offloaded_layers(layers: Sequence[Layer], count: int) -> tuple[Offloaded[Layer], ...]:
    """Returns ``count`` of ``layers``, spread evenly; at most all but the last, whose backward pass comes at once.

    Each is released when the next begins, the last of them when the last layer does: each one's copies have the forward
    passes of the layers in between to themselves, and at the end of the forward pass no copy is under way.
    """
    last = len(layers) - 1
    count = max(0, min(count, last))
    places = [number * last // count for number in range(count)]
    return tuple(
        Offloaded(layers[place], released=layers[following], fetched=layers[min(place + FETCHED_AHEAD, last)])
        for place, following in zip(places, [*places[1:], last])
    )
