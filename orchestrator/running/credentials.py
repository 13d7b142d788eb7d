"""The token for gated models, from the sweep's process to its workers on any node, and nowhere else.

A token in Ray's ``runtime_env``, in a trial's configuration or in a function's closure would be readable in job lists,
or lie in Tune's files. Here it stays in the memory of two kinds of process: an actor beside the sweep, which ends with
it, and the workers that ask it. On a cluster that the sweep has started itself, workers inherit the environment.
"""

from __future__ import annotations

import os
from typing import Any

ACTOR = "longspan-credentials"
VARIABLE = "HF_TOKEN"


class Token:
    """A token that does not show itself."""

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Token(...)"


class _Keeper:
    """The actor. The token comes by a call, not to its constructor, which Ray's head node would keep."""

    token: Token | None = None

    def take(self, token: Token) -> None:
        self.token = token

    def give(self) -> Token | None:
        return self.token


def share_token() -> Any | None:
    """Makes this process's Hugging Face token (HF_TOKEN, or what ``hf auth login`` has stored) known to the workers of
    this Ray job. They know it for as long as what is returned lives; None if there is no token.
    """
    from huggingface_hub import get_token

    token = get_token()
    if token is None:
        return None
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    keeper = ray.remote(_Keeper).options(name=ACTOR, num_cpus=0, scheduling_strategy=here).remote()
    ray.get(keeper.take.remote(Token(token)))
    return keeper


def receive_token() -> None:
    """In a worker: puts the sweep's token where the hub's client looks for it. Without one its node's own holds."""
    import ray

    try:
        keeper = ray.get_actor(ACTOR)
    except ValueError:
        return
    os.environ[VARIABLE] = ray.get(keeper.give.remote()).reveal()
