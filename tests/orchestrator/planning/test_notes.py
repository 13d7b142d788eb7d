"""Which notes a sweep prints before its plan, and which it leaves out."""

import json

import pytest

from orchestrator.planning.notes import notes
from orchestrator.run_options import RunOptions
from orchestrator.spec import SweepSpec
from workloads.data import Instructions, prepare_examples
from workloads.models.source import ModelSource

SOURCE = ModelSource.parse("builtin:tiny")


def notes_of(scored=20, original_length=512, examples=None, **changes):
    """The notes of a sweep of which there is nothing to say but what ``changes`` bring."""
    options = {name: changes.pop(name) for name in ("engine", "workers", "offload") if name in changes}
    spec = SweepSpec(**{"context_lengths": (1024,), "steps": 100, "eval_documents": 20, **changes})
    return list(notes(spec, RunOptions(**options), original_length, examples, scored))


def test_there_is_nothing_to_say_of_a_usual_sweep():
    assert notes_of() == []


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"original_length": 1024}, "1,024 tokens are within the model's original context of 1,024"),
        ({"scored": 12}, "only 12 of the 20 requested held-out documents are long enough to score"),
        ({"scored": 4, "eval_documents": 4}, "4 documents are too few for an interval"),
        ({"steps": 10}, "the warm-up takes 20 steps of 10: the learning rate only rises, to 50% of its peak"),
        ({"engine": "zero2"}, "--engine zero2 with one worker has nothing to shard"),
    ],
)
def test_what_is_allowed_but_hardly_meant_is_noted(changes, note):
    (only,) = notes_of(**changes)
    assert note in only


def test_an_engine_that_has_an_effect_is_not_spoken_of():
    assert notes_of(engine="zero2", workers=2) == notes_of(engine="zero3", offload=True) == []


def test_short_examples_and_left_out_ones_are_noted_with_their_share(tmp_path):
    rows = [{"instruction": f"{i:02}", "output": "b" * size} for i, size in enumerate([99] * 30 + [2000] * 10)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    examples = prepare_examples(
        Instructions.parse(str(tmp_path / "rows.json")), SOURCE.tokenizer, SOURCE.chat_identity, tmp_path / "data"
    )
    left_out, unused = notes_of(examples=examples, task="sft")
    assert "longer than 1,024 tokens and are dropped" in left_out
    assert "fill 11% of 1,024 tokens on average, 89% of the context is unused" in unused  # 113 tokens, one a byte
