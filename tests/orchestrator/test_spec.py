"""A trial's identity: what changes its fingerprint and what must not; and the command line that makes a sweep."""

import dataclasses
import json

import pytest

from orchestrator.cli import parse
from orchestrator.fields import GROUPS, MOST_USED
from orchestrator.recipes import RECIPES
from orchestrator.run_options import RunOptions
from orchestrator.spec import SweepSpec
from orchestrator.trial_spec import Identities, TrialSpec
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


# Users have trials with this fingerprint in storage: a change makes them train again. Raise RESULT_VERSION if
# results are meant to change; otherwise keep it.
def test_the_fingerprint_is_stable():
    assert trial().fingerprint == "7d8c84161b401c29"


def test_a_field_at_its_default_is_the_same_trial_whether_it_is_named_or_not():
    default = next(f.default for f in dataclasses.fields(TrainingConfig) if f.name == "lora_rank")
    assert trial(lora_rank=default).fingerprint == trial().fingerprint
    assert trial(lora_rank=16).fingerprint != trial().fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"context_length": 1024}, {"method": "full"}, {"group_size": 1024}, {"positions": "yarn"}, {"steps": 41},
        {"batch": 8}, {"learning_rate": 1e-3}, {"seed": 1}, {"precision": "bfloat16"}, {"eval_documents": 3},
        {"attention": "full", "group_size": None}, {"beta2": 0.999}, {"train_layers": "last 1"}, {"schedule": "cosine"},
        {"method": "lora+norm"}, {"lora_targets": ("q_proj",)}, {"quantization": "nf4"}, {"positions": "ntk"},
        {"attention": "short"}, {"document_mask": True},
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


@pytest.mark.parametrize("targets", [None, ("q_proj", "v_proj")])
def test_a_trial_survives_json(targets):
    there_and_back = TrialSpec.from_dict(json.loads(json.dumps(trial(lora_targets=targets).to_dict())))
    assert there_and_back == trial(lora_targets=targets)


def test_the_order_of_lora_targets_makes_no_other_trial():
    one, other = (trial(lora_targets=targets) for targets in (("v_proj", "q_proj"), ("q_proj", "v_proj")))
    assert one.fingerprint == other.fingerprint


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
        for t in spec.trials(IDENTITIES, "float32")
    }
    assert rates == {
        "lora": (1e-3, None, None),
        "lora+norm": (1e-3, None, 5e-3),
        "lora+embed": (2e-3, 4e-3, None),
        "lora+": (2e-3, 4e-3, 5e-3),
        "full": (3e-3, 4e-3, 5e-3),
    }
    (last,) = dataclasses.replace(spec, methods=("full",), train_layers="last 1", learning_rate_embeddings=None).trials(
        IDENTITIES, "float32"
    )
    assert (last.training.train_layers, last.training.learning_rate_norms) == ("last 1", 5e-3)


def test_what_is_adapted_and_how_can_be_told_on_the_command_line():
    flags = ["--methods", "lora+embed", "--train-layers", "last 2", "--lora-targets", "v_proj", "q_proj"]
    flags += ["--positions", "ntk", "--references", "none", "dynamic", "llama3", "--schedule", "cosine"]
    flags += ["--learning-rate-embeddings", "1e-4", "--quantization", "nf4"]
    _, spec, _ = parse(flags)
    assert SweepSpec.from_json(spec.to_json(), "spec.json") == spec
    trials = [trial.training for trial in spec.trials(IDENTITIES, "float32") if trial.training.context_length == 1024]
    assert [training.positions for training in trials] == ["none", "dynamic", "llama3", "ntk", "ntk"]
    tuned = trials[-1]
    assert (tuned.train_layers, tuned.lora_targets) == ("last 2", ("q_proj", "v_proj"))
    assert (tuned.schedule, tuned.learning_rate_embeddings, tuned.quantization) == ("cosine", 1e-4, "nf4")
    assert {training.quantization for training in trials[:-1]} == {"none"}


def test_a_sweep_is_every_context_with_every_method_and_the_references():
    spec = SweepSpec(context_lengths=(1024, 2048), seeds=(0, 1))
    trials = spec.trials(IDENTITIES, "float32")
    labels = [t.label for t in trials]
    assert len(trials) == 2 * (3 + 3 * 2) == len({t.fingerprint for t in trials})
    assert labels[:3] == ["untuned none 1024", "untuned yarn 1024", "untuned linear 1024"]
    assert labels[3:6] == ["lora 1024", "lora 1024 seed 1", "lora+ 1024"]
    lora = trials[3]
    assert lora.untuned() == trials[2] == trials[2].untuned()
    assert {t.training.group_size for t in trials if t.training.context_length == 2048} == {None, 512}
    assert {t.training.eval_span for t in trials} == {2048}


def test_every_attention_pattern_is_a_flag_of_a_sweep():
    flags = ["--attention", "dilated", "--document-mask", "--group-size", "0.5", "--attention-backend", "sdpa"]
    _, spec, options = parse(flags)
    assert options.attention_backend == "sdpa"
    trained = [t.training for t in spec.trials(IDENTITIES, "float32") if t.training.method != "untuned"]
    assert {(t.attention, t.document_mask, t.group_size / t.context_length) for t in trained} == {
        ("dilated", True, 0.5)
    }


def test_full_fine_tuning_is_the_same_trial_whatever_the_rank():
    """A rank sweep trains its baseline once."""
    both = [SweepSpec(context_lengths=(1024,), lora_rank=rank).trials(IDENTITIES, "float32") for rank in (8, 16)]
    one, other = ({t.training.method: t.fingerprint for t in trials} for trials in both)
    assert one["full"] == other["full"] and one["untuned"] == other["untuned"]
    assert one["lora"] != other["lora"]


def test_help_lists_every_field_in_one_group():
    """A new field needs its place in orchestrator/fields.py."""
    listed = sorted(name for names in GROUPS.values() for name in names)
    fields = [field.name for kind in (SweepSpec, RunOptions) for field in dataclasses.fields(kind)]
    assert listed == sorted(set(fields) - {"axes"})
    assert set(MOST_USED) <= set(listed)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_a_sweep_that_survives_its_file(recipe):
    spec = RECIPES[recipe]()
    assert SweepSpec.from_json(spec.to_json(), "spec.json") == spec
    assert spec.trials(IDENTITIES, "float32")


def test_the_command_line_overrides_any_field_and_names_the_sweep_after_it():
    name, spec, options = parse([])
    assert (name, spec) == ("quickstart", RECIPES["quickstart"]())
    assert options.storage == "./runs"
    flags = ["convergence", "--context-lengths", "512", "1024", "--steps", "7", "--methods", "lora+", "full"]
    name, spec, _ = parse(flags)
    assert (spec.context_lengths, spec.steps, spec.methods) == ((512, 1024), 7, ("lora+", "full"))
    assert name.startswith("convergence-") and parse(flags)[0] == name
    assert parse([*flags, "--name", "mine"])[0] == "mine"


# Sweeps in storage have these names: another name makes the same command start a new sweep.
def test_the_name_of_a_sweep_is_stable():
    assert parse(["convergence", "--steps", "7"])[0] == "convergence-2ae118"
    assert parse(["convergence", "--methods", "full", "--learning-rate-full", "1e-4"])[0] == "convergence-69f865"


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
        (["--context-lengths", "1024", "1024"], "each value once"),
        (["--methods"], "--methods is empty"),
        (["--steps", "0"], "expected at least 1"),
        (["--methods", "lora", "--learning-rate-norms", "1e-4"], "none of the methods lora trains them"),
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


def test_a_sweep_over_the_learning_rate_multiplies_every_rate_of_a_method():
    spec = SweepSpec(
        context_lengths=(1024,), methods=("lora", "lora+"), references=(), learning_rate_sweep=(0.3, 1, 3),
        learning_rate_lora=2e-5, learning_rate_lora_plus=1e-4, learning_rate_embeddings=5e-6,
    )  # fmt: skip
    trials = spec.trials(IDENTITIES, "float32")
    rates = [(t.training.method, t.training.learning_rate, t.training.learning_rate_embeddings) for t in trials]
    assert rates == [
        ("lora", 6e-6, None), ("lora", 2e-5, None), ("lora", 6e-5, None),
        ("lora+", 3e-5, 1.5e-6), ("lora+", 1e-4, 5e-6), ("lora+", 3e-4, 1.5e-5),
    ]  # fmt: skip
    assert len({trial.label for trial in trials}) == 6
    # The trial of a multiple is the one that somebody has trained at that rate.
    (alone,) = dataclasses.replace(
        spec, methods=("lora",), learning_rate_lora=6e-6, learning_rate_sweep=(1.0,), learning_rate_embeddings=None
    ).trials(IDENTITIES, "float32")
    assert alone.fingerprint == trials[0].fingerprint and alone.label == "lora 1024"
    for wrong in ((0.0,), (-1.0, 1.0), (), (1.0, 1.0), (float("inf"),)):
        with pytest.raises(InputError, match="--learning-rate-sweep"):
            dataclasses.replace(spec, learning_rate_sweep=wrong)


def test_how_the_learning_rates_were_chosen_is_said_only_of_those_that_were():
    recipe = parse(["convergence"])[1]
    assert "small grid" in recipe.learning_rates_chosen
    assert parse(["convergence", "--steps", "3", "--learning-rate-sweep", "0.3", "1"])[1].learning_rates_chosen == (
        recipe.learning_rates_chosen
    )
    given = parse(["convergence", "--learning-rate-lora", "1e-4"])[1].learning_rates_chosen
    assert given == "not stated of --learning-rate-lora, given as flags"
    own = parse(["--learning-rate-lora", "1e-4", "--learning-rates-chosen", "by a coin"])[1]
    assert own.learning_rates_chosen == "by a coin"
    said, unsaid = (dataclasses.replace(recipe, learning_rates_chosen=words) for words in ("so", "or so"))
    assert [t.fingerprint for t in said.trials(IDENTITIES, "float32")] == [
        t.fingerprint for t in unsaid.trials(IDENTITIES, "float32")
    ]
