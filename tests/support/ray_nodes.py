"""A Ray cluster of several nodes on this machine, each with its own raylet, for tests that kill or drain a node."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from orchestrator.records.trial_record import TrialRecord

# Seconds between Ray Train's checks for a preemption notice; Ray's default is 5.
PREEMPTION_POLL = "0.2"
# Milliseconds between the head's checks of a node, five of which a killed one has to fail; Ray's default is 3,000.
NODE_CHECK = "500"
# Ray names its processes after the classes of their actors: the class that Tune makes of a trial's driver, a worker of
# Ray Train, and its watcher for preemption notices.
DRIVER_TITLE, WORKER_TITLE, WATCHER_TITLE = "ImplicitFunc", "RayTrainWorker", "PreemptionWatcher"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RayNodes:
    """A head without CPUs, and nodes added one by one; with their own ports, token and temporary folder."""

    def __init__(self) -> None:
        # Ray's sockets are in its temporary folder; their paths may be 107 bytes long.
        self.folder = Path(f"/tmp/ls{os.getpid()}-{secrets.token_hex(2)}")
        self.folder.mkdir()
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))
        }
        self.environment |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": PREEMPTION_POLL,
            "RAY_health_check_period_ms": NODE_CHECK,
            "PATH": f"{Path(sys.executable).parent}:{self.environment['PATH']}",
        }
        self.processes: list[subprocess.Popen] = []
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self._start("--head", "--num-cpus=0", f"--port={port}", "--include-dashboard=false",
                    f"--ray-client-server-port={free_port()}", f"--temp-dir={self.folder / 'ray'}")  # fmt: skip

    def add(self, cpus: int) -> subprocess.Popen:
        """Starts one more node; returns once it has joined."""
        return self._start(f"--address={self.address}", f"--num-cpus={cpus}")

    def _start(self, *flags: str) -> subprocess.Popen:
        with (self.folder / "output").open("a") as output:
            process = subprocess.Popen(
                ["ray", "start", "--block", "--disable-usage-stats", f"--object-store-memory={100 * 2**20}", *flags],
                env=self.environment, start_new_session=True, stdout=output, stderr=output,
            )  # fmt: skip
        self.processes.append(process)
        deadline = time.time() + 300
        host, _, port = self.address.partition(":")
        while process.poll() is None and time.time() < deadline:
            with contextlib.suppress(OSError), socket.create_connection((host, int(port))):
                break
            time.sleep(0.1)
        expected = sum(p.poll() is None for p in self.processes)
        while len(self.alive(expected)) < expected or process.poll() is not None:
            if time.time() > deadline or process.poll() is not None:
                raise AssertionError((self.folder / "output").read_text())
        return process

    def alive(self, at_least: int = 1) -> list[str]:
        """The ids of the nodes that are alive, the head first; waits up to 300 s for ``at_least`` of them."""
        code = f"""
import json, ray, time
deadline, nodes = time.time() + 300, []
try:
    ray.init(address={self.address!r}, log_to_driver=False, logging_level="ERROR")
    while len(nodes) < {at_least} and time.time() < deadline:
        time.sleep(0.1 if nodes else 0)
        nodes = [node for node in ray.nodes() if node["Alive"]]
except ConnectionError:
    pass
print(json.dumps([n["NodeID"] for n in sorted(nodes, key=lambda n: n["Resources"].get("CPU", 0))]))
"""
        done = subprocess.run([sys.executable, "-c", code], env=self.environment, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1]) if done.stdout else []

    def node_of(self, pid: int) -> subprocess.Popen:
        """The node that a process runs on, as the process that started it."""
        return next(process for process in self.processes if pid in descendants(process.pid))

    def runs(self, title: str) -> bool:
        """Whether a process with this in its title runs on any of the nodes."""
        nodes = (process.pid for process in self.processes if process.poll() is None)
        return any(title in title_of(pid) for node in nodes for pid in descendants(node))

    def kill(self, node: subprocess.Popen) -> None:
        """Kills a node with everything that runs on it, as if the machine were gone."""
        kill_with_descendants(node)

    def drain(self, node_id: str, seconds: int) -> None:
        """Gives the notice that a cloud gives before it takes a spot node."""
        subprocess.run(
            ["ray", "drain-node", "--address", self.address, "--node-id", node_id, "--reason",
             "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the spot price rose",
             "--deadline-remaining-seconds", str(seconds)],
            env=self.environment, check=True, capture_output=True,
        )  # fmt: skip

    def close(self) -> None:
        """Ends what this class started, the head last, and nothing else on the host."""
        for process in reversed(self.processes):
            if process.poll() is None:
                self.kill(process)
        subprocess.run(["rm", "-rf", str(self.folder)], check=True)


@contextlib.contextmanager
def paused(pid: int) -> Iterator[None]:
    """Stops a process, which goes on afterwards: on a fast machine a trial would be over too soon."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def children(pid: int) -> list[int]:
    """The processes whose parent is ``pid``."""
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


def worker_processes(record: TrialRecord) -> list[int]:
    """The trial's workers, rank 0 first."""
    first = record.started.pid
    return [first, *sorted(set(processes_beside(first, WORKER_TITLE)) - {first})]


def processes_beside(pid: int, title: str) -> list[int]:
    """The processes on the node of ``pid`` with this in their title: the raylet is the parent of all."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return [child for child in children(parent) if title in title_of(child)]


def title_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # it has just ended
        return ""


def kill_with_descendants(process: subprocess.Popen) -> None:
    """Kills the process group that ``process`` leads, and descendants that lead other groups."""
    below = descendants(process.pid)
    os.killpg(process.pid, signal.SIGKILL)
    for pid in below:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    return [found for child in children(pid) for found in (child, *descendants(child))]
