"""``python -m orchestrator.plan [RECIPE] [flags]``: what a sweep would do, and what that takes; starts nothing.

``--cluster`` plans for one of the files in ``clusters/`` instead of for this machine (or the Ray cluster at
``--address``), without touching it.
"""

from __future__ import annotations

import sys

from rich.console import Console

from orchestrator.cli import parse
from orchestrator.planning.cluster import Cluster, join_or_start
from orchestrator.planning.plan_table import print_plan
from orchestrator.planning.preparation import Identified, check_sweep, identify
from orchestrator.planning.sweep_plan import SweepPlan, plan_sweep, refuse_impossible
from orchestrator.process import exit_without_gc
from orchestrator.run_options import RunOptions
from orchestrator.spec import SweepSpec
from workloads.command import exit_status
from workloads.terminal import make_console


def main(arguments: list[str] | None = None, prog: str = "python -m orchestrator.plan") -> int:
    """Runs the command; returns its exit status."""
    return exit_status(lambda: _plan(sys.argv[1:] if arguments is None else arguments, prog, make_console()))


def _plan(arguments: list[str], prog: str, console: Console) -> int:
    sweep, plan = make_plan(*parse(arguments, prog, plan=True))
    print_plan(sweep, plan, console)
    refuse_impossible(sweep, plan)
    return 0


def make_plan(name: str, spec: SweepSpec, options: RunOptions) -> tuple[Identified, SweepPlan]:
    """A sweep with its model and data looked up, and its plan.

    Raises:
        InputError: settings, a model or data that cannot be.
    """
    sweep = identify(check_sweep(name, spec, options, plan_only=True))
    return sweep, plan_sweep(sweep, _cluster(options))


def _cluster(options: RunOptions) -> Cluster:
    """The cluster to plan for: a named one, the one at an address, or this machine."""
    if options.cluster is not None:
        return Cluster.named(options.cluster)
    if options.address in (None, "local"):
        return Cluster.this_machine()
    return join_or_start(options)


if __name__ == "__main__":
    exit_without_gc(main)
