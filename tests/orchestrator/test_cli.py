"""The command line that makes a sweep."""

import dataclasses
import json

import pytest

from orchestrator.cli import parse
from orchestrator.expansion import expand
from orchestrator.field_help import GROUPS, MOST_USED
from orchestrator.recipes import RECIPES
from orchestrator.run_options import RunOptions
from orchestrator.spec import SweepSpec
from orchestrator.trial_spec import Identities
from workloads.errors import InputError

IDENTITIES = Identities(model="sha256:m", tokenizer="sha256:t", data="stdlib:d")


def test_help_lists_every_field_in_one_group():
    """A new field needs its place in orchestrator/field_help.py."""
    listed = sorted(name for names in GROUPS.values() for name in names)
    fields = [field.name for kind in (SweepSpec, RunOptions) for field in dataclasses.fields(kind)]
    assert listed == sorted(set(fields) - {"axes"})
    assert set(MOST_USED) <= set(listed)


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
    file.write_text(json.dumps(spec.values()))
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
        (["--steps", "3", "convergence"], "comes before all flags: python -m orchestrator.sweep convergence --steps 3"),
    ],
)
def test_a_flag_or_value_that_cannot_be_names_what_was_expected(arguments, hint, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(arguments)
    assert exit.value.code == 2
    captured = capsys.readouterr()
    assert hint in " ".join((captured.err + captured.out).replace("│", " ").split())


def test_how_the_learning_rates_were_chosen_holds_only_for_those_that_were():
    recipe = parse(["convergence"])[1]
    assert "small grid" in recipe.learning_rates_chosen
    assert parse(["convergence", "--steps", "3", "--learning-rate-sweep", "0.3", "1"])[1].learning_rates_chosen == (
        recipe.learning_rates_chosen
    )
    given = parse(["convergence", "--learning-rate-lora", "1e-4"])[1].learning_rates_chosen
    assert given == "not stated of --learning-rate-lora, given as flags"
    own = parse(["--learning-rate-lora", "1e-4", "--learning-rates-chosen", "by a coin"])[1]
    assert own.learning_rates_chosen == "by a coin"
    one, other = (dataclasses.replace(recipe, learning_rates_chosen=words) for words in ("so", "or so"))
    assert [t.fingerprint for t in expand(one, IDENTITIES, "float32").trials] == [
        t.fingerprint for t in expand(other, IDENTITIES, "float32").trials
    ]


def test_what_is_adapted_and_how_can_be_given_on_the_command_line():
    flags = ["--methods", "lora+embed", "--train-layers", "last 2", "--lora-targets", "v_proj", "q_proj"]
    flags += ["--positions", "ntk", "--references", "none", "dynamic", "llama3", "--schedule", "cosine"]
    flags += ["--learning-rate-embeddings", "1e-4", "--quantization", "nf4"]
    _, spec, _ = parse(flags)
    assert SweepSpec.of(json.loads(json.dumps(spec.values()))) == spec
    expansion = expand(spec, IDENTITIES, "float32")
    trials = [each.training for each in expansion.trials if each.training.context_length == 1024]
    assert [training.positions for training in trials] == ["none", "dynamic", "llama3", "ntk", "ntk"]
    tuned = trials[-1]
    assert (tuned.train_layers, tuned.lora_targets) == ("last 2", ("q_proj", "v_proj"))
    assert (tuned.schedule, tuned.learning_rate_embeddings, tuned.quantization) == ("cosine", 1e-4, "nf4")
    assert {training.quantization for training in trials[:-1]} == {"none"}


def test_every_attention_pattern_is_a_flag_of_a_sweep():
    flags = ["--attention", "dilated", "--document-mask", "--group-size", "0.5", "--attention-backend", "sdpa"]
    _, spec, options = parse(flags)
    assert options.attention_backend == "sdpa"
    trained = [t.training for t in expand(spec, IDENTITIES, "float32").trials if t.training.method != "untuned"]
    assert {(t.attention, t.document_mask, t.group_size / t.context_length) for t in trained} == {
        ("dilated", True, 0.5)
    }
