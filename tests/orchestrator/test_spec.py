"""A trial's identity: what changes its fingerprint and what must not; and the command line that makes a sweep."""

import dataclasses
import json

import pytest

from orchestrator.cli import parse
from orchestrator.recipes import RECIPES
from orchestrator.spec import Identities, SweepSpec, TrialSpec
from workloads.config import TrainingConfig
from workloads.errors import InputError

IDENTITIES = Identities(model="sha256:m", tokenizer="sha256:t", data="stdlib:d")


def trial(**training):
    values = dict(context_length=2048, method="lora", group_size=512, steps=40, eval_span=2048)
    return TrialSpec(
        model="builtin:tiny",
        data="builtin:stdlib",
        identities=IDENTITIES,
        training=TrainingConfig(**{**values, **training}),
    )


# Whatever this test pins is trained in somebody's storage: a change of it makes them train again. Raise RESULT_VERSION
# if results are meant to change; otherwise keep it as it is.
def test_the_fingerprint_is_stable():
    assert trial().fingerprint == "0d327dfa3ce30b8d"


def test_a_field_at_its_default_is_the_same_trial_whether_it_is_named_or_not():
    default = next(f.default for f in dataclasses.fields(TrainingConfig) if f.name == "lora_rank")
    assert trial(lora_rank=default).fingerprint == trial().fingerprint
    assert trial(lora_rank=16).fingerprint != trial().fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"context_length": 1024}, {"method": "full"}, {"group_size": 1024}, {"positions": "yarn"}, {"steps": 41},
        {"batch": 8}, {"learning_rate": 1e-3}, {"seed": 1}, {"precision": "bfloat16"}, {"eval_documents": 3},
        {"attention": "full", "group_size": None}, {"beta2": 0.999},
    ],
)  # fmt: skip
def test_whatever_changes_the_result_changes_the_fingerprint(change):
    assert trial(**change).fingerprint != trial().fingerprint


@pytest.mark.parametrize("field", ["model", "tokenizer", "data"])
def test_other_content_is_another_trial(field):
    changed = dataclasses.replace(trial(), identities=dataclasses.replace(IDENTITIES, **{field: "other"}))
    assert changed.fingerprint != trial().fingerprint


def test_where_things_lie_is_not_part_of_the_trial():
    moved = dataclasses.replace(trial(), model="/elsewhere/tiny", data="/elsewhere/text")
    assert moved.fingerprint == trial().fingerprint


def test_a_trial_survives_json():
    there_and_back = TrialSpec.from_dict(json.loads(json.dumps(trial().to_dict())))
    assert there_and_back == trial()


def test_a_sweep_is_every_context_with_every_method_and_the_references():
    spec = SweepSpec(context_lengths=(1024, 2048), seeds=(0, 1))
    trials = spec.trials(IDENTITIES, "float32")
    labels = [t.label for t in trials]
    assert len(trials) == 2 * (2 + 3 * 2) == len({t.fingerprint for t in trials})
    assert labels[:5] == ["untuned none 1024", "untuned yarn 1024", "lora 1024", "lora 1024 seed 1", "lora+ 1024"]
    assert {t.training.group_size for t in trials if t.training.context_length == 2048} == {None, 512}
    assert {t.training.eval_span for t in trials} == {2048}


def test_full_fine_tuning_is_the_same_trial_whatever_the_rank():
    """A rank sweep trains its baseline once."""
    both = [SweepSpec(context_lengths=(1024,), lora_rank=rank).trials(IDENTITIES, "float32") for rank in (8, 16)]
    one, other = ({t.training.method: t.fingerprint for t in trials} for trials in both)
    assert one["full"] == other["full"] and one["untuned"] == other["untuned"]
    assert one["lora"] != other["lora"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_a_sweep_that_survives_its_file(recipe):
    spec = RECIPES[recipe]()
    assert SweepSpec.from_json(spec.to_json(), "spec.json") == spec
    assert spec.trials(IDENTITIES, "float32")


def test_the_command_line_overrides_any_field_and_names_the_sweep_after_it():
    name, spec, options = parse([])
    assert (name, spec) == ("convergence", RECIPES["convergence"]())
    assert options.storage == "./runs"
    flags = ["convergence", "--context-lengths", "512", "1024", "--steps", "7", "--methods", "lora+", "full"]
    name, spec, _ = parse(flags)
    assert (spec.context_lengths, spec.steps, spec.methods) == ((512, 1024), 7, ("lora+", "full"))
    assert name.startswith("convergence-") and parse(flags)[0] == name
    assert parse([*flags, "--name", "mine"])[0] == "mine"


def test_a_saved_sweep_is_rerun_exactly_and_can_be_overridden(tmp_path):
    _, spec, _ = parse(["--steps", "9", "--references"])
    file = tmp_path / "spec.json"
    file.write_text(spec.to_json())
    assert parse(["--spec", str(file)])[1] == spec
    assert parse([f"--spec={file}", "--steps", "3"])[1] == dataclasses.replace(spec, steps=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convergance"], "did you mean convergence"),
        (["--spec", "/nowhere/spec.json"], "cannot be read"),
        (["--spec"], "needs a file"),
        (["convergence", "--spec", "spec.json"], "expected one of them"),
    ],
)
def test_what_no_sweep_can_have_is_one_clear_error(arguments, message):
    with pytest.raises(InputError, match=message):
        parse(arguments)


def test_a_file_that_is_no_sweep(tmp_path):
    file = tmp_path / "spec.json"
    for content, message in [("{", "not JSON"), ("[]", "no object"), ('{"contextlengths": [1]}', "contextlengths")]:
        file.write_text(content)
        with pytest.raises(InputError, match=message):
            parse(["--spec", str(file)])


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--contxt-lengths", "8"], "--context-lengths"),
        (["--steps", "many"], "--steps"),
        (["--methods", "lora++"], "choice"),
        (["--context-lengths", "1024", "1024"], "none of the values twice"),
        (["--methods"], "--methods is empty"),
        (["--steps", "0"], "expected at least 1"),
        (["--name", "../elsewhere"], "names a folder"),
        (["--workers", "0"], "workers is 0"),
        (["--offload"], "choose zero2 or zero3"),
    ],
)
def test_a_flag_or_value_that_cannot_be_names_what_was_expected(arguments, hint, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(arguments)
    assert exit.value.code == 2
    captured = capsys.readouterr()
    assert hint in " ".join((captured.err + captured.out).replace("│", " ").split())
