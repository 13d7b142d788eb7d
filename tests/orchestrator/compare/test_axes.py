"""A sweep over axes: variants, baselines and the effect of each axis, against loops over the numbers."""

import io
import itertools

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from dashboards import report
from dashboards.comparison import check
from orchestrator.compare import Outcome, cautions, compare, headline, labels, summarise
from orchestrator.records.events import Eval, Finished, Started
from orchestrator.records.journal import Journal
from orchestrator.records.trial_record import TrialRecord
from orchestrator.reporting.result_table import print_comparison
from orchestrator.trial_spec import Identities, TrialSpec
from orchestrator.variants import Variant, variants_of
from tests.support.comparison import comparison
from tests.support.events import HARDNESS, TOKENS
from workloads.config import TrainingConfig
from workloads.errors import InputError

IDENTITIES = Identities(model="m", tokenizer="t", data="d")
AXES = ("positions", "train_layers", "lora_rank")
# Log perplexity of each value; what is drawn for a trial comes on top.
LEVELS = {
    "method": {"full": 0.0, "lora": 0.10, "lora+": 0.02},
    "positions": {"linear": 0.0, "yarn": -0.2},
    "train_layers": {"all": 0.0, "last 4": 0.05},
}


def trial(method, positions, layers="all", seed=0, rank=8, **fields):
    fields = {"learning_rate": 1e-3, "context_length": 1024} | fields
    training = TrainingConfig(
        method=method, positions=positions, train_layers=layers, seed=seed, lora_rank=rank, steps=0 if method ==
        "untuned" else 10, attention="full", eval_span=1024, **fields,
    )  # fmt: skip
    return TrialSpec(model="m", data="d", identities=IDENTITIES, training=training)


def finished(folder, spec, log_perplexity):
    """A trial whose documents have these log perplexities, shape (6,)."""
    journal = Journal(folder / spec.fingerprint)
    journal.append(Started(hardware="test", workers=1))
    step = spec.training.steps
    for at in {0, step}:
        nll = (log_perplexity + (1.0 if at < step else 0.0)) * TOKENS
        perplexity = float(np.exp(nll.sum() / TOKENS.sum()))
        journal.append(
            Eval(step=at, tokens=at * 4096, context_length=spec.training.context_length, perplexity=perplexity,
                 nll=nll.tolist(), num_tokens=TOKENS.tolist())
        )  # fmt: skip
    journal.append(Finished())
    return Outcome(spec, TrialRecord.of(journal), "log.txt")


@pytest.fixture
def sweep(tmp_path):
    """Three methods x two positions x two choices of layers x three seeds, and what each trial scored."""
    generator, made, scored = np.random.default_rng(1), [], {}
    for method, positions, layers, seed in itertools.product(("lora", "lora+", "full"), *LEVELS_TESTED, (0, 1, 2)):
        spec = trial(method, positions, layers, seed)
        chosen = {"method": method, "positions": positions, "train_layers": layers}
        level = sum(LEVELS[axis][value] for axis, value in chosen.items())
        scored[method, positions, layers, seed] = 0.7 + 0.3 * HARDNESS + level + 0.01 * generator.standard_normal(6)
        made.append(finished(tmp_path, spec, scored[method, positions, layers, seed]))
    made.append(finished(tmp_path, trial("untuned", "yarn"), 0.95 + 0.3 * HARDNESS))
    return made, scored


LEVELS_TESTED = (("linear", "yarn"), ("all", "last 4"))


def test_the_effect_of_an_axis_is_the_mean_over_matched_variants_paired_by_document_and_seed(sweep):
    made, scored = sweep
    (context,) = compare(made, 512, axes=AXES)
    found = {(one["axis"], one["value"]): one for one in context["effects"]}
    assert set(found) == {
        ("method", "LoRA"), ("method", "LoRA+"), ("positions", "YaRN"), ("train_layers", "last 4 layers"),
    }  # fmt: skip
    share = TOKENS / TOKENS.sum()
    for (axis, value), first in (
        (("positions", "yarn"), "linear"),
        (("train_layers", "last 4"), "all"),
        (("method", "lora"), "full"),
    ):
        place = ("method", "positions", "train_layers").index(axis)
        differences = {seed: [] for seed in range(3)}
        for key, log_perplexity in scored.items():
            if key[place] == value:
                other = (*key[:place], first, *key[place + 1 :])
                differences[key[3]].append(log_perplexity - scored[other])
        by_seed = np.stack([np.mean(each, axis=0) for each in differences.values()])  # (seeds, documents)
        one = next(each for (name, _), each in found.items() if name == axis)
        mean = float(by_seed.mean(axis=0) @ share)
        assert one["percent"] == pytest.approx(100 * np.expm1(mean))
        assert one["seeds"] == [0, 1, 2] and len(one["matched"]) == len(differences[0])
        residuals = share * (by_seed.mean(axis=0) - mean)
        of_documents = stats.t.ppf(0.975, 1 / (share @ share) - 1) * np.sqrt(6 / 5 * (residuals @ residuals))
        of_seeds = stats.t.ppf(0.975, 2) * stats.sem(by_seed @ share)
        half = np.hypot(of_documents, of_seeds)
        assert (one["low"], one["high"]) == pytest.approx(tuple(100 * np.expm1([mean - half, mean + half])))


def test_variants_are_named_by_what_differs_and_held_against_full_fine_tuning_of_the_same_axes(sweep):
    made, scored = sweep
    (context,) = compare(made, 512, axes=("positions", "train_layers"))
    assert context["lowest"] == "full YaRN all layers"
    assert {setting["name"] for setting in context["settings"]} >= {"LoRA · linear interpolation · last 4 layers"}
    assert context["baselines"]["lora+ YaRN last 4 layers"] == "full YaRN last 4 layers"
    one = next(s for s in context["settings"] if s["variant"] == "lora+ YaRN last 4 layers")
    mean = np.mean([scored["lora+", "yarn", "last 4", s] - scored["full", "yarn", "last 4", s] for s in range(3)], 0)
    assert one["gap"]["percent"] == pytest.approx(100 * np.expm1(mean @ TOKENS / TOKENS.sum()))
    assert context["against_untuned"]["variant"] == "full YaRN all layers"
    assert context["against_untuned"]["high"] < 0
    names = {variant.id: variant.name for variant in variants_of([o.trial.training for o in made], AXES[:2])}
    (answer,) = headline([context], names)
    assert answer.startswith("At 1,024 tokens full fine-tuning · YaRN · all layers ")
    assert "below the untuned model with" in answer


def test_an_axis_without_effect_on_a_method_makes_no_variants_of_it(tmp_path):
    made = [finished(tmp_path, trial("full", "linear"), 1.0 + 0.1 * HARDNESS)]
    made += [finished(tmp_path, trial("lora", "linear", rank=r), 1.0 + 0.01 * r * HARDNESS) for r in (8, 32)]
    (context,) = compare(made, 512, axes=("lora_rank",))
    assert [setting["variant"] for setting in context["settings"]] == ["full", "lora rank 8", "lora rank 32"]
    assert context["baselines"] == {"lora rank 8": "full", "lora rank 32": "full"}
    of_method, of_rank = context["effects"]
    assert (of_rank["value"], of_rank["against"], of_rank["label"]) == ("rank 32", "rank 8", "LoRA rank")
    assert of_method["matched"] == [["lora rank 8", "full"], ["lora rank 32", "full"]]


def test_learning_rates_compete_within_a_variant(tmp_path):
    made = [
        finished(tmp_path, trial("lora", positions, learning_rate=rate), level + 0.1 * HARDNESS)
        for positions, rate, level in (("linear", 1e-3, 1.0), ("linear", 3e-3, 0.9), ("yarn", 1e-3, 0.8))
    ]
    (context,) = compare(made, 512, axes=("positions",))
    chosen = {s["variant"]: s["learning_rate"] for s in context["settings"] if s["chosen"]}
    assert chosen == {"lora linear interpolation": 3e-3, "lora YaRN": 1e-3}
    (effect,) = context["effects"]
    assert effect["percent"] == pytest.approx(100 * np.expm1(0.8 - 0.9))


def test_any_setting_may_be_the_baseline_by_name(sweep):
    made, _ = sweep
    for name in ("LoRA+ · linear interpolation · all layers", "lora+ linear interpolation all layers"):
        (context,) = compare(made, 512, axes=AXES[:2], baseline=name)
        assert set(context["baselines"].values()) == {"lora+ linear interpolation all layers"}
        assert len(context["baselines"]) == 11  # full fine-tuning too
        assert context["target"]["source"] == "the final perplexity of LoRA+ · linear interpolation · all layers"
    with pytest.raises(InputError, match=r"--baseline 'lora- yarn' is none of .*'LoRA\+ · YaRN · last 4 layers'"):
        compare(made, 512, axes=AXES[:2], baseline="lora- yarn")


def test_where_full_fine_tuning_did_not_finish_with_the_same_axes_the_answer_says_so(tmp_path):
    made = [finished(tmp_path, trial("full", "linear"), 1.0 + 0.1 * HARDNESS)]
    made += [finished(tmp_path, trial("lora", positions), 1.1 + 0.1 * HARDNESS) for positions in ("linear", "yarn")]
    (context,) = compare(made, 512, axes=("positions",))
    assert context["baselines"]["lora YaRN"] == "full linear interpolation"
    text = " ".join(context["sentences"])
    assert "Full fine-tuning has not finished with the axis values of LoRA · YaRN: the baseline is full" in text


def test_of_many_variants_sentences_tell_of_the_best(sweep):
    made, _ = sweep
    (context,) = compare(made, 512, axes=AXES[:2])
    assert len(context["settings"]) == 12
    assert len(context["sentences"]) <= 5 and sum(map(len, context["sentences"])) < 1000
    assert len(context["gaps"]) <= 2 * 12


def test_the_report_and_the_terminal_show_effects_means_over_seeds_and_what_few_documents_mean(sweep):
    made, _ = sweep
    axes = ("positions",)
    made = [outcome for outcome in made if outcome.trial.training.train_layers == "all"]
    contexts = compare(made, 512, axes=axes)
    variants = variants_of([outcome.trial.training for outcome in made], axes)
    names = {variant.id: variant.name for variant in variants}
    written = comparison() | {
        "contexts": contexts, "seeds": [0, 1, 2], "sentences": summarise(contexts, [0, 1, 2], names),
        "headline": headline(contexts, names), "cautions": cautions(contexts), **labels(variants, axes),
    }  # fmt: skip
    page = report.html(check(written))
    for text in ("Effect of each axis with the others held", "LoRA+ · YaRN, mean", "over seeds 0, 1, 2"):
        assert text in page
    assert '<p class="notice">At 1,024 tokens 6 documents are scored, fewer than 20' in page
    console = Console(width=200, record=True, file=io.StringIO())
    print_comparison(written, console)
    printed = console.export_text()
    assert printed.startswith(written["headline"][0]) and all(printed.count(s) == 1 for s in written["sentences"])
    assert "LoRA+ · YaRN, mean of 3 seeds" in printed and "Positions" in printed


def test_without_axes_a_variant_is_its_method():
    variant = Variant.of(trial("lora+", "yarn").training, ())
    assert (variant.id, variant.name) == ("lora+", "LoRA+")
