"""A hub model's weights before any of them is downloaded: in this machine's cache, or by their headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from workloads.errors import InputError, reason

if TYPE_CHECKING:
    import torch

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def cached_folder(hub_id: str, revision: str) -> Path | None:
    """The folder of this machine's cache that holds the model's weights; None unless all of them are there."""
    from huggingface_hub import try_to_load_from_cache

    def find(name: str) -> Path | None:
        found = try_to_load_from_cache(hub_id, name, revision=revision)
        return Path(found) if isinstance(found, str) else None

    if whole := find("model.safetensors"):
        return whole.parent
    if (index := find("model.safetensors.index.json")) is None:
        return None
    shards = set(json.loads(index.read_bytes())["weight_map"].values())
    return index.parent if all(map(find, shards)) else None


def tensors_by_headers(hub_id: str, revision: str) -> dict[str, torch.Tensor]:
    """The weights by name, on the device "meta": what the headers of the hub's safetensors say, some KB a file.

    Raises:
        InputError: the repository has no safetensors, or damaged ones.
        OSError: the hub does not answer.
    """
    import torch
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    try:
        found = HfApi().get_safetensors_metadata(hub_id, revision=revision)
    except NotASafetensorsRepoError as error:
        raise InputError(
            f"model {hub_id}: the hub has no .safetensors weights of it; expected a model with its weights as "
            "safetensors (a pickle is never loaded)"
        ) from error
    except SafetensorsParsingError as error:
        raise InputError(f"model {hub_id}: its safetensors on the hub are damaged ({reason(error)})") from error
    except Exception as error:  # the hub's client changes what it raises for a dead network from version to version
        raise OSError(reason(error)) from error
    return {
        name: torch.empty(tensor.shape, dtype=getattr(torch, _DTYPES.get(tensor.dtype, "uint8")), device="meta")
        for file in found.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
