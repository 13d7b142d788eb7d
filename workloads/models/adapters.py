"""Adapters in PEFT's form: a base model, loaded with the configuration beside the adapter, and the adapter on it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workloads.errors import InputError, one_error, reason
from workloads.models.configuration import read_configuration
from workloads.models.source import ModelSource, load_whole

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


BASE_FILE = "base.json"  # beside an exported adapter: the identity of its base, as of ModelSource


def note_base(folder: Path, identity: str) -> None:
    """Records beside an adapter which base it was trained from."""
    (folder / BASE_FILE).write_text(json.dumps({"identity": identity}) + "\n", "utf-8")


def refuse_another_base(folder: Path, base: str) -> None:
    """Raises InputError if an adapter was trained from another base than the folder ``base``, where that is recorded.

    Weights of the same shape would load without an error.
    """
    noted = folder / BASE_FILE
    if noted.is_file() and Path(base).is_dir():
        with one_error(f"adapter {folder}: its {BASE_FILE} cannot be read", "Export the adapter again."):
            expected = str(json.loads(noted.read_text("utf-8"))["identity"])
        found = ModelSource.parse(base).identity
        if found != expected and not expected.startswith("gguf:"):
            raise InputError(
                f"the adapter {folder} was trained from another base than {base}: from {expected}, and this is "
                f"{found}. Write into its adapter_config.json (base_model_name_or_path) where the one that it was "
                "trained from is"
            )


def base_of_adapter(folder: Path, **kwargs: Any) -> PreTrainedModel:
    """Loads the base of an exported adapter by stock transformers, with the configuration beside the adapter.

    Raises:
        InputError: it is not where it was, damaged, or another one.
    """
    from peft import PeftConfig

    config = read_configuration(f"adapter {folder}", str(folder))
    try:
        adapter = PeftConfig.from_pretrained(folder)
    except Exception as error:  # whatever a broken file makes PEFT raise
        raise InputError(
            f"adapter {folder}: its adapter_config.json cannot be read ({reason(error)}); export it again"
        ) from error
    base = adapter.base_model_name_or_path
    refuse_another_base(folder, base)
    try:
        return load_whole(f"the base {base}", base, revision=adapter.revision, config=config, **kwargs)
    except InputError as error:
        raise InputError(
            f"adapter {folder}: {error}. adapter_config.json in it says where the base is (base_model_name_or_path): "
            "write there where it is now"
        ) from error


@contextmanager
def without_deprecations() -> Iterator[None]:
    """Silences a warning: PEFT asks for gradient checkpointing by a name that transformers has replaced."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def load_adapter(folder: Path, **kwargs: Any) -> PeftModel:
    """Loads an exported adapter on its base; ``kwargs`` as of ``from_pretrained``, for the base.

    Raises:
        InputError: the configuration beside it or its weights are missing, its base is not where it was, or the weights
            are for another base.
    """
    from peft import PeftModel

    for name in ("config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"adapter {folder} has no {name}; expected a folder that workloads.export wrote")
    base = base_of_adapter(folder, **kwargs)
    try:
        with without_deprecations():
            # PEFT would go on with those matrices as it made them.
            warnings.filterwarnings("error", ".*missing adapter keys", UserWarning)
            return PeftModel.from_pretrained(base, folder)
    except Exception as error:  # whatever a broken file or another base makes PEFT raise
        raise InputError(
            f"the adapter {folder} does not go on {base.name_or_path} ({reason(error)}): it is damaged, or another "
            "base's. Export it again, or write its base into its adapter_config.json (base_model_name_or_path)"
        ) from error
