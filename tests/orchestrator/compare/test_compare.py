"""The answer: from journals whose outcome is known to what the comparison says of them."""

import dataclasses
from typing import get_args

import numpy as np
import pytest
from scipy import stats

from orchestrator.compare import Outcome, compare, headline, quality_and_cost, summarise
from orchestrator.expansion import expand
from orchestrator.records.events import Cancelled, Eval, Finished, Started, Step
from orchestrator.records.journal import Journal
from orchestrator.records.trial_record import TrialRecord
from orchestrator.spec import SweepSpec, TrainedMethod
from orchestrator.trial_spec import Identities
from tests.support.events import TOKENS, a_step, document_evaluation
from workloads.config import Positions, TrainingConfig


def outcomes(folder, curves, finished=True, context_length=1024, seeds=(0,), machine=None, rates=None, **fields):
    """Outcomes of a sweep, each step of which takes 36 s on ``machine``.

    ``curves``: perplexity by step for each method, and for the references. ``rates``: factors to the perplexity by
    learning rate.
    """
    methods = tuple(m for m in curves if m in METHODS)
    spec = SweepSpec(context_lengths=(context_length,), seeds=seeds, methods=methods, **fields)
    made = []
    for trial in expand(spec, Identities(model="m", tokenizer="t", data="d"), "float32").trials:
        training: TrainingConfig = trial.training
        name = training.positions if training.method == "untuned" else training.method
        journal = Journal(folder / trial.fingerprint)
        if name in curves:
            journal.append(Started(**{"hardware": "test", "workers": 1, **(machine or {})}))
            factor = (1 + 0.001 * training.seed) * (rates or {}).get(training.learning_rate, 1)
            for step in range(1, max(curves[name]) + 1):
                journal.append(Step(**a_step(step) | {"seconds": 36.0, "tokens_per_second": 100.0}))
            for step, perplexity in curves[name].items():
                journal.append(Eval(**document_evaluation(step, perplexity * factor, context_length)))
                if step == max(curves[name]):
                    at_512 = 1.9 if name == "none" else 2.0 + step / 100
                    journal.append(Eval(**document_evaluation(step, at_512, 512)))
            if finished is True or name in finished:
                journal.append(Finished())
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
    above = {setting["method"]: setting["above_lowest"]["percent"] for setting in context["settings"]}
    assert above == pytest.approx({method: 5.0 * i for i, method in enumerate(METHODS)})
    text = " ".join([*context["sentences"], *headline([context])])
    for words in ("At 1,024 tokens LoRA is followed by LoRA+norm, 5.0% above it", "LoRA+embed, 10.0% above it"):
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
    (answer,) = headline([context])
    assert answer.startswith(
        "At 1,024 tokens full fine-tuning wins with a perplexity of 2.400: 5.9% below the untuned model with YaRN "
        "(paired 95% interval -"
    )
    assert "0.4% below LoRA+ (-" in answer
    text = " ".join(context["sentences"])
    assert "full fine-tuning is followed by LoRA+, 0.4% above it (paired 95% interval +" in text
    assert "LoRA, 8.3% above it" in text
    against = {setting["method"]: setting["against_untuned"] for setting in context["settings"]}
    assert against["lora+"]["percent"] == pytest.approx(100 * (2.41 / 2.55 - 1)) and against["lora+"]["high"] < 0
    assert against["lora"]["percent"] == pytest.approx(100 * (2.6 / 2.55 - 1)) and against["lora"]["low"] > 0
    assert "At the original 512 tokens the unchanged model scores 1.900; trained at 1,024, full fine-tun" in text
    summary = " ".join(summarise([context], [0]))
    assert summary.startswith(answer)
    assert "variance between seeds" in summary
    assert "variance between seeds" not in " ".join(summarise([context], [0, 1]))


def test_a_reference_that_nothing_beats_is_in_the_headline(tmp_path):
    for best, phrase in (("yarn", "the untuned model with YaRN"), ("none", "the unchanged model")):
        (folder := tmp_path / best).mkdir()
        (context,) = compare(outcomes(folder, CURVES | {best: {0: 2.2}}), original_length=512)
        (answer,) = headline([context])
        assert answer.startswith(
            f"At 1,024 tokens no trained model beats {phrase} (2.200): the best, full fine-tuning (2.400), is 9.1% "
            "above it (paired 95% interval +"
        )


def test_a_gap_that_the_documents_do_not_establish_is_called_that(tmp_path):
    made = outcomes(tmp_path, {"full": {0: 9.0, 10: 2.4}, "lora": {0: 9.0, 10: 2.401}})
    lora = next(o for o in made if o.trial.training.method == "lora")
    event = lora.record.evals[1024, 10]
    nll = np.array(event.nll) + TOKENS * np.array([0.05, -0.05, 0.04, -0.06, 0.03, -0.02])
    lora.record.evals[1024, 10] = dataclasses.replace(event, nll=nll.tolist())
    (context,) = compare(made, original_length=512)
    assert (context["winner"], context["lowest"], context["not_distinguishable"]) == (None, "lora", ["full"])
    (answer,) = headline([context])
    assert "LoRA has the lowest perplexity, 2.393" in answer and "not distinguishable from full fine-tuning: " in answer
    assert "wins" not in answer
    assert "full fine-tuning, 0.3% above it (paired 95% interval -" in " ".join(context["sentences"])


def test_the_best_untuned_model_is_what_training_is_held_against(tmp_path):
    (context,) = compare(outcomes(tmp_path, CURVES | {"yarn": {0: 2.2}}), original_length=512)
    assert context["against_untuned"]["reference"] == "untuned, YaRN"
    assert context["against_untuned"]["percent"] == pytest.approx(100 * (2.4 / 2.2 - 1))


def test_below_five_documents_nothing_wins_and_the_answer_says_what_to_do(tmp_path):
    made = outcomes(tmp_path, CURVES)
    for outcome in made:
        for key, event in outcome.record.evals.items():
            few = {"nll": event.nll[:4], "num_tokens": event.num_tokens[:4]}
            outcome.record.evals[key] = dataclasses.replace(event, **few)
    (context,) = compare(made, original_length=512)
    assert (context["winner"], context["lowest"], context["scored_documents"]) == (None, "full", 4)
    ends = [trial["final"][end] for trial in context["trials"] for end in ("low", "high")]
    assert set(ends) == {None}
    assert "interval" not in " ".join([*headline([context]), *context["sentences"]])
    summary = " ".join(summarise([context], [0]))
    assert "no intervals and no winner" in summary and "Hold out more data" in summary


def test_seeds_are_averaged_for_the_winner_and_paired_for_the_gap(tmp_path):
    (context,) = compare(outcomes(tmp_path, CURVES, seeds=(0, 1)), original_length=512)
    gaps = [t["gap_to_full"]["percent"] for t in context["trials"] if t["method"] == "lora+"]
    assert gaps == pytest.approx([100 * (2.41 / 2.40 - 1)] * 2)
    assert "LoRA+ from 2.410 to 2.412 with 2 seeds" in " ".join(context["sentences"])
    assert context["winner"] == "full"


def test_what_did_not_finish_wins_nothing_and_is_named(tmp_path):
    made = outcomes(tmp_path, CURVES, finished={"lora", "none"})
    full = next(o for o in made if o.trial.training.method == "full")
    full.record.state, full.record.reason = "failed", "NonFiniteLoss: step 3"
    (context,) = compare(made, original_length=512)
    assert context["winner"] == "lora"
    states = {t["method"]: t["state"] for t in context["trials"]}
    assert states == {"lora": "finished", "lora+": "unfinished", "full": "failed"}
    failed = next(trial for trial in context["trials"] if trial["method"] == "full")
    assert (failed["reason"], failed["log"]) == ("NonFiniteLoss: step 3", "log.txt")
    assert all(t["gap_to_full"] is None for t in context["trials"])


def test_nothing_finished_is_an_answer_too(tmp_path):
    (context,) = compare(outcomes(tmp_path, CURVES, finished=set()), original_length=512)
    assert context["winner"] is None
    assert "there is no winner" in summarise([context], [0])[0]
    assert (context["settings"], context["gaps"], context["target"]) == ([], [], None)


def test_gaps_at_every_evaluation_of_every_pair_are_paired_over_documents_and_seeds(tmp_path):
    """Against the two t-intervals written out: 3 seeds, 6 documents."""
    made = outcomes(tmp_path, CURVES, seeds=(0, 1, 2))
    generator, noise = np.random.default_rng(1), {}
    for outcome in made:
        for (length, step), event in outcome.record.evals.items():
            if length == 1024 and step:
                nll = np.array(event.nll) + TOKENS * 0.02 * generator.standard_normal(6)
                outcome.record.evals[length, step] = dataclasses.replace(event, nll=nll.tolist())
                key = outcome.trial.training.method, step
                noise.setdefault(key, {})[outcome.trial.training.seed] = nll
    (context,) = compare(made, original_length=512)
    pairs = {(gap["method"], gap["baseline"]): gap for gap in context["gaps"]}
    assert set(pairs) == {("lora+", "full"), ("lora", "full"), ("lora", "lora+")}
    for (method, baseline), gap in pairs.items():
        assert gap["seeds"] == [0, 1, 2]
        assert [point["step"] for point in gap["points"]] == [10, 20, 30]
        for point in gap["points"]:
            ours, theirs = (np.stack(list(noise[name, point["step"]].values())) for name in (method, baseline))
            total = 3 * TOKENS.sum()
            assert point["percent"] == pytest.approx(100 * np.expm1((ours.sum() - theirs.sum()) / total))
            by_seed = (ours - theirs).sum(axis=1) / TOKENS.sum()
            mean, of_seeds = by_seed.mean(), stats.t.ppf(0.975, 2) * stats.sem(by_seed)
            share = TOKENS / TOKENS.sum()
            variance, num_alike = 0.0, 1 / sum(share**2)
            for document in range(6):
                own = (ours - theirs)[:, document].mean() / TOKENS[document]
                variance += 6 / 5 * (share[document] * (own - mean)) ** 2
            of_documents = stats.t.ppf(0.975, num_alike - 1) * variance**0.5
            half = (of_seeds**2 + of_documents**2) ** 0.5
            assert (point["low"], point["high"]) == pytest.approx(tuple(100 * np.expm1([mean - half, mean + half])))


def test_what_it_takes_to_reach_what_full_fine_tuning_ends_with(tmp_path):
    machine = {"device": "gpu", "devices": 4, "device_name": "NVIDIA L4", "usd_per_device_hour": 0.5}
    curves = {"full": {0: 10.0, 10: 3.0, 20: 2.4}, "lora+": {0: 10.0, 10: 2.5, 20: 2.3}, "lora": {0: 10.0, 10: 3.0}}
    (context,) = compare(outcomes(tmp_path, curves, machine=machine), original_length=512)
    assert context["target"] == {"perplexity": pytest.approx(2.4), "source": "the final perplexity of full fine-tuning"}
    assert context["hours_unit"] == "GPU hours"
    settings = {setting["method"]: setting for setting in context["settings"]}
    # Between steps 10 and 20 the logarithm falls in a line; a step is 4096 tokens and 36 s on each of 4 GPUs.
    step = 10 + 10 * (np.log(2.5) - np.log(2.4)) / (np.log(2.5) - np.log(2.3))
    reached = settings["lora+"]["reached"]
    assert reached["step"] == pytest.approx(step)
    assert reached["tokens"] == pytest.approx(4096 * step)
    assert reached["hours"] == pytest.approx(0.04 * step)
    assert reached["usd"] == pytest.approx(0.02 * step)
    assert settings["full"]["reached"]["step"] == pytest.approx(20)
    assert settings["full"]["hours"] == pytest.approx(20 * 36 * 4 / 3600)
    assert settings["lora"]["reached"] is None
    text = " ".join(context["sentences"])
    assert f"LoRA+ takes {0.04 * step:.3g} GPU hours (${0.02 * step:.2f}); full fine-tuning takes " in text
    assert "LoRA does not reach it" in text


def test_a_target_of_ones_own(tmp_path):
    (context,) = compare(outcomes(tmp_path, CURVES), original_length=512, target_perplexity=3.0)
    settings = {setting["method"]: setting for setting in context["settings"]}
    assert settings["full"]["reached"]["step"] == pytest.approx(10)
    assert context["target"]["source"] == "as requested"
    (context,) = compare(outcomes(tmp_path, CURVES), original_length=512, target_perplexity=11.0)
    assert all(setting["reached"]["step"] == 0 for setting in context["settings"])
    text = " ".join(context["sentences"])
    assert "LoRA+ is there before training" in text and " 0 " not in text


def test_the_front_of_perplexity_and_hours_is_that_of_brute_force():
    generator = np.random.default_rng(0)
    points = [(float(h), float(p)) for h, p in generator.integers(1, 12, (60, 2))]
    for point, is_dominated in zip(points, quality_and_cost.dominated(points)):
        beaten = False
        for other in points:
            no_worse = other[0] <= point[0] and other[1] <= point[1]
            if no_worse and (other[0] < point[0] or other[1] < point[1]):
                beaten = True
        assert is_dominated == beaten


def test_a_method_that_another_beats_at_perplexity_and_hours_is_dominated_by_it(tmp_path):
    curves = {"full": {0: 10.0, 30: 2.4}, "lora+": {0: 10.0, 20: 2.3}, "lora": {0: 10.0, 10: 2.6}}
    made = outcomes(tmp_path, curves, machine={"device": "cpu", "devices": 2, "device_name": "EPYC"})
    (context,) = compare(made, original_length=512)
    assert {s["method"]: s["dominated"] for s in context["settings"]} == {"full": True, "lora+": False, "lora": False}
    assert context["hours_unit"] == "CPU hours"
    assert [s["dominated_by"] for s in context["settings"] if s["method"] == "full"] == ["LoRA+"]
    text = " ".join(context["sentences"])
    assert "By perplexity and CPU hours at 1,024 tokens, LoRA+ and LoRA are dominated by no other setting." in text


def test_hours_follow_each_attempts_devices_and_of_other_hardware_are_not_compared(tmp_path):
    made = outcomes(tmp_path, CURVES, machine={"device": "gpu", "devices": 4, "device_name": "NVIDIA L4"})
    record = next(o.record for o in made if o.trial.training.method == "full")
    # From step 21 on it went on with 2 GPUs.
    record.attempts.append(dataclasses.replace(record.started, devices=2))
    record.attempt_of_step |= dict.fromkeys(range(21, 31), record.attempts[-1])
    (context,) = compare(made, original_length=512)
    hours = {trial["method"]: trial["hours"] for trial in context["trials"]}
    assert hours["full"] == pytest.approx((20 * 4 + 10 * 2) * 36 / 3600)
    assert hours["lora"] == pytest.approx(30 * 4 * 36 / 3600)
    record.attempts[-1] = dataclasses.replace(record.started, device_name="NVIDIA H200")
    (context,) = compare(made, original_length=512)
    assert context["hours_unit"] is None
    assert all(each["hours"] is None for each in [*context["trials"], *context["settings"]])
    assert "Hours are not compared" in " ".join(context["sentences"])


def test_of_several_learning_rates_a_methods_best_represents_it_and_the_answer_states_that(tmp_path):
    factors = {6e-6: 1.1, 2e-5: 1.0, 6e-5: 0.98}
    made = outcomes(tmp_path, CURVES, learning_rate_sweep=(0.3, 1, 3), rates=factors, seeds=(0, 1))
    assert len({o.trial.label for o in made}) == len(made) == 2 + 1 + 3 * 3 * 2
    assert "lora+ 1024 lr 6e-06 seed 1" in {o.trial.label for o in made}
    (context,) = compare(made, original_length=512)
    assert len(context["settings"]) == 9
    assert {one["name"] for one in context["settings"] if one["method"] == "lora+"} == {
        "LoRA+ lr 6e-6", "LoRA+ lr 2e-5", "LoRA+ lr 6e-5"
    }  # fmt: skip
    assert "LoRA lr 2e-5 seed 1" in {trial["name"] for trial in context["trials"]}
    chosen = [setting for setting in context["settings"] if setting["chosen"]]
    assert {setting["method"]: setting["learning_rate"] for setting in chosen} == dict.fromkeys(
        ("lora", "lora+", "full"), 6e-5
    )
    assert all(trial["chosen"] == (trial["learning_rate"] == 6e-5) for trial in context["trials"])
    assert {gap["method"] for gap in context["gaps"]} == {"lora", "lora+"}
    text = " ".join(context["sentences"])
    assert "LoRA+ with 6e-05 of 6e-06, 2e-05 and 6e-05 (the edge of the grid" in text
    assert "which flatters it" in " ".join(summarise([context], [0, 1]))


def test_a_trial_that_was_stopped_early_is_shown_and_does_not_compete(tmp_path):
    curves = CURVES | {"lora+": {0: 10.0, 10: 2.0}}
    made = outcomes(tmp_path, curves, finished={"none", "yarn", "full", "lora"})
    stopped = next(o for o in made if o.trial.training.method == "lora+")
    stopped.record.state, stopped.record.reason = "stopped", "at 40,960 tokens it was the worst of 3"
    (context,) = compare(made, original_length=512)
    assert context["winner"] == "full"
    assert "lora+" not in {setting["method"] for setting in context["settings"]}
    (trial,) = (t for t in context["trials"] if t["method"] == "lora+")
    assert (trial["state"], trial["last_step"], trial["final"], trial["chosen"]) == ("stopped", 10, None, False)
    assert [point["step"] for point in trial["curve"]] == [0, 10]
    assert trial["reason"] == "at 40,960 tokens it was the worst of 3"


def test_a_cancelled_trial_is_shown_as_unfinished_with_who_cancelled_it(tmp_path):
    made = outcomes(tmp_path, CURVES | {"lora+": {0: 10.0, 10: 2.0}}, finished={"none", "yarn", "full", "lora"})
    next(o for o in made if o.trial.training.method == "lora+").record.journal.append(
        Cancelled(step=10, by="somebody on head")
    )
    for outcome in made:
        outcome.record.follow()
    (context,) = compare(made, original_length=512)
    (trial,) = (t for t in context["trials"] if t["method"] == "lora+")
    assert (trial["state"], trial["last_step"], trial["final"], trial["chosen"]) == ("cancelled", 10, None, False)
    assert trial["reason"] == "by somebody on head"


def test_how_near_is_as_good_is_the_users_to_say(tmp_path):
    (context,) = compare(outcomes(tmp_path, CURVES), original_length=512, as_good=0.1)
    settings = {setting["method"]: setting for setting in context["settings"]}
    assert settings["lora+"]["as_good_from_step"] == 10
    assert settings["lora"]["as_good_from_step"] == 30  # at 10 it is 0.3% above, but at 20 12%; at 30 8.3%
    assert settings["full"]["as_good_from_step"] is None


def test_methods_that_finished_other_seeds_are_compared_over_those_they_share(tmp_path):
    made = outcomes(tmp_path, CURVES, seeds=(0, 1))
    late = next(o for o in made if o.trial.training.method == "full" and o.trial.training.seed == 1)
    late.record.state = "running"
    (context,) = compare(made, original_length=512)
    assert "The methods are compared over seed 0, which all of them finished." in context["sentences"]
    assert {tuple(gap["seeds"]) for gap in context["gaps"] if gap["baseline"] == "full"} == {(0,)}
    (between,) = (gap for gap in context["gaps"] if gap["baseline"] == "lora+")
    assert between["seeds"] == [0, 1]
