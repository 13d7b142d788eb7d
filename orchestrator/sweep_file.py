"""A sweep as a file that a team keeps in git: YAML or JSON.

The file names a recipe, the fields that differ from it, and in a section ``run`` how it runs:

    recipe: convergence
    context_lengths: [1024, 4096]
    steps: 100
    run:
      storage: /shared/runs
      workers: 2

A sweep's own spec.json is such a file with every field, so that it reruns the sweep exactly.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from orchestrator.axes import LISTS
from orchestrator.field_help import read_value
from orchestrator.flags import TYPES
from orchestrator.recipes import RECIPES, find_recipe
from orchestrator.run_options import RunOptions, check_name
from orchestrator.spec import HASHED, SweepSpec
from workloads.errors import InputError, first_line, near

SUFFIXES = (".yaml", ".yml", ".json")
LARGEST = 2**20  # bytes; no sweep needs more
MAX_PROBLEMS = 10  # unknown fields of a section that an error lists
# Options of one run only: a saved sweep that is rerun must not train everything again.
NOT_SAVED = ("name", "force", "force_trials")


@dataclass(frozen=True, kw_only=True)
class SweepFile:
    """What a file, or the arguments of the Python library, say.

    ``name`` is the sweep's as long as no field changes. Without one the sweep is named after its recipe, if it has one.
    """

    spec: SweepSpec
    options: RunOptions
    name: str | None
    recipe: str | None = None


def is_file_name(text: str) -> bool:
    """Whether a command's first word names a file and not a recipe."""
    return text.lower().endswith(SUFFIXES)


def read_sweep_file(path: Path) -> SweepFile:
    """The sweep in a file.

    Raises:
        InputError: it cannot be read, or says what no sweep can have; the message names the field and its line.
    """
    text = _read_text(path)
    values, lines = _parse_json(text, path) if path.suffix.lower() == ".json" else _parse_yaml(text, path)
    found = read_sweep(values, str(path), lines)
    if found.name is not None:
        return found
    if "recipe" not in values:  # an earlier version's spec.json
        return dataclasses.replace(found, name=path.parent.name if path.parent.parent.name == "sweeps" else None)
    stem = re.sub(r"[^\w.+-]+", "-", path.stem)
    check_name(stem, f"{path} gives its sweep the name")
    return dataclasses.replace(found, name=stem)


def _read_text(path: Path) -> str:
    """The content of a file; without the byte order mark that some editors write."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise InputError(f"{path} is larger than {LARGEST:,} bytes; expected a sweep's fields")
        return content.decode("utf-8-sig")
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error


def read_sweep(values: Mapping[str, Any], where: str, lines: Mapping[str, int] | None = None) -> SweepFile:
    """A sweep from plain data: its fields, and under ``recipe`` and ``run`` what they change and how it runs.

    Args:
        where: what the data is, for errors.
        lines: the line of each field, ``run.workers`` for those of the section.

    Raises:
        InputError: it says what no sweep can have, or gives some fields without a recipe for the others.
    """
    values = dict(values)
    recipe, run = values.pop("recipe", None), values.pop("run", None)
    if run is not None and not isinstance(run, Mapping):
        raise InputError(f"{where}: run is {run!r}; expected run options below it, such as storage: ./runs")
    values, run = _read_fields(values, run or {}, where, lines or {})
    options = RunOptions(**run)
    base = None if recipe is None else find_recipe(str(recipe))()
    if set(HASHED) <= set(values):  # a saved sweep: what is not in it is newer, and was at its default
        spec = SweepSpec.of(values)
        recipe = recipe or next((name for name, make in RECIPES.items() if make() == spec), None)
        return SweepFile(spec=spec, options=options, name=options.name, recipe=recipe)
    if base is None:
        raise InputError(
            f"{where} names no recipe, and not every field of a sweep. Add `recipe: NAME`, whose values hold for the "
            f"fields that it does not give; NAME is one of {', '.join(RECIPES)}"
        )
    spec = correct_learning_rates_chosen(base, base.changed(**values), f"in {Path(where).name}")
    return SweepFile(spec=spec, options=options, name=options.name, recipe=recipe)


def override(base: SweepFile, fields: Mapping[str, Any], run: Mapping[str, Any]) -> tuple[SweepSpec, RunOptions]:
    """A sweep with other fields and run options, as the Python library takes them.

    Raises:
        InputError: there is no such field, or no sweep can have these values.
    """
    fields, run = _read_fields(fields, run, "the sweep", {})
    spec = correct_learning_rates_chosen(base.spec, base.spec.changed(**fields), "in Python")
    return spec, dataclasses.replace(base.options, **{"name": None} | run)


def recipe_as_file(name: str) -> SweepFile:
    """A recipe as if it stood in a file, which changes nothing of it."""
    return SweepFile(spec=find_recipe(name)(), options=RunOptions(), name=name)


def name_of(base: SweepFile, spec: SweepSpec) -> str:
    """The recipe's or the file's name, with a hash if fields differ: the same command is always the same sweep."""
    if base.name is None:
        return f"sweep-{spec.digest()}" if base.recipe is None else name_of(recipe_as_file(base.recipe), spec)
    return base.name if spec == base.spec else f"{base.name}-{spec.digest()}"


def saved(name: str, spec: SweepSpec, options: RunOptions) -> str:
    """The content of a sweep's spec.json: every field, and the run options that were given, but no passwords."""
    given = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name not in NOT_SAVED and getattr(options, field.name) != field.default
    }
    if "@" in str(given.get("tracking_uri")):  # it may hold a password
        del given["tracking_uri"]
    return json.dumps(spec.values() | {"run": {"name": name} | given}, indent=1)


def correct_learning_rates_chosen(default: SweepSpec, sweep: SweepSpec, how: str) -> SweepSpec:
    """A recipe's statement of how it chose its learning rates does not hold for rates given otherwise, as ``how`` says.

    The text enters the hash in the sweep's name: changing it renames such sweeps.
    """
    fields = [
        field.name
        for field in dataclasses.fields(sweep)
        if field.name.startswith("learning_rate_") and field.name != "learning_rate_sweep"
    ]
    given = [f"--{name.replace('_', '-')}" for name in fields if getattr(sweep, name) != getattr(default, name)]
    if not given or sweep.learning_rates_chosen != default.learning_rates_chosen:
        return sweep
    return dataclasses.replace(sweep, learning_rates_chosen=f"not stated of {', '.join(given)}, given {how}")


def _read_fields(
    fields: Mapping[str, Any], run: Mapping[str, Any], where: str, lines: Mapping[str, int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of a sweep's fields and run options, as their types have them."""
    _refuse_unknown(fields, run, where, lines)
    read: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    sections = ((fields, TYPES, ""), (run, get_type_hints(RunOptions), "run."))
    for result, (section, kinds, prefix) in zip(read, sections):
        for name, value in section.items():
            try:
                result[name] = _read_field(name, value, kinds[name])
            except InputError as error:
                raise InputError(f"{_place(where, lines.get(prefix + name))}: {name} is {error}") from error
    return read


def _read_field(name: str, value: Any, kind: Any) -> Any:
    """A field's value: of a field that may be an axis all of its values."""
    if name == "learning_rate_for" and isinstance(value, Mapping):
        return {str(condition): read_value(rate, float) for condition, rate in value.items()}
    if name in LISTS and isinstance(value, list) and any(each is None or isinstance(each, list) for each in value):
        return [read_value(each, kind) for each in value]
    return read_value(value, kind)


def _refuse_unknown(values: Mapping[str, Any], run: Mapping[str, Any], where: str, lines: Mapping[str, int]) -> None:
    of_sweep, of_run = list(TYPES), [field.name for field in dataclasses.fields(RunOptions)]
    problems = []
    for section, own, other, belongs, prefix in (
        (values, of_sweep, of_run, "it belongs below run:", ""),
        (run, of_run, of_sweep, "it belongs outside run:", "run."),
    ):
        for name in itertools.islice((name for name in section if name not in own), MAX_PROBLEMS):
            guess = near(str(name), [*own, *other])
            hint = belongs if name in other else f"did you mean {guess}?" if guess else "no field has a near name"
            problems.append(f"{_place(where, lines.get(prefix + str(name)))}: field {name!r} is unknown; {hint}")
    if problems:
        raise InputError("\n".join(problems) + "\nlongspan sweep --help-all describes all fields")


def _place(where: str, line: int | None) -> str:
    return where if line is None else f"{where}, line {line}"


def _parse_json(text: str, path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, value in pairs:
            if name in fields:
                raise InputError(f"{path}: {name} is given twice; expected each field once")
            fields[name] = value
        return fields

    try:
        values = json.loads(text, object_pairs_hook=unique)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({first_line(error)}); expected a sweep's fields") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} has no object; expected a sweep's fields")
    return values, {}


def _parse_yaml(text: str, path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    import yaml

    from orchestrator.yaml_loader import Loader

    try:
        loader = Loader(text)
        node = loader.get_single_node()
        values = loader.construct_document(node) if node is not None else None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or first_line(error)
        raise InputError(f"{_place(str(path), mark and mark.line + 1)}: {problem}") from error
    if node is None or not isinstance(values, dict):
        raise InputError(f"{path} has no fields; expected a sweep's, such as recipe: convergence")
    lines = {}
    for key, value in node.value:
        lines[key.value] = key.start_mark.line + 1
        if key.value == "run" and isinstance(value, yaml.MappingNode):
            lines |= {f"run.{inner.value}": inner.start_mark.line + 1 for inner, _ in value.value}
    return values, lines
