"""Where torch's compiler caches compiled code, which the next process loads instead of compiling again.

The compiler's caches (of graphs, of their backward passes, of kernels) are on by default and may be used by many
processes and nodes at once: each file is written under another name and renamed. They hold pickles and machine code,
which loading executes. They must therefore be where only the user can write: not in an object store, and not in torch's
default, a folder in /tmp with a name that anyone can guess and create first.

They are of no use to another torch, machine or version of longspan, and may be removed at any time.
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

# torch reads it when it first compiles, and puts Triton's cache below it unless TRITON_CACHE_DIR is set.
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
TORCHS_DEFAULT = str(Path(tempfile.gettempdir(), "torchinductor_"))  # followed by the user's name
SOURCE = Path(__file__).parents[1]
# Their operators and kernels are opaque to the compiler: its keys do not cover their code.
PACKAGES = ("torch", "triton", "flash-attn", "flash-attn-4", "liger-kernel", "bitsandbytes")


def keep_compiled(shared: Path | None = None) -> None:
    """Caches what this process compiles in ``shared``, a folder of the sweep's storage, or in this user's cache.

    ``shared`` is used if only this user can write there (:func:`workloads.files.cache.private_folder`), else the cache
    on this node. Call it before anything is compiled. A folder that the user has set (TORCHINDUCTOR_CACHE_DIR) stays.
    """
    # Torch sets its default when its compiler is imported; defining an operator is enough for that.
    if not os.environ.get(VARIABLE, TORCHS_DEFAULT).startswith(TORCHS_DEFAULT):
        return
    folders = (private_folder(each) for each in (shared, user_cache() / "compiled") if each)
    folder = next(filter(None, folders), None)
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="longspan-compiled-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[VARIABLE] = str(folder / _environment_hash())


def _environment_hash() -> str:
    """Hash of what compiled code depends on beside the compiler's own keys (the graph, its settings, the GPU).

    Machine code is for one kind of processor and C library. Of an operator that is not compiled, the caches hold how it
    was called, in the forward and the backward pass, but not the code that determines this.
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
    """The processor's instruction set, as the kernel lists it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
