"""Which layers keep their activations in host memory, and when these leave the device and come back.

One rule for the plan (memory.py) and for training (workloads/training/offload.py). It speaks of the order in which layers are
computed, not of time: by it the memory that a step takes is known before it runs, however fast the copies are. Where
they are slower than planned, the device waits for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Layer = TypeVar("Layer")  # a layer's index, or the layer itself

# The copy back begins with the backward pass of the layer so many after the offloaded one: it has the time of two
# backward passes (2 x 120 ms for Llama-2-7B at 98,304 tokens on an H200, where a layer's 9 GB take 166 ms), and what
# comes back takes the place of later layers that are done.
FETCHED_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Offloaded(Generic[Layer]):
    """A layer whose activations go to host memory.

    Args:
        layer: which.
        released: before the forward pass of this one its copies must have left, and the device's memory is free again.
        fetched: with the backward pass of this one its copies begin to come back.
    """

    layer: Layer
    released: Layer
    fetched: Layer


def offloaded_layers(layers: Sequence[Layer], count: int) -> tuple[Offloaded[Layer], ...]:
    """``count`` of ``layers``, spread evenly; all but the last at most, whose backward pass comes at once.

    Each is released when the next begins, the last of them when the last layer does: the copies of one have the forward
    passes of the layers between them to themselves, and at the end of the forward pass nothing is on its way.
    """
    last = len(layers) - 1
    count = max(0, min(count, last))
    places = [number * last // count for number in range(count)]
    return tuple(
        Offloaded(layers[place], released=layers[following], fetched=layers[min(place + FETCHED_AHEAD, last)])
        for place, following in zip(places, [*places[1:], last])
    )
