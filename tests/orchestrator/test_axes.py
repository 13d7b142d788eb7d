"""Fields of a sweep with several values: how they are given."""

import dataclasses
import json

import pytest

from orchestrator.axes import AXES
from orchestrator.cli import parse
from orchestrator.expansion import expand
from orchestrator.spec import SweepSpec
from orchestrator.trial_spec import Identities
from workloads.config import TrainingConfig
from workloads.errors import InputError

IDENTITIES = Identities(model="sha256:m", tokenizer="sha256:t", data="stdlib:d")


def trials(spec):
    return expand(spec, IDENTITIES, "float32").trials


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
    assert told == made == SweepSpec.of(json.loads(json.dumps(made.values())))
    assert made.values()["positions"] == ["linear", "yarn"] and "axes" not in made.values()
    assert len(trials(made)) == 3 + 2 * 3 * 2 * 2 * 2 * 2 + 2 * 3 * 2 * 2
    assert made.changed(positions="yarn", learning_rate_for=[]).axes.keys() == made.axes.keys() - {"positions"}
    assert parse(["--document-mask"])[1].document_mask and not parse(["--document-mask", "False"])[1].document_mask


def test_a_saved_axis_is_the_default_of_its_flag(tmp_path):
    file = tmp_path / "spec.json"
    spec = SweepSpec.of(
        dict(context_lengths=[1024], lora_rank=[8, 32], lora_targets=[["q_proj"], ["v_proj", "o_proj"]])
    )
    file.write_text(json.dumps(spec.values()))
    assert parse(["--spec", str(file)])[1] == spec
    assert parse(["--spec", str(file), "--lora-rank", "16"])[1] == spec.changed(lora_rank=16)


def test_one_value_of_an_axis_changed_without_the_others_is_refused():
    spec = SweepSpec.of(dict(context_lengths=[1024], positions=["linear", "yarn"]))
    with pytest.raises(InputError, match=r"SweepSpec\.changed"):
        dataclasses.replace(spec, positions="ntk")


def test_axes_are_fields_of_a_trial():
    assert {field.name for field in dataclasses.fields(TrainingConfig)} > set(AXES)
