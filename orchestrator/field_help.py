"""Every field of a sweep and of its run: its group in help, its type in words, and how it reads a file's value."""

from __future__ import annotations

import dataclasses
import os
import reprlib
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from workloads.errors import InputError

# Every field is in one group; those in MOST_USED come first in --help, with a line each.
GROUPS: dict[str, tuple[str, ...]] = {
    "model and data": ("model", "data", "text_column", "max_train_tokens", "task", "long_examples"),
    "what trains": ("methods", "train_layers", "lora_rank", "lora_alpha", "lora_targets", "quantization", "precision"),
    "attention and positions": (
        "context_lengths", "positions", "original_length", "attention", "group_size", "document_mask",
    ),
    "optimisation": (
        "steps", "batch", "seeds", "learning_rate_lora", "learning_rate_lora_plus", "learning_rate_full",
        "learning_rate_for", "learning_rate_embeddings", "learning_rate_norms", "learning_rate_sweep",
        "learning_rates_chosen", "warmup_steps", "schedule", "beta1", "beta2", "weight_decay", "max_grad_norm",
    ),
    "evaluation": (
        "references", "eval_data", "holdout", "eval_every", "eval_documents", "eval_span", "target_perplexity",
        "as_good_within", "baseline",
    ),
    "search and stopping": (
        "search", "search_trials", "search_learning_rate", "search_rank", "search_group_size", "early_stopping",
        "reduction_factor", "first_rung", "min_trials", "early_stopping_among",
    ),
    "execution": (
        "storage", "name", "cluster", "address", "workers", "cpus_per_worker", "gpus_per_worker", "max_concurrent",
        "micro_batch", "attention_backend", "compile_layers", "gradient_checkpointing", "offload_activations", "fit",
        "engine", "offload", "tracking_uri", "experiment",
    ),
    "reliability": (
        "checkpoint_every", "checkpoint_minutes", "keep_last", "keep_best", "keep_every", "max_failures",
        "max_preemptions", "hang_timeout", "force", "force_trials",
    ),
    "money": ("budget_hours", "budget_usd", "budget_usd_per_hour", "price_per_hour", "prices"),
}  # fmt: skip
MOST_USED = {
    "model": "builtin:tiny, a folder, .gguf file, or Hugging Face id",
    "data": "builtin:stdlib, a file or folder, or Hugging Face id",
    "context_lengths": "context lengths to train, in tokens",
    "methods": "what trains: lora, lora+, full and more",
    "positions": "how positions extend: linear, yarn, ntk and more",
    "attention": "attention in training: s2 (shifted sparse), full, more",
    "steps": "optimiser steps of each trial",
    "batch": "sequences in an optimiser step",
    "storage": "folder or object store of all results",
    "cluster": "machines to plan for and to ask for, such as aws-p4d",
}

# How errors show a value, which in YAML may hold others a billion times.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 200, 200

BOTH = "{True,False}"  # of a boolean that is an axis; one that is not is a flag without a value


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a sweep or of its run; ``type`` is without ``Annotated``."""

    name: str
    type: Any
    default: Any
    help: str

    @property
    def flag(self) -> str:
        """Its spelling on the command line."""
        return f"--{self.name.replace('_', '-')}"


def fields_of(record: Any) -> dict[str, Field]:
    """The fields of a dataclass's instance with the values that it has as their defaults."""
    kind = type(record)
    hints, texts = get_type_hints(kind), _descriptions(kind)
    return {
        field.name: Field(field.name, hints[field.name], getattr(record, field.name), texts.get(field.name, ""))
        for field in dataclasses.fields(kind)
    }


def _descriptions(kind: type) -> dict[str, str]:
    """The string below each field, which Python itself does not keep."""
    from docstring_parser import parse_from_object  # here, since only --help-all and --print-schema need it

    return {
        parameter.arg_name: " ".join((parameter.description or "").split())
        for base in reversed(kind.__mro__[:-1])
        for parameter in parse_from_object(base).params
    }


def alternatives(kind: Any) -> Iterator[Any]:
    """The types that a value may have: the members of a union, else the type itself."""
    if get_origin(kind) is Annotated:
        yield from alternatives(get_args(kind)[0])
    elif get_origin(kind) in (Union, types.UnionType):
        for member in get_args(kind):
            yield from alternatives(member)
    else:
        yield kind


def in_words(kind: Any) -> str:
    """A type as help shows it: ``INT``, ``INT INT ...``, ``{ddp,zero2}``, ``{all}|INT``."""
    members = [member for member in alternatives(kind) if member is not type(None)]
    return "|".join(dict.fromkeys(_member_in_words(member) for member in members))


def _member_in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "{" + ",".join(str(value) for value in get_args(kind)) + "}"
    if get_origin(kind) is tuple:
        item, *rest = get_args(kind)
        return f"{in_words(item) or BOTH} ..." if rest == [Ellipsis] else " ".join(map(in_words, get_args(kind)))
    return {str: "TEXT", int: "INT", float: "NUMBER", bool: ""}[kind]


def read_value(value: Any, kind: Any) -> Any:
    """A value of a file, or of Python, as a field's type has it.

    A list, a range or an array is a tuple, and so is one value where several are expected. ``1e3`` is an integer where
    one is expected, text such as JSON's ``"1e-3"`` a number, a path text, and null the choice ``none`` where there is
    one.

    Raises:
        InputError: the type does not take it; the message says what was expected.
    """
    value = _plain(value)
    for member in alternatives(kind):
        try:
            return _read_member(value, member)
        except (TypeError, ValueError, OverflowError):
            continue
    expected = "true or false" if bool in alternatives(kind) else in_words(kind)
    given = textwrap.shorten(_SHORT.repr(value), 300)
    raise InputError(f"{given}; expected {expected}{' or none' * (type(None) in alternatives(kind))}")


def _plain(value: Any) -> Any:
    """A path as text; a range, or numbers of numpy, pandas and torch, as Python's own."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, range):
        return list(value)
    return value.tolist() if hasattr(value, "tolist") else value


def _read_member(value: Any, kind: Any) -> Any:
    """The value as one type, which is no union.

    Raises:
        TypeError, ValueError: the type does not take it.
    """
    if get_origin(kind) is Literal:
        choice = "none" if value is None else value
        if isinstance(choice, bool) or choice not in get_args(kind):
            raise ValueError(choice)
        return choice
    if get_origin(kind) is tuple:
        items, (item, *rest) = list(value) if isinstance(value, list | tuple) else [value], get_args(kind)
        kinds = [item] * len(items) if rest == [Ellipsis] else [item, *rest]
        if len(items) != len(kinds):
            raise ValueError(items)
        return tuple(read_value(each, its) for each, its in zip(items, kinds))
    if kind is type(None):
        if value is not None and value not in ("none", "None"):
            raise ValueError(value)
        return None
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, str | int | float):
        raise TypeError(value)
    if kind is str and isinstance(value, float):
        raise TypeError(value)
    if kind is int and not isinstance(value, int):
        number = float(value)
        if number != int(number):
            raise ValueError(value)
        return int(number)
    return kind(value)
