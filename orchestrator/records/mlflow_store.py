"""The connection to an MLflow store: its experiment, and what an error of MLflow's means.

An outage passes: the same call succeeds once the store answers again. A refusal stays until somebody acts. MLflow
reports some refusals as outages (a read-only database as "temporarily unavailable"); `is_outage` tells them apart.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from dashboards.mlflow import no_stray_folders
from dashboards.mlflow_views import KIND, KIND_TAG, View, links, supports_views
from workloads.errors import InputError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

logger = logging.getLogger(__name__)

# How long another process may hold the database, as MLflow itself waits, or the lock on making its tables.
LOCKED_S = 20.0
TABLES_S = 120.0

# MLflow's codes for what passes: the server or its database is down, busy, or failing. A code that it does not know
# becomes INTERNAL_ERROR, and so does a connection that fails.
OUTAGE_CODES = {
    "TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED",
    "CANCELLED", "ABORTED",
}  # fmt: skip
OTHER_STORE = "choose another store with --tracking-uri or MLFLOW_TRACKING_URI (without either, one under --storage)"
# What an error's code and text have in it where waiting does not help, and what does.
REMEDIES = {
    "readonly database|unable to open database|Permission denied|Read-only file system": (
        f"its files belong to another user or are on a read-only disk: make them writable, or {OTHER_STORE}"
    ),
    "malformed|not a database|no such table|no such column": (
        f"move the database aside, and the same command makes another with all points of the journals; or {OTHER_STORE}"
    ),
    "disk is full|No space left": "free space on its disk; the same command then logs what is missing",
    "UNAUTHENTICATED|CUSTOMER_UNAUTHORIZED": (
        "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    ),
    "Invalid Host header": "start the server with --allowed-hosts and the name by which it is reached",
    "PERMISSION_DENIED": (
        f"ask its owner for the permission to write, choose another experiment with --experiment, or {OTHER_STORE}"
    ),
    "must be in the 'active' state": "restore it in MLflow, or choose another experiment with --experiment",
    "valid JSON|error code 30|ENDPOINT_NOT_FOUND": (
        f"what answers there is no MLflow server: correct the address, or {OTHER_STORE}"
    ),
    "SSLError": "correct the address, or name the server's certificate with MLFLOW_TRACKING_SERVER_CERT_PATH",
    "No module named": "install what that kind of store needs",
}


def without_password(uri: str) -> str:
    """The address without a user's name and password, fit to be shown and stored."""
    return re.sub(r"//[^/@]*@", "//", uri)


def is_outage(error: Exception) -> bool:
    """Whether the same call may succeed later without anybody's action. An error of an unknown kind is no outage."""
    if _remedy(error):
        return False
    if code := getattr(error, "error_code", None):
        return code in OUTAGE_CODES
    # An upload's error is one of requests or of a cloud's library, a first connection's one of the database's driver.
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status >= 500 or status in (408, 429)
    names = [cls.__name__ for cls in type(error).__mro__]
    return any(re.search("Connection|Timeout|OperationalError|InterfaceError", name) for name in names)


def cause(error: Exception) -> str:
    """The database's or the server's message, in one short line without MLflow's words around it or passwords."""
    text = str(error) or type(error).__name__
    found = re.search(r"\(\w+\.\w*Error\) (.+)", text) or re.search(r"\(Caused by (.+)\)", text)
    line = (found[1] if found else text).splitlines()[0].split(" Response body:")[0]
    return without_password(line)[:200]


def remedy(error: Exception) -> str:
    """What helps against a refusal."""
    return _remedy(error) or f"choose another experiment with --experiment, or {OTHER_STORE}"


def _remedy(error: Exception) -> str | None:
    text = f"{getattr(error, 'error_code', '')} {type(error).__name__} {error}"
    return next((helps for signs, helps in REMEDIES.items() if re.search(signs, text)), None)


class MlflowStore:
    """One experiment of an MLflow store. Its calls raise what MLflow raises (:func:`is_outage`).

    Args:
        folder: of the default store under the storage root.
        notes: what was done about the experiment that a person should know.
    """

    client: MlflowClient
    experiment_id: str

    def __init__(self, uri: str, experiment: str, folder: Path) -> None:
        self.uri, self.experiment, self.folder = uri, experiment, folder
        self.notes: list[str] = []

    def connect(self) -> None:
        """Reaches the store for the first time.

        Raises:
            InputError: it does not answer or cannot be used; the message says why, and what helps.
        """
        # MLflow would wait for four minutes; later outages are handled by trying again.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        if self._is_sqlite:  # a pooled connection would go on writing to a file that has been removed
            os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
        logging.getLogger("alembic").setLevel(logging.ERROR)
        shown = without_password(self.uri)
        try:
            self.open()
        except Exception as error:  # of any kind: SQLAlchemy's own where the database is damaged
            if "database is locked" in str(error):
                raise InputError(
                    f"MLflow's database {shown} is locked by another process; end that process or wait for it, or "
                    f"{OTHER_STORE}"
                ) from error
            if is_outage(error):
                raise InputError(
                    f"MLflow at {shown} does not answer ({cause(error)}); start the server, or {OTHER_STORE}"
                ) from error
            raise InputError(f"MLflow at {shown} cannot be used ({cause(error)}); {remedy(error)}") from error

    def open(self) -> None:
        """Finds the experiment: restores it if it was deleted, makes it if there is none, and the database too."""
        from mlflow import MlflowClient

        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock", timeout=TABLES_S):  # two sweeps at once would both create the tables
            if self._is_sqlite:
                self._open_database()
            self.client = MlflowClient(self.uri)
            found = self.client.get_experiment_by_name(self.experiment)
            if found is None:
                self.experiment_id = self._create_experiment()
                self.client.set_experiment_tag(self.experiment_id, KIND_TAG, KIND)
                return
            if found.lifecycle_stage == "deleted":
                self.client.restore_experiment(found.experiment_id)
                self.notes = [f"MLflow's experiment {self.experiment} had been deleted; it is restored with its runs"]
            self.experiment_id = found.experiment_id
            if KIND_TAG not in found.tags:
                self.client.set_experiment_tag(self.experiment_id, KIND_TAG, KIND)

    def save_views(self, views: list[View]) -> None:
        """Saves views of the page as tags of the experiment; those that are saved already stay."""
        tags = self.client.get_experiment(self.experiment_id).tags
        for view in views:
            if (value := view.value(tags.get(view.key))) is not None:
                self.client.set_experiment_tag(self.experiment_id, view.key, value)

    def links(self, sweep: str) -> list[tuple[str, str]]:
        """(name, address) of the pages that show a sweep; none where the store is a database without a server."""
        if not self.uri.startswith("http"):
            return []
        page = without_password(self.uri).rstrip("/")
        version = self._server_version()
        if not supports_views(version):
            self.notes.append(f"MLflow {version} at {page} has no saved views; from 3.15 on, it opens arranged charts")
            return [("runs", f"{page}/#/experiments/{self.experiment_id}")]
        return links(page, self.experiment_id, self.client.get_experiment(self.experiment_id).tags, sweep)

    def _server_version(self) -> str:
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request

        answer = http_request(get_default_host_creds(self.uri), "/version", "GET")
        return str(answer.text) if answer.status_code == 200 else "of an unknown version"

    @property
    def _is_sqlite(self) -> bool:
        return self.uri.startswith("sqlite:")

    def _open_database(self) -> None:
        """Raises at once what MLflow would raise after two minutes of tries, and makes missing tables."""
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
        from sqlalchemy.engine import make_url

        url = make_url(self.uri)
        if url.database and not url.query:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(url.database, timeout=LOCKED_S, isolation_level=None)) as database:
                database.execute("BEGIN IMMEDIATE")  # fails if it is locked, read-only or no database
                database.execute("SELECT name FROM sqlite_master").fetchall()
                database.execute("ROLLBACK")
        with no_stray_folders(self.uri):
            SqlAlchemyStore(self.uri, self._artifacts)

    @property
    def _artifacts(self) -> str:
        return (self.folder / "artifacts").as_uri()

    def _create_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        location = self._artifacts if self._is_sqlite else None
        try:
            return self.client.create_experiment(self.experiment, artifact_location=location)
        except MlflowException as error:
            found: Experiment | None = self.client.get_experiment_by_name(self.experiment)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                raise
            return found.experiment_id  # another sweep has made it in between

    def find_runs(self, **tags: str) -> list[Run]:
        """The runs with these tags, the newest first; ``kind="sweep"`` is the tag ``longspan.kind``."""
        wanted = " and ".join(f"tags.`longspan.{name}` = '{value}'" for name, value in tags.items())
        return list(self.client.search_runs([self.experiment_id], wanted))

    def usable_run(self, run_id: str) -> Run | None:
        """The run of this id; None if it has been deleted or the store has never had it."""
        from mlflow.exceptions import MlflowException

        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def retire(self, run: Run, label: str, **tags: str) -> None:
        """Keeps a run whose name is needed for another: under the name ``label``, as of the kind ``earlier``.

        Args:
            tags: to set instead of those by which the run was found; an empty one is removed.
        """
        run_id = run.info.run_id
        self.client.update_run(run_id, name=label)
        if run.info.status == "RUNNING":  # its sweep was killed
            self.client.set_terminated(run_id, "KILLED")
        self.client.set_tag(run_id, "longspan.kind", "earlier")
        for name, value in tags.items():
            if value:
                self.client.set_tag(run_id, f"longspan.{name}", value)
            else:
                self.client.delete_tag(run_id, f"longspan.{name}")
