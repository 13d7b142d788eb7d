"""Every use of what Ray keeps private, does not document or means for its own developers, each with its reason.

Written for Ray 2.60, which pyproject.toml pins. tests/orchestrator/test_ray_internals.py checks each use against the
installed Ray. One use is elsewhere, since ``clusters`` imports no other package: clusters/check.py validates cluster
files with the autoscaler's own functions.

Ray is imported inside the functions: the commands that need no cluster start without it.
"""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ray.train
    from ray.train.backend import BackendConfig
    from ray.train.torch import TorchTrainer
    from ray.tune import Callback

# The resource that only the head node has. Ray documents no other way to require that node.
HEAD_NODE_RESOURCE = "node:__internal_head__"

# What the error of a worker contains that Ray's memory monitor killed. Where the error reaches the driver as
# the text of another one, its class is lost.
MEMORY_MONITOR_WORDS = ("OutOfMemory", "memory pressure")


def is_memory_monitor_kill(reason: str) -> bool:
    """Whether the reason of a failure says that Ray's memory monitor killed a worker to protect its host."""
    return any(words in reason for words in MEMORY_MONITOR_WORDS)


def lean_trainer(train_loop: Callable[[dict[str, Any]], None], own_cluster: bool, **arguments: Any) -> TorchTrainer:
    """A TorchTrainer with fewer actors: each takes 2 to 3 s of a core to start.

    Args:
        own_cluster: whether Ray runs without its dashboard.
        arguments: TorchTrainer's.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2._internal.execution.controller import TrainController

    # The first hands out Ray datasets, of which there are none. The second releases what a killed driver had
    # reserved, but asks the dashboard; `release_placement_group` does it where there is none.
    unused = (DatasetsCallback, PlacementGroupCleanerCallback) if own_cluster else (DatasetsCallback,)

    class LeanTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

        def _initialize_and_run_controller(self, **controller_arguments: Any) -> ray.train.Result:
            # The controller starts and watches the workers. Here it runs in the driver's process, which only waits
            # for it, and not as an actor: that took 3 s of a core for each trial.
            controller = TrainController(**controller_arguments)
            asyncio.run(controller.run())
            return controller.get_result()

    return LeanTrainer(train_loop, **arguments)


def no_process_group() -> BackendConfig:
    """The backend of a trial with one worker.

    TorchConfig would make it join a process group of its own. TorchTrainer reads ``backend``, which BackendConfig does
    not have.
    """
    from ray.train.backend import BackendConfig

    config = BackendConfig()
    config.backend = "none"
    return config


def preemption_announced() -> bool:
    """In a worker: whether Ray Train has announced that a node of this trial will be preempted.

    The public ``ray.train.get_preemption_info`` reads the same, but waits for all workers: too slow for every step.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def release_placement_group(hex_id: str) -> None:
    """Releases what is reserved under the id of a placement group; does nothing if that is released already.

    Ray ends the workers of a killed driver but keeps their reservation until the sweep ends. The public
    ``get_placement_group`` finds groups by name only, and Ray Train gives its groups none.
    """
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(hex_id)))


def ray_folder() -> Path:
    """The folder under which Ray keeps the sockets and logs of what it starts here."""
    from ray._common.utils import get_default_ray_temp_dir

    return Path(get_default_ray_temp_dir())


def probe_head(address: str) -> Iterator[dict[str, Any]]:
    """Asks the head of a Ray cluster whether a process here can join; yields what is known, the ``answer`` last.

    May block in C++ for long. ``ray.init`` would do the same steps, but it waits minutes for a head that is not there,
    and asks one that wants a token again and again, without telling why it was refused.
    """
    import socket

    import ray
    import ray._common.usage.usage_lib as usage
    from ray._common.network_utils import parse_address
    from ray._private.authentication.authentication_token_setup import (
        ensure_token_if_auth_enabled,
        maybe_enable_token_auth_if_token_available,
    )
    from ray._private.authentication.authentication_utils import is_token_auth_enabled
    from ray._private.services import canonicalize_bootstrap_address
    from ray._private.utils import check_version_info

    compiled: Any = ray._raylet  # its stub lacks what is used here
    if address == "auto":
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as ray.init does
    try:
        there = canonicalize_bootstrap_address(address)
        host, port = parse_address(there or "") or ("", "")
        yield {"address": there}
        if not 0 < int(port) < 2**16:
            raise ValueError(f"{port} is no port")
        socket.create_connection((host, int(port))).close()
        yield {"connected": True}
    except ConnectionRefusedError:
        yield {"answer": "refused"}
        return
    except socket.gaierror as error:
        yield {"answer": "unknown host", "message": error.strerror}
        return
    except ValueError as error:
        yield {"answer": "invalid", "message": str(error)}
        return
    except OSError as error:
        none = address == "auto" and error.errno is None  # Ray's own ConnectionError
        yield {"answer": "none" if none else "unreachable", "message": str(error)}
        return

    try:
        ensure_token_if_auth_enabled(create_token_if_missing=False)  # without a token the client aborts the process
        client = compiled.InnerGcsClient.standalone(there, cluster_id=None, timeout_ms=60_000)  # the caller ends sooner
        versions = usage.get_cluster_metadata(client)
    except ray.exceptions.AuthenticationError as error:
        yield {
            "answer": "token refused" if is_token_auth_enabled() else "token missing",
            "message": _first_sentence(error),
        }
        return
    except ray.exceptions.RpcError as error:
        yield {"answer": "not Ray", "message": _first_sentence(error)}
        return
    try:
        check_version_info(versions, "this process")
    except RuntimeError:
        own = {"own_ray": ray.__version__, "own_python": platform.python_version()}
        yield {"answer": "other version", "ray": versions["ray_version"], "python": versions["python_version"], **own}
        return
    yield {"answer": "joins"}


def _first_sentence(error: Exception) -> str:
    return str(error).partition(". ")[0].strip().splitlines()[0]


def silent_progress() -> Callback:
    """Tune's progress callback without output.

    Tune adds its own unless it finds one of this class, and prints a line for a trial without results at any verbosity.
    """
    from ray.tune.progress_reporter import TrialProgressCallback

    class SilentProgress(TrialProgressCallback):
        def on_trial_complete(self, *args: Any, **kwargs: Any) -> None:
            pass

    return SilentProgress()
