"""Where a result comes from: the code's commit and the packages' versions."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

PACKAGES = ("longspan", "torch", "transformers", "peft", "ray", "mlflow", "datasets", "numpy")


@dataclass(frozen=True)
class Provenance:
    git_commit: str | None
    packages: dict[str, str] = field(default_factory=dict)

    @classmethod
    def collect(cls) -> Provenance:
        return cls(git_commit(), package_versions())

    def tags(self) -> dict[str, str]:
        """As tags of an MLflow run."""
        return {"git_commit": self.git_commit} if self.git_commit else {}


def package_versions() -> dict[str, str]:
    """The installed versions of what a result depends on."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def git_commit() -> str | None:
    """The commit that longspan runs from, with ``-dirty`` where files differ from it; None outside a git checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None
