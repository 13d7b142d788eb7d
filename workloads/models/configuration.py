"""A model's config.json, read, and refused by name where a model cannot be trained from it. Imports no torch.

Older forms of the settings for rotary positions (``rope_scaling`` with ``type``, ``su``, numbers as strings) become the
form that transformers reads. Code in a model's folder is never run.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from workloads.errors import InputError, reason

# Types of rotary positions by older names.
RENAMED = {"su": "longrope"}
# The schemes that a quantization_config names by ``quant_method``.
SCHEMES = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "compressed-tensors": "compressed-tensors",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "mxfp4": "MXFP4",
}
SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip
MOST_LAYERS = 10_000
ROPE_NUMBERS = (
    "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor", "attention_factor",
    "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor",
)  # fmt: skip


def read_configuration(what: str, pretrained: str, revision: str | None = None) -> Any:
    """The configuration of a folder or hub id, as an object of transformers.

    Args:
        what: what is read, for error messages.

    Raises:
        InputError: it cannot be read, transformers does not know its kind of model, or its settings contradict each
            other.
    """
    from transformers import CONFIG_MAPPING, PretrainedConfig

    try:
        values, _ = PretrainedConfig.get_config_dict(pretrained, revision=revision)
        kind = str(values.get("model_type"))
        if kind not in CONFIG_MAPPING:
            raise InputError(f"{what}: {_unknown_kind(kind, values)}")
        _update_rope(what, values)
        _refuse_sizes(what, values)
        config = CONFIG_MAPPING[kind].from_dict(values)
        _refuse_token_ids(what, config)
    except InputError:
        raise
    except Exception as error:  # whatever a broken or strange file makes transformers raise
        raise InputError(
            f"{what}: its config.json cannot be read ({reason(error)}); expected the file that transformers writes"
        ) from error
    return config


def refuse_quantised(what: str, config: Any) -> None:
    """Raises InputError if a model's files are quantised, which can be neither trained nor merged with an adapter."""
    settings = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if not settings:
        return
    values = settings if isinstance(settings, dict) else settings.to_dict()
    method = str(values.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in values else "unnamed"))
    raise InputError(
        f"{what} is quantised ({SCHEMES.get(method, method)}, by quantization_config in its config.json); expected "
        "plain weights: give the model that it was made from, and --quantization nf4 or fp8 to train on less memory"
    )


def _unknown_kind(kind: Any, values: dict[str, Any]) -> str:
    if "auto_map" in values:
        return (
            f"its config.json (auto_map) asks for Python code of its own for model_type {kind!r}, which is never run; "
            "choose a model of a kind that transformers has"
        )
    return (
        f"its config.json has model_type {kind!r}, which the installed transformers does not know; choose another "
        "model, or install a newer transformers"
    )


def _refuse_sizes(what: str, values: dict[str, Any]) -> None:
    """Raises InputError for sizes that no model has: transformers makes layers of any number, one by one."""
    for name in SIZES:
        size, most = values.get(name), MOST_LAYERS if name == "num_hidden_layers" else 2**31
        if isinstance(size, int) and not 0 < size < most:
            raise InputError(f"{what}: {name} is {size} in its config.json; expected 1 to {most - 1:,}")


def _refuse_token_ids(what: str, config: Any) -> None:
    """Raises InputError if the padding token has no embedding: torch would refuse to make the embeddings."""
    vocabulary, pad = getattr(config, "vocab_size", None), getattr(config, "pad_token_id", None)
    if isinstance(vocabulary, int) and isinstance(pad, int) and not -vocabulary <= pad < vocabulary:
        raise InputError(
            f"{what}: pad_token_id is {pad} in its config.json, and its vocabulary has {vocabulary} tokens (0 to "
            f"{vocabulary - 1}); write null there, which is enough for training, or another token's id"
        )


def _update_rope(what: str, values: dict[str, Any]) -> None:
    """Brings the settings for rotary positions in a config.json to the form that transformers reads, in place."""
    forms = {name: values[name] for name in ("rope_parameters", "rope_scaling") if values.get(name)}
    for name, rope in forms.items():
        if not isinstance(rope, dict):
            raise InputError(f"{what}: {name} is {rope!r} in its config.json; expected settings by name, or null")
        if any(isinstance(value, dict) for value in rope.values()):
            continue  # different positions in different layers, which workloads/models/positions.py refuses
        older = rope.pop("type", None)
        kinds = [RENAMED.get(str(kind), str(kind)) for kind in (rope.get("rope_type"), older) if kind is not None]
        if len(set(kinds)) > 1:
            raise InputError(
                f"{what}: {name} has rope_type {kinds[0]!r} and type {kinds[1]!r} in its config.json; keep the one "
                "that it was trained with"
            )
        rope["rope_type"] = kinds[0] if kinds else "default"
        for number in ROPE_NUMBERS:
            if rope.get(number) is not None:
                rope[number] = _number(what, f"{name}.{number}", rope[number])
        _refuse_shrinking(what, name, rope)
        if rope["rope_type"] == "longrope" and (original := values.get("original_max_position_embeddings")):
            rope.setdefault("original_max_position_embeddings", original)
    if values.get("rope_theta") is not None:
        values["rope_theta"] = _number(what, "rope_theta", values["rope_theta"])
    _refuse_two_answers(what, forms, values.get("rope_theta"))


def _refuse_shrinking(what: str, name: str, rope: dict[str, Any]) -> None:
    """Raises InputError for factors that would shorten the context, or stretch dimensions by nothing."""
    if rope.get("factor") is not None and rope["factor"] < 1:
        raise InputError(f"{what}: {name}.factor is {rope['factor']} in its config.json; expected at least 1")
    for each in ("short_factor", "long_factor"):
        if isinstance(factors := rope.get(each), list):
            for place, factor in enumerate(factors):
                _number(what, f"{name}.{each}[{place}]", factor)


def _number(what: str, name: str, value: Any) -> int | float:
    """A number that may have been written as a string."""
    try:
        if not isinstance(value, bool) and 0 < float(value) < math.inf:
            return float(value) if isinstance(value, str) else value
    except (ValueError, TypeError, OverflowError):
        pass
    raise InputError(f"{what}: {name} is {value!r} in its config.json; expected a positive number")


def _refuse_two_answers(what: str, forms: dict[str, dict[str, Any]], theta: float | None) -> None:
    """Raises InputError if older and newer settings differ: versions of transformers would take one or the other."""
    answers: dict[str, dict[str, Any]] = {}
    for form, rope in forms.items():
        for name, value in rope.items():
            answers.setdefault(name, {})[f"{form}.{name}"] = value
    if theta is not None and forms:
        answers.setdefault("rope_theta", {})["rope_theta"] = theta
    for found in answers.values():
        if any(value != next(iter(found.values())) for value in found.values()):
            listed = " and ".join(f"{name} {value!r}" for name, value in found.items())
            raise InputError(
                f"{what}: its config.json says {listed}, and versions of transformers differ in which they take; keep "
                "the one that it was trained with"
            )


def refuse_pointers(what: str, folder: Path) -> None:
    """Raises InputError if a file of a model's folder is a pointer of Git LFS in place of the file."""
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".model", ".txt") and path.is_file():
            with path.open("rb") as file:
                if file.read(40).startswith(b"version https://git-lfs.github.com/spec"):
                    raise InputError(
                        f"{what}: {path.name} is a pointer of Git LFS, not the file itself; run git lfs pull in "
                        f"{folder}, or download the model from its hub"
                    )
