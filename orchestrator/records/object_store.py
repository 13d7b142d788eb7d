"""Objects under one fsspec location, such as ``s3://bucket/prefix``: read and written whole, or created only if absent.

An object store cannot append, rename or memory-map; what longspan needs is built from these few calls. Each raises at
once; :func:`retry` repeats it after a transient error (refused or reset connections, time-outs, 5xx, throttling).
Credentials come from the environment or fsspec's configuration.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from workloads.errors import InputError, first_line, reason
from workloads.files.hashes import content_hash
from workloads.files.safe import is_plain_name, open_plain, replace_file

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Seconds that a store may be unreachable before a call fails, and before a command fails at its start.
RETRY_LIMIT_S = 300.0
FIRST_RETRY_LIMIT_S = 15.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 10.0
# Transient errors of clients, by name: which libraries a store needs is up to fsspec.
TRANSIENT = {
    "ConnectionError", "HTTPClientError", "ClientConnectionError", "ClientPayloadError", "IncompleteRead",
    "ResponseParserError", "TimeoutError",
}  # fmt: skip
FINAL_OS_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
FINAL_ERRNOS = {errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENAMETOOLONG, errno.EMSGSIZE}

# Written last into a stored folder: a folder that has one is whole.
MANIFEST = "manifest.json"


class StoreUnavailable(ConnectionError):
    """The store has not answered within the time that the caller allows."""


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    if isinstance(error, FINAL_OS_ERRORS):
        return False
    if any(kind.__name__ in TRANSIENT for kind in type(error).__mro__):
        return True
    return isinstance(error, OSError) and error.errno not in FINAL_ERRNOS


def retry(call: Callable[[], T], give_up: Callable[[float], bool] = lambda waited: waited > RETRY_LIMIT_S) -> T:
    """``call()``, repeated after transient errors, with random, growing pauses of up to 10 s.

    Raises:
        StoreUnavailable: ``give_up``, called with the seconds since the first try, returned true.
        Exception: any other error of ``call``, at once.
    """
    began = time.monotonic()

    def unavailable(state: RetryCallState) -> NoReturn:
        error = state.outcome.exception() if state.outcome else None
        waited, why = time.monotonic() - began, reason(error) if error else "no error"
        raise StoreUnavailable(f"the storage has not answered for {waited:.0f} s ({why})") from error

    return Retrying(
        retry=retry_if_exception(is_transient),
        stop=lambda state: give_up(time.monotonic() - began),
        wait=wait_random_exponential(multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S),
        retry_error_callback=unavailable,
    )(call)


def _first_try(call: Callable[[], T]) -> T:
    return retry(call, give_up=lambda waited: waited > FIRST_RETRY_LIMIT_S)


class UnsafeName(InputError):
    """A name in a store that could lead out of the folder it belongs to."""


def check_names(names: Iterable[object], where: str) -> None:
    """Checks that each is a plain name, as of a file in a folder. ``where``: what has these names, for the message.

    Raises:
        UnsafeName: one is not: absolute, with a separator, "..", or with control characters.
    """
    for name in names:
        if not is_plain_name(name):
            raise UnsafeName(
                f"{where} names {name!r}; expected the plain name of a file or folder in it, without / or .., so "
                "nothing is read or written there"
            )


def _parse_manifest(content: bytes) -> dict[str, dict[str, Any]]:
    """The files of a manifest: each one's bytes, and of newer ones its sha256.

    Raises:
        ValueError: it is no manifest.
    """
    try:
        files = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} is not JSON ({error})") from error
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{MANIFEST} lists no files")
    check_names(files, MANIFEST)
    for name, described in files.items():
        if not isinstance(described, dict) or not isinstance(described.get("bytes"), int):
            raise ValueError(f"{MANIFEST} has no size for {name}")
    return files


class ObjectStore:
    """The objects under ``url``, named relative to it."""

    def __init__(self, url: str, **options: Any) -> None:
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        self.fs, path = url_to_fs(self.url, **options)
        self.root = path.rstrip("/")
        self.trouble: str | None = None  # why the last poll got no answer

    @classmethod
    @functools.cache
    def at(cls, url: str) -> ObjectStore:
        """The store at a location; a process has one for each.

        Raises:
            InputError: fsspec knows no such protocol, its package is not installed, or a password is in the location.
        """
        parts = urlsplit(url)
        if "@" in parts.netloc:
            raise InputError(
                f"storage {parts.scheme}://...@{parts.netloc.rpartition('@')[2]}{parts.path}: credentials do not "
                "belong into a location, which is shown and stored; give them in the environment (AWS_ACCESS_KEY_ID "
                "and AWS_SECRET_ACCESS_KEY, or a role of the machine)"
            )
        # Other processes change listings, and this function caches clients.
        options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
        if parts.scheme in ("s3", "s3a"):
            from fsspec.config import conf

            # The client itself gives up early: `retry` waits for an unreachable store.
            config = {"connect_timeout": 10, "retries": {"mode": "standard", "max_attempts": 2}}
            config |= conf.get(parts.scheme, {}).get("config_kwargs", {})
            options["config_kwargs"] = config
        try:
            return cls(url, **options)
        except ImportError as error:
            extra = "'longspan[s3]'" if parts.scheme in ("s3", "s3a") else "its fsspec package"
            raise InputError(f"storage {url}: {error}; pip install {extra}") from error
        except Exception as error:  # each file system of fsspec raises what it likes
            raise InputError(
                f"storage {url}: {first_line(error)}; expected a folder, or a location that fsspec opens"
            ) from error

    def check(self) -> None:
        """Checks that objects can be written, and created only if absent.

        Raises:
            InputError: there is no such bucket, access is denied, nothing answers, or the store lets two writers create
                the same object.
        """
        probe = f".writable-{uuid.uuid4().hex}"
        bucket = self.root.partition("/")[0]
        with self._first_contact("written", "list, read, write and delete", f"there is no bucket {bucket}; create it"):
            _first_try(lambda: self.write(probe, b"x"))
            _first_try(lambda: self.remove([probe]))
            # Concurrently: a client that checks for the object and then writes gives no protection.
            with ThreadPoolExecutor(8) as writers:
                created = list(writers.map(lambda n: _first_try(partial(self.create, probe, b"%d" % n)), range(8)))
            _first_try(lambda: self.remove([probe]))
        if created.count(True) != 1:
            raise InputError(
                f"storage {self.url} overwrites an object that was to be created only if absent; two sweeps could "
                "train the same trial there. Choose a store with conditional writes, such as Amazon S3"
            )

    def check_readable(self) -> None:
        """Checks that objects can be listed.

        Raises:
            InputError: there is nothing at the location, access is denied, or nothing answers.
        """
        with self._first_contact("read", "list and read", "there is nothing yet; correct the location"):
            _first_try(lambda: self.fs.ls(self.root))  # `find` would leave errors out

    @contextlib.contextmanager
    def _first_contact(self, verb: str, needs: str, absent: str) -> Iterator[None]:
        """Turns what a store raises at first into an InputError: what cannot be done, and what it takes."""
        try:
            yield
        except StoreUnavailable as error:
            raise InputError(
                f"storage {self.url}: {error}. Check the network, and the address (AWS_ENDPOINT_URL where it is not "
                "Amazon's)"
            ) from error
        except FileNotFoundError as error:
            raise InputError(f"storage {self.url}: {absent}, or choose another") from error
        except Exception as error:  # fsspec and the store's client raise many kinds for denied access
            raise InputError(
                f"storage {self.url} cannot be {verb} ({reason(error)}); check the credentials in the environment and "
                f"what they allow: {needs}"
            ) from error

    def read(self, name: str) -> bytes | None:
        """An object's content, or None if there is none."""
        try:
            return self.fs.cat_file(self._path(name))
        except FileNotFoundError:
            return None

    def read_many(self, names: list[str]) -> list[bytes]:
        """The contents of existing objects, many at a time."""
        if not names:
            return []
        contents = self.fs.cat([self._path(name) for name in names])
        return [contents[self._path(name)] for name in names]

    def write(self, name: str, content: bytes) -> None:
        """Writes an object, or replaces it."""
        self.fs.pipe_file(self._path(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Writes an object only if it is absent, and returns whether it did: of several writers one succeeds."""
        try:
            self.fs.pipe_file(self._path(name), content, mode="create")
        except FileExistsError:
            return False
        return True

    def names(self, prefix: str) -> list[str]:
        """The names of the objects below ``prefix``, a folder, sorted."""
        folder = f"{self._path(prefix)}/"
        # s3fs lists the folder itself if its first object appears meanwhile.
        found = (path for path in self.fs.find(self._path(prefix)) if path.startswith(folder))
        return sorted(path[len(self.root) + 1 :] for path in found)

    def sizes(self) -> dict[str, int]:
        """The size of every object in bytes, by name."""
        found = self.fs.find(self._path(""), detail=True)
        return {path[len(self.root) + 1 :]: each["size"] for path, each in found.items()}

    def remove(self, names: list[str]) -> None:
        """Removes objects; a missing one is no error."""
        for name in names:
            try:
                self.fs.rm_file(self._path(name))
            except FileNotFoundError:
                continue

    def upload(self, file: Path, name: str) -> None:
        """Writes a file's content to an object.

        Raises:
            OSError: the file is a symbolic link, or cannot be read; or the store failed.
        """
        open_plain(file, "rb").close()
        self.fs.put_file(str(file), self._path(name))

    def download(self, name: str, folder: Path) -> Path:
        """Downloads an object into a folder, under the last part of its name; the file appears whole or not at all.

        Everything that is downloaded goes through here.

        Raises:
            UnsafeName: the name could lead out of the folder.
        """
        *parents, last = name.split("/")
        check_names([*parents, last], self.url)
        file = folder / last
        folder.mkdir(parents=True, exist_ok=True)
        incomplete = folder / f".{uuid.uuid4().hex}"
        try:
            self.fs.get_file(self._path(name), str(incomplete))
            incomplete.replace(file)
        finally:
            incomplete.unlink(missing_ok=True)
        return file

    def upload_folder(self, folder: Path, name: str, call: Callable[[Callable[[], None]], None] = retry) -> None:
        """Uploads a folder's files one by one, each through ``call``, and its manifest last.

        The manifest is the folder's own, or is made here with the size and SHA-256 of each file.
        """
        own = folder / MANIFEST
        files = [path for path in sorted(folder.iterdir()) if path.name != MANIFEST]
        manifest = own.read_bytes() if own.exists() else None
        if manifest is None:
            described = {path.name: {"bytes": path.stat().st_size, "sha256": content_hash(path)} for path in files}
            manifest = json.dumps(described, indent=1).encode()
        for path in files:
            call(partial(self.upload, path, f"{name}/{path.name}"))
        call(partial(self.write, f"{name}/{MANIFEST}", manifest))

    def download_folder(self, name: str, folder: Path) -> bool:
        """Downloads a folder with its manifest, and returns whether it is whole; what is wrong with it is logged.

        The manifest is checked before anything is written. A file has the size, and where the manifest has one the
        SHA-256, that is written there.
        """
        manifest = retry(lambda: self.read(f"{name}/{MANIFEST}"))
        if manifest is None:
            return False
        try:
            for file, described in _parse_manifest(manifest).items():
                path = retry(partial(self.download, f"{name}/{file}", folder))
                if path.stat().st_size != described["bytes"]:
                    raise ValueError(f"{file} has {path.stat().st_size:,} bytes, not {described['bytes']:,}")
                if "sha256" in described and content_hash(path) != described["sha256"]:
                    raise ValueError(f"{file} has another SHA-256 than its manifest says")
        except (ValueError, FileNotFoundError) as error:
            logger.warning("%s/%s is damaged: %s", self.url, name, error)
            return False
        replace_file(folder / MANIFEST, manifest)
        return True

    def remove_folder(self, name: str) -> None:
        """Removes a folder, its manifest first: what remains meanwhile does not count as whole."""
        names = self.names(name)
        self.remove(sorted(names, key=lambda found: not found.endswith(f"/{MANIFEST}")))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root


class LocalStore:
    """The part of :class:`ObjectStore` that leases need, for a local or shared folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, name: str) -> bytes | None:
        """A file's content, or None if there is none."""
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Writes a file whole or not at all."""
        incomplete = self.root / f".{uuid.uuid4().hex}"
        # Without fsync, which may wait for a checkpoint: a late heartbeat would lose the lease.
        with open_plain(incomplete, "xb") as file:
            file.write(content)
        incomplete.replace(self.root / name)

    def create(self, name: str, content: bytes) -> bool:
        """As :meth:`ObjectStore.create`; a reader may see the file before its content."""
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            with open_plain(self.root / name, "xb") as file:
                file.write(content)
        except FileExistsError:
            return False
        return True

    def names(self, prefix: str) -> list[str]:
        """The names of the files in a folder, sorted."""
        return sorted(path.relative_to(self.root).as_posix() for path in (self.root / prefix).glob("*"))

    def remove(self, names: list[str]) -> None:
        """Removes files; a missing one is no error."""
        for name in names:
            (self.root / name).unlink(missing_ok=True)
