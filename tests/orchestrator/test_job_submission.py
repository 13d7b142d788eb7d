"""``ray job submit -- python -m orchestrator.sweep`` against a running cluster, with token authentication on."""

import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from orchestrator.planning.cluster import join_or_start
from orchestrator.run_options import RunOptions
from tests.support.commands import SMALL
from tests.support.ray_nodes import free_port, kill_with_descendants
from tests.support.storage import mlflow_runs
from workloads.errors import InputError

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """(dashboard's address, head's address, environment of a client) of a Ray head of our own."""
    # Ray's sockets lie under its temporary folder, and their paths may be 107 bytes long.
    folder = Path(f"/tmp/ls{os.getpid()}")
    folder.mkdir()
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
    }
    port, dashboard = free_port(), free_port()
    head = subprocess.Popen(
        [
            "ray", "start", "--head", "--block", "--num-cpus=2", f"--port={port}", f"--dashboard-port={dashboard}",
            "--dashboard-host=127.0.0.1", "--include-dashboard=true", f"--temp-dir={folder / 'ray'}",
            f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats",
        ],
        env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    try:
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"{address}/api/version", timeout=2)
            except urllib.error.HTTPError:
                break  # it answers: 401 without the token
            except OSError:
                time.sleep(0.1)
            else:
                break
        yield address, f"127.0.0.1:{port}", environment
    finally:
        kill_with_descendants(head)  # asked to end, it takes half a minute
        subprocess.run(["rm", "-rf", str(folder)], check=True)


def test_a_job_without_the_token_is_refused(cluster):
    address, _, environment = cluster
    without = {name: value for name, value in environment.items() if name != "RAY_AUTH_TOKEN_PATH"}
    without["HOME"] = "/nonexistent"
    done = subprocess.run(
        ["ray", "job", "submit", "--address", address, "--", "true"], env=without, capture_output=True, text=True
    )
    assert done.returncode != 0
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{address}/api/jobs/", timeout=400)
    assert refused.value.code == 401


@pytest.mark.parametrize("token", [None, "of another cluster"])
def test_a_sweep_without_the_token_says_what_it_lacks(cluster, token, tmp_path, monkeypatch):
    _, address, _ = cluster
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    said = "wants a token, and this process sends none; set RAY_AUTH_MODE=token"
    if token:
        (tmp_path / "token").write_text(token)
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
        said = "refuses the token"
    with pytest.raises(InputError, match=f"^--address {address}: the cluster at .* {said}"):
        join_or_start(RunOptions(address=address))


def test_a_submitted_sweep_runs_on_the_cluster_and_its_runs_are_in_mlflow(cluster, tmp_path, text_folder):
    address, _, environment = cluster
    storage = tmp_path / "runs"
    flags = [*SMALL, "--methods", "lora", "--references", "none", "--data", str(text_folder), "--storage", str(storage)]
    command = [
        "ray",
        "job",
        "submit",
        "--address",
        address,
        "--",
        "python",
        "-m",
        "orchestrator.sweep",
        "convergence",
        *flags,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "LoRA measured lowest" in " ".join(done.stdout.split()) and "succeeded" in done.stdout
    _, trials, sweeps = mlflow_runs(storage)
    assert sorted(run.info.run_name for run in trials) == ["lora 1024", "untuned linear 1024", "untuned none 1024"]
    assert {run.info.status for run in trials + sweeps} == {"FINISHED"}
