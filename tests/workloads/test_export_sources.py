"""Which trial, checkpoint and base an export takes, and what it refuses."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.support.trained_trials import CONTEXT, TINY, llama
from workloads.errors import InputError
from workloads.export import export_trial
from workloads.models.source import ModelSource
from workloads.trained import TrainedTrial
from workloads.training.checkpoint import load_newest, save_checkpoint


def test_a_folder_that_is_no_trial_names_those_below_it(trial, tmp_path):
    for folder in (tmp_path, tmp_path / "trials"):
        with pytest.raises(InputError, match=f"no trial's folder.*{trial}"):
            export_trial(folder, tmp_path / "out")
    with pytest.raises(InputError, match="runs/trials/<fingerprint>"):
        export_trial(tmp_path / "nowhere", tmp_path / "out")
    (trial / "trial.json").write_text('{"model": "builtin:tiny"}')
    with pytest.raises(InputError, match="not what this version of longspan writes"):
        export_trial(trial, tmp_path / "out")


def test_an_unfinished_trial_offers_its_last_checkpoint(trial, tmp_path):
    shutil.rmtree(trial / "checkpoints" / "step-00000003")
    with pytest.raises(InputError, match=r"step 2 of 3.*--unfinished"):
        export_trial(trial, tmp_path / "out")
    assert export_trial(trial, tmp_path / "out", unfinished=True).step == 2
    assert "| Steps | 2 of 3 |" in (tmp_path / "out" / "README.md").read_text()


def test_the_best_checkpoint_or_any_that_is_kept_can_be_taken(trial, train, tmp_path):
    state = trial / "checkpoints" / "step-00000003" / "state.json"
    best = json.loads(state.read_text())["best"]["step"]
    events = TrainedTrial.open(trial).evaluations()
    evaluated = {e["step"]: e["perplexity"] for e in events if e["step"] and e["context_length"] == CONTEXT}
    assert best == min(evaluated, key=evaluated.get)
    assert export_trial(trial, tmp_path / "best", checkpoint="best").step == best
    other = 3 if best == 2 else 2
    assert export_trial(trial, tmp_path / "other", checkpoint=str(other)).step == other
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("best", "other"))
    assert any(not torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(InputError, match=r"no whole checkpoint of step 1 .*there are: 2, 3"):
        export_trial(trial, tmp_path / "out", checkpoint="1")
    with pytest.raises(InputError, match=r"'newest': expected last, best, or a step"):
        export_trial(trial, tmp_path / "out", checkpoint="newest")


def test_a_truncated_checkpoint_is_named(trial, tmp_path):
    file = trial / "checkpoints" / "step-00000003" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"step-00000003 is damaged.*bytes"):
        export_trial(trial, tmp_path / "out")
    shutil.rmtree(trial / "checkpoints" / "step-00000002")
    with pytest.raises(InputError, match=r"no whole checkpoint.*step-00000003 is damaged"):
        export_trial(trial, tmp_path / "out", unfinished=True)
    with (trial / "journal.jsonl").open("a") as journal:
        journal.write('{"event": "failed", "time": 1, "reason": "InputError: lora_rank is 99"}\n')
    with pytest.raises(InputError, match=r"training failed \(InputError: lora_rank is 99\): fix that"):
        export_trial(trial, tmp_path / "out", unfinished=True)


@pytest.mark.parametrize("other", ["lora", "full"])
def test_another_models_checkpoint_is_refused(other, trial, train, tmp_path):
    foreign = train(other, False, "linear").folder / "checkpoints"
    shutil.rmtree(trial / "checkpoints")
    shutil.copytree(foreign, trial / "checkpoints")
    with pytest.raises(InputError, match="another model's parameters"):
        export_trial(trial, tmp_path / "out")


def test_a_checkpoint_of_another_size_is_refused(trial, tmp_path):
    tensors, _ = load_newest(trial / "checkpoints")
    norm = "model/base_model.model.model.norm.weight"
    tensors[norm] = tensors[norm][:-1].contiguous()
    save_checkpoint(trial / "checkpoints", 3, tensors, {})
    with pytest.raises(InputError, match=r"norm\.weight is \(31,\) there and \(32,\)"):
        export_trial(trial, tmp_path / "out")


def test_a_base_that_moved_is_found_and_another_one_refused(trial, train, tmp_path):
    values = json.loads((trial / "trial.json").read_text())
    moved = shutil.copytree(values["model_location"], tmp_path / "moved")
    values["model_location"] = values["model"] = str(tmp_path / "gone")
    (trial / "trial.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"gone.*--base"):
        export_trial(trial, tmp_path / "out")
    other = train("lora", True, "yarn").base.location
    with pytest.raises(InputError, match="was trained from the base"):
        export_trial(trial, tmp_path / "out", base=other)
    assert export_trial(trial, tmp_path / "out", base=str(moved)).step == 3


def test_a_tokenizer_that_does_not_match_is_refused(tmp_path, train):
    """Tokens without an embedding: the base itself is broken, so its identity cannot tell."""
    trained = train("untuned", False, "yarn")
    base = tmp_path / "base"
    llama(vocab_size=200).save_pretrained(base)
    TINY.tokenizer().save_pretrained(base)
    trial = shutil.copytree(trained.folder, tmp_path / "trial")
    values = json.loads((trial / "trial.json").read_text())
    values["identities"]["model"] = ModelSource.parse(str(base)).identity
    (trial / "trial.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"tokenizer.*does not match.*id 257.*200 embeddings"):
        export_trial(trial, tmp_path / "out", base=str(base))


def test_a_folder_that_holds_something_is_left_alone(train, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        export_trial(train("full", False, "linear").folder, tmp_path / "out")
    with pytest.raises(InputError, match="is a file"):
        export_trial(train("full", False, "linear").folder, tmp_path / "out" / "notes")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes"]
