"""Several workers of one trial, as real processes on this machine."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from workloads.engine import make_engine


def run_workers(folder, scenario: Callable[..., Any], *args, workers: int = 2, device: str = "cpu") -> list[Any]:
    """What ``scenario(*args)`` returns in each of ``workers`` processes that torch.distributed joins, by rank.

    ``scenario`` is a function of a module, and it returns what torch can save without pickling code: numbers, strings,
    tensors, and lists and dictionaries of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_worker, (workers, port, str(folder), device, scenario, args), nprocs=workers)
    return [torch.load(folder / f"result-{rank}", weights_only=True) for rank in range(workers)]


def _worker(rank: int, workers: int, port: int, folder: str, device: str, scenario, args) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=rank, world_size=workers)
    torch.save(scenario(*args), f"{folder}/result-{rank}")
    dist.destroy_process_group()


def this_device() -> torch.device:
    """The device of this worker: its own GPU where the workers talk over NCCL."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        return torch.device("cuda", dist.get_rank())
    return torch.device("cpu")
