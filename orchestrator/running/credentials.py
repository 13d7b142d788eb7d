"""Hands the token for gated models from the sweep's process to its workers on any node, and to nothing else.

In Ray's ``runtime_env``, in a trial's configuration or in a function's closure a token would be readable in job lists
or be saved in Tune's files. Here it stays in the memory of two kinds of process: an actor beside the sweep, which ends
with it, and the workers that ask the actor. On a cluster that the sweep started itself, workers inherit the
environment.
"""

from __future__ import annotations

import os
from typing import Any

ACTOR = "longspan-credentials"
VARIABLE = "HF_TOKEN"


class Token:
    """A token whose ``repr`` hides it."""

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The token itself. Keep it out of logs."""
        return self._value

    def __repr__(self) -> str:
        return "Token(...)"


class _Keeper:
    """The actor. It takes the token by a call: Ray's head node keeps the arguments of a constructor."""

    token: Token | None = None

    def take(self, token: Token) -> None:
        self.token = token

    def give(self) -> Token | None:
        return self.token


def share_token() -> Any | None:
    """Shares this process's Hugging Face token (HF_TOKEN, or that of ``hf auth login``) with this Ray job's workers.

    Returns a handle that keeps the token shared while it lives; None if there is no token.
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
    """In a worker: sets the sweep's token, if it has one, where the hub's client looks for it."""
    import ray

    try:
        keeper = ray.get_actor(ACTOR)
    except ValueError:
        return
    os.environ[VARIABLE] = ray.get(keeper.give.remote()).reveal()
