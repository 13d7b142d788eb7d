"""Where torch's compiler keeps what it has compiled, so that the next process takes it up and compiles nothing.

The compiler's caches (of graphs, of their backward passes, of kernels) are on by default and may be used by many
processes and nodes at once: each file is written under another name and renamed. What is kept is pickles and machine
code, which whoever loads them runs: so they lie only where nobody but the user himself can write, which excludes an
object store, and torch's own default, a folder in /tmp under a name that anyone can guess and take first.

What is kept is of no use to another torch, machine or version of longspan, and may be removed at any time.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import platform
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

from workloads.files.cache import private_folder, user_cache

# torch reads it when it first compiles, and keeps Triton's cache below it unless TRITON_CACHE_DIR says otherwise.
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
TORCHS_DEFAULT = str(Path(tempfile.gettempdir(), "torchinductor_"))  # and the user's name
SOURCE = Path(__file__).parents[1]
# Whose operators and kernels the compiler takes as they are: their code is not in its keys.
PACKAGES = ("torch", "triton", "flash-attn", "flash-attn-4", "liger-kernel", "bitsandbytes")


def keep_compiled(shared: Path | None = None) -> None:
    """Has what this process compiles kept in ``shared``, a folder of the sweep's storage, if nobody but this user can
    write there (:func:`workloads.files.cache.private_folder`); else in this user's cache on this node.

    To be called before anything is compiled. A folder that the user has named himself (TORCHINDUCTOR_CACHE_DIR) stays.
    """
    # Torch names its own default there when its compiler is imported; the definition of an operator is enough for that.
    if not os.environ.get(VARIABLE, TORCHS_DEFAULT).startswith(TORCHS_DEFAULT):
        return
    folders = (private_folder(each) for each in (shared, user_cache() / "compiled") if each)
    folder = next(filter(None, folders), None)
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="longspan-compiled-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[VARIABLE] = str(folder / _made_for())


def _made_for() -> str:
    """Names all that compiled code depends on beside what is in the compiler's own keys (the graph, its settings, the
    GPU): machine code is for one kind of processor and C library; and of an operator that is not compiled the caches
    hold how it was called, forwards and backwards, but not the code that says so.
    """
    known = [platform.python_version(), platform.machine(), *platform.libc_ver(), _processor()]
    for package in PACKAGES:
        try:
            known.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    for file in sorted(SOURCE.rglob("*.py")):
        known += [file.relative_to(SOURCE).as_posix(), hashlib.sha256(file.read_bytes()).hexdigest()]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:16]


def _processor() -> str:
    """The instructions that this machine's processor has, as the kernel tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
