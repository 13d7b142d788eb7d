"""MLflow's UI on a storage root: `python -m dashboards.mlflow [--storage runs] [--port 5000]`.

A sweep writes runs to `<storage>/mlflow/mlflow.db` and files to `<storage>/mlflow/artifacts`; this serves both until
Ctrl-C, by default to this machine only. MLflow runs in separate processes: this one starts them, waits until the page
answers, prints its address, and ends them.
"""

import argparse
import contextlib
import errno
import importlib.util
import os
import re
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from dashboards.mlflow_views import TAG, links, supports_views

LOCAL = ("127.0.0.1", "localhost", "::1")
EVERY = ("0.0.0.0", "::")
SECONDS_TO_START = 180
SECONDS_TO_END = 10
FEWEST_PASSWORD_CHARACTERS = 12  # MLflow's own limit

ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # no job runners: four more processes of about 230 MB
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",  # a run's files are shown, never loaded
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


SQLITE = "sqlite:///"


def sqlite_url(file: Path) -> str:
    """The SQLAlchemy URL of a database file; its path may have characters that mean something else in a URL."""
    return SQLITE + re.sub("[%?#]", lambda found: f"%{ord(found[0]):02X}", str(file))


@contextlib.contextmanager
def no_stray_folders(url: str) -> Iterator[None]:
    """Removes the folders that MLflow makes inside: it takes what follows sqlite:/// for a path, %23 and all."""
    written = Path(url.removeprefix(SQLITE)).parent
    missing = [folder for folder in (written, *written.parents) if url.startswith(SQLITE) and not folder.exists()]
    try:
        yield
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # none was made, or the database is there after all
                folder.rmdir()


def serve(storage: str, host: str, port: int, more_hosts: list[str], basic_auth: bool = False) -> int:
    """Serves until Ctrl-C, SIGTERM or SIGHUP, then returns 0; if MLflow exits on its own, its exit status.

    Args:
        basic_auth: ask for users and passwords.

    Raises:
        ValueError: there is no store, the address cannot be used, or basic auth lacks something.
    """
    store = _store(storage)
    _check_address(host, port)
    environment = os.environ | ENVIRONMENT | (_basic_auth(store) if basic_auth else {})
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if name is not signal.SIGHUP or signal.getsignal(name) is not signal.SIG_IGN:  # respects nohup
            signal.signal(name, signal.default_int_handler)
    if host not in LOCAL:
        risk = (
            f"MLflow's UI has no passwords. Anyone who can reach port {port} of this machine can read, change and "
            "delete every run. Prefer --host 127.0.0.1 with an SSH tunnel, or ask for passwords with --basic-auth."
        )
        clear = "passwords cross the network unencrypted. Put a proxy with TLS in front, or use an SSH tunnel."
        print(f"Warning: {clear if basic_auth else risk}", file=sys.stderr)
    errors = tempfile.TemporaryFile()  # printed only if MLflow exits on its own
    # In a new session: Ctrl-C reaches only this process, which then ends the group once, in order.
    server = subprocess.Popen(
        [*_command(store, host, port, more_hosts), *(["--app-name", "basic-auth"] if basic_auth else [])],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        start_new_session=True,
    )
    try:
        print(f"Starting MLflow on {store} ...", flush=True)
        with no_stray_folders(sqlite_url(store / "mlflow.db")):
            if _wait_until_up(server, host, port):
                page = _url(_names(host)[0], port)
                print("\n".join([f"Open {page} (Ctrl-C to stop)", *_views(store, page)]), flush=True)
            status = server.wait()
        errors.seek(0)
        logged = re.sub(r"[^\t\n -~\xa0-\U0010ffff]", "?", errors.read().decode(errors="replace"))
        print(f"{logged}MLflow exited with status {status}.", file=sys.stderr)
        return status or 1
    except KeyboardInterrupt:
        return 0
    finally:
        _end(server)


def _store(storage: str) -> Path:
    storage = storage.removeprefix("file://")
    if "://" in storage:
        raise ValueError(
            f"--storage {storage} is not a local folder, so its sweeps keep no MLflow store there. Open the UI of the "
            "tracking server that they were given with --tracking-uri."
        )
    store = Path(storage).expanduser().resolve() / "mlflow"
    if not (store / "mlflow.db").is_file():
        raise ValueError(
            f"{Path(storage).expanduser().resolve()} contains no MLflow store (no mlflow/mlflow.db). "
            f"`python -m orchestrator.sweep --storage {shlex.quote(storage)}` creates one."
        )
    return store


def _basic_auth(store: Path) -> dict[str, str]:
    """The environment of a server that asks for users and passwords; they are kept beside the runs, in users.db.

    Raises:
        ValueError: something is missing that it needs; all of it is named.
    """
    missing, users = [], store / "users.db"
    if importlib.util.find_spec("flask_wtf") is None:
        missing.append("the package Flask-WTF (pip install 'mlflow[auth]')")
    if not os.environ.get("MLFLOW_FLASK_SERVER_SECRET_KEY"):
        missing.append("MLFLOW_FLASK_SERVER_SECRET_KEY in the environment (a long random text, the same at each start)")
    first_start = not users.exists() or users.stat().st_size == 0
    if first_start and len(os.environ.get("MLFLOW_AUTH_ADMIN_PASSWORD", "")) < FEWEST_PASSWORD_CHARACTERS:
        missing.append(
            "MLFLOW_AUTH_ADMIN_PASSWORD in the environment, at the first start (of the user admin, "
            f"{FEWEST_PASSWORD_CHARACTERS} characters or more)"
        )
    if missing:
        raise ValueError(f"--basic-auth needs {', and '.join(missing)}.")
    users.touch(mode=0o600)
    database = sqlite_url(users).replace("%", "%%")  # % begins a reference in such a file
    settings = store / "basic_auth.ini"
    settings.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {database}\nadmin_username = admin\n", encoding="utf-8"
    )
    return {"MLFLOW_AUTH_CONFIG_PATH": str(settings)}


def _views(store: Path, page: str) -> list[str]:
    """A line for each saved view of each experiment's newest sweep, or a note where MLflow has none."""
    database = f"{(store / 'mlflow.db').as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(database, uri=True)) as connection:
        query = "SELECT experiment_id, key, value FROM experiment_tags WHERE key LIKE ?"
        rows = connection.execute(query, (f"{TAG}%",)).fetchall()
    tags: dict[str, dict[str, str]] = defaultdict(dict)
    for experiment, key, value in rows:
        tags[str(experiment)][key] = value
    if rows and not supports_views(version := metadata.version("mlflow")):
        return [f"note: MLflow {version} has no saved views; from 3.15 on, links to arranged charts are printed here"]
    found = [view for experiment, saved in tags.items() for view in links(page, experiment, saved)]
    width = max((len(name) for name, _ in found), default=0)
    return [f"  {name:<{width}}  {address}" for name, address in found]


def _check_address(host: str, port: int) -> None:
    problem = _problem(host, port)
    if problem == errno.EADDRINUSE:
        free = next((other for other in range(port + 1, min(port + 100, 65536)) if _problem(host, other) is None), 0)
        fix = f"Port {free} is free: add --port {free}." if free else "Choose another with --port."
        raise ValueError(f"port {port} of {host} is in use. {fix}")
    if problem is not None:
        raise ValueError(f"cannot listen on {host}, port {port}: {os.strerror(problem)}. Check --host and --port.")


def _problem(host: str, port: int) -> int | None:
    """Why no server can listen there, as an errno; None if one can."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except socket.gaierror:
        return errno.EADDRNOTAVAIL
    except OSError as error:
        return error.errno
    return None


def _command(store: Path, host: str, port: int, more_hosts: list[str]) -> list[str]:
    """MLflow's server with one worker, which answers only to the names in its list of allowed hosts.

    Without the list it would answer to any name that begins like a private address (`10.evil.example`), which another
    site could point at this machine, and it would refuse what the UI posts from any name but localhost.
    """
    names = [*_names(host), *more_hosts]
    with_ports = [name if _has_port(name) else f"{_bracketed(name)}:{port}" for name in names]
    origins = [
        f"{scheme}://{name}" for scheme in ("http", "https") for name in [*with_ports, *map(_bracketed, more_hosts)]
    ]
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--backend-store-uri", sqlite_url(store / "mlflow.db")),
        *("--registry-store-uri", sqlite_url(store / "mlflow.db")),
        *("--default-artifact-root", (store / "artifacts").as_uri()),
        "--no-serve-artifacts",  # artifacts are read from their folder; no uploads over HTTP
        *("--host", host, "--port", str(port), "--workers", "1"),
        *("--allowed-hosts", ",".join(dict.fromkeys([*map(_bracketed, names), *with_ports]))),
        *("--cors-allowed-origins", ",".join(dict.fromkeys(origins))),
        *("--uvicorn-opts", f"--log-level warning --timeout-graceful-shutdown {SECONDS_TO_END // 2}"),
    ]


def _names(host: str) -> list[str]:
    """The names and addresses of a server listening on `host`; the one to open comes first."""
    if host in LOCAL:
        return [host, *(name for name in LOCAL if name != host)]
    if host not in EVERY:
        return [host]
    addresses = {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)}
    return list(dict.fromkeys([socket.gethostname(), socket.getfqdn(), *sorted(addresses), *LOCAL]))


def _bracketed(name: str) -> str:
    return f"[{name}]" if name.count(":") > 1 and not name.startswith("[") else name


def _has_port(name: str) -> bool:
    return name.count(":") == 1 or "]:" in name


def _url(host: str, port: int) -> str:
    return f"http://{_bracketed(host)}:{port}"


def _wait_until_up(server: subprocess.Popen, host: str, port: int) -> bool:
    """True once the page answers; False if the server exits, or takes too long (which is printed)."""
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(SECONDS_TO_START * 5):
        if server.poll() is not None:
            return False
        try:
            direct.open(f"{_url(address, port)}/health", timeout=2).close()
            return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    print(f"MLflow has not answered within {SECONDS_TO_START} s; still waiting (Ctrl-C to stop).", file=sys.stderr)
    return False


def _end(server: subprocess.Popen) -> None:
    """Ends every process of the server's group: SIGTERM first, SIGKILL if they take too long."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)  # a second Ctrl-C must not leave processes behind
    deadline = time.monotonic() + SECONDS_TO_END
    sent = signal.SIGTERM
    while True:
        try:
            os.killpg(server.pid, sent)
        except (ProcessLookupError, PermissionError):
            return
        while time.monotonic() < deadline:
            server.poll()  # reaps it, else it stays in its group as a zombie
            try:
                os.killpg(server.pid, 0)
            except (ProcessLookupError, PermissionError):
                return
            time.sleep(0.05)
        sent, deadline = signal.SIGKILL, time.monotonic() + SECONDS_TO_END


def main(arguments: list[str] | None = None, prog: str = "python -m dashboards.mlflow") -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog=prog, description="Serve MLflow's UI on a storage root.")
    parser.add_argument("--storage", default="./runs", help="storage root of the sweeps (default: %(default)s)")
    parser.add_argument("--port", type=int, default=5000, help="default: %(default)s")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    parser.add_argument(
        "--allowed-hosts",
        default="",
        metavar="NAME,NAME",
        help="more names by which browsers reach the server, such as a proxy's",
    )
    parser.add_argument("--basic-auth", action="store_true", help="ask for users and passwords")
    options = parser.parse_args(arguments)
    more_hosts = [name.strip() for name in options.allowed_hosts.split(",") if name.strip()]
    try:
        return serve(options.storage, options.host, options.port, more_hosts, options.basic_auth)
    except ValueError as error:
        print(f"dashboards.mlflow: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
