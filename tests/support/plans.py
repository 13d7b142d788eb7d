"""What a plan is made with."""

from orchestrator.planning.cluster import Cluster, Node
from orchestrator.planning.estimate import Estimator
from orchestrator.run_options import RunOptions
from workloads.budget import ModelShape
from workloads.models.source import ModelSource


def an_estimator() -> Estimator:
    """For trials of the built-in model on a machine of two CPUs."""
    shape = ModelShape.of(ModelSource.parse("builtin:tiny").config())
    return Estimator(shape, 512, Cluster((Node(cpus=2, memory=2**35),)), RunOptions(), {})
