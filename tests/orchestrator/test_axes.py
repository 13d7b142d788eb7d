"""Axes: which trials a sweep has whose fields have several values, and how they are given."""

import dataclasses
import hashlib
import itertools
import json

import pytest

from orchestrator.axes import AXES as FIELDS
from orchestrator.cli import parse
from orchestrator.spec import SweepSpec
from orchestrator.trial_spec import Identities
from workloads.config import TrainingConfig
from workloads.errors import InputError

IDENTITIES = Identities(model="sha256:m", tokenizer="sha256:t", data="stdlib:d")
AXES = {
    "positions": ("linear", "yarn"), "train_layers": ("all", "last 2"), "attention": ("s2", "short", "full"),
    "lora_rank": (8, 32), "group_size": (0.25, 0.5), "batch": (2, 4), "quantization": ("none", "nf4"),
}  # fmt: skip


def trials(spec):
    return spec.trials(IDENTITIES, "float32")


def fingerprints(spec):
    return [trial.fingerprint for trial in trials(spec)]


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
    expansion = spec.expand(IDENTITIES, "float32")
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
        ({"learning_rate_for": ["positions=yran:1e-3"]}, "positions is 'yran'; expected one of linear, ntk"),
        ({"learning_rate_for": ["positions=linear:fast"]}, "'fast'; expected a positive number"),
    ],
)
def test_what_gives_no_trial_or_has_no_effect_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        trials(SweepSpec.of({"context_lengths": [1024]} | values))


def test_axes_are_the_same_in_the_command_line_in_a_file_and_in_python():
    flags = ["--context-lengths", "1024", "--positions", "linear", "yarn", "--train-layers", "all", "last 4", "0,5"]
    flags += [
        "--lora-targets",
        "v_proj,q_proj",
        "None",
        "--document-mask",
        "False",
        "True",
        "--max-grad-norm",
        "None",
        "1",
    ]
    name, told, _ = parse([*flags, "--learning-rate-for", "positions=yarn:1e-3"])
    assert parse([*flags, "--learning-rate-for", "positions=yarn:1e-3"])[0] == name
    made = parse([])[1].changed(
        context_lengths=[1024], positions=["linear", "yarn"], train_layers=["all", "last 4", "0,5"],
        lora_targets=[["v_proj", "q_proj"], None], document_mask=[False, True], max_grad_norm=[None, 1.0],
        learning_rate_for={"positions=yarn": "1e-3"}, learning_rates_chosen=told.learning_rates_chosen,
    )  # fmt: skip
    assert told == made == SweepSpec.from_json(made.to_json(), "spec.json")
    assert json.loads(made.to_json())["positions"] == ["linear", "yarn"] and "axes" not in json.loads(made.to_json())
    assert len(trials(made)) == 3 + 2 * 3 * 2 * 2 * 2 * 2 + 2 * 3 * 2 * 2
    assert made.changed(positions="yarn", learning_rate_for=[]).axes.keys() == made.axes.keys() - {"positions"}
    assert parse(["--document-mask"])[1].document_mask and not parse(["--document-mask", "False"])[1].document_mask


def test_a_saved_axis_is_the_default_of_its_flag(tmp_path):
    file = tmp_path / "spec.json"
    spec = SweepSpec.of(
        dict(context_lengths=[1024], lora_rank=[8, 32], lora_targets=[["q_proj"], ["v_proj", "o_proj"]])
    )
    file.write_text(spec.to_json())
    assert parse(["--spec", str(file)])[1] == spec
    assert parse(["--spec", str(file), "--lora-rank", "16"])[1] == spec.changed(lora_rank=16)


def test_one_value_of_an_axis_changed_without_the_others_is_refused():
    spec = SweepSpec.of(dict(context_lengths=[1024], positions=["linear", "yarn"]))
    with pytest.raises(InputError, match=r"SweepSpec\.changed"):
        dataclasses.replace(spec, positions="ntk")


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


def test_axes_are_fields_of_a_trial():
    assert {field.name for field in dataclasses.fields(TrainingConfig)} > set(FIELDS)
