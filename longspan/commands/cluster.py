"""``longspan cluster``: the cluster files that come with longspan, to list, to print, to check."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from clusters.prices import CLUSTER_FILES, find_cluster, named_clusters
from workloads.command import run_command
from workloads.errors import InputError, unknown
from workloads.terminal import make_console


def show_clusters(
    file: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="NAME|FILE")] = None,
    check: bool = False,
    allow_placeholders: bool = False,
) -> int:
    """List the cluster files that come with longspan, print one to start from, or check one offline.

    Args:
        file: A cluster's name, such as aws-p4d, or the path of your own file.
        check: Check it with Ray's schema and longspan's rules; status 1 if it has problems.
        allow_placeholders: Accept values that are still to be filled in.
    """
    if file is None:
        if check:
            raise InputError("--check needs a file or one of " + ", ".join(named_clusters()))
        console = make_console()
        for name in named_clusters():
            cluster = find_cluster(name)
            machine = cluster.worker.instance
            console.print(f"{name}: {cluster.nodes} x {machine.name}, each {machine.gpus} x {machine.gpu}")
        return 0
    path = Path(file) if Path(file).is_file() else CLUSTER_FILES / f"{file}.yaml"
    if not path.is_file():
        raise InputError(f"{unknown('cluster', file, named_clusters())}; or give the path of a file")
    if not check:
        sys.stdout.write(path.read_text("utf-8"))
        return 0
    from clusters.check import print_problems

    return print_problems(path, allow_placeholders)


def main(arguments: list[str] | None = None, prog: str = "longspan cluster") -> int:
    """Runs the command; returns its exit status."""
    return run_command(show_clusters, prog, arguments)
