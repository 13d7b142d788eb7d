"""Checkpoints that are whole or absent: a manifest with size and SHA-256 of each file, verified before loading.

A checkpoint is written into a folder with a temporary name, its manifest last, and renamed when complete, so that
whatever dies on the way leaves nothing partial under a final name. Loading takes the newest one whose files match
their manifest, and falls back to the one before. Tensors are safetensors; nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"
STATE = "state.json"


def save_checkpoint(
    root: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], keep: int = 2
) -> Path:
    """Writes checkpoint ``step`` under ``root`` and keeps the newest ``keep``.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are untouched and nothing partial stays.
    """
    final = root / f"step-{step:08d}"
    partial = root / f".partial-{step:08d}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, partial / TENSORS)
        (partial / STATE).write_text(json.dumps({"step": step, **state}))
        manifest = {name: _describe(partial / name) for name in (TENSORS, STATE)}
        _write_durably(partial / MANIFEST, json.dumps(manifest, indent=1))
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        raise OSError(f"checkpoint {final} of {size:,} bytes could not be written: {error}") from error
    for old in sorted(root.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_newest(root: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """(tensors, state) of the newest checkpoint that is whole, or None. A damaged one is reported and passed over."""
    for folder in sorted(root.glob("step-*"), reverse=True):
        if problem := damage(folder):
            logger.warning("checkpoint %s is damaged (%s); falling back to the one before", folder, problem)
            continue
        return load_file(folder / TENSORS), json.loads((folder / STATE).read_text())
    return None


def newest_step(root: Path) -> int | None:
    """The step of the newest whole checkpoint, or None."""
    for folder in sorted(root.glob("step-*"), reverse=True):
        if not damage(folder):
            return int(folder.name.removeprefix("step-"))
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if each of its files matches the manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {error}"
    for name in (TENSORS, STATE):
        if name not in manifest:
            return f"{name} is not in the manifest"
        try:
            found = _describe(folder / name)
        except OSError as error:
            return str(error)
        if found != manifest[name]:
            return f"{name} has {found['bytes']} bytes, SHA-256 {found['sha256'][:12]}…; expected {manifest[name]}"
    return None


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
