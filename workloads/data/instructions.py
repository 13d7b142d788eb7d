"""Instruction data, for supervised fine-tuning: from its name, as the user gave it, to texts with marked answers.

A row has one of three forms, recognised by its columns:

    instruction, output[, input]    LongAlpaca's: the prompt is ``[INST]{instruction}[/INST]``, then the output and the
                                    end of the sequence (LongLoRA's code; an input that is not empty follows the
                                    instruction on a line of its own)
    messages                        a list of {role, content}, written out by the tokenizer's chat template
    conversations                   ShareGPT's: a list of {from, value}, from human, gpt or system, written out likewise

The loss is taken on answers only: on the output with the end of the sequence, or on every assistant turn. A template
that marks those turns itself (``{% generation %}``) says which tokens they are. Any other is asked for the
conversation up to each of them: what it writes between the prompt of a turn and the turn's end is the answer. If these
texts are not prefixes of each other (a template that rewrites earlier turns), that would mark the wrong tokens, and the
template is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from workloads.data.columns import encodable
from workloads.data.documents import Row, Split
from workloads.data.encoding import SpelledTokens
from workloads.data.hub import HubSource
from workloads.data.local import ROW_SUFFIXES, LocalRows
from workloads.data.split import EVALUATED_ON, Division, check_holdout, divide
from workloads.errors import InputError
from workloads.files.given import existing_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMS = (
    "columns instruction and output (LongAlpaca's form), messages (a list of {role, content}), or conversations "
    "(ShareGPT's list of {from, value})"
)
_CHATS = ("messages", "conversations")
# ShareGPT's names of roles.
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Instructions:
    """Instruction data from one source. Make it with ``parse``.

    What is held out is a ``holdout`` of it (None: the default), or the rows of ``evaluation``: see split.py.
    """

    name: str
    source: LocalRows | HubSource
    holdout: float | None = None
    evaluation: Instructions | None = None

    @classmethod
    def parse(cls, text: str, holdout: float | None = None, eval_data: str | None = None) -> Instructions:
        """A local .json, .jsonl or .parquet file, a folder of them, or ``org/name[@revision][:config or files]``.

        Raises:
            InputError: a text is none of these, a folder holds nothing that can be read, or the share to hold out
                cannot be or has no effect.
        """
        share = check_holdout(holdout, eval_data)
        evaluation = cls(*_source(eval_data)) if eval_data is not None else None
        return cls(*_source(text), share, evaluation)

    def identity(self) -> str:
        """What the rows are and how they are divided, for the fingerprint: as of a corpus."""
        share = "" if self.holdout is None else f":{self.holdout:g} held out"
        evaluation = "" if self.evaluation is None else f"{EVALUATED_ON}{self.evaluation.identity()}"
        return self.source.identity + share + evaluation

    def rows(self, division: Division | None = None) -> Iterator[tuple[Row, Split, int]]:
        """Every row with its split, and the hash by which held-out rows are ordered.

        Args:
            division: receives how the rows are divided.

        Raises:
            InputError: there are fewer than two, a row is no example, or a file cannot be read.
        """
        other = self.evaluation
        is_empty = True
        for found in divide(
            self.source.row_parts(), example_text, self.name, division or Division(), share=self.holdout,
            evaluation=None if other is None else (other.name, other.source.row_parts()),
        ):  # fmt: skip
            if found.split is None:
                raise InputError(
                    f"instruction data {self.name} has a single row (copies do not count), and one is to be held out. "
                    "Add rows, or give held-out ones by --eval-data."
                )
            is_empty = False
            yield found.item, found.split, found.order
        if is_empty:
            raise InputError(f"instruction data {self.name} has no row. Give data that has some.")


def _source(text: str) -> tuple[str, LocalRows | HubSource]:
    if path := existing_path(text):
        source = LocalRows(path)
        source.files  # noqa: B018 (a folder without readable files is refused here, not at the first row)
        return path.resolve().name, source
    hub = None if text.startswith("builtin:") else HubSource.parse(text)
    if hub:
        return text, hub
    raise InputError(
        f"instruction data {text!r}: expected an existing file or folder of {', '.join(ROW_SUFFIXES)}, or a hub "
        "data set such as Yukang/LongAlpaca-12k"
    )


@dataclass(frozen=True)
class Conversation:
    """A text, and ranges in it, (begin, end) in characters: of its answers, and of special tokens that are spelled out.

    ``adds_ends`` adds the token that begins a sequence, if the tokenizer has one, and the one that ends it, which is
    part of the answer; a chat template writes its own.
    """

    text: str
    answers: list[tuple[int, int]]
    adds_ends: bool = False
    spelled: tuple[tuple[int, int], ...] = ()


def encode_rows(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each row's tokens (int64), and which of them belong to an answer (bool), as this tokenizer's model sees them.

    Raises:
        InputError: a row has none of the forms, or the chat template fails on it, each with its place; or the tokenizer
            does not tell which characters a token stands for.
    """
    tokens_in_text = SpelledTokens(tokenizer)
    conversations = [_conversation(row, tokenizer, tokens_in_text) for row in rows]
    for row, (tokens, answers) in zip(rows, _encode(conversations, tokenizer, tokens_in_text)):
        if not answers[1:].any():
            raise InputError(f"{row.where}: the tokenizer's chat template marks none of its tokens as an answer.")
        yield tokens, answers


def empty_answer(row: Row) -> str | None:
    """Which answer of a row is empty, with its place; None if none is.

    Raises:
        InputError: the row has none of the forms.
    """
    if (form := form_of(row)) not in _CHATS:
        return f"{row.where}: the answer ('output') is empty" if _is_blank(row.columns["output"]) else None
    for number, message in enumerate(_messages(row, form)):
        if message["role"] == "assistant" and _is_blank(message["content"]):
            return f"{row.where}, message {number}: the assistant's answer is empty"
    return None


def form_of(row: Row) -> str:
    """The columns that make a row an example: ``messages``, ``conversations``, or ``instruction and output``.

    Raises:
        InputError: it has none of them.
    """
    for chat in _CHATS:
        if row.columns.get(chat) is not None:
            return chat
    if "instruction" in row.columns and "output" in row.columns:
        return "instruction and output"
    raise InputError(f"{row.where}: expected {_FORMS}; its columns are {', '.join(row.columns) or '(none)'}.")


def example_text(row: Row) -> str:
    """The roles and texts of a row, the same from every kind of file.

    Raises:
        InputError: the row has none of the forms.
    """
    columns = row.columns
    if (form := form_of(row)) not in _CHATS:
        return "\0".join(str(columns.get(name) or "") for name in ("instruction", "input", "output"))
    messages = columns[form] if isinstance(columns[form], list) else [columns[form]]
    return "\0".join(_role_and_text(message) if isinstance(message, dict) else str(message) for message in messages)


def _role_and_text(message: dict) -> str:
    role, text = message.get("role") or message.get("from"), message.get("content") or message.get("value")
    return f"{_ROLES.get(str(role), role)}\0{text}"


def first_text(row: Row) -> str:
    """The text that a row begins with: its first message, or its instruction."""
    form = form_of(row)
    return _messages(row, form)[0]["content"] if form in _CHATS else str(row.columns["instruction"])


def _is_blank(text: Any) -> bool:
    return isinstance(text, str) and not text.strip()


def _conversation(row: Row, tokenizer: PreTrainedTokenizerBase, tokens_in_text: SpelledTokens) -> Conversation:
    if (form := form_of(row)) in _CHATS:
        messages = [{**message, "content": tokens_in_text.hide(message["content"])} for message in _messages(row, form)]
        conversation = _of_messages(messages, tokenizer, row.where)
    else:
        conversation = _of_instruction(row, tokens_in_text.hide)
    text, spelled = tokens_in_text.reveal(conversation.text)
    return replace(conversation, text=text, spelled=tuple(spelled))


def _encode(
    conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase, tokens_in_text: SpelledTokens
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """As :func:`encode_rows`; a token that begins in the prompt and ends in the answer is part of the answer."""
    texts = [conversation.text for conversation in conversations]
    try:
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except NotImplementedError as error:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path} does not tell which characters a token stands for, which marks the "
            "answers. Take a model with a fast tokenizer (tokenizer.json)."
        ) from error
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    begin = [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
    for conversation, ids, offsets in zip(conversations, encoded["input_ids"], encoded["offset_mapping"]):
        ids, offsets = tokens_in_text.as_text(conversation.text, conversation.spelled, ids, offsets)
        begins, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        answers = np.zeros(len(ids), dtype=bool)
        for start, stop in conversation.answers:
            # By their ends: some tokenizers report a token of blanks as empty, at the end of the blanks.
            answers |= (ends > start) & ((ends <= stop) | (begins < stop))
        if conversation.adds_ends:
            ids = [*begin, *ids, eos]
            answers = np.concatenate([np.zeros(len(begin), dtype=bool), answers, [True]])
        yield np.array(ids, dtype=np.int64), answers


def _of_instruction(row: Row, hide: Callable[[str], str]) -> Conversation:
    texts = {}
    for column in ("instruction", "input", "output"):
        text = row.columns.get(column)
        if not isinstance(text, str) and not (text is None and column == "input"):
            raise InputError(f"{row.where}: {column!r} is {type(text).__name__}, not a string. Fix the row.")
        texts[column] = hide(encodable(text or "", f"{row.where}: {column!r}"))
    instruction = f"{texts['instruction']}\n{texts['input']}" if texts["input"].strip() else texts["instruction"]
    prompt = f"[INST]{instruction}[/INST]"
    text = prompt + texts["output"]
    return Conversation(text, [(len(prompt), len(text))], adds_ends=True)


def _messages(row: Row, form: str) -> list[dict[str, str]]:
    messages = row.columns[form]
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{row.where}: {form!r} is not a list of messages, or an empty one. Fix the row.")
    found = [_message(message, f"{row.where}, message {number}") for number, message in enumerate(messages)]
    if not any(message["role"] == "assistant" for message in found):
        raise InputError(f"{row.where}: no message is of the role 'assistant', so there is no answer. Fix the row.")
    return found


def _message(message: Any, where: str) -> dict[str, str]:
    """A message as {role, content}."""
    fields = message if isinstance(message, dict) else {}
    if isinstance(fields.get("role"), str) and isinstance(fields.get("content"), str):
        return {"role": fields["role"], "content": encodable(fields["content"], where)}
    if isinstance(fields.get("from"), str) and isinstance(fields.get("value"), str):
        if fields["from"] not in _ROLES:
            raise InputError(
                f"{where}: it is from {fields['from']!r}; expected one of {', '.join(_ROLES)}. Fix the row."
            )
        return {"role": _ROLES[fields["from"]], "content": encodable(fields["value"], where)}
    raise InputError(f"{where}: expected {{role, content}} or {{from, value}}, two strings. Fix the row.")


def _of_messages(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, where: str) -> Conversation:
    from transformers.utils.chat_template_utils import render_jinja_template

    if not tokenizer.chat_template:
        raise InputError(
            f"{where}: the tokenizer of {tokenizer.name_or_path} has no chat template to write messages out with. Take "
            "an instruct model, or data with the columns instruction and output."
        )

    with _template_errors(where):
        if _GENERATION.search(template := tokenizer.get_chat_template()):
            # Not by the mask that apply_chat_template returns: where a tokenizer reports offsets without blanks, it
            # loses an answer that begins with one, and all answers after it.
            (text,), (answers,) = render_jinja_template(
                [messages], chat_template=template, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
            )
            return Conversation(text, answers)
        return _by_prefixes(messages, tokenizer, where)


def _by_prefixes(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, where: str) -> Conversation:
    def render(count: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)

    if messages[0]["role"] == "assistant":
        raise InputError(f"{where}: the first message is the assistant's; expected a user's or a system message.")
    answers = []
    text = render(len(messages), prompt=False)
    for turn in (number for number, message in enumerate(messages) if message["role"] == "assistant"):
        before, through = render(turn, prompt=True), render(turn + 1, prompt=False)
        if not (through.startswith(before) and text.startswith(through)) or through == before:
            raise InputError(
                f"{where}: the chat template of {tokenizer.name_or_path} does not write message {turn} the same way "
                "whatever follows it, so its answers cannot be told from its prompts. Give the tokenizer a template "
                "with {% generation %} marks, or one that leaves earlier turns as they are."
            )
        answers.append((len(before), len(through)))
    return Conversation(text, answers)


class _template_errors:
    """Turns a template's error for a conversation into an InputError with its place."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        from jinja2 import TemplateError

        if isinstance(error, TemplateError):
            raise InputError(f"{self.where}: the chat template fails on it ({error}). Fix the row.") from error
