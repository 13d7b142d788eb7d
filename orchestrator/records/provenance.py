"""Where a result comes from: the code's commit and diff, the packages, the machine and its price."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clusters.prices import ANY, price_per_gpu_hour, read_prices
from orchestrator.gpus import nvidia_driver
from orchestrator.run_options import RunOptions
from workloads.engines.allocator import allocator_settings
from workloads.errors import InputError
from workloads.files.safe import replace_file

if TYPE_CHECKING:
    import torch

# Packages that a result or its speed depends on.
PACKAGES = (
    "longspan", "torch", "transformers", "peft", "ray", "mlflow", "datasets", "numpy", "tokenizers", "safetensors",
    "deepspeed", "flash-attn", "flash-attn-4", "liger-kernel", "bitsandbytes", "optuna",
)  # fmt: skip
# longspan's own folder: commit and diff cover nothing else.
SOURCE = Path(__file__).parents[2]
# A larger diff is cut: each trial keeps one, and MLflow's pages show up to this size at once.
MOST_DIFF_BYTES = 2**20

# Tracked files that the diff leaves out: their names suggest credentials.
_SECRET_FILES = (
    *(".env*", ".netrc", "*.pem", "*.key", "*.p12", "*token", "*_token.*", "token.*"),
    *("*secret*", "*credential*", "*password*"),
)
# Values in the diff that are replaced: tokens of well-known forms, a password in an address, and values assigned to
# names such as api_key.
_SECRETS = (
    (re.compile(r"\b(?:hf_|ghp_|gho_|github_pat_|glpat-|sk-|xox[abp]-|AKIA|ASIA)[\w-]{12,}"), "[left out]"),
    (re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"), "[left out]"),
    (
        re.compile(
            r"(?i)(\b\w*(?:token|secret|passw(?:or)?d|api_?key|access_?key|private_?key)\w*[\"']?\s*[=:]\s*)"
            r"(?:[\"'][^\"'\n]{6,}[\"']|[A-Za-z0-9/+_.-]*\d[A-Za-z0-9/+_.-]{7,})"
        ),
        r"\1[left out]",
    ),
)


@dataclass(frozen=True)
class Provenance:
    """The provenance of the process that starts a sweep; its workers run the same code."""

    git_commit: str | None
    packages: dict[str, str] = field(default_factory=dict)
    diff: str | None = None

    @classmethod
    def collect(cls) -> Provenance:
        """That of this process."""
        commit = git_commit()
        dirty = commit is not None and commit.endswith("-dirty")
        return cls(commit, package_versions(), git_diff() if dirty else None)

    def tags(self) -> dict[str, str]:
        """The tags of an MLflow run; its page shows those of MLflow's own names as source and version."""
        source = {"mlflow.source.name": "longspan", "mlflow.source.type": "LOCAL"}
        if self.git_commit is None:
            return source
        commit = self.git_commit.removesuffix("-dirty")
        return source | {"mlflow.source.git.commit": commit, "git_commit": self.git_commit}

    @property
    def diff_name(self) -> str | None:
        """The diff's file name, by its content: a trial resumed with other code has several."""
        return f"code-{hashlib.sha256(self.diff.encode()).hexdigest()[:8]}.diff" if self.diff else None

    def keep_diff(self, folder: Path) -> Path | None:
        """Writes the diff into a trial's or a sweep's folder; None if the code is as committed."""
        if self.diff is None or self.diff_name is None:
            return None
        path = folder / self.diff_name
        if not path.exists():
            replace_file(path, self.diff.encode())
        return path

    def of_attempt(self) -> dict[str, str | None]:
        """Fields of the journal's ``started`` that a worker cannot know: it may have no git and no checkout."""
        return {"git_commit": self.git_commit, "git_diff": self.diff_name}


def package_versions() -> dict[str, str]:
    """The installed versions of the packages that a result depends on."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def git_commit(source: Path = SOURCE) -> str | None:
    """The commit that longspan runs from, with ``-dirty`` if tracked files differ from it.

    None outside a git checkout, and if longspan is merely installed inside somebody else's.
    """
    if _git(source, "ls-files", "--error-unmatch", "orchestrator/records/provenance.py") is None:
        return None
    commit = _git(source, "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    return commit.strip() + ("-dirty" if _git(source, "diff", "--quiet", "HEAD", "--", ".") is None else "")


def without_secrets(text: str) -> str:
    """The text with values replaced that look like credentials."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def git_diff(source: Path = SOURCE) -> str:
    """The changes of tracked files in longspan's folder since the commit, under a heading that says what is left out.

    Left out: untracked, ignored and binary files, files named like credentials, and the environment. Values that look
    like credentials are replaced, and the diff is cut at MOST_DIFF_BYTES.
    """
    left_out = [f":(exclude,glob,icase)**/{pattern}" for pattern in _SECRET_FILES]
    plain = ("--no-color", "--no-ext-diff", "--no-textconv", "--relative")
    diff = _git(source, "diff", *plain, "HEAD", "--", ".", *left_out) or ""
    diff = without_secrets(diff)
    content, cut = diff.encode(), ""
    if len(content) > MOST_DIFF_BYTES:
        diff = content[:MOST_DIFF_BYTES].decode(errors="ignore")
        cut = f"# Cut: {len(content) - MOST_DIFF_BYTES:,} bytes more are left out.\n"
    commit = git_commit(source) or "unknown"
    untracked = len((_git(source, "ls-files", "--others", "--exclude-standard") or "").splitlines())
    return (
        f"# Changes of longspan's tracked files since commit {commit.removesuffix('-dirty')}.\n"
        f"# Left out: untracked files ({untracked} here) and ignored ones, binary files' content, files named like\n"
        f"# {' '.join(_SECRET_FILES)}, and values that look like credentials.\n"
        f"{cut}{diff}"
    )


def _git(folder: Path, *arguments: str) -> str | None:
    """Git's output, or None if it fails, is not installed, or takes longer than 20 s."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder, capture_output=True, text=True, errors="replace", timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def describe_machine(device: torch.device, workers: int, prices: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The machine of worker 0 with its devices, driver and packages, as fields of the journal's ``started``.

    ``devices`` counts all of the trial's GPUs, or threads of CPUs. ``usd_per_device_hour`` is the price of an hour of
    one of them and ``price_source`` its source (``prices``: the user's own, see
    :func:`clusters.prices.price_per_gpu_hour`); both are None if the price is not known.
    """
    import torch

    described = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "workers": workers,
        "hardware": hardware(device, workers),
        "cpus": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": package_versions(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {
            "device": "gpu",
            "devices": workers,
            "device_name": torch.cuda.get_device_name(device),
            "device_memory_gib": round(properties.total_memory / 2**30, 2),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "driver": nvidia_driver(),
            "cuda": torch.version.cuda,
            "allocator": allocator_settings(),
        }
    else:
        described |= {"device": "cpu", "devices": workers * torch.get_num_threads(), "device_name": cpu_name()}
    return described | _price(described, prices or {})


def _price(described: dict[str, Any], prices: Mapping[str, float]) -> dict[str, Any]:
    if described["device"] == "gpu":
        price = price_per_gpu_hour(described["device_name"], prices)
        usd, source = (price.usd, price.source) if price else (None, None)
    else:
        usd = prices.get(ANY)
        source = "given by the user" if usd else None
    return {"usd_per_device_hour": usd, "price_source": source}


def own_prices(options: RunOptions) -> dict[str, float]:
    """The user's own prices, for :func:`clusters.prices.price_per_gpu_hour`.

    Raises:
        InputError: the file of prices cannot be read, or holds an invalid price.
    """
    try:
        given = read_prices(Path(options.prices).expanduser()) if options.prices else {}
    except ValueError as error:
        raise InputError(f"--prices: {error}") from error
    return given | ({ANY: options.price_per_hour} if options.price_per_hour is not None else {})


def hardware(device: torch.device, workers: int) -> str:
    """``2 x NVIDIA H200`` or ``1 x 1 CPU thread (AMD EPYC)``."""
    import torch

    if device.type == "cuda":
        return f"{workers} x {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{workers} x {threads} CPU thread{'s' if threads > 1 else ''} ({cpu_name()})"


@functools.cache
def cpu_name() -> str:
    """The CPU's model, such as AMD EPYC."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None
