"""Reading a trained trial's folder."""

import json

import pytest

from workloads.config import TrainingConfig
from workloads.errors import InputError
from workloads.trained import TrainedTrial


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-this-name", "nowhere", ""])
def test_what_is_no_trials_folder(name, tmp_path):
    assert not TrainedTrial.is_at(name)
    with pytest.raises(InputError, match="is no trial's folder"):
        TrainedTrial.open(tmp_path / name)


@pytest.mark.parametrize("content", ["[]", "null", "[" * 9**6, '{"model": 1}', '{"identities": 5}', "\x00"])
def test_a_broken_trial_is_one_error_that_names_its_file(content, tmp_path):
    (tmp_path / "trial.json").write_text(content)
    with pytest.raises(InputError, match=r"trial\.json is not what this version of longspan writes") as refused:
        TrainedTrial.open(tmp_path)
    assert "\n" not in str(refused.value)


def test_damaged_lines_of_its_journal_are_passed_over(tmp_path):
    def line(step, perplexity, **fields):
        return json.dumps({"event": "eval", "time": 1.5, "step": step, "perplexity": perplexity, **fields})

    lines = [
        "12", "null", "[1]", "[" * 9999, '{"event": "eval"',
        '{"event": "eval", "time": 1.5}', '{"event": 1, "time": 1.5}',
        line(2, 9.0, context_length=64), line(0, 8.0), line(0, 7.0, context_length=64), line(2, 6.0, context_length=64),
        '{"event": "failed", "time": 2.5, "reason": "lost"}', "\N{REPLACEMENT CHARACTER}",
    ]  # fmt: skip
    (tmp_path / "journal.jsonl").write_bytes("\n".join(lines).encode() + b"\xff\n")
    training = TrainingConfig(context_length=64, method="lora", attention="full", eval_span=64)
    trial = TrainedTrial(tmp_path, "m", "d", "1", "2", training, "lora 64")
    assert [(each["step"], each["perplexity"]) for each in trial.evaluations()] == [(0, 7.0), (2, 6.0)]
    assert TrainedTrial(tmp_path / "none", *["x"] * 4, training, "x").evaluations() == []
