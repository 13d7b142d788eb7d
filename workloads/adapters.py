"""Adapters in PEFT's form: a base model, loaded with the configuration beside the adapter, and the adapter on it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workloads.errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def base_of_adapter(folder: Path, **kwargs: Any) -> PreTrainedModel:
    """The base of an exported adapter, by stock transformers, with the configuration that lies beside the adapter."""
    from peft import PeftConfig
    from transformers import AutoConfig, AutoModelForCausalLM

    adapter = PeftConfig.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        adapter.base_model_name_or_path,
        revision=adapter.revision,
        config=AutoConfig.from_pretrained(folder),
        use_safetensors=True,
        **kwargs,
    )


@contextmanager
def without_deprecations() -> Iterator[None]:
    """PEFT asks a model about gradient checkpointing by a name that transformers has replaced."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def load_adapter(folder: Path, **kwargs: Any) -> PeftModel:
    """An exported adapter on its base; ``kwargs`` as of ``from_pretrained``, for the base.

    Raises:
        InputError: the configuration beside it or its weights are missing, its base is not where it was, or the weights
            are for another base.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    for name in ("config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"adapter {folder} has no {name}; expected a folder that workloads.export wrote")
    try:
        base = base_of_adapter(folder, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the base model of the adapter {folder} cannot be loaded ({reason}); adapter_config.json in it says where "
            "the base is (base_model_name_or_path): write there where it is now"
        ) from error
    try:
        with without_deprecations():
            return PeftModel.from_pretrained(base, folder)
    except (RuntimeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the adapter {folder} does not go on {base.name_or_path} ({reason}): it is damaged, or another base's. "
            "Export it again, or write its base into its adapter_config.json (base_model_name_or_path)"
        ) from error
