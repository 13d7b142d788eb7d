"""A model's weights: whether they are finite, and whether the output layer is the embedding matrix."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from workloads.errors import InputError
from workloads.files.cache import private_folder, user_cache
from workloads.files.hashes import LARGE_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def refuse_not_finite(what: str, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raises InputError, with its name, if a weight holds NaN or infinity."""
    for name, weight in weights:
        if weight.dtype not in PLAIN or weight.device.type == "meta" or not weight.numel():
            continue
        if not torch.stack(torch.aminmax(weight.detach())).isfinite().all():
            raise InputError(
                f"{what}: its weight {name} holds NaN or infinity, so that every result would be NaN; take an intact "
                "copy, or an earlier checkpoint of the model"
            )


def refuse_packed(what: str, weights: Iterable[tuple[str, torch.dtype]], parameters: set[str]) -> None:
    """Raises InputError, with its name, if a parameter is stored in a type that needs scales to be read."""
    for name, dtype in weights:
        if dtype not in PLAIN and name in parameters:
            raise InputError(
                f"{what}: its weight {name} is stored as {str(dtype).removeprefix('torch.')}, and its config.json has "
                "no quantization_config; expected plain weights (float16, bfloat16, float32): give the model that it "
                "was made from"
            )


def check_files(what: str, folder: Path, identity: str, parameters: set[str]) -> None:
    """Checks that the weights in a folder's safetensors are plain and finite; those of a large model once per content.

    Args:
        parameters: the names of the model's own.

    Raises:
        InputError: they are not.
    """
    files = sorted(folder.glob("*.safetensors"))
    entry = None
    if sum(file.stat().st_size for file in files) >= LARGE_BYTES and (cache := private_folder(user_cache() / "finite")):
        entry = cache / hashlib.sha256(identity.encode()).hexdigest()
        if entry.exists():
            return
    refuse_packed(what, ((name, weight.dtype) for file in files for name, weight in _tensors(file)), parameters)
    refuse_not_finite(what, (each for file in files for each in _tensors(file)))
    if entry:
        entry.touch()


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():
            yield name, opened.get_tensor(name)


def holds_another_output_layer(model: PreTrainedModel, folder: Path) -> bool:
    """Whether a folder holds an output layer that differs from its embeddings, although its configuration ties them."""
    output, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if not model.config.tie_word_embeddings or output is None:
        return False
    wanted = {_name(model, output): None, _name(model, embeddings): None}
    found = {name: weight for file in folder.glob("*.safetensors") for name, weight in _tensors(file) if name in wanted}
    return len(found) == 2 and not torch.equal(*found.values())


def _name(model: nn.Module, layer: nn.Module) -> str:
    return next(f"{name}.weight" for name, module in model.named_modules() if module is layer)


def write_down_ties(model: PreTrainedModel) -> None:
    """Makes the configuration say whether the output layer is the embedding matrix.

    Where the files of a tied model hold another output layer, transformers loads it; with ``tie_word_embeddings`` still
    on, others would take the embeddings in its place, and an export would be another model there.
    """
    output = model.get_output_embeddings()
    # Without values transformers ties nothing that the files hold twice.
    if output is not None and model.config.tie_word_embeddings and output.weight.device.type != "meta":
        model.config.tie_word_embeddings = output.weight is model.get_input_embeddings().weight
