"""Checkpoints are whole or absent: whatever is done to a file is noticed, and the one before is taken."""

import resource
import subprocess
import sys
import textwrap

import pytest
import torch

from workloads.checkpoint import MANIFEST, STATE, TENSORS, damage, load_newest, newest_step, save_checkpoint


def tensors(value):
    return {"model/weight": torch.full((100, 3), float(value)), "random/cpu": torch.arange(5, dtype=torch.uint8)}


@pytest.fixture
def two_checkpoints(tmp_path):
    for step in (10, 20):
        save_checkpoint(tmp_path, step, tensors(step), {"note": f"at {step}"})
    return tmp_path


def test_the_newest_comes_back_as_it_was(two_checkpoints):
    loaded, state = load_newest(two_checkpoints)
    assert state == {"step": 20, "note": "at 20"}
    for name, tensor in tensors(20).items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype


@pytest.mark.parametrize("name", [MANIFEST, STATE, TENSORS])
@pytest.mark.parametrize("harm", ["delete", "truncate", "zero", "empty", "flip a bit"])
def test_any_damage_is_noticed_and_the_checkpoint_before_is_taken(two_checkpoints, name, harm):
    path = two_checkpoints / "step-00000020" / name
    content = path.read_bytes()
    if harm == "delete":
        path.unlink()
    else:
        flipped = bytes([content[-3] ^ 1])
        path.write_bytes(
            {
                "truncate": content[:-1],
                "zero": bytes(len(content)),
                "empty": b"",
                "flip a bit": content[:-3] + flipped + content[-2:],
            }[harm]
        )
    assert damage(path.parent)
    assert newest_step(two_checkpoints) == 10
    _, state = load_newest(two_checkpoints)
    assert state["step"] == 10


def test_only_the_newest_are_kept(two_checkpoints):
    save_checkpoint(two_checkpoints, 30, tensors(30), {})
    assert sorted(p.name for p in two_checkpoints.iterdir()) == ["step-00000020", "step-00000030"]


def test_no_checkpoint_is_none(tmp_path):
    assert load_newest(tmp_path / "nothing") is None


def test_a_full_disk_names_path_and_bytes_and_leaves_the_checkpoint_before(two_checkpoints):
    """A file-size limit stands for the full disk: a write fails in the middle."""
    script = f"""
        import resource, signal, sys, torch
        from pathlib import Path
        from workloads.checkpoint import save_checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, {resource.RLIM_INFINITY}))
        try:
            save_checkpoint(Path({str(two_checkpoints)!r}), 30, {{"big": torch.zeros(100_000)}}, {{}})
        except OSError as error:
            sys.exit(f"refused: {{error}}")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert "refused" in done.stderr and "step-00000030" in done.stderr and "400,000 bytes" in done.stderr
    assert sorted(p.name for p in two_checkpoints.iterdir()) == ["step-00000010", "step-00000020"]
    assert newest_step(two_checkpoints) == 20
