"""What ``orchestrator.ray_internals`` relies on, checked against the installed Ray, without starting it."""

import ast
import inspect
import re
import textwrap
from pathlib import Path

import pytest
import ray
import ray.exceptions
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator import ray_internals
from orchestrator.planning.cluster import ENVIRONMENT, LOCAL_ENVIRONMENT

ROOT = Path(__file__).parents[2]
RAY = Path(ray.__file__).parent


def trainer(own_cluster=True, torch_config=None):
    scaling = ray.train.ScalingConfig(num_workers=1)
    config = torch_config or TorchConfig()
    return ray_internals.lean_trainer(lambda: None, own_cluster, torch_config=config, scaling_config=scaling)


def test_the_head_node_still_has_its_resource():
    from ray._common.constants import HEAD_NODE_RESOURCE_NAME

    assert ray_internals.HEAD_NODE_RESOURCE == HEAD_NODE_RESOURCE_NAME, (
        f"Ray now calls the head node's resource {HEAD_NODE_RESOURCE_NAME}; drivers of trials would wait for ever"
    )


def test_a_kill_by_the_memory_monitor_is_recognised():
    name = ray.exceptions.OutOfMemoryError.__name__
    assert ray_internals.is_memory_monitor_kill(f"{name}: Task was killed"), f"Ray now calls it {name}"
    assert b"memory pressure" in (RAY / "core/src/ray/raylet/raylet").read_bytes(), (
        "Ray no longer says 'memory pressure' of a worker that its memory monitor killed: the trial would count as lost"
    )


@pytest.mark.parametrize("own_cluster", [True, False])
def test_the_lean_trainer_has_only_the_callbacks_that_it_needs(own_cluster):
    whole = TorchTrainer(lambda: None, scaling_config=ray.train.ScalingConfig(num_workers=1))
    names = [type(each).__name__ for each in whole._create_default_callbacks()]
    for name in ("DatasetsCallback", "PlacementGroupCleanerCallback", "BackendSetupCallback"):
        assert name in names, f"Ray Train's default callbacks are now {names}, without {name}; see lean_trainer"
    dropped = {"DatasetsCallback", "PlacementGroupCleanerCallback"} if own_cluster else {"DatasetsCallback"}
    assert [type(each).__name__ for each in trainer(own_cluster)._create_default_callbacks()] == [
        name for name in names if name not in dropped
    ]


def test_the_controller_can_run_in_the_drivers_process():
    from ray.train.v2._internal.execution.controller import TrainController

    fit = ast.parse(textwrap.dedent(inspect.getsource(TorchTrainer.fit)))
    calls = [
        node
        for node in ast.walk(fit)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "_initialize_and_run_controller"
    ]
    assert len(calls) == 1, (
        "TorchTrainer.fit no longer calls _initialize_and_run_controller, which lean_trainer overrides"
    )
    given = {keyword.arg: None for keyword in calls[0].keywords}
    try:
        inspect.signature(TrainController).bind(**given)
    except TypeError as error:
        pytest.fail(
            f"TrainController no longer takes what TorchTrainer.fit hands over, as lean_trainer expects: {error}"
        )
    assert inspect.iscoroutinefunction(TrainController.run), "TrainController.run is no coroutine: see lean_trainer"
    assert not inspect.iscoroutinefunction(TrainController.get_result), "TrainController.get_result is a coroutine now"


def test_a_worker_that_is_alone_joins_no_process_group():
    made = trainer(torch_config=ray_internals.no_process_group())
    assert made.backend_config.backend == "none", "TorchTrainer replaces the backend that no_process_group gives it"
    assert made.backend_config.backend_cls is not TorchConfig().backend_cls, (
        "BackendConfig now sets up torch.distributed: a single worker would join a process group"
    )


def test_a_preemption_can_be_read_without_waiting_for_other_workers():
    from ray.train.v2._internal.execution.context import TrainContext, get_train_context
    from ray.train.v2._internal.execution.preemption import PreemptionContext

    fields = TrainContext.__dataclass_fields__
    assert "preemption_context" in fields, f"a worker's context is now {sorted(fields)}: see preemption_announced"
    assert PreemptionContext().preemption_info is None, "preemption_info is no longer None while nothing is announced"
    with pytest.raises(RuntimeError):
        get_train_context()  # outside a worker there is none


def test_a_placement_group_can_be_named_by_its_id():
    from ray import JobID, PlacementGroupID
    from ray.util.placement_group import PlacementGroup

    known = PlacementGroupID.of(JobID.from_int(1))
    again = PlacementGroup(PlacementGroupID.from_hex(known.hex()))
    assert again.id == known, "a placement group made from its id has another id: see release_placement_group"


def test_tune_takes_the_silent_progress_for_its_own():
    from ray.tune.callback import Callback
    from ray.tune.progress_reporter import TrialProgressCallback
    from ray.tune.utils.callback import _create_default_callbacks

    silent = ray_internals.silent_progress()
    assert isinstance(silent, Callback)
    callbacks = _create_default_callbacks([silent], air_verbosity=None)
    reporters = [each for each in callbacks if isinstance(each, TrialProgressCallback)]
    assert reporters == [silent], "Tune adds a progress callback of its own beside silent_progress, and prints"


def test_ray_reads_every_environment_variable_that_is_set_for_it():
    set_here = {*ENVIRONMENT, *LOCAL_ENVIRONMENT, "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"}
    wanted = {name for name in set_here if name.startswith(("RAY_", "TUNE_", "TORCH_PROCESS_GROUP_"))}
    # Settings of Ray's core have lower-case names, and RAY_ before them.
    core = (RAY / "_raylet.so").read_bytes()
    in_core = {name for name in wanted if name.removeprefix("RAY_").islower()}
    missing = (wanted - in_core) | {name for name in in_core if name.removeprefix("RAY_").encode() not in core}
    for file in RAY.rglob("*.py"):
        if not missing:
            break
        text = file.read_text(errors="ignore")
        missing -= {name for name in missing if name in text}
    assert not missing, f"Ray no longer reads {sorted(missing)} (orchestrator/planning/cluster.py)"


def test_only_ray_internals_uses_what_ray_keeps_private():
    """The autoscaler's check of cluster files is the exception: ``clusters`` imports no other package."""
    private = re.compile(r"\b(?:from|import)\s+ray\.[\w.]*\b_\w+|\b(?:from|import)\s+ray\s+import\s+_|\bray\._\w+")
    allowed = {ROOT / "orchestrator/ray_internals.py", ROOT / "clusters/check.py"}
    packages = ("orchestrator", "workloads", "clusters", "dashboards", "benchmarks")
    files = {path for package in packages for path in (ROOT / package).rglob("*.py")} - allowed
    found = [str(path.relative_to(ROOT)) for path in files if private.search(path.read_text())]
    assert not found, f"{found} use Ray's private modules; orchestrator/ray_internals.py is their place"
