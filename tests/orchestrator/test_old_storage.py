"""A killed sweep of an earlier version (commit b1875aa) is trained again, and nothing of it is lost."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.commands import SweepCommand
from tests.support.storage import records
from workloads.trained import TrainedTrial

INTERRUPTED = Path(__file__).parents[1] / "data" / "b1875aa_interrupted"
# The command that was killed after the checkpoint of step 2.
FLAGS = (
    "--name", "golden", "--context-lengths", "1024", "--methods", "lora", "--lora-rank", "2",
    "--lora-targets", "q_proj", "--steps", "12", "--batch", "2", "--checkpoint-every", "2",
    "--eval-every", "12", "--eval-documents", "4", "--precision", "float32",
)  # fmt: skip
LORA = "095eaad18e88c459"
# At 1,024 tokens after 12 steps. Commit b1875aa reached 3.8338428, and so did version 3 before documents were held
# out by their texts instead of their names.
PERPLEXITY = 4.0186618


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.ray
def test_the_same_command_trains_anew_and_keeps_what_there_was(tmp_path, text_folder):
    storage = tmp_path / "runs"
    shutil.copytree(INTERRUPTED, storage)
    trials, sweep = contents(storage / "trials"), contents(storage / "sweeps" / "golden")

    status, output = SweepCommand(storage, "convergence", "--data", str(text_folder), *FLAGS).run()

    assert status == 0, output
    words = " ".join(output.split())
    assert "note: results of an earlier version of longspan are kept and not used" in words
    assert "untuned none 1024, untuned yarn 1024, untuned linear 1024, lora 1024" in words
    assert trials.items() <= contents(storage / "trials").items()
    assert contents(storage / "sweeps" / "golden" / "earlier-1") == sweep
    listed = json.loads((storage / "sweeps" / "golden" / "sweep.json").read_text())["trials"]
    found = records(storage)
    assert len(listed) == 4 and not set(listed) & {name.split("/")[0] for name in trials}
    assert {found[name].state for name in listed} == {"finished"}
    (lora,) = (found[name] for name in listed if found[name].steps)
    assert sorted(lora.steps) == list(range(1, 13)) and not lora.resumed_at
    assert lora.curve(1024)[-1].perplexity == pytest.approx(PERPLEXITY, rel=1e-4)


def test_its_checkpoint_is_still_a_model():
    """Which is what evaluate, export and ask begin with."""
    trained = TrainedTrial.open(INTERRUPTED / "trials" / LORA)
    assert (trained.label, trained.step(unfinished=True)) == ("lora 1024", 2)
    weights = trained.build(trained.base(), step=2).state_dict()
    adapted = [weight for name, weight in weights.items() if "lora_B" in name]
    assert adapted and all(weight.any() for weight in adapted)  # zeros before training
