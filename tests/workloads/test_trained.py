"""Reading a trained trial's folder."""

import json

from workloads.config import TrainingConfig
from workloads.trained import TrainedTrial


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
