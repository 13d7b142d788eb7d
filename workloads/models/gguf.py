"""Base models from a GGUF file (llama.cpp's format), quantised or not.

The file is converted once, to a folder that transformers loads like any other: reading and unpacking it takes about
twenty seconds for 100 MB, loading the folder one. The folder is
``$XDG_CACHE_HOME/longspan/models/<SHA-256 of the file>`` (``~/.cache`` without it), with the file's tokenizer.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

from workloads.errors import InputError, reason
from workloads.files.cache import user_cache
from workloads.files.once import make_once

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def converted(file: Path, digest: str) -> Path:
    """Returns the folder that a GGUF file of this content is converted to; converts it if it is not in the cache.

    Raises:
        InputError: it is no GGUF file, transformers cannot read its architecture, or its tokens are not those that its
            tokenizer gives.
    """
    return make_once(user_cache() / "models" / digest, lambda partial: _convert(file, partial))


def _convert(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise InputError(f"model {file} is no GGUF file: it does not begin with the letters GGUF")
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name, "trust_remote_code": False}
    try:
        # Without dequantize the model would stay quantised, and could be neither trained nor saved.
        quantization = GgufConfig(dequantize=True)
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that has no switch
            model = AutoModelForCausalLM.from_pretrained(
                **where, quantization_config=quantization, dtype=_weights_dtype(file)
            )
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # whatever a broken or unknown file makes the readers raise
        raise InputError(f"model {file} cannot be read from GGUF ({reason(error)})") from error
    _take_tokens(file, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _remove_added_tokens(folder, model.get_input_embeddings().num_embeddings)


def _weights_dtype(file: Path) -> torch.dtype:
    """Returns the dtype of the file's largest tensor; bfloat16 where that is quantised.

    Its rounding is far finer than the quantisation's (perplexity of SmolLM2-135M in Q4_1: 15.2581 in bfloat16, 15.2578
    in float32).
    """
    import torch
    from gguf import GGMLQuantizationType, GGUFReader

    largest = max(GGUFReader(file).tensors, key=lambda tensor: tensor.n_elements)
    plain = {GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.F16: torch.float16}
    return plain.get(largest.tensor_type, torch.bfloat16)


def _take_tokens(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the tokenizer the file's own special tokens: transformers 5.17 mistakes the end of sequence.

    Checks that it has the file's tokens under their numbers and loses no text.
    """
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    wrong = [i for i, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokens)))) if token != tokens[i]]
    if wrong:
        raise InputError(
            f"model {file}: transformers makes another tokenizer of it than it holds ({len(wrong):,} of "
            f"{len(tokens):,} tokens differ, the first is {tokens[wrong[0]]!r}). Take the model in another format"
        )
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if token := fields.get(f"tokenizer.ggml.{key}_token_id"):
            setattr(tokenizer, f"{name}_token", tokens[token.contents()])
    sample = "Größe 本 12345\n\tdef f(x):  return 'x'"
    ids = tokenizer(sample, add_special_tokens=False)["input_ids"]
    if tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() != sample:
        raise InputError(f"model {file}: its tokenizer does not give a text back that it took. Take another format")


def _remove_added_tokens(folder: Path, embeddings: int) -> None:
    """Removes tokens without an embedding: transformers adds ``<|endoftext|>`` to a file that has none (Llama 3's)."""
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text("utf-8"))
    values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] < embeddings]
    file.write_text(json.dumps(values, ensure_ascii=False), "utf-8")
