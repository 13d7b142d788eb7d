"""``python -m workloads.ask --model DIR --document book.txt "question"``: one question about one long document.

The answer streams to stdout; how long the document is and how fast the model read it goes to stderr.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import tyro
from transformers import TextStreamer

from workloads.adaptation.methods import compute_dtype
from workloads.command import quiet_transformers, run_command
from workloads.engines.engine import Engine
from workloads.errors import InputError
from workloads.export import cast_parameters, make_stock
from workloads.models.adapters import load_adapter
from workloads.models.positions import max_context_length
from workloads.models.source import ModelSource, check_vocabulary, is_adapter, load_whole
from workloads.trained import TrainedTrial

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OMISSION = "\n[...]\n"  # in the place of what --truncate leaves out


@dataclass(frozen=True)
class Answer:
    """What the model said, and what it cost: tokens of the prompt and of the answer, and seconds for each."""

    text: str
    prompt_tokens: int
    answer_tokens: int
    prefill_seconds: float
    answer_seconds: float


def load_model(
    name: str, device: str = "auto", say: Callable[[str], None] = lambda line: None, checkpoint: str = "last"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model to ask and its tokenizer: a trial's folder, an exported one (merged or adapter), another one, a hub id,
    builtin:tiny. ``checkpoint``, of a trial: last (the newest), best, or a step.

    Weights are bfloat16 on a GPU; on a CPU they stay in the dtype they are saved in, and a trial's are in its
    training's precision. ``auto`` takes every CUDA device there is (of a trial: one), else the CPU. ``say`` gets a line
    if a trial is not finished.

    Raises:
        InputError: there is no such model or device, or the tokenizer does not match.
    """
    if (Path(name) / "trial.json").is_file():
        return _load_trial(TrainedTrial.open(Path(name)), device, say, checkpoint)
    if checkpoint != "last":
        raise InputError(f"--checkpoint {checkpoint}: {name} is no trial's folder and has but one; leave the flag out")
    source = ModelSource.parse(name)
    tokenizer = source.tokenizer()
    placement = _placement(device)
    # In float32 torch's attention for grouped-query models makes a matrix of (tokens, tokens) for every head: 25 GiB at
    # 27,000 tokens and 9 heads, measured, where its kernels for 16 bits make none.
    dtype = "auto" if placement == "cpu" else torch.bfloat16
    options: dict[str, Any] = {"dtype": dtype, "device_map": placement}
    if is_adapter(Path(source.pretrained)):
        model = load_adapter(Path(source.pretrained), **options)
    else:
        model = load_whole(f"model {name}", source.pretrained, revision=source.revision, **options)
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0], name)
    return model.eval(), tokenizer


def _load_trial(
    trial: TrainedTrial, device: str, say: Callable[[str], None], checkpoint: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source, step = trial.base(), trial.step(unfinished=True, checkpoint=checkpoint)
    if step < trial.training.steps:
        say(trial.describe_step(step, checkpoint))
    placement = _placement(device)
    precision = trial.training.precision if placement == "cpu" else "bfloat16"
    model = trial.build(source, step, Engine(torch.device("cuda" if placement == "auto" else placement), precision))
    make_stock(model)
    cast_parameters(model, compute_dtype(precision))  # what trained is float32, and there is no autocast here
    tokenizer = source.tokenizer()
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0], source.name)
    return model.eval(), tokenizer


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    document: str,
    question: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    truncate: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Answer:
    """Asks ``question`` about ``document``; the answer is printed to stdout while it is made.

    Greedy where ``temperature`` is 0. ``say`` gets a line on how long the document is before the model reads it.

    Raises:
        InputError: document, question and answer are together longer than the model's reach, and ``truncate`` is off.
    """
    tokens = prompt_tokens(model.config, tokenizer, document, question, max_new_tokens, truncate, say)
    inputs = torch.tensor([tokens], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = _TimedStreamer(tokenizer)
    began = time.perf_counter()
    with torch.inference_mode():
        # generate computes the last position's logits alone; with nothing padded, SDPA is causal without a mask.
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=streamer,
            **sampling,
        )
    ended = time.perf_counter()
    answer = output[0, len(tokens) :]
    return Answer(
        text=tokenizer.decode(answer, skip_special_tokens=True),
        prompt_tokens=len(tokens),
        answer_tokens=len(answer),
        prefill_seconds=streamer.first_token - began,
        answer_seconds=ended - streamer.first_token,
    )


def prompt_tokens(
    config: Any,
    tokenizer: PreTrainedTokenizerBase,
    document: str,
    question: str,
    max_new_tokens: int,
    truncate: bool,
    say: Callable[[str], None],
) -> list[int]:
    """The prompt's tokens, the document's middle left out where it has to be; see :func:`ask`."""
    in_document = tokenizer(document, add_special_tokens=False, verbose=False).input_ids
    tokens = _prompt(tokenizer, document, question)
    limit = context_limit(config)
    if limit is None or len(tokens) + max_new_tokens <= limit:
        of = f" of the {limit:,} that the model reaches" if limit else ""
        say(f"document: {len(in_document):,} tokens; with the question {len(tokens):,}{of}")
        return tokens
    room = limit - max_new_tokens
    lengths = (
        f"the document has {len(in_document):,} tokens, with the question {len(tokens):,}; the model reaches "
        f"{limit:,}, of which {max_new_tokens:,} are for the answer"
    )
    if not truncate:
        raise InputError(
            f"{lengths}. Give a shorter document or a model of longer reach, lower --max-new-tokens, or keep only the "
            "document's beginning and end with --truncate"
        )
    kept = len(in_document)
    while len(tokens) > room:
        kept -= len(tokens) - room  # cut text may take a token more than its parts did
        if kept < 2:
            raise InputError(f"{lengths}: no room is left for any of the document. Lower --max-new-tokens")
        first, last = in_document[: (kept + 1) // 2], in_document[-(kept // 2) :]
        tokens = _prompt(tokenizer, tokenizer.decode(first) + OMISSION + tokenizer.decode(last), question)
    say(f"{lengths}. Kept: the first {(kept + 1) // 2:,} and the last {kept // 2:,} tokens of the document")
    return tokens


def context_limit(config: Any) -> int | None:
    """Tokens that a model takes, prompt and answer together; None if its configuration does not say."""
    rope = getattr(config, "rope_parameters", None)
    if rope and "rope_type" in rope:
        return max_context_length(config)
    return getattr(config, "max_position_embeddings", None)


def _prompt(tokenizer: PreTrainedTokenizerBase, document: str, question: str) -> list[int]:
    if tokenizer.chat_template:
        message = {"role": "user", "content": f"{document}\n\n{question}"}
        prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        # The template has written the special tokens already.
        return tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    return tokenizer(f"{document}\n\nQuestion: {question}\nAnswer:", verbose=False).input_ids


class _TimedStreamer(TextStreamer):
    """Prints words as they are finished, and notes when the first token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.first_token: float | None = None

    def put(self, value: torch.Tensor) -> None:
        if self.first_token is None and not self.next_tokens_are_prompt:
            self.first_token = time.perf_counter()
        super().put(value)


def _read(document: Path) -> str:
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--document {document} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--document {document} is not UTF-8 text ({error}); give a text file") from error
    if not text.strip():
        raise InputError(f"--document {document} is empty; give a text file")
    return text


def _placement(device: str) -> str:
    """What transformers takes as device_map."""
    if device == "auto":
        return "auto" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises the latter where it is built without CUDA
        raise InputError(f"--device {device}: there is no such device here ({error}); give auto or cpu") from error
    return device


def main(
    question: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="QUESTION")],
    model: str,
    document: Path,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    truncate: bool = False,
    device: str = "auto",
    checkpoint: str = "last",
) -> None:
    """Asks a model one question about one long document; the answer streams to stdout.

    Args:
        question: What to ask about the document.
        model: A trial's folder, or an exported one (merged or adapter); or another model's, a Hugging Face id,
            builtin:tiny.
        document: A text file in UTF-8.
        max_new_tokens: The longest answer, in tokens.
        temperature: Of sampling; 0 always takes the most likely token.
        truncate: Of a document that is longer than the model's reach, keep the beginning and the end.
        device: cpu, cuda, cuda:1, ...; auto takes every CUDA device there is, else the CPU.
        checkpoint: Of a trial: last; best (the lowest perplexity at the trained length); or a step.
    """
    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {max_new_tokens}: expected at least 1")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"--temperature {temperature}: expected 0 or a positive number")
    text = _read(document)
    quiet_transformers()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    loaded, tokenizer = load_model(model, device, say, checkpoint)
    answer = ask(
        loaded,
        tokenizer,
        text,
        question,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        truncate=truncate,
        say=say,
    )
    say(
        f"read {answer.prompt_tokens:,} tokens in {answer.prefill_seconds:.1f} s "
        f"({answer.prompt_tokens / answer.prefill_seconds:,.0f} tokens/s), answered with {answer.answer_tokens:,} in "
        f"{answer.answer_seconds:.1f} s ({answer.answer_tokens / max(answer.answer_seconds, 1e-9):,.1f} tokens/s)"
    )


if __name__ == "__main__":
    sys.exit(run_command(main, "workloads.ask"))
