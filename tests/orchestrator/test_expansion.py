"""The trials of a sweep."""

import dataclasses
import hashlib
import itertools

import pytest

from orchestrator.cli import parse
from orchestrator.expansion import expand
from orchestrator.spec import SweepSpec
from orchestrator.trial_spec import Identities
from workloads.errors import InputError

IDENTITIES = Identities(model="sha256:m", tokenizer="sha256:t", data="stdlib:d")
AXES = {
    "positions": ("linear", "yarn"), "train_layers": ("all", "last 2"), "attention": ("s2", "short", "full"),
    "lora_rank": (8, 32), "group_size": (0.25, 0.5), "batch": (2, 4), "quantization": ("none", "nf4"),
}  # fmt: skip


def trials(spec):
    return expand(spec, IDENTITIES, "float32").trials


def fingerprints(spec):
    return [trial.fingerprint for trial in trials(spec)]


def test_a_sweep_is_every_context_with_every_method_and_the_references():
    spec = SweepSpec(context_lengths=(1024, 2048), seeds=(0, 1))
    trials = expand(spec, IDENTITIES, "float32").trials
    labels = [t.label for t in trials]
    assert len(trials) == 2 * (3 + 3 * 2) == len({t.fingerprint for t in trials})
    assert labels[:3] == ["untuned none 1024", "untuned yarn 1024", "untuned linear 1024"]
    assert labels[3:6] == ["lora 1024", "lora 1024 seed 1", "lora+ 1024"]
    lora = trials[3]
    assert lora.untuned() == trials[2] == trials[2].untuned()
    assert {t.training.group_size for t in trials if t.training.context_length == 2048} == {None, 512}
    assert {t.training.eval_span for t in trials} == {2048}


def test_each_method_takes_the_learning_rates_of_what_it_trains():
    spec = SweepSpec(
        context_lengths=(1024,), methods=("lora", "lora+norm", "lora+embed", "lora+", "full"), references=(),
        learning_rate_lora=1e-3, learning_rate_lora_plus=2e-3, learning_rate_full=3e-3,
        learning_rate_embeddings=4e-3, learning_rate_norms=5e-3,
    )  # fmt: skip
    rates = {
        t.training.method: (
            t.training.learning_rate,
            t.training.learning_rate_embeddings,
            t.training.learning_rate_norms,
        )
        for t in expand(spec, IDENTITIES, "float32").trials
    }
    assert rates == {
        "lora": (1e-3, None, None),
        "lora+norm": (1e-3, None, 5e-3),
        "lora+embed": (2e-3, 4e-3, None),
        "lora+": (2e-3, 4e-3, 5e-3),
        "full": (3e-3, 4e-3, 5e-3),
    }
    last_layer = dataclasses.replace(spec, methods=("full",), train_layers="last 1", learning_rate_embeddings=None)
    (last,) = expand(last_layer, IDENTITIES, "float32").trials
    assert (last.training.train_layers, last.training.learning_rate_norms) == ("last 1", 5e-3)


def test_full_fine_tuning_is_the_same_trial_whatever_the_rank():
    """A rank sweep trains its baseline once."""
    specs = [SweepSpec(context_lengths=(1024,), lora_rank=rank) for rank in (8, 16)]
    both = [expand(spec, IDENTITIES, "float32").trials for spec in specs]
    one, other = ({t.training.method: t.fingerprint for t in trials} for trials in both)
    assert one["full"] == other["full"] and one["untuned"] == other["untuned"]
    assert one["lora"] != other["lora"]


def test_a_sweep_over_the_learning_rate_multiplies_every_rate_of_a_method():
    spec = SweepSpec(
        context_lengths=(1024,), methods=("lora", "lora+"), references=(), learning_rate_sweep=(0.3, 1, 3),
        learning_rate_lora=2e-5, learning_rate_lora_plus=1e-4, learning_rate_embeddings=5e-6,
    )  # fmt: skip
    trials = expand(spec, IDENTITIES, "float32").trials
    rates = [(t.training.method, t.training.learning_rate, t.training.learning_rate_embeddings) for t in trials]
    assert rates == [
        ("lora", 6e-6, None), ("lora", 2e-5, None), ("lora", 6e-5, None),
        ("lora+", 3e-5, 1.5e-6), ("lora+", 1e-4, 5e-6), ("lora+", 3e-4, 1.5e-5),
    ]  # fmt: skip
    assert len({trial.label for trial in trials}) == 6
    # The trial of a multiple is the one that somebody has trained at that rate.
    one_rate = dataclasses.replace(
        spec, methods=("lora",), learning_rate_lora=6e-6, learning_rate_sweep=(1.0,), learning_rate_embeddings=None
    )
    (alone,) = expand(one_rate, IDENTITIES, "float32").trials
    assert alone.fingerprint == trials[0].fingerprint and alone.label == "lora 1024"
    for wrong in ((0.0,), (-1.0, 1.0), (), (1.0, 1.0), (float("inf"),)):
        with pytest.raises(InputError, match="--learning-rate-sweep"):
            dataclasses.replace(spec, learning_rate_sweep=wrong)


def test_a_sweep_over_axes_is_the_union_of_the_sweeps_of_their_combinations():
    """The oracle: a sweep without axes for every combination and method, and those that it refuses left out."""
    shared = dict(context_lengths=(512, 1024), methods=("lora", "lora+", "full"), seeds=(0, 1), steps=8)
    spec = SweepSpec.of(shared | AXES)
    union, refused = set(), 0
    for values in itertools.product(*AXES.values()):
        for method in shared["methods"]:
            try:
                union |= set(fingerprints(SweepSpec(**shared | {"methods": (method,)}, **dict(zip(AXES, values)))))
            except InputError:
                refused += 1
    found = fingerprints(spec)
    assert set(found) == union and len(found) == len(union) and refused == 96
    labels = [trial.label for trial in trials(spec)]
    assert len(set(labels)) == len(labels)
    assert [label for label in labels if label.startswith("untuned")] == [
        f"untuned {positions} {length}" for length in (512, 1024) for positions in ("none", "yarn", "linear")
    ]


def test_combinations_that_cannot_be_are_left_out_with_one_note_a_reason():
    spec = SweepSpec.of(dict(context_lengths=[1024], quantization=["none", "nf4"], batch=[2, 4]))
    expansion = expand(spec, IDENTITIES, "float32")
    trained = [trial.training for trial in expansion.trials]
    assert [training.quantization for training in trained if training.method == "full"] == ["none"] * 2
    (note,) = expansion.left_out
    assert note.startswith("method full with quantization nf4 left out: ") and "cannot train" in note


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"quantization": ["none", "nf4"], "methods": ["full"]},
            "nothing can be trained with quantization nf4",
        ),
        ({"group_size": [0.25, 384]}, "nothing can be trained with group size 384: .*divides the context length"),
        ({"context_lengths": [512, 1024], "group_size": 1024, "batch": [2, 4]}, "with context length 512"),
        ({"batch": [0, -1]}, "batch is 0"),
        ({"lora_rank": [8, 16], "methods": ["full"]}, "--lora-rank 8 16 has no effect"),
        ({"group_size": [0.25, 0.5], "attention": "full"}, "--group-size 0.25 0.5 has no effect"),
        ({"positions": ["yarn", "yarn"]}, "each value once"),
        ({"positions": []}, "--positions is empty"),
        ({"eval_evry": [1, 2]}, "unknown fields eval_evry"),
        ({"learning_rate_for": ["positions=yarn"]}, "expected FIELD=VALUE:RATE"),
        ({"learning_rate_for": ["position=yarn:1e-3"]}, "'position' is unknown"),
        ({"learning_rate_for": ["positions=yran:1e-3"]}, r"positions is 'yran'; expected \{linear,ntk"),
        ({"learning_rate_for": ["lora_rank=8.5:1e-3"]}, "lora_rank is '8.5'; expected INT"),
        ({"learning_rate_for": ["train_layers=lsat 4:1e-3"]}, "train_layers is 'lsat 4'; expected all"),
        ({"learning_rate_for": ["document_mask=on:1e-3"]}, "document_mask is 'on'; expected true or false"),
        ({"learning_rate_for": ["positions=linear,positions=yarn:1e-3"]}, "positions is given twice"),
        ({"seeds": list(range(4000))}, "3 methods x 4000 seeds make 12,000 trials"),
        ({"lora_targets": [[], ["q_proj"]], "methods": ["lora"]}, "with lora targets ,: lora_targets is empty"),
        ({"steps": [3, 10**5000]}, "steps has 64 bits or more"),
        ({"lora_alpha": 0}, "lora_alpha is 0; expected a positive number"),
        ({"beta1": [0.9, 1.5]}, "beta1 is 1.5; expected a number from 0 to less than 1"),
        ({"weight_decay": -1}, "weight_decay is -1; expected zero"),
        ({"max_grad_norm": 0}, "max_grad_norm is 0; expected a positive number, or None"),
        ({"learning_rate_for": ["positions=linear:fast"]}, "'fast'; expected a positive number"),
    ],
)
def test_what_gives_no_trial_or_has_no_effect_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        trials(SweepSpec.of({"context_lengths": [1024]} | values))


def test_the_last_rule_that_matches_a_trial_gives_its_learning_rate():
    spec = SweepSpec.of(
        dict(
            context_lengths=[1024, 2048], methods=["lora", "lora+", "full"], positions=["linear", "yarn"],
            train_layers=["all", "0,2"], learning_rate_lora=1e-3, learning_rate_lora_plus=2e-3, learning_rate_full=3e-3,
            learning_rate_sweep=[1.0, 10.0], references=[], group_size=0.5,
            learning_rate_for=[
                "positions=yarn:4e-3", "method=lora+, positions=yarn:5e-3", "train_layers=0,2,context_length=2048:6e-3",
            ],
        )
    )  # fmt: skip

    def expected(t):
        if t.train_layers == "0,2" and t.context_length == 2048:
            return 6e-3
        if t.positions == "yarn":
            return 5e-3 if t.method == "lora+" else 4e-3
        return {"lora": 1e-3, "lora+": 2e-3, "full": 3e-3}[t.method]

    configs = [trial.training for trial in trials(spec)]
    assert len(configs) == 2 * 3 * 2 * 2 * 2
    for one, ten in zip(configs[::2], configs[1::2], strict=True):
        assert (one.learning_rate, ten.learning_rate) == (expected(one), pytest.approx(10 * expected(ten)))


def test_a_trial_is_named_by_the_axes_that_it_depends_on():
    spec = SweepSpec.of(
        dict(
            context_lengths=[1024], methods=["lora", "full"], references=[], lora_rank=[8, 32],
            positions=["none", "yarn"], attention=["s2", "full"], document_mask=[True, False],
            learning_rate_sweep=[1.0, 3.0],
        )
    )  # fmt: skip
    labels = [trial.label for trial in trials(spec)]
    assert labels[0] == "lora 1024 positions none attention s2 document mask on r 8 lr 2e-05"
    assert labels[-1] == "full 1024 yarn attention full document mask off lr 6e-05"


# Sweeps and trials in storage from before there were axes: other values would start them anew.
@pytest.mark.parametrize(
    ("flags", "name", "of_trials"),
    [
        (["convergence"], "convergence", "392a966bbe8f"),
        (["convergence-llama2-7b"], "convergence-llama2-7b", "9cf3637e181e"),
        (["--positions", "yarn", "--attention", "full"], "convergence-755e09", "36547510af60"),
        (
            ["--methods", "lora", "lora+", "--lora-rank", "16", "--train-layers", "last 2",
             "--lora-targets", "v_proj", "q_proj"],
            "convergence-d2aaf2", "535a5fa3fbeb",
        ),
        (
            ["--learning-rate-sweep", "0.3", "1", "--seeds", "0", "1", "--references"],
            "convergence-fe9877", "3de3f955dae7",
        ),
        (
            ["--document-mask", "--group-size", "256", "--quantization", "nf4", "--methods", "lora"],
            "convergence-fa5a3c", "1889870d7263",
        ),
        (
            ["--max-grad-norm", "None", "--batch", "4", "--learning-rate-norms", "1e-4"],
            "convergence-349a41", "77278e63edaa",
        ),
    ],
)  # fmt: skip
def test_names_and_trials_of_sweeps_without_axes_are_as_they_were(flags, name, of_trials):
    found, spec, _ = parse(flags if flags[0].startswith("convergence") else ["convergence", *flags])
    assert found == name
    # As version 2 trained them, in which these were recorded.
    recorded = [dataclasses.replace(trial, result_version=2).fingerprint for trial in trials(spec)]
    assert hashlib.sha256(" ".join(recorded).encode()).hexdigest()[:12] == of_trials
