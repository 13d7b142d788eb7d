"""Checkpoints are whole or absent: whatever is done to a file is noticed, and the one before is taken."""

import hashlib
import json
import os
import resource
import shutil
import signal

import pytest
import torch

from tests.support.workers import FORK_SERVER
from workloads.training import checkpoint
from workloads.training.checkpoint import (
    MANIFEST,
    STATE,
    TENSORS,
    damage,
    load_newest,
    newest_step,
    save_checkpoint,
    whole_steps,
)


def tensors(value):
    return {"model/weight": torch.full((100, 3), float(value)), "random/cpu": torch.arange(5, dtype=torch.uint8)}


@pytest.fixture
def two_checkpoints(tmp_path):
    for step in (10, 20):
        save_checkpoint(tmp_path, step, tensors(step), {"note": f"at {step}"})
    return tmp_path


@pytest.mark.parametrize("state", ["[]", "{}", "[" * 9**6, '{"step": "two"}'])
def test_a_checkpoint_whose_state_is_none_is_damaged_though_its_manifest_agrees(state, tmp_path):
    save_checkpoint(tmp_path, 2, {"w": torch.zeros(2)}, {"seed": 0})
    folder = tmp_path / "step-00000002"
    (folder / "state.json").write_text(state)
    described = {"bytes": len(state), "sha256": hashlib.sha256(state.encode()).hexdigest()}
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "state.json": described}))
    assert "state.json" in damage(folder)
    (folder / "manifest.json").write_text("[" * 9**6)
    assert "manifest.json" in damage(folder)


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


@pytest.mark.parametrize("what", ["an empty folder", "another's manifest", "another's files", "a file", "a list"])
def test_a_folder_that_is_no_checkpoint_of_its_step_is_passed_over(two_checkpoints, what):
    first, newest = two_checkpoints / "step-00000020", two_checkpoints / "step-00000030"
    if what == "a file":
        newest.write_text("not a folder")
    else:
        newest.mkdir()
    if what == "another's files":
        shutil.copytree(first, newest, dirs_exist_ok=True)
    if what in ("another's manifest", "a list"):
        save_checkpoint(two_checkpoints / "elsewhere", 30, tensors(30), {})
        shutil.copytree(two_checkpoints / "elsewhere" / newest.name, newest, dirs_exist_ok=True)
        (newest / MANIFEST).write_bytes((first / MANIFEST).read_bytes() if what != "a list" else b'["state.json"]')
    assert damage(newest)
    assert newest_step(two_checkpoints) == 20
    assert load_newest(two_checkpoints)[1]["step"] == 20


def test_a_damaged_later_checkpoint_does_not_count_among_those_kept(two_checkpoints):
    """A run that fell back to 10 saves 15.

    If 20, which is damaged, were kept as the newest, no checkpoint would be left to fall back to.
    """
    (two_checkpoints / "step-00000020" / TENSORS).unlink()
    save_checkpoint(two_checkpoints, 15, tensors(15), {})
    assert sorted(p.name for p in two_checkpoints.iterdir()) == ["step-00000010", "step-00000015"]


def die_while_saving(folder):
    """Between the tensors and the state."""
    checkpoint.json.dumps = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    save_checkpoint(folder, 30, {"big": torch.zeros(1000)}, {})


def test_what_a_process_left_that_died_while_saving_is_removed_by_the_next_save(two_checkpoints):
    process = FORK_SERVER.Process(target=die_while_saving, args=(two_checkpoints,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(list(two_checkpoints.iterdir())) == 3
    assert newest_step(two_checkpoints) == 20
    save_checkpoint(two_checkpoints, 40, tensors(40), {})
    assert sorted(p.name for p in two_checkpoints.iterdir()) == ["step-00000020", "step-00000040"]


def test_only_the_newest_are_kept(two_checkpoints):
    save_checkpoint(two_checkpoints, 30, tensors(30), {})
    assert sorted(p.name for p in two_checkpoints.iterdir()) == ["step-00000020", "step-00000030"]


def test_no_checkpoint_is_none(tmp_path):
    assert load_newest(tmp_path / "nothing") is None


def save_on_a_full_disk(folder, refusal):
    """Writes the error to ``refusal``. A file-size limit simulates the full disk: a write fails in the middle."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    try:
        save_checkpoint(folder, 30, {"big": torch.zeros(100_000)}, {})
    except OSError as error:
        refusal.write_text(str(error))


def test_a_full_disk_names_path_and_bytes_and_leaves_the_checkpoint_before(two_checkpoints, tmp_path_factory):
    refusal = tmp_path_factory.mktemp("refusal") / "message"
    process = FORK_SERVER.Process(target=save_on_a_full_disk, args=(two_checkpoints, refusal))
    process.start()
    process.join()
    message = refusal.read_text()
    assert "step-00000030" in message and "400,000 bytes" in message
    assert sorted(p.name for p in two_checkpoints.iterdir()) == ["step-00000010", "step-00000020"]
    assert newest_step(two_checkpoints) == 20


def test_the_rule_keeps_the_last_the_best_and_every_so_manieth(tmp_path):
    def save(step, **rule):
        save_checkpoint(tmp_path, step, tensors(step), {}, **rule)
        return [int(path.name.removeprefix("step-")) for path in sorted(tmp_path.iterdir())]

    for step in (10, 20, 30, 40):
        save(step, keep_last=3, keep_every=20, best=10)
    assert whole_steps(tmp_path) == [10, 20, 30, 40]
    assert save(50, keep_last=1, keep_every=20, best=10) == [10, 20, 40, 50]
    # A run that came back to step 25 has come past what it had made after it, every and best or not.
    assert save(25, keep_last=1, keep_every=20, best=40) == [20, 25]
    assert save(30) == [25, 30]
