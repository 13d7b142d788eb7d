"""Checkpoints that are whole or absent: a manifest with size and SHA-256 of each file, verified before loading.

A checkpoint is written into a folder with a temporary name, its manifest last, and renamed once all of it is on disk:
a process that dies midway leaves nothing partial under a final name. Loading takes the newest one whose files match
their manifest, and falls back to the one before. Tensors are safetensors; nothing is ever unpickled.

A folder of checkpoints has one writer at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from workloads.errors import reason
from workloads.files.json_text import json_text
from workloads.files.safe import flush

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"
STATE = "state.json"
# Prefix of folders that are being written or discarded; the next save removes those of a process that died.
TEMPORARY = ".partial-"


def save_checkpoint(
    root: Path,
    step: int,
    tensors: dict[str, torch.Tensor],
    state: dict[str, Any],
    *,
    keep_last: int = 2,
    keep_every: int | None = None,
    best: int | None = None,
) -> Path:
    """Writes checkpoint ``step`` under ``root`` and removes those that are not :func:`kept_steps`.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are untouched and nothing partial remains.
    """
    final = _folder(root, step)
    partial = root / f"{TEMPORARY}{final.name}"
    try:
        for leftover in root.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, partial / TENSORS)
        (partial / STATE).write_text(json_text({"step": step, **state}), "utf-8")
        # safetensors ignores the umask and writes for the owner alone; a shared storage has other readers.
        (partial / TENSORS).chmod((partial / STATE).stat().st_mode)
        manifest = {name: _describe(partial / name) for name in (TENSORS, STATE)}
        (partial / MANIFEST).write_text(json_text(manifest, indent=1), "utf-8")
        for path in (*partial.iterdir(), partial):
            flush(path)
        if final.exists():
            _discard(final)
        partial.rename(final)
        flush(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        raise OSError(f"checkpoint {final} of {size:,} bytes could not be written: {error}") from error
    steps = {int(folder.name.removeprefix("step-")): folder for folder in _folders(root)}
    for old in steps.keys() - kept_steps(steps, step, keep_last=keep_last, keep_every=keep_every, best=best):
        _discard(steps[old])
    return final


def kept_steps(
    steps: Iterable[int], newest: int, *, keep_last: int = 2, keep_every: int | None = None, best: int | None = None
) -> set[int]:
    """Which of the checkpoints of these steps stay once ``newest`` is written.

    These are the last ``keep_last``, one every ``keep_every`` steps, and the best. Later ones do not: they were
    damaged, and the run has passed them again from an earlier one.
    """
    past = sorted(step for step in steps if step <= newest)
    kept = set(past[-keep_last:]) | {step for step in past if step == best}
    return kept | {step for step in past if keep_every and step % keep_every == 0}


def load_newest(root: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """(tensors, state) of the newest whole checkpoint, or None. A damaged one is logged and skipped."""
    step = newest_step(root)
    return None if step is None else load_checkpoint(root, step)


def load_checkpoint(root: Path, step: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, state) of a checkpoint that :func:`newest_step` found whole; tensors may be mapped from the file."""
    folder = _folder(root, step)
    return load_file(folder / TENSORS), read_state(root, step)


def read_state(root: Path, step: int) -> dict[str, Any]:
    """The state alone of a checkpoint that :func:`newest_step` found whole."""
    return json.loads((_folder(root, step) / STATE).read_text("utf-8"))


def whole_steps(root: Path) -> list[int]:
    """The steps of all whole checkpoints, in increasing order."""
    return [int(folder.name.removeprefix("step-")) for folder in _folders(root) if damage(folder) is None]


def newest_step(root: Path) -> int | None:
    """The step of the newest whole checkpoint, or None. A damaged one is logged and skipped."""
    for folder in reversed(_folders(root)):
        if problem := damage(folder):
            logger.warning("checkpoint %s is damaged (%s); falling back to the one before", folder, problem)
            continue
        return int(folder.name.removeprefix("step-"))
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if its files match the manifest and its state has its step."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"{MANIFEST}: {error}"
    if not isinstance(manifest, dict):
        return f"{MANIFEST} is no JSON object"
    for name in (TENSORS, STATE):
        if name not in manifest:
            return f"{name} is not in the manifest"
        try:
            found = _describe(folder / name)
        except OSError as error:
            return str(error)
        if found != manifest[name]:
            return f"{name} has {found['bytes']} bytes, SHA-256 {found['sha256'][:12]}…; expected {manifest[name]}"
    try:
        step = json.loads((folder / STATE).read_text("utf-8"))["step"]
        return None if folder.name == _folder(folder.parent, step).name else f"it is of step {step}"
    except Exception as error:  # whole, by its manifest, but not written by this program
        return f"{STATE}: {reason(error)}"


def _folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def _folders(root: Path) -> list[Path]:
    """The checkpoints under their final names, whole or not, oldest first."""
    return sorted(root.glob("step-" + "[0-9]" * 8))


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _discard(folder: Path) -> None:
    """Removes a checkpoint; a process that dies midway leaves no part of it under its final name."""
    discarded = folder.with_name(f"{TEMPORARY}discarded-{folder.name}")
    folder.rename(discarded)
    shutil.rmtree(discarded, ignore_errors=True)
