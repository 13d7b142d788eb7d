"""Objects under one fsspec location, such as ``s3://bucket/prefix``: read and written whole, or created only if absent.

An object store knows no appending, no renaming and no memory map; what longspan needs there is made of these few calls.
A call that fails in passing (refused or reset connections, time-outs, 5xx, throttling) is worth another try: every call
raises at once, and :func:`patiently` tries again. Credentials come from the environment or fsspec's configuration.
"""

from __future__ import annotations

import errno
import functools
import itertools
import json
import random
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from workloads.errors import InputError

T = TypeVar("T")

# How long a store may be away before what needs it ends in an error; and, at the start of a command, before it is told.
PATIENCE_S = 300.0
FIRST_PATIENCE_S = 15.0
LONGEST_PAUSE_S = 10.0
# What a client raises when the way to the store is broken, by name: which libraries lie on that way is up to fsspec.
PASSING = {
    "ConnectionError", "HTTPClientError", "ClientConnectionError", "ClientPayloadError", "IncompleteRead",
    "ResponseParserError", "TimeoutError",
}  # fmt: skip
FINAL_OS_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
FINAL_ERRNOS = {errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENAMETOOLONG, errno.EMSGSIZE}

# Of a folder that was stored: written last, so that a folder with it is whole.
MANIFEST = "manifest.json"


class StoreAway(ConnectionError):
    """The store has not answered for as long as it was waited for."""


def is_passing(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    if isinstance(error, FINAL_OS_ERRORS):
        return False
    if any(kind.__name__ in PASSING for kind in type(error).__mro__):
        return True
    return isinstance(error, OSError) and error.errno not in FINAL_ERRNOS


def patiently(call: Callable[[], T], give_up: Callable[[float], bool] = lambda waited: waited > PATIENCE_S) -> T:
    """``call()``, again and again while it fails in passing, with growing, jittered pauses of up to 10 s.

    Raises:
        StoreAway: ``give_up``, asked with the seconds waited so far, has had enough.
        Exception: what else ``call`` raises, at once.
    """
    began = time.monotonic()
    for attempt in itertools.count():
        try:
            return call()
        except Exception as error:
            if not is_passing(error):
                raise
            waited = time.monotonic() - began
            if give_up(waited):
                raise StoreAway(f"the storage has not answered for {waited:.0f} s ({reason(error)})") from error
        time.sleep(min(LONGEST_PAUSE_S, 0.25 * 2 ** min(attempt, 10)) * random.uniform(0.5, 1))


def reason(error: BaseException) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


class ObjectStore:
    """The objects under ``url``, named relative to it."""

    def __init__(self, url: str, **options: Any) -> None:
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        self.fs, path = url_to_fs(self.url, **options)
        self.root = path.rstrip("/")
        self.trouble: str | None = None  # why the last reader that does not wait got no answer

    @classmethod
    @functools.cache
    def at(cls, url: str) -> ObjectStore:
        """The store at a location, one a process.

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
        # Listings change under us; and clients are kept here.
        options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
        if parts.scheme in ("s3", "s3a"):
            from fsspec.config import conf

            # Waiting for a store that is away is `patiently`'s business.
            config = {"connect_timeout": 10, "retries": {"mode": "standard", "max_attempts": 2}}
            config |= conf.get(parts.scheme, {}).get("config_kwargs", {})
            options["config_kwargs"] = config
        try:
            return cls(url, **options)
        except ImportError as error:
            extra = "'longspan[s3]'" if parts.scheme in ("s3", "s3a") else "its fsspec package"
            raise InputError(f"storage {url}: {error}; pip install {extra}") from error
        except ValueError as error:
            raise InputError(f"storage {url}: {error}; expected a folder, or a location that fsspec opens") from error

    def check(self) -> None:
        """That objects can be written here, and created only if absent.

        Raises:
            InputError: there is no such bucket, access is denied, nothing answers, or the store would let two sweeps
                create the same object.
        """
        probe = f".writable-{uuid.uuid4().hex}"

        def first(call: Callable[[], T]) -> T:
            return patiently(call, give_up=lambda waited: waited > FIRST_PATIENCE_S)

        try:
            first(lambda: self.write(probe, b"x"))
            first(lambda: self.remove([probe]))
            # At once, since a client may look whether there is one and then write: that is no protection.
            with ThreadPoolExecutor(8) as writers:
                created = list(writers.map(lambda n: first(lambda: self.create(probe, b"%d" % n)), range(8)))
            first(lambda: self.remove([probe]))
        except StoreAway as error:
            raise InputError(
                f"storage {self.url}: {error}. Check the network, and the address (AWS_ENDPOINT_URL where it is not "
                "Amazon's)"
            ) from error
        except FileNotFoundError as error:
            raise InputError(
                f"storage {self.url}: there is no bucket {self.root.partition('/')[0]}; create it, or choose another"
            ) from error
        except Exception as error:  # whatever fsspec and the store's client raise for what is not to be had
            raise InputError(
                f"storage {self.url} cannot be written ({reason(error)}); check the credentials in the environment and "
                "what they allow: list, read, write and delete"
            ) from error
        if created.count(True) != 1:
            raise InputError(
                f"storage {self.url} overwrites an object that was to be created only if absent; two sweeps could "
                "train the same trial there. Choose a store with conditional writes, such as Amazon S3"
            )

    def read(self, name: str) -> bytes | None:
        """An object's content, or None where there is none."""
        try:
            return self.fs.cat_file(self._path(name))
        except FileNotFoundError:
            return None

    def read_many(self, names: list[str]) -> list[bytes]:
        """The contents of objects that are there, many at a time."""
        if not names:
            return []
        contents = self.fs.cat([self._path(name) for name in names])
        return [contents[self._path(name)] for name in names]

    def write(self, name: str, content: bytes) -> None:
        self.fs.pipe_file(self._path(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Writes an object only if it is absent. Returns whether it was: of several who try, one succeeds."""
        try:
            self.fs.pipe_file(self._path(name), content, mode="create")
        except FileExistsError:
            return False
        return True

    def names(self, prefix: str) -> list[str]:
        """The objects below ``prefix``, a folder's name, in order of their names."""
        folder = f"{self._path(prefix)}/"
        # s3fs names the folder itself where its first object comes while it looks.
        found = (path for path in self.fs.find(self._path(prefix)) if path.startswith(folder))
        return sorted(path[len(self.root) + 1 :] for path in found)

    def sizes(self) -> dict[str, int]:
        """Bytes of every object, by its name."""
        found = self.fs.find(self._path(""), detail=True)
        return {path[len(self.root) + 1 :]: each["size"] for path, each in found.items()}

    def remove(self, names: list[str]) -> None:
        for name in names:
            try:
                self.fs.rm_file(self._path(name))
            except FileNotFoundError:
                continue

    def upload(self, file: Path, name: str) -> None:
        self.fs.put_file(str(file), self._path(name))

    def download(self, name: str, file: Path) -> None:
        """Fetches an object into a file, which appears whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
        try:
            self.fs.get_file(self._path(name), str(partial))
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)

    def upload_folder(self, folder: Path, name: str, call: Callable[[Callable[[], T]], T] = patiently) -> None:
        """Stores a folder's files one by one, each waited for by ``call``, and its manifest last: the folder's own, or
        one with the size of each file.
        """
        own = folder / MANIFEST
        files = [path for path in sorted(folder.iterdir()) if path.name != MANIFEST]
        sizes = {path.name: {"bytes": path.stat().st_size} for path in files}
        for path in files:
            call(lambda path=path: self.upload(path, f"{name}/{path.name}"))
        manifest = own.read_bytes() if own.exists() else json.dumps(sizes, indent=1).encode()
        call(lambda: self.write(f"{name}/{MANIFEST}", manifest))

    def download_folder(self, name: str, folder: Path) -> bool:
        """Fetches a stored folder, its manifest too. False if there is none that is whole, as far as sizes tell."""
        manifest = patiently(lambda: self.read(f"{name}/{MANIFEST}"))
        try:
            expected = json.loads(manifest or b"{}")
        except ValueError:
            return False
        for file, described in expected.items():
            try:
                patiently(lambda file=file: self.download(f"{name}/{file}", folder / file))
            except FileNotFoundError:
                return False
            if (folder / file).stat().st_size != described["bytes"]:
                return False
        if expected:
            (folder / MANIFEST).write_bytes(manifest)
        return bool(expected)

    def remove_folder(self, name: str) -> None:
        """Its manifest first: what is left of it in between is no whole folder."""
        names = self.names(name)
        self.remove(sorted(names, key=lambda found: not found.endswith(f"/{MANIFEST}")))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root


class LocalStore:
    """Files in a local or shared folder, for what needs no more than this of an object store."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, name: str) -> bytes | None:
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        partial = self.root / f".{uuid.uuid4().hex}"
        partial.write_bytes(content)
        partial.replace(self.root / name)

    def create(self, name: str, content: bytes) -> bool:
        """As :meth:`ObjectStore.create`; a reader may come before the content."""
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            with (self.root / name).open("xb") as file:
                file.write(content)
        except FileExistsError:
            return False
        return True

    def names(self, prefix: str) -> list[str]:
        return sorted(path.relative_to(self.root).as_posix() for path in (self.root / prefix).glob("*"))

    def remove(self, names: list[str]) -> None:
        for name in names:
            (self.root / name).unlink(missing_ok=True)
