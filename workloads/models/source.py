"""Base models by name: what a name stands for, its identity and configuration, and loading it.

A name is ``builtin:tiny``, a local folder, a GGUF file, or a Hugging Face id (``org/name`` or ``org/name@revision``). A
:class:`ModelSource` knows a model's identity and configuration without loading it; the sweep's own process needs no
more, and imports neither torch nor transformers for it.
"""

from __future__ import annotations

import copy
import difflib
import glob
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workloads.config import Positions
from workloads.errors import InputError, one_error, reason
from workloads.files.given import existing_path
from workloads.files.hashes import content_hash
from workloads.models.configuration import read_configuration, refuse_pointers, refuse_quantised
from workloads.models.families import refuse_sliding_windows
from workloads.models.gguf import converted
from workloads.models.positions import ORIGINAL_LENGTH_FIELD, extend

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUILTIN = Path(__file__).parents[1] / "builtin"

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "*.model")
_CHAT_FILES = ("chat_template*", "additional_chat_templates/*")
# Weights, the model's own settings and documents. Whatever is neither here nor above counts as read by the tokenizer.
_NO_TOKENIZER_FILES = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf", "*.h5",
    "*.msgpack", "config.json", "generation_config.json", ".*", "*.md", "LICENSE*", "NOTICE*",
)  # fmt: skip
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class ModelSource:
    """Where a model is: ``location`` is a folder or a .gguf file, or with a ``revision`` (a commit) a Hugging Face id.

    ``pretrained`` is what transformers loads.
    """

    name: str
    location: str
    revision: str | None = None

    @classmethod
    def parse(cls, name: str) -> ModelSource:
        """Returns the source that a user named.

        Raises:
            InputError: no such builtin, folder or id, or the hub cannot say which revision the id stands for.
        """
        if name.startswith("builtin:"):
            known = sorted(f"builtin:{path.parent.name}" for path in BUILTIN.glob("*/config.json"))
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)
                raise InputError(f"model {name!r} is not built in; did you mean {nearest[0]}?")
            return cls(name, str(BUILTIN / name.removeprefix("builtin:")))
        path = existing_path(name)
        if path and path.is_dir():
            if not (path / "config.json").is_file():
                raise InputError(f"model folder {name} has no config.json; expected a folder that transformers loads")
            if not any(path.glob("*.safetensors")):
                others = sorted(each.name for each in path.iterdir() if each.suffix in (".bin", ".pt", ".pth", ".gguf"))
                held = f" but {', '.join(others[:3])}" if others else ""
                raise InputError(
                    f"model folder {name} has no .safetensors weights{held}; expected a folder that transformers "
                    "loads, with its weights as safetensors (a pickle is never loaded; give a .gguf file by its path)"
                )
            refuse_pointers(f"model folder {name}", path)
            return cls(name, str(path.resolve()))
        if name.lower().endswith(".gguf"):
            if not (path and path.is_file()):
                raise InputError(f"model {name!r} is no file here; expected a GGUF file (looked in {Path.cwd()})")
            return cls(name, str(path.resolve()))
        if name.startswith(("/", "./", "../", "~")) or not HUB_ID.fullmatch(name):
            raise InputError(
                f"model {name!r} is no folder here, and not of the form org/name or org/name@revision; "
                "expected one of them, a .gguf file, or builtin:tiny"
            )
        hub_id, _, revision = name.partition("@")
        return cls(name, hub_id, _hub_revision(hub_id, revision or None))

    @cached_property
    def identity(self) -> str:
        """The model's part of a fingerprint: the content of a folder or file, the id and commit of a hub model."""
        if self.revision:
            return f"hub:{self.location}@{self.revision}"
        if self.is_gguf:
            return f"gguf:sha256:{self._gguf_hash}"
        return _content_hash(Path(self.location), ("*.json", "*.safetensors", "*.model", "*.txt"))

    @property
    def is_gguf(self) -> bool:
        """Whether the location is a GGUF file."""
        return self.location.lower().endswith(".gguf") and Path(self.location).is_file()

    @cached_property
    def pretrained(self) -> str:
        """The folder or hub id that transformers' ``from_pretrained`` takes, with ``revision``.

        For a GGUF file, the folder in this machine's cache; the file is converted to it if it was not before.

        Raises:
            InputError: the GGUF file cannot be converted.
        """
        if not self.is_gguf:
            return self.location
        return str(converted(Path(self.location), self._gguf_hash))

    @cached_property
    def _gguf_hash(self) -> str:
        return content_hash(Path(self.location))

    @cached_property
    def tokenizer_identity(self) -> str:
        """The tokenizer's part of a fingerprint: the content of its files, or the identity of a hub or GGUF model.

        Any file counts that a tokenizer may read, after those of the usual names (``added_tokens.json``, say).
        """
        if self.revision or self.is_gguf:
            return self.identity
        folder = Path(self.location)
        usual = _content_hash(folder, _TOKENIZER_FILES)
        known = {*_matching(folder, (*_TOKENIZER_FILES, *_CHAT_FILES, *_NO_TOKENIZER_FILES))}
        others = [path.name for path in _matching(folder, ("*",)) if path not in known]
        return f"{usual}:{_content_hash(folder, map(glob.escape, others))}" if others else usual

    @cached_property
    def chat_identity(self) -> str:
        """The tokenizer's identity with its chat template, which is part of what instruction data become."""
        if self.revision or self.is_gguf:
            return self.identity
        return f"{self.tokenizer_identity}:{_content_hash(Path(self.location), _CHAT_FILES)}"

    def refuse_adapter(self) -> None:
        """Raises InputError if the model is an adapter, which is not a whole model."""
        if is_adapter(Path(self.location)):
            raise InputError(
                f"model folder {self.name} is an adapter, and what is trained starts from a whole model: export the "
                "trial with --what merged, and give that folder"
            )

    def config(self, original_length: int | None = None) -> Any:
        """The model's configuration, as transformers reads it.

        Args:
            original_length: the length that it was pretrained on, if its configuration leaves that open.

        Raises:
            InputError: it cannot be read, its weights are quantised, or its layers attend in sliding windows.
        """
        config = self._read_config()
        refuse_quantised(f"model {self.name}", config)
        refuse_sliding_windows(config)
        if original_length is not None:
            recorded = getattr(config, ORIGINAL_LENGTH_FIELD, original_length)
            if recorded != original_length:
                raise InputError(
                    f"--original-length {original_length}: model {self.name} was extended by longspan, and its "
                    f"config.json records an original length of {recorded}; leave the flag out"
                )
            setattr(config, ORIGINAL_LENGTH_FIELD, original_length)
        return config

    def _read_config(self) -> Any:
        return read_configuration(f"model {self.name}", self.pretrained, self.revision)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            InputError: it cannot be read.
        """
        from transformers import AutoTokenizer

        pretrained = self.pretrained
        # Transformers would read the configuration by itself, older forms not understood.
        config = read_configuration(f"model {self.name}", pretrained, self.revision)
        try:
            return AutoTokenizer.from_pretrained(
                pretrained, revision=self.revision, config=config, trust_remote_code=False
            )
        except Exception as error:  # whatever a missing or broken file makes the tokenizer's own code raise
            raise InputError(f"model {self.name}: its tokenizer cannot be loaded ({reason(error)})") from error

    def refuse_no_end(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises InputError if the tokenizer's files have no end-of-sequence token.

        It separates documents and ends answers. To one that ``eos_token`` names and no file holds, transformers gives
        an id after all others, whose embedding was never trained.
        """
        from tokenizers import Tokenizer
        from transformers.models.auto.tokenization_auto import get_tokenizer_config
        from transformers.utils import cached_file

        end, what = tokenizer.eos_token, f"the tokenizer of {self.name}"
        if end is None:
            raise InputError(
                f"{what} has no end-of-sequence token, which separates documents and ends answers; set eos_token in "
                "its tokenizer_config.json"
            )
        file = cached_file(
            self.pretrained, "tokenizer.json", revision=self.revision, _raise_exceptions_for_missing_entries=False
        )
        if file is None or Tokenizer.from_file(file).token_to_id(end) is not None:
            return
        settings = get_tokenizer_config(self.pretrained, revision=self.revision)
        if not any(token["content"] == end for token in settings.get("added_tokens_decoder", {}).values()):
            raise InputError(
                f"{what} lacks its end-of-sequence token {end!r}, so the model has no trained embedding of it; set "
                "eos_token in its tokenizer_config.json to a token of its tokenizer.json"
            )

    def check_files(self, config: Any) -> tuple[Any, list[str]]:
        """Checks a model's weights: that they are all there, of the right shapes, and finite.

        Transformers loads them as in training, but onto the device "meta", so that only headers are read. A model of
        the hub is not downloaded for this: what is not in this machine's cache is checked by the headers there.

        Args:
            config: the model's configuration, as of :meth:`config`.

        Returns:
            The configuration, with the ties that the weights have, and notes on what a user may not expect.

        Raises:
            InputError: as :meth:`load`, or a weight is not finite.
        """
        from transformers.utils import logging

        from workloads.models.hub_files import cached_folder, tensors_by_headers
        from workloads.models.weights import check_files, holds_another_output_layer  # imports torch

        what, config = f"model {self.name}", copy.deepcopy(config)
        logging.disable_progress_bar()
        folder = cached_folder(self.location, self.revision) if self.revision else Path(self.pretrained)
        if folder is None:
            try:
                tensors = tensors_by_headers(self.location, self.revision or "")
            except OSError as error:
                unchecked = f"the weights of {self.name} are not in this machine's cache, and the hub does not answer"
                return config, [f"{unchecked} ({error}): each worker checks them when it loads them"]
            check_shapes(what, config, tensors)
            checked = f"the weights of {self.name} are on the hub: their names and shapes were checked"
            return config, [f"{checked}, and each worker checks that they are finite when it loads them"]
        model = load_whole(what, str(folder), config=config, device_map={"": "meta"}, dtype="auto")
        check_files(what, folder, self.identity, {name for name, _ in model.named_parameters()})
        if not holds_another_output_layer(model, folder):
            return config, []
        config.tie_word_embeddings = False
        return config, [
            "the model's files hold an output layer of its own, although its config.json ties it to the embeddings "
            "(tie_word_embeddings): it is trained and exported as untied"
        ]

    def load(
        self,
        context_length: int,
        positions: Positions,
        dtype: torch.dtype,
        quantized: dict[str, Any] | None = None,
        device: torch.device | str = "cpu",
        original_length: int | None = None,
    ) -> PreTrainedModel:
        """The model, its positions extended to ``context_length``, weights in ``dtype``, on ``device``.

        Each weight goes there as it is read: host memory never holds more than a few. The files are mapped into memory,
        so several processes of a node read them from its disk once, as long as its page cache has room.

        With ``quantized`` (of :func:`workloads.models.quantization.nf4_loading`) linear weights are quantised, on the
        device that this names.

        Raises:
            InputError: the model has no rotary positions, its weights are not safetensors (a pickle is never loaded),
                or they are damaged, not finite, or not all there.
        """
        self.refuse_adapter()
        config = self.config(original_length)
        extend(config, context_length, positions)
        config.use_cache = False
        options = {"device_map": {"": device}, **(quantized or {})}
        return load_whole(
            f"model {self.name}", self.pretrained, revision=self.revision, config=config, dtype=dtype, **options
        )


def load_whole(what: str, pretrained: str, **options: Any) -> PreTrainedModel:
    """Loads a folder or hub id by transformers' ``from_pretrained``, with every weight from its safetensors.

    Args:
        what: what is loaded, for error messages.
        options: of ``from_pretrained``.

    Raises:
        InputError: its weights are not safetensors (a pickle is never loaded), or they are damaged, not finite, or not
            all there.
    """
    from transformers import AutoModelForCausalLM

    from workloads.models.rotary import by_sequence  # imports torch
    from workloads.models.weights import refuse_not_finite, write_down_ties

    if options.get("config") is None:
        options["config"] = read_configuration(what, pretrained, options.get("revision"))
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            pretrained,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
            **options,
        )
    except Exception as error:  # whatever damaged files or strange settings make transformers raise
        raise InputError(f"{what} could not be loaded from its safetensors ({reason(error)})") from error
    _refuse_absent(what, loaded)
    refuse_not_finite(what, model.named_parameters())
    write_down_ties(model)
    by_sequence(model)
    return model


def check_shapes(what: str, config: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Checks that a model's weights, by name and on the device "meta", are those of its configuration.

    Raises:
        InputError: they are not, or transformers has no causal language model of this kind.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from workloads.models.weights import refuse_packed  # imports torch

    try:
        model, loaded = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None, config=config, state_dict=tensors, device_map={"": "meta"}, dtype="auto",
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # whatever strange settings make transformers raise
        raise InputError(f"{what} could not be made from its config.json ({reason(error)})") from error
    _refuse_absent(what, loaded)
    parameters = {name for name, _ in model.named_parameters()}
    refuse_packed(what, ((name, tensor.dtype) for name, tensor in tensors.items()), parameters)


def _refuse_absent(what: str, loaded: dict[str, Any]) -> None:
    """Raises InputError if weights were not found, which transformers fills with random numbers."""
    if absent := sorted(loaded["missing_keys"]) + [name for name, *_ in loaded["mismatched_keys"]]:
        raise InputError(
            f"{what}: {len(absent)} of its weights are not in its safetensors or have another shape, {absent[0]} among "
            "them; the folder is not complete, or its config.json is another model's"
        )


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's form."""
    return (folder / "adapter_config.json").is_file()


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, embeddings: int, name: str) -> None:
    """Raises InputError if the tokenizer has tokens that the model has no embedding for.

    On a GPU such a token ends in an assertion that names no cause.
    """
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= embeddings:
        raise InputError(
            f"the tokenizer of {name} does not match the model: it has a token with id {highest}, and the model has "
            f"{embeddings} embeddings. Give a model with the tokenizer that it was trained with, or save it with its "
            "embeddings resized to the tokenizer (resize_token_embeddings)"
        )


def _hub_revision(hub_id: str, revision: str | None) -> str:
    """The commit that a revision of a hub model stands for."""
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi

    try:
        if commit := HfApi().model_info(hub_id, revision=revision, timeout=20).sha:
            return commit
        raise ValueError("it names no commit")
    except Exception as error:  # the hub's client changes what it raises for a dead network from version to version
        raise InputError(
            f"model {hub_id!r}: the model hub does not say which commit it is at ({reason(error)}). Check "
            "the name and the network, log in if the model is gated, give a full commit "
            f"({hub_id}@<40 hex digits>) if it is in the local cache, or name a local folder"
        ) from error


def _content_hash(folder: Path, patterns: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for path in _matching(folder, patterns):
        with one_error(f"{path} cannot be read", "Put the file there, or take it out of the model's folder."):
            digest.update(os.fsencode(path.name) + b"\0")
            digest.update(bytes.fromhex(content_hash(path)))
    return f"sha256:{digest.hexdigest()}"


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files and links of a folder that match a pattern, sorted."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if not path.is_dir()})
