"""Which layers keep their activations in host memory, and when they are copied there and back.

The plan (memory.py) and training (workloads/training/offload.py) share this rule. It follows the order of layers, not
time, so the memory of a step is known in advance at any speed of the copies. If they are slower than planned, the
device waits for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Layer = TypeVar("Layer")  # a layer's index, or the layer itself

# The copy back begins with the backward pass of the layer this many after the offloaded one. That leaves two backward
# passes for it (2 x 120 ms for Llama-2-7B at 98,304 tokens on an H200, where a layer's 9 GB take 166 ms), and memory
# that later layers have freed.
FETCHED_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Offloaded(Generic[Layer]):
    """A layer whose activations go to host memory.

    Args:
        layer: the offloaded layer.
        released: before this layer's forward pass the copies to the host end, and free device memory.
        fetched: with this layer's backward pass the copies back begin.
    """

    layer: Layer
    released: Layer
    fetched: Layer


def offloaded_layers(layers: Sequence[Layer], count: int) -> tuple[Offloaded[Layer], ...]:
    """Returns ``count`` of ``layers``, spread evenly; at most all but the last, whose backward pass follows at once.

    Each is released when the next one begins, and the last one when the last layer does. Copies of two layers never
    overlap, and at the end of the forward pass none is running.
    """
    last = len(layers) - 1
    count = max(0, min(count, last))
    places = [number * last // count for number in range(count)]
    return tuple(
        Offloaded(layers[place], released=layers[following], fetched=layers[min(place + FETCHED_AHEAD, last)])
        for place, following in zip(places, [*places[1:], last])
    )
