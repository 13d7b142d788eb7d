"""``longspan ui``: MLflow's UI on a storage root, for this machine unless another address is given."""

from __future__ import annotations

from typing import Annotated

import tyro

from dashboards.mlflow import serve
from workloads.command import run_command
from workloads.errors import InputError


def show_ui(
    storage: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = "./runs",
    port: int = 5000,
    host: str = "127.0.0.1",
    allowed_hosts: tuple[str, ...] = (),
    basic_auth: bool = False,
) -> int:
    """Serve MLflow's UI on a storage root, until Ctrl-C.

    Args:
        storage: The storage root of the sweeps.
        port: The port to listen on.
        host: The address to listen on; by default this machine only.
        allowed_hosts: More names by which browsers reach the server, such as a proxy's.
        basic_auth: Ask for users and passwords; what it needs is checked first.
    """
    try:
        return serve(storage, host, port, list(allowed_hosts), basic_auth)
    except ValueError as error:
        raise InputError(str(error)) from error


def main(arguments: list[str] | None = None, prog: str = "longspan ui") -> int:
    """Runs the command; returns its exit status."""
    return run_command(show_ui, prog, arguments)
