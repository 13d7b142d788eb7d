"""The answer: from journals whose outcome is known to what the comparison says of them."""

from typing import get_args

import numpy as np
import pytest

from orchestrator.compare import Outcome, compare, summarise
from orchestrator.journal import Journal, TrialRecord
from orchestrator.spec import Identities, SweepSpec, TrainedMethod
from workloads.config import Positions, TrainingConfig

TOKENS = np.array([1000, 1500, 1200, 900, 1100, 1300])
HARDNESS = np.array([0.9, 1.3, 1.0, 1.1, 0.8, 1.2])


def evaluation(step, perplexity, context_length):
    """Six documents of different hardness whose joint perplexity is the one given."""
    nll = HARDNESS * TOKENS
    nll = nll + TOKENS * (np.log(perplexity) - nll.sum() / TOKENS.sum())
    return {
        "step": step, "tokens": step * 4096, "context_length": context_length, "perplexity": perplexity,
        "nll": nll.tolist(), "num_tokens": TOKENS.tolist(),
    }  # fmt: skip


def outcomes(folder, curves, finished=True, context_length=1024, seeds=(0,), **fields):
    """Outcomes of a sweep; ``curves``: perplexity by step for each method, and for the references."""
    methods = tuple(m for m in curves if m in METHODS)
    spec = SweepSpec(context_lengths=(context_length,), seeds=seeds, methods=methods, **fields)
    made = []
    for trial in spec.trials(Identities(model="m", tokenizer="t", data="d"), "float32"):
        training: TrainingConfig = trial.training
        name = training.positions if training.method == "untuned" else training.method
        journal = Journal(folder / trial.fingerprint)
        if name in curves:
            journal.append("started", hardware="test")
            for step, perplexity in curves[name].items():
                journal.append("eval", **evaluation(step, perplexity * (1 + 0.001 * training.seed), context_length))
                if step == max(curves[name]):
                    at_512 = 1.9 if name == "none" else 2.0 + step / 100
                    journal.append("eval", **evaluation(step, at_512, 512))
            if finished is True or name in finished:
                journal.append("finished")
        made.append(Outcome(trial, TrialRecord.of(journal), "log.txt"))
    return made


METHODS = get_args(TrainedMethod)
CURVES = {
    "none": {0: 8.0},
    "yarn": {0: 2.55},
    "full": {0: 10.0, 10: 3.0, 20: 2.5, 30: 2.4},
    "lora+": {0: 10.0, 10: 3.1, 20: 2.51, 30: 2.41},
    "lora": {0: 10.0, 10: 3.01, 20: 2.8, 30: 2.6},
}


def test_every_method_and_every_kind_of_positions_has_a_name_and_a_place(tmp_path):
    methods = {method: {0: 10.0, 10: 2.0 + 0.1 * i} for i, method in enumerate(METHODS)}
    references = {positions: {0: 3.0 + i} for i, positions in enumerate(get_args(Positions))}
    made = outcomes(tmp_path, methods | references, references=get_args(Positions))
    (context,) = compare(made, original_length=512)
    assert len({reference["label"] for reference in context["references"]}) == len(get_args(Positions))
    assert context["winner"] == "lora"
    text = " ".join([*context["sentences"], *summarise([context], [0])])
    for words in ("LoRA with norms is 5.0% above LoRA", "LoRA with embeddings is 10.0% above LoRA"):
        assert words in text


def test_step_0_of_a_quantised_base_is_not_the_untuned_model(tmp_path):
    curves = {"none": {0: 8.0}, "lora": {0: 4.0, 10: 3.0}}
    for folder in ("plain", "nf4"):
        (tmp_path / folder).mkdir()
    (plain,) = compare(outcomes(tmp_path / "plain", curves), original_length=512)
    (quantised,) = compare(outcomes(tmp_path / "nf4", curves, quantization="nf4"), original_length=512)
    assert [r["label"] for r in plain["references"]] == ["untuned, no change", "untuned, linear interpolation"]
    assert [r["label"] for r in quantised["references"]] == ["untuned, no change"]


def test_winner_gaps_and_where_they_close(tmp_path):
    (context,) = compare(outcomes(tmp_path, CURVES), original_length=512)
    trials = {t["method"]: t for t in context["trials"]}
    assert context["winner"] == "full"
    assert trials["full"]["gap_to_full"] is None
    assert trials["lora+"]["gap_to_full"]["percent"] == pytest.approx(100 * (2.41 / 2.40 - 1))
    # Within 1% at step 20 (2.51 of 2.50) and at 30; at 10 it was 3.3% above.
    assert trials["lora+"]["gap_to_full"]["as_good_from_step"] == 20
    # Within 1% at step 10, but not from there on.
    assert trials["lora"]["gap_to_full"]["as_good_from_step"] is None
    assert [point["step"] for point in trials["lora"]["curve"]] == [0, 10, 20, 30]
    assert trials["lora"]["final"]["perplexity"] == pytest.approx(2.6)
    assert trials["lora"]["final"]["low"] < 2.6 < trials["lora"]["final"]["high"]
    # Before: the unchanged model at its own length, not the interpolated one that training starts from.
    assert trials["lora"]["original_length"] == {"context_length": 512, "before": 1.9, "after": 2.3}


def test_the_interpolated_model_at_step_0_is_a_reference_beside_the_untuned_ones(tmp_path):
    (context,) = compare(outcomes(tmp_path, CURVES), original_length=512)
    assert [(r["label"], round(r["perplexity"], 2)) for r in context["references"]] == [
        ("untuned, no change", 8.0),
        ("untuned, linear interpolation", 10.0),
        ("untuned, YaRN", 2.55),
    ]


def test_the_words_say_what_the_numbers_say(tmp_path):
    (context,) = compare(outcomes(tmp_path, CURVES), original_length=512)
    text = " ".join(context["sentences"])
    assert "At 1,024 tokens full fine-tuning wins with a perplexity of 2.400" in text
    assert "LoRA+ is 0.4% above full fine-tuning" in text
    assert "LoRA+ is at most 1% above full fine-tuning from step 20 on." in text
    assert "LoRA is still more than 1% above full fine-tuning after 30 steps." in text
    assert "LoRA+ beats the untuned model with YaRN (2.550) by 5.5%" in text
    assert "LoRA does not beat the untuned model with YaRN (2.550): it is 2.0% above it" in text
    assert "At its original 512 tokens the unchanged model scores 1.900" in text
    summary = " ".join(summarise([context], [0]))
    assert "Of what was trained, full fine-tuning has the lowest perplexity at 1,024 tokens." in summary
    assert "YaRN" not in summary
    assert "variance between seeds" in summary
    assert "variance between seeds" not in " ".join(summarise([context], [0, 1]))


def test_a_reference_that_nothing_beats_is_in_the_headline(tmp_path):
    for best, phrase in (("yarn", "the untuned model with YaRN"), ("none", "the unchanged model")):
        (folder := tmp_path / best).mkdir()
        (context,) = compare(outcomes(folder, CURVES | {best: {0: 2.2}}), original_length=512)
        headline = f"At 1,024 tokens nothing that was trained beats {phrase}."
        assert headline in summarise([context], [0])


def test_a_gap_that_the_documents_do_not_establish_is_called_that(tmp_path):
    made = outcomes(tmp_path, {"full": {0: 9.0, 10: 2.4}, "lora": {0: 9.0, 10: 2.401}})
    lora = next(o for o in made if o.trial.training.method == "lora")
    event = lora.record.evals[1024, 10]
    event["nll"] = (np.array(event["nll"]) + TOKENS * np.array([0.05, -0.05, 0.04, -0.06, 0.03, -0.02])).tolist()
    (context,) = compare(made, original_length=512)
    assert "do not establish" in " ".join(context["sentences"])


def test_seeds_are_averaged_for_the_winner_and_paired_for_the_gap(tmp_path):
    (context,) = compare(outcomes(tmp_path, CURVES, seeds=(0, 1)), original_length=512)
    gaps = [t["gap_to_full"]["percent"] for t in context["trials"] if t["method"] == "lora+"]
    assert gaps == pytest.approx([100 * (2.41 / 2.40 - 1)] * 2)
    assert "LoRA+ is the mean over 2 seeds, which end from 2.410 to 2.412." in context["sentences"]
    assert context["winner"] == "full"


def test_what_did_not_finish_wins_nothing_and_is_named(tmp_path):
    made = outcomes(tmp_path, CURVES, finished={"lora", "none"})
    full = next(o for o in made if o.trial.training.method == "full")
    full.record.state, full.record.reason = "failed", "NonFiniteLoss: step 3"
    (context,) = compare(made, original_length=512)
    assert context["winner"] == "lora"
    states = {t["method"]: t["state"] for t in context["trials"]}
    assert states == {"lora": "finished", "lora+": "unfinished", "full": "failed"}
    text = " ".join(context["sentences"])
    assert "full 1024 failed: NonFiniteLoss: step 3 (log: log.txt)" in text
    assert "lora+ 1024 is unfinished; the same command goes on with it." in text
    assert all(t["gap_to_full"] is None for t in context["trials"])


def test_nothing_finished_is_an_answer_too(tmp_path):
    (context,) = compare(outcomes(tmp_path, CURVES, finished=set()), original_length=512)
    assert context["winner"] is None
    assert "nothing wins" in summarise([context], [0])[0]
