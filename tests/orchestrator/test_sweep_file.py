"""A sweep as a file: what it says is what the same flags say, and a mistake in it is found by field and line."""

import dataclasses
import json
import subprocess
import sys

import jsonschema
import pytest
import yaml

from orchestrator.cli import parse
from orchestrator.recipes import RECIPES, find_recipe
from orchestrator.run_options import RunOptions
from orchestrator.sweep_file import saved
from orchestrator.yaml_loader import Loader
from tests.support.commands import ROOT
from workloads.errors import InputError


def write(folder, text, name="mine.yaml"):
    file = folder / name
    file.write_text(text)
    return str(file)


MINE = """
recipe: convergence
context_lengths: [512, 1024]
methods: lora            # one value where several may be
steps: 1e3
learning_rate_lora: 1e-4 # text in YAML 1.1
max_grad_norm: null
quantization: null
train_layers: [3, last 2]  # an axis
positions: [linear, yarn]
learning_rate_for: {positions=yarn: 1e-3}
group_size: 256
run:
  compile_layers: off    # a boolean in YAML 1.1
  workers: 2
  keep_best: true
"""
FLAGS = [
    "convergence",
    *("--context-lengths", "512", "1024", "--methods", "lora", "--steps", "1000", "--learning-rate-lora", "1e-4"),
    *("--max-grad-norm", "None", "--quantization", "none", "--train-layers", "3", "last 2"),
    *("--positions", "linear", "yarn", "--learning-rate-for", "positions=yarn:0.001", "--group-size", "256"),
    *("--compile-layers", "off", "--workers", "2", "--keep-best", "--name", "mine"),
]  # fmt: skip


def in_json(text):
    return json.dumps(yaml.load(text, Loader))


@pytest.mark.parametrize(("name", "content"), [("mine.yaml", MINE), ("mine.json", in_json(MINE))])
def test_a_file_says_what_the_same_flags_say(name, content, tmp_path):
    sweep_name, spec, options = parse([write(tmp_path, content, name)])
    _, by_flags, options_by_flags = parse(FLAGS)
    assert sweep_name == "mine"
    assert dataclasses.replace(spec, learning_rates_chosen="") == dataclasses.replace(
        by_flags, learning_rates_chosen=""
    )
    assert options == dataclasses.replace(options_by_flags, name=None)
    assert f"--learning-rate-lora, --learning-rate-for, given in {name}" in spec.learning_rates_chosen


def test_lists_are_the_values_of_an_axis_also_where_a_value_is_a_list(tmp_path):
    one = "recipe: convergence\nlora_targets: [q_proj, v_proj]\n"
    two = "recipe: convergence\nlora_targets: [[q_proj], [q_proj, v_proj], null]\n"
    assert parse([write(tmp_path, one)])[1] == parse(["convergence", "--lora-targets", "q_proj", "v_proj"])[1]
    spec = parse([write(tmp_path, two)])[1]
    assert spec.axes == {"lora_targets": (("q_proj",), ("q_proj", "v_proj"), None)}
    assert parse([write(tmp_path, saved("it", spec, RunOptions()), "spec.json")])[1] == spec


def test_flags_override_a_file_and_rename_the_sweep(tmp_path):
    file = write(tmp_path, MINE)
    name, spec, options = parse([file, "--steps", "10", "--workers", "4"])
    assert (spec.steps, spec.context_lengths, options.workers, options.compile_layers) == (10, (512, 1024), 4, "off")
    assert name.startswith("mine-") and name != parse([file, "--steps", "11"])[0]
    assert parse([file, "--workers", "4"])[0] == "mine"  # changes no result
    assert parse([file, "--steps", "10", "--name", "other"])[0] == "other"
    assert parse([write(tmp_path, MINE + "  name: theirs\n", "b.yaml")])[0] == "theirs"


def test_fields_that_a_file_does_not_give_are_the_recipes(tmp_path):
    _, spec, _ = parse([write(tmp_path, "recipe: convergence\nsteps: 9\n")])
    assert spec == dataclasses.replace(find_recipe("convergence")(), steps=9) and spec.batch == 2
    with pytest.raises(InputError, match="names no recipe"):
        parse([write(tmp_path, "context_lengths: [1024]\n")])


def test_a_saved_sweep_is_a_file_that_reruns_it_under_its_name(tmp_path):
    password = "mlflow-password"
    flags = ["--steps", "9", "--references", "--name", "it", "--workers", "2", "--force"]
    name, spec, options = parse([*flags, "--tracking-uri", f"https://me:{password}@host"])
    text = saved(name, spec, options)
    again = parse([write(tmp_path, text, "spec.json")])
    assert again[:2] == (name, spec)
    assert again[2] == RunOptions(workers=2)
    assert password not in text
    assert parse(["--spec", write(tmp_path, text, "spec.json"), "--steps", "3"])[0] != name


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_printed_as_a_file_is_the_recipe_and_fits_the_schema(recipe, tmp_path):
    def longspan(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "longspan", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout

    text, schema = longspan("recipes", recipe), json.loads(longspan("sweep", "--print-schema"))
    assert parse([write(tmp_path, text)])[1] == find_recipe(recipe)()
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    for good in (text, MINE, saved("it", *parse(FLAGS)[1:])):
        assert not list(validator.iter_errors(yaml.load(good, Loader)))
    for bad in ("stps: 3", "steps: many", "methods: [lora, lore]", "run: {workers: two}", "run: {steps: 3}"):
        assert list(validator.iter_errors(yaml.load(bad, Loader))), bad


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stps: 3", "line 2: field 'stps' is unknown; did you mean steps?"),
        ("context-lengths: [8]", "did you mean context_lengths?"),
        ("workers: 2", "line 2: field 'workers' is unknown; it belongs below run:"),
        ("run:\n  workers: 1\n  steps: 3", "line 4: field 'steps' is unknown; it belongs outside run:"),
        ("steps: many", "line 2: steps is 'many'; expected INT"),
        ("steps: true", "line 2: steps is True; expected INT"),
        ("steps: 1.5", "steps is 1.5; expected INT"),
        ("document_mask: yes", "document_mask is 'yes'; expected {True,False}"),
        ("methods: [lora, lore]", "methods is ['lora', 'lore']; expected {lora,"),
        ("search_learning_rate: [1e-3]", "search_learning_rate is [0.001]; expected NUMBER NUMBER or none"),
        ("run:\n  keep_best: on", "line 3: keep_best is 'on'; expected true or false"),
        ("run:\n  engine: zero4", "line 3: engine is 'zero4'; expected {auto,ddp,zero2,zero3}"),
        ("steps: 3\nsteps: 4", "line 3: steps is given twice"),
        ("run: 3", "run is 3; expected run options below it"),
        ("steps: [", "line 3: "),
        ("model: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("steps: 0", "--steps 0: expected at least 1"),
        ("steps: !!int abc", "line 2: 'abc' is no int"),
        ("document_mask: !!bool maybe", "line 2: 'maybe' is no bool"),
        (f"steps: {'9' * 5000}", "line 2: '999"),
        ("? [a, b]\n: 3", "line 2: a list or a mapping is no name"),
        ("\n".join(f"field{n}: 1" for n in range(99)), "line 11: field 'field9' is unknown"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_error_with_its_line(text, message, tmp_path):
    with pytest.raises(InputError) as error:
        parse([write(tmp_path, f"recipe: convergence\n{text}\n")])
    assert message in str(error.value)


def test_aliases_that_multiply_are_one_short_error(tmp_path):
    nested = "".join(f"  - &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
    with pytest.raises(InputError) as error:
        parse([write(tmp_path, f"recipe: convergence\nsteps:\n  - &a0 [1]\n{nested}")])
    assert len(str(error.value)) < 1000


def test_a_saved_sweep_of_an_earlier_version_keeps_the_name_of_its_folder(tmp_path):
    (tmp_path / "sweeps" / "mine").mkdir(parents=True)
    text = json.dumps(find_recipe("convergence")().changed(steps=7).values())
    assert parse([write(tmp_path / "sweeps" / "mine", text, "spec.json")])[0] == "mine"
    assert parse([write(tmp_path, text, "spec.json")])[0].startswith("sweep-")


@pytest.mark.parametrize("name", ["a.yaml", "a.json"])
def test_a_byte_order_mark_is_no_part_of_a_file(name, tmp_path):
    assert parse([write(tmp_path, '\ufeff{"recipe": "convergence"}', name)])[0] == "a"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("...yaml", "recipe: convergence", "gives its sweep the name '..': expected letters"),
        ("a.json", '{"recipe": ""' + "".join(f', "k{n}": 1' for n in range(50_000)) + "}", "is unknown"),
        ("a.yaml", "#" * 2**20 + "\n", "is larger than 1,048,576 bytes"),
        ("a.json", '{"steps": 3, "steps": 4}', "steps is given twice"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "[]", "no object"),
        ("a.yaml", "", "has no fields"),
        ("a.yaml", "recipe: convergance", "did you mean convergence?"),
        ("a.yaml", "recipe: [convergence]", "is unknown"),
        ("a.yaml", "a: &a [1]\nrecipe: *b", "undefined alias"),
    ],
)
def test_a_file_that_is_no_sweep(name, content, message, tmp_path):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        parse([write(tmp_path, content, name)])
