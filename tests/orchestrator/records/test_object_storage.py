"""Sweeps as a user runs them, on an S3-compatible server; and a gated model's token on a cluster's workers."""

import http.server
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from orchestrator.fetch import fetch
from orchestrator.records.journal import Journal
from orchestrator.records.object_store import ObjectStore
from orchestrator.records.segments import SegmentedJournal
from orchestrator.records.trial_record import TrialRecord
from tests.support.commands import SweepCommand, wait_for
from workloads.models.source import BUILTIN
from workloads.training.checkpoint import load_newest

pytestmark = pytest.mark.ray

ONE_TRIAL = (
    "--context-lengths", "1024", "--batch", "2", "--eval-every", "6", "--eval-documents", "2", "--methods", "lora+",
    "--references", "--checkpoint-every", "2",
)  # fmt: skip


def only_record(bucket):
    """The record of the only trial in the storage; None before it starts."""
    store = ObjectStore.at(bucket)
    folders = {name.rpartition("/")[0] for name in store.names("trials") if "/journal/" in name}
    return TrialRecord.of(SegmentedJournal(store, folders.pop())) if folders else None


def losses(record):
    return {step: event.loss for step, event in record.steps.items()}


def is_gone(pid):
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True


def test_killed_and_continued_on_another_machine_it_ends_as_an_undisturbed_local_sweep(
    s3, bucket, tmp_path, text_folder, monkeypatch
):
    flags = (*ONE_TRIAL, "--steps", "12", "--data", str(text_folder))
    mirrors = {name: {"XDG_CACHE_HOME": str(tmp_path / name)} for name in ("one", "other")}

    undisturbed = SweepCommand(tmp_path / "runs", *flags).start()
    process = SweepCommand(bucket, *flags, environment=mirrors["one"]).start()
    record = wait_for(
        lambda: (r := only_record(bucket)) and r.saved_step >= 4 and r, process, "the checkpoint of step 4"
    )
    worker = record.started.pid
    os.killpg(process.pid, signal.SIGKILL)
    os.kill(worker, signal.SIGKILL)  # Ray would end it too, but so late that it might finish the trial before
    process.communicate()
    deadline = time.monotonic() + 300
    while not is_gone(worker):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    shutil.rmtree(tmp_path / "one")

    process = SweepCommand(bucket, *flags, environment=mirrors["other"]).start()
    wait_for(lambda: only_record(bucket).started.pid != worker, process, "the second worker")
    s3.stop()
    threading.Timer(3, s3.start).start()
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert "an object store cannot hold" in output

    printed, _ = undisturbed.communicate(timeout=400)
    assert undisturbed.returncode == 0, printed
    (expected,) = (TrialRecord.of(Journal(path)) for path in (tmp_path / "runs").glob("trials/*/journal.jsonl"))
    found = only_record(bucket)
    assert (found.state, found.resumed_at >= 4) == ("finished", True)
    assert losses(found) == losses(expected)
    assert [e.nll for e in found.curve(1024)] == [e.nll for e in expected.curve(1024)]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "third"))
    fingerprint = expected.journal.path.parent.name
    tensors, _ = load_newest(fetch(bucket, fingerprint) / "checkpoints")
    whole, _ = load_newest(expected.journal.path.parent / "checkpoints")
    assert tensors.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors.items())

    store = ObjectStore.at(bucket)
    (sweep,) = {name.split("/")[1] for name in store.names("sweeps")}
    for file in ("spec.json", "sweep.json", "comparison.json", "report/report.html"):
        assert store.read(f"sweeps/{sweep}/{file}")
    (database,) = (tmp_path / "other").glob("longspan/storage/*/mlflow/mlflow.db")
    client = MlflowClient(f"sqlite:///{database}")
    runs = client.search_runs([client.get_experiment_by_name("longspan").experiment_id])
    (run,) = (run for run in runs if run.data.tags["longspan.kind"] == "trial")
    assert run.info.status == "FINISHED"
    assert sorted(point.step for point in client.get_metric_history(run.info.run_id, "train/loss")) == list(
        range(1, 13)
    )


def test_two_sweeps_at_once_on_two_machines_train_a_shared_trial_once(bucket, tmp_path, text_folder):
    flags = (*ONE_TRIAL, "--steps", "6", "--data", str(text_folder))
    processes = [
        SweepCommand(bucket, *flags, "--name", name, environment={"XDG_CACHE_HOME": str(tmp_path / name)}).start()
        for name in ("one", "other")
    ]
    for process in processes:
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output
    record = only_record(bucket)
    assert record.state == "finished"
    events = record.journal.read().events
    assert [event.step for event in events if event.name == "step"] == list(range(1, 7))
    assert sum(event.name == "started" for event in events) == 1


PLANTED = "hf_planted0123456789token"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class GatedHub(http.server.BaseHTTPRequestHandler):
    """A model hub with one gated model, builtin:tiny under another name."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = BUILTIN / "tiny" / self.path.partition("?")[0].rpartition("/")[2]
        if self.headers.get("Authorization") != f"Bearer {PLANTED}":
            self.send_response(401)
            self.send_header("X-Error-Code", "GatedRepo")
            content = b""
        elif "/resolve/" in self.path and path.is_file():
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{path.name}-{len(content)}"')
            self.send_header("X-Repo-Commit", COMMIT)
        else:
            content = b"[]" if "/api/" in self.path else b""
            self.send_response(200 if content else 404)
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def gated_hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), GatedHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


CLUSTER = """
import sys, ray
context = ray.init(address="local", num_cpus=2, include_dashboard=True, _temp_dir=sys.argv[1], log_to_driver=False)
print(context.address_info["gcs_address"], context.dashboard_url, flush=True)
sys.stdin.read()
"""


def test_a_token_reaches_the_workers_of_a_cluster_and_lies_nowhere(gated_hub, tmp_path, text_folder):
    from orchestrator.planning.cluster import ENVIRONMENT

    # Ray's sockets lie under its temporary folder, and their paths may be 107 bytes long.
    session = Path(f"/tmp/lst{os.getpid()}")
    hub = {"HF_ENDPOINT": gated_hub, "HF_HUB_DISABLE_XET": "1"}
    token = tmp_path / "ray-token"
    token.write_text(secrets.token_hex(32))
    ray_token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    cleared = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "HF_"))}
    nodes = subprocess.Popen(
        [sys.executable, "-c", CLUSTER, str(session)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=cleared | hub | ray_token | ENVIRONMENT | {"HF_HOME": str(tmp_path / "node")},
    )  # fmt: skip
    try:
        address, dashboard = nodes.stdout.readline().split()
        command = SweepCommand(
            tmp_path / "runs", *ONE_TRIAL, "--steps", "2", "--data", str(text_folder), "--address", address,
            "--model", f"someone/gated@{COMMIT}",
            environment=hub | ray_token | {"HF_HOME": str(tmp_path / "driver"), "HF_TOKEN": PLANTED},
        )  # fmt: skip
        status, output = command.run()
        assert status == 0, output
        assert list((tmp_path / "node").rglob("model.safetensors"))  # a worker has fetched it
        assert PLANTED not in output
        request = urllib.request.Request(f"http://{dashboard}/api/jobs/")
        request.add_header("Authorization", f"Bearer {token.read_text()}")
        jobs = urllib.request.urlopen(request, timeout=60).read().decode()
        assert "orchestrator.sweep" in jobs and PLANTED not in jobs
        places = [session, tmp_path / "runs", tmp_path / "node", tmp_path / "driver"]
        files = [file for place in places for file in place.rglob("*") if file.is_file()]
        assert len(files) > 50
        assert not [file for file in files if PLANTED.encode() in file.read_bytes()]
    finally:
        nodes.communicate("")
        shutil.rmtree(session, ignore_errors=True)
