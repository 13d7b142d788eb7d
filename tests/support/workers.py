"""Several workers of one trial, as real processes on this machine."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

# Forks processes from one that has imported what takes seconds and has neither threads nor CUDA. They see the
# environment variables of its start.
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(
    ["torch", "torch._inductor.compile_fx", "transformers", "transformers.models.llama.modeling_llama", "peft"]
)


def run_workers(folder, device: str, scenario: Callable[..., Any], *args, workers: int = 2) -> list[Any]:
    """What ``scenario(*args)`` returns in each of ``workers`` processes that torch.distributed joins, by rank.

    ``scenario`` is a function of a module and returns numbers, strings, tensors, and lists and dictionaries of them. A
    worker that waits for another longer than two minutes ends in an error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _worker,
        (workers, port, str(folder), device, scenario, args),
        nprocs=workers,
        start_method="spawn" if device == "cuda" else "forkserver",
    )
    return [torch.load(folder / f"result-{rank}", weights_only=True) for rank in range(workers)]


def _worker(rank: int, workers: int, port: int, folder: str, device: str, scenario, args) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=workers, timeout=timedelta(minutes=2))
    torch.save(scenario(*args), f"{folder}/result-{rank}")
    dist.destroy_process_group()


def this_device(device: str) -> torch.device:
    """The device of this process: each worker has a GPU of its own."""
    return (
        torch.device("cuda", dist.get_rank() if dist.is_initialized() else 0)
        if device == "cuda"
        else torch.device("cpu")
    )
