"""``python -m workloads.ask --model DIR --document book.txt "question"``: one question about one long document.

The answer streams to stdout; the document's length and the model's speed go to stderr.
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
from workloads.command import argument_text, quiet_transformers, run_command
from workloads.engines.engine import Engine
from workloads.errors import InputError
from workloads.models.adapters import load_adapter
from workloads.models.positions import max_context_length
from workloads.models.rotary import fixed_length
from workloads.models.source import ModelSource, check_vocabulary, is_adapter, load_whole
from workloads.stock_model import cast_parameters, make_stock
from workloads.terminal import printable
from workloads.trained import TrainedTrial

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OMISSION = "\n[...]\n"  # replaces what --truncate leaves out


@dataclass(frozen=True)
class Answer:
    """The model's answer, with the tokens of prompt and answer and the seconds that each took."""

    text: str
    prompt_tokens: int
    answer_tokens: int
    prefill_seconds: float
    answer_seconds: float


def load_model(
    name: str, device: str = "auto", report: Callable[[str], None] = lambda line: None, checkpoint: str = "last"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model and its tokenizer.

    Weights are bfloat16 on a GPU; on a CPU they keep the dtype they were saved in, and a trial's have its training's
    precision.

    Args:
        name: a trial's folder, an exported one (merged or adapter), another model's, a hub id, or builtin:tiny.
        device: ``auto`` takes every CUDA device (for a trial: one), else the CPU.
        report: is called with a line if a trial is unfinished.
        checkpoint: of a trial: last (the newest), best, or a step.

    Raises:
        InputError: there is no such model or device, or the tokenizer does not match.
    """
    if TrainedTrial.is_at(name):
        return _load_trial(TrainedTrial.open(Path(name).expanduser()), device, report, checkpoint)
    if checkpoint != "last":
        raise InputError(f"--checkpoint {checkpoint}: {name} is no trial's folder and has only one; leave the flag out")
    source = ModelSource.parse(name)
    tokenizer = source.tokenizer()
    placement = _placement(device)
    # In float32 torch's attention for grouped-query models makes a (tokens, tokens) matrix for every head: 25 GiB at
    # 27,000 tokens and 9 heads, measured. Its 16-bit kernels make none.
    dtype = "auto" if placement == "cpu" else torch.bfloat16
    options: dict[str, Any] = {"dtype": dtype, "device_map": placement}
    if is_adapter(Path(source.pretrained)):
        model = load_adapter(Path(source.pretrained), **options)
    else:
        model = load_whole(f"model {name}", source.pretrained, revision=source.revision, **options)
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0], name)
    return model.eval(), tokenizer


def _load_trial(
    trial: TrainedTrial, device: str, report: Callable[[str], None], checkpoint: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source, step = trial.base(), trial.step(unfinished=True, checkpoint=checkpoint)
    if step < trial.training.steps:
        report(trial.describe_step(step, checkpoint))
    placement = _placement(device)
    precision = trial.training.precision if placement == "cpu" else "bfloat16"
    model = trial.build(source, step, Engine(torch.device("cuda" if placement == "auto" else placement), precision))
    make_stock(model)
    cast_parameters(model, compute_dtype(precision))  # trained parameters are float32; there is no autocast here
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
    report: Callable[[str], None] = lambda line: None,
) -> Answer:
    """Asks ``question`` about ``document``; the answer is printed to stdout as it is generated.

    Greedy if ``temperature`` is 0. ``report`` is called with a line on the document's length before the model reads it.

    Raises:
        InputError: document, question and answer together exceed the model's context, and ``truncate`` is off.
    """
    tokens = prompt_tokens(model.config, tokenizer, document, question, max_new_tokens, truncate, report)
    inputs = torch.tensor([tokens], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = _TimedStreamer(tokenizer)
    started = time.perf_counter()
    with torch.inference_mode(), fixed_length(model, len(tokens) + max_new_tokens):
        # generate computes only the last position's logits; without padding, SDPA is causal without a mask.
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=streamer,
            **sampling,
        )
    ended = time.perf_counter()
    first_token = ended if streamer.first_token is None else streamer.first_token
    answer = output[0, len(tokens) :]
    return Answer(
        text=tokenizer.decode(answer, skip_special_tokens=True),
        prompt_tokens=len(tokens),
        answer_tokens=len(answer),
        prefill_seconds=first_token - started,
        answer_seconds=ended - first_token,
    )


def prompt_tokens(
    config: Any,
    tokenizer: PreTrainedTokenizerBase,
    document: str,
    question: str,
    max_new_tokens: int,
    truncate: bool,
    report: Callable[[str], None],
) -> list[int]:
    """The prompt's tokens, without the document's middle if it does not fit; see :func:`ask`."""
    in_document = tokenizer(document, add_special_tokens=False, verbose=False).input_ids
    tokens = _prompt(tokenizer, document, question)
    limit = context_limit(config)
    if limit is None or len(tokens) + max_new_tokens <= limit:
        of = f" of the model's {limit:,}" if limit else ""
        report(f"document: {len(in_document):,} tokens; with the question {len(tokens):,}{of}")
        return tokens
    room = limit - max_new_tokens
    lengths = (
        f"the document has {len(in_document):,} tokens, with the question {len(tokens):,}; the model's context "
        f"is {limit:,}, of which {max_new_tokens:,} are for the answer"
    )
    if not truncate:
        raise InputError(
            f"{lengths}. Give a shorter document or a model with a longer context, lower --max-new-tokens, or keep "
            "only the document's beginning and end with --truncate"
        )
    kept = len(in_document)
    while len(tokens) > room:
        kept -= len(tokens) - room  # text that was cut may take a token more than its parts
        if kept < 2:
            raise InputError(f"{lengths}: no room is left for any of the document. Lower --max-new-tokens")
        first, last = in_document[: (kept + 1) // 2], in_document[-(kept // 2) :]
        tokens = _prompt(tokenizer, tokenizer.decode(first) + OMISSION + tokenizer.decode(last), question)
    report(f"{lengths}. Kept: the first {(kept + 1) // 2:,} and the last {kept // 2:,} tokens of the document")
    return tokens


def context_limit(config: Any) -> int | None:
    """Tokens of a model's context, prompt and answer together; None if its configuration has no limit."""
    rope = getattr(config, "rope_parameters", None)
    if rope and "rope_type" in rope:
        return max_context_length(config)
    return getattr(config, "max_position_embeddings", None)


def _prompt(tokenizer: PreTrainedTokenizerBase, document: str, question: str) -> list[int]:
    if tokenizer.chat_template:
        message = {"role": "user", "content": f"{document}\n\n{question}"}
        prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        # The template writes the special tokens.
        return tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    return tokenizer(f"{document}\n\nQuestion: {question}\nAnswer:", verbose=False).input_ids


class _TimedStreamer(TextStreamer):
    """Prints words as they are finished, and records the time of the first token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.first_token: float | None = None

    def put(self, value: torch.Tensor) -> None:
        if self.first_token is None and not self.next_tokens_are_prompt:
            self.first_token = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text) if sys.stdout.isatty() else text, stream_end)


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
    """The ``device_map`` of transformers."""
    if device == "auto":
        return "auto" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises the latter if it was built without CUDA
        raise InputError(f"--device {device}: there is no such device here ({error}); give auto or cpu") from error
    return device


def answer_question(
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
        question: The question about the document.
        model: A trial's folder, or an exported one (merged or adapter); or another model's, a Hugging Face id,
            builtin:tiny.
        document: A text file in UTF-8.
        max_new_tokens: The longest answer, in tokens.
        temperature: Sampling temperature; 0 always takes the most likely token.
        truncate: Keep the beginning and the end of a document that exceeds the model's context.
        device: cpu, cuda, cuda:1, ...; auto takes every CUDA device, else the CPU.
        checkpoint: A trial's checkpoint: last; best (the lowest perplexity at the trained length); or a step.
    """
    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {max_new_tokens}: expected at least 1")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"--temperature {temperature}: expected 0 or a positive number")
    text = _read(document)
    quiet_transformers()

    def report(line: str) -> None:
        print(printable(line), file=sys.stderr, flush=True)

    question = argument_text(question, "QUESTION")
    loaded, tokenizer = load_model(model, device, report, checkpoint)
    answer = ask(
        loaded,
        tokenizer,
        text,
        question,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        truncate=truncate,
        report=report,
    )
    report(
        f"read {answer.prompt_tokens:,} tokens in {answer.prefill_seconds:.1f} s "
        f"({answer.prompt_tokens / answer.prefill_seconds:,.0f} tokens/s), answered with {answer.answer_tokens:,} in "
        f"{answer.answer_seconds:.1f} s ({answer.answer_tokens / max(answer.answer_seconds, 1e-9):,.1f} tokens/s)"
    )


def main(arguments: list[str] | None = None, prog: str = "python -m workloads.ask") -> int:
    """Runs the command; returns its exit status."""
    return run_command(answer_question, prog, arguments)


if __name__ == "__main__":
    sys.exit(main())
