"""MLflow's UI as a user starts and stops it: one address, a real store behind it, and nothing left running."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dashboards import mlflow as ui
from orchestrator.records.storage import Storage
from tests.support.mlflow_store import PROVENANCE, connect

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")
VIEWS = ("step", "tokens", "CPU hours", "speed and memory", "failed")
COMMAND = [sys.executable, "-m", "dashboards.mlflow"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage root as a sweep leaves it."""
    folder = tmp_path_factory.mktemp("my runs")
    shutil.copytree(ROOT / "tests" / "data" / "b1875aa", folder, dirs_exist_ok=True)
    storage = Storage.open(str(folder))
    trials = [storage.trial(path.name).read_trial() for path in sorted((folder / "trials").iterdir())]
    connect(storage).follow(trials, "convergence", PROVENANCE)
    return folder


@pytest.fixture(scope="module")
def served(storage: Path) -> Iterator[tuple[subprocess.Popen, str, int]]:
    """The running command, what it printed until the page was up, and its port."""
    port = free_port()
    command = [*COMMAND, "--storage", str(storage), "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = "".join(process.stdout.readline() for _ in range(2 + len(VIEWS)))
        yield process, said, port
    finally:
        process.terminate()
        process.communicate(timeout=400)


@pytest.fixture
def signals() -> Iterator[None]:
    """Puts this process' signal handlers back."""
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for name, handler in handlers.items():
        signal.signal(name, handler)


def fetch(port: int, path: str, body: dict | None = None, **headers: str) -> str:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json", **headers}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=400) as answer:
        return answer.read().decode()


def search(port: int, **headers: str) -> dict:
    return json.loads(fetch(port, "/ajax-api/2.0/mlflow/runs/search", {"experiment_ids": ["1"]}, **headers))


def test_says_the_one_address_to_open(served: tuple[subprocess.Popen, str, int]) -> None:
    _, said, port = served
    assert f"Open http://127.0.0.1:{port} (Ctrl-C to stop)" in said.splitlines()
    assert "<title>MLflow</title>" in fetch(port, "/")


def test_shows_the_runs_and_files_of_the_store(served: tuple[subprocess.Popen, str, int]) -> None:
    _, _, port = served
    found = search(port, Origin=f"http://localhost:{port}")["runs"]
    runs = {run["info"]["run_name"]: run for run in found}
    (metric,) = (each for each in runs["lora 1024"]["data"]["metrics"] if each["key"] == "eval/perplexity_1024")
    assert (int(metric["step"]), metric["value"]) == (48, pytest.approx(2.5689, abs=5e-5))
    kept = fetch(port, f"/get-artifact?run_uuid={runs['lora 1024']['info']['run_id']}&path=trial.json")
    assert json.loads(kept)["training"]["method"] == "lora"


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_a_printed_link_opens_the_curves_of_each_context_length(
    served: tuple[subprocess.Popen, str, int], tmp_path: Path
) -> None:
    _, said, _ = served
    (link,) = (line.split()[-1] for line in said.splitlines() if "perplexity by CPU hours" in line)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    for budget_ms in (60_000, 240_000, 960_000):  # of the page's own clock, which waits for requests
        shown = [*command, "--window-size=1400,2000", f"--virtual-time-budget={budget_ms}", link]
        page = subprocess.run(shown, capture_output=True, text=True, check=True).stdout
        if "device_hours" in page and ">3.62<" in page:
            break
    assert all(section in page for section in ("Context 1,024", "Context 2,048", "Training loss"))
    # The bars: the last perplexity of full fine-tuning and of the reference at either context length.
    assert all(f">{perplexity}<" in page for perplexity in ("2.79", "2.21", "3.62", "2.34"))
    assert "Error loading shared view" not in page


@pytest.mark.parametrize("headers", [{"Host": "10.evil.example"}, {"Origin": "http://evil.example"}])
def test_refuses_names_that_are_not_its_own(served: tuple[subprocess.Popen, str, int], headers: dict[str, str]) -> None:
    with pytest.raises(urllib.error.HTTPError, match="403"):
        search(served[2], **headers)


def test_reports_to_nobody(served: tuple[subprocess.Popen, str, int]) -> None:
    assert json.loads(fetch(served[2], "/ajax-api/3.0/mlflow/ui-telemetry"))["disable_ui_telemetry"] is True


def test_a_taken_port_names_a_free_one(served: tuple[subprocess.Popen, str, int], storage: Path, capsys) -> None:
    _, _, port = served
    assert ui.main(["--storage", str(storage), "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert f"port {port} of 127.0.0.1 is in use" in said
    offered = int(said.rsplit("--port ", 1)[1].strip(" .\n"))
    assert ui._problem("127.0.0.1", offered) is None


def test_ctrl_c_ends_every_process(served: tuple[subprocess.Popen, str, int]) -> None:
    process, _, port = served
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(family) <= 3  # this command, MLflow's, and its one worker
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=400) == 0
    _, alive = psutil.wait_procs(family, timeout=300)
    assert alive == []
    assert ui._problem("127.0.0.1", port) is None
    assert "Traceback" not in process.stderr.read()


def test_without_a_store_it_says_where_it_looked_and_what_makes_one(tmp_path: Path, capsys) -> None:
    assert ui.main(["--storage", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path) in said and f"python -m orchestrator.sweep --storage {tmp_path}" in said
    assert list(tmp_path.iterdir()) == []


def test_a_remote_storage_root_and_a_foreign_address_are_refused(storage: Path, capsys) -> None:
    assert ui.main(["--storage", "s3://bucket/runs"]) == 2
    assert "not a local folder" in capsys.readouterr().err
    assert ui.main(["--storage", str(storage), "--host", "192.0.2.1"]) == 2
    assert "cannot listen on 192.0.2.1" in capsys.readouterr().err


def test_an_mlflow_without_saved_views_is_named_instead_of_links(storage: Path, monkeypatch) -> None:
    page = "http://127.0.0.1:5000"
    assert len(ui._views(storage / "mlflow", page)) == len(VIEWS)
    monkeypatch.setattr(ui.metadata, "version", lambda _: "3.14.0")
    (note,) = ui._views(storage / "mlflow", page)
    assert note.startswith("note: MLflow 3.14.0 has no saved views") and page not in note


def test_basic_auth_names_all_that_it_lacks_before_anything_starts(storage: Path, monkeypatch, capsys) -> None:
    monkeypatch.delenv("MLFLOW_FLASK_SERVER_SECRET_KEY", raising=False)
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", "too short")
    assert ui.main(["--storage", str(storage), "--port", str(free_port()), "--basic-auth"]) == 2
    said = capsys.readouterr().err
    assert "MLFLOW_FLASK_SERVER_SECRET_KEY" in said and "12 characters or more" in said and "too short" not in said


def test_what_mlflow_says_is_shown_where_it_cannot_start(storage: Path, monkeypatch, signals, capsys) -> None:
    broken = [sys.executable, "-c", "import sys; print('file is not a database', file=sys.stderr); sys.exit(3)"]
    monkeypatch.setattr(ui, "_command", lambda *_: broken)
    assert ui.main(["--storage", str(storage), "--port", str(free_port())]) == 3
    said = capsys.readouterr()
    assert "file is not a database\nMLflow exited with status 3" in said.err
    assert "Open http" not in said.out


def test_beyond_this_machine_it_warns_and_answers_to_its_names_alone(
    storage: Path, monkeypatch, signals, capsys
) -> None:
    started: list[list[str]] = []

    class Ended:
        pid = 2**22  # no process has it: larger than the kernel gives out

        def __init__(self, command: list[str], **_: object) -> None:
            started.append(command)

        def poll(self) -> int:
            return 0

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(ui.subprocess, "Popen", Ended)
    port = free_port()
    ui.main(["--storage", str(storage), "--host", "0.0.0.0", "--port", str(port), "--allowed-hosts", "mlflow.example"])
    assert "no passwords" in capsys.readouterr().err
    (command,) = started
    hosts = command[command.index("--allowed-hosts") + 1].split(",")
    assert {socket.gethostname(), f"{socket.gethostname()}:{port}", f"localhost:{port}", "mlflow.example"} <= set(hosts)
    assert not any("*" in host for host in hosts)
    origins = command[command.index("--cors-allowed-origins") + 1].split(",")
    assert {"https://mlflow.example", f"http://{socket.gethostname()}:{port}"} <= set(origins)
