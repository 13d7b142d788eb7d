"""Topic and line retrieval as LongChat tests it (lmsys.org, June 2023): its own cases, or generated ones of that form.

    topics    a record of conversations on several topics; the question is the first topic
    lines     a record of lines, each with a name and a number; the question is the number of one line

LongChat's cases are JSON Lines: ``prompt`` with ``topics`` or with ``expected_number``, of fixed lengths. Generated
ones fill a given length exactly, need no data and fit any model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from rich.console import Console

from workloads.errors import InputError, one_error
from workloads.evaluation import pictures
from workloads.evaluation.retrieval import Prompter, RetrievalOptions, collect_tests, prepare_tests, retrieval_table
from workloads.evaluation.retrieval_cases import RetrievalTest
from workloads.evaluation.task import EvaluationTask, Result, Run

if TYPE_CHECKING:
    from workloads.evaluation.subject import Subject

Form = Literal["topics", "lines"]

# LongChat's prompts continue in a chat template of these roles, which a model without chat tuning follows as well.
CUE = "\n ASSISTANT:"
ANSWER_TOKENS = 64

TOPICS_TASK = (
    "Below is a record of our previous conversation on several different topics. You are the ASSISTANT, and I am the "
    "USER. At the beginning of each topic, the USER will say 'I would like to discuss the topic of <TOPIC>'. Memorize "
    "each <TOPIC>. At the end of the record, I will ask you to retrieve the first topic. Now the record start.\n"
)
TOPICS_QUESTION = (
    "\n USER: Now the record ends. What is the first topic we discussed? Only give me the topic name. Do not summarize "
    "yourself."
)
LINES_TASK = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
    "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
    "<REGISTER_CONTENT> of a certain line index. Now the record start:\n"
)
LINES_QUESTION = "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {name}? I need the number."

ASPECTS = "history future economics psychology ethics teaching science beauty dangers politics".split()
SUBJECTS = (
    "beekeeping, bridges, bicycles, chess, volcanoes, glaciers, lighthouses, opera, pottery, railways, sleep, tea, "
    "vaccines, whales, gardens, clocks, maps, cinema, coral reefs, earthquakes, folk music, handwriting, insulation, "
    "jewellery, kites, libraries, mushrooms, night markets, orchards, perfume, recycling, satellites, theatre, "
    "umbrellas"
).split(", ")
TURNS = (
    ("What would you say to somebody who hears of {topic} for the first time?",
     "I would begin with an example from daily life, since {topic} touches more people than one would think. Then I "
     "would name two or three questions that are still open, and leave the details for later."),
    ("Which books or films on {topic} can you recommend?",
     "There are many, and tastes differ. An introduction by someone who has worked in the field for years is a good "
     "start. A documentary shows what words cannot, and a local library will have both."),
    ("Has the view of {topic} changed over the years?",
     "Yes, a good deal. What experts took for granted fifty years ago is often doubted today, partly because there is "
     "more evidence, and partly because people now ask other questions than their grandparents did."),
    ("What do people most often get wrong?",
     "They tend to look for one simple cause. In fact several things work together, some of them slowly, and it takes "
     "patience to tell them apart. It also helps to ask who gains if a simple story is believed."),
    ("How could I take part myself?",
     "Look for a club or an evening class near you, and go there twice before you decide. You will meet people who "
     "like to share what they know, and most of them started with as many questions as you have now."),
)  # fmt: skip

ADJECTIVES = (
    "able amber ample ancient arctic autumn basic bitter blank bold brave brief bright broad calm careful cheerful "
    "civil clean clever cold common cosmic crisp curious damp dark deep dense double dry dusty eager early easy "
    "elegant empty equal faint fair famous fancy fast final firm flat fresh gentle giant glad golden grand green happy "
    "hidden hollow honest humble icy idle inner jolly keen kind large late lazy light little lively local lonely loud "
    "lucky mellow mild modern narrow neat noble odd old open pale patient plain polite proud quick quiet rapid rare "
    "rich rough round royal rustic secret sharp short shy silent simple slow small smooth"
).split()
NOUNS = (
    "anchor apple arrow badge barn basin beach bell bench berry bird boat bottle branch brick bridge bucket button "
    "cabin candle canyon carpet castle chair circle cliff clock cloud coast coin comet corner cotton cradle crown "
    "curtain desert door dragon drum eagle engine feather fence field finger forest fountain garden gate glove hammer "
    "harbor hat hill horse house island jacket jar jungle kettle key kitchen ladder lake lamp leaf lemon letter magnet "
    "marble market meadow mirror moon mountain needle nest ocean orange oven paddle palace paper pebble pencil piano "
    "pillow planet pocket pond quilt rabbit ribbon river road rocket roof rope saddle sail shell"
).split()


@dataclass(frozen=True, kw_only=True)
class TopicsOptions(RetrievalOptions):
    """Which record is searched."""

    form: Form = "topics"
    """topics: generate conversations and ask for the first topic, or lines and ask for one line's number."""
    cases: Path | None = None
    """topics: LongChat's own cases instead (a .jsonl file, or a folder of them), up to the longest of --lengths."""


def _prepare(subject: Subject, options: TopicsOptions, console: Console) -> Run:
    """Prepares topic or line prompts: generated ones of each length, or LongChat's cases."""
    prompter = Prompter(subject.tokenizer, options.chat)
    if options.cases is None:

        def make(length: int) -> list[RetrievalTest]:
            return generated_tests(prompter, options.form, [length], options.tests, options.seed)

        tests = collect_tests(subject, options, console, make)
        return prepare_tests(subject, options, console, f"generated {options.form}", tests)
    tests = longchat_tests(prompter, options.cases, options.tests)
    short = [test for test in tests if test.length <= max(subject.lengths)]
    if len(short) < len(tests):
        console.print(
            f"note: {len(tests) - len(short)} of {len(tests)} cases are left out: they are longer than "
            f"{max(subject.lengths):,} tokens"
        )
    if not short:
        raise InputError(
            f"--cases {options.cases}: the shortest case has {min(test.length for test in tests):,} tokens, more than "
            f"the longest length, {max(subject.lengths):,}; give longer --lengths"
        )
    return prepare_tests(subject, options, console, f"LongChat's cases, {options.cases.name}", short)


def _lengths_of_cases(options: TopicsOptions) -> tuple[int, ...]:
    """The length of LongChat's longest case, to which positions are extended."""
    if options.cases is None:
        return ()
    from workloads.models.source import ModelSource

    prompter = Prompter(ModelSource.parse(options.model).tokenizer(), options.chat)
    return (max(test.length for test in longchat_tests(prompter, options.cases, options.tests)),)


def generated_tests(
    prompter: Prompter, form: Form, lengths: Sequence[int], tests: int, seed: int
) -> list[RetrievalTest]:
    """``tests`` prompts of each length: a prompt and the room for its answer are exactly ``length`` tokens.

    The record's last conversation or line is cut to fit; the one asked for is always whole. In ``lines`` every line is
    equally likely to be asked for.

    Raises:
        InputError: a length is too short for one conversation's first turn or one line, or needs more names than there
            are.
    """
    generator = np.random.default_rng(seed)
    make = {"topics": _topics_test, "lines": _lines_test}[form]
    return [make(prompter, length, generator) for length in lengths for _ in range(tests)]


def _topics_test(prompter: Prompter, length: int, generator: np.random.Generator) -> RetrievalTest:
    before, after = prompter.frame(TOPICS_TASK, TOPICS_QUESTION, "" if prompter.chat else CUE)
    room = length - ANSWER_TOKENS - len(before) - len(after)
    topics = [f"the {aspect} of {subject}" for aspect in ASPECTS for subject in SUBJECTS]
    generator.shuffle(topics)
    least = len(prompter.encode(_opening(topics[0])))
    if room < least:
        raise InputError(f"a prompt on topics needs {length - room + least} tokens with this tokenizer, not {length:,}")
    record: list[int] = []
    for topic in topics:
        if len(record) < room:
            record += prompter.encode(_conversation(topic, generator))
    if len(record) < room:
        most = length - room + len(record)
        raise InputError(f"there are topics for {most:,} tokens, not for {length:,}; --form lines reaches further")
    tokens = before + record[:room] + after
    return RetrievalTest(tokens, topics[0], ANSWER_TOKENS, depth=0.0, group=f"{length} tokens")


def _opening(topic: str) -> str:
    return f" USER: I would like to discuss the topic of {topic}.\n"


def _conversation(topic: str, generator: np.random.Generator) -> str:
    turns = "".join(
        f" USER: {question.format(topic=topic)}\n ASSISTANT: {answer.format(topic=topic)}\n"
        for question, answer in generator.permutation(TURNS)
    )
    return (
        f"{_opening(topic)} ASSISTANT: Sure, I'd be happy to talk about that! What would you like to know?\n{turns}"
        f" USER: Great, this is the end of our discussion on the topic {topic}, let's talk about the next topic.\n"
    )


def _lines_test(prompter: Prompter, length: int, generator: np.random.Generator) -> RetrievalTest:
    names = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]
    generator.shuffle(names)
    numbers = generator.integers(1, 50_000, len(names)).astype(str)
    lines = (f"line {name}: REGISTER_CONTENT is <{number}>\n" for name, number in zip(names, numbers))
    wanted = prompter.encode(next(lines))
    question = LINES_QUESTION.format(name=names[0])
    before, after = prompter.frame(LINES_TASK, question, "" if prompter.chat else CUE)
    room = length - ANSWER_TOKENS - len(before) - len(wanted) - len(after)
    if room < 0:
        raise InputError(f"a prompt of lines needs {length - room:,} tokens with this tokenizer, not {length:,}")
    others: list[int] = []
    starts = []  # where the line asked for may be inserted
    for line in lines:
        if len(others) > room:
            break
        starts.append(len(others))
        others += prompter.encode(line)
    if len(others) < room:
        raise InputError(f"there are lines for {length - room + len(others):,} tokens, not for {length:,}")
    place = int(generator.choice(starts))
    tokens = before + others[:place] + wanted + others[place:room] + after
    return RetrievalTest(tokens, str(numbers[0]), ANSWER_TOKENS, depth=place / max(1, room), group=f"{length} tokens")


def longchat_tests(prompter: Prompter, location: Path, tests: int) -> list[RetrievalTest]:
    """The first ``tests`` cases of each of LongChat's files (topics or lines), by their number of topics or lines.

    Args:
        location: one of its .jsonl files, or a folder of them.

    Raises:
        InputError: there is no such file, or it does not hold LongChat's cases.
    """
    files = sorted(location.glob("*.jsonl")) if location.is_dir() else [location]
    if not files or not files[0].is_file():
        raise InputError(f"--cases {location} is neither a .jsonl file nor a folder that holds some")
    found = [test for file in files for test, _ in zip(_read_cases(prompter, file), range(tests))]
    return sorted(found, key=lambda test: int(test.group.split()[0]))


def _read_cases(prompter: Prompter, file: Path) -> Iterator[RetrievalTest]:
    reading = one_error(f"--cases {file} cannot be read", "Give a .jsonl file of LongChat's cases.")
    with reading, file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                case = json.loads(line)
                if "topics" in case:
                    group, expected, depth = f"{len(case['topics'])} topics", case["topics"][0], 0.0
                else:
                    group, expected = f"{case['num_lines']} lines", str(case["expected_number"])
                    depth = case["random_idx"][1] / case["num_lines"]
                before, after = prompter.frame(case["prompt"].rstrip(), "", "" if prompter.chat else CUE)
            except Exception as error:  # whatever values of other types raise
                raise InputError(
                    f"{file}, line {number} is no case of LongChat ({type(error).__name__}: {error}); expected a JSON "
                    "object with prompt and topics, or with prompt, expected_number, num_lines and random_idx"
                ) from error
            yield RetrievalTest(before + after, expected, ANSWER_TOKENS, depth, group)


def _picture(result: Result, path: Path) -> Path:
    title = "Topic retrieval" if "topics" in result["what"] else "Line retrieval"
    return pictures.accuracy_by_length(result, path, title)


TOPICS = EvaluationTask(
    name="topics",
    options=TopicsOptions,
    prepare=_prepare,
    table=retrieval_table,
    picture=_picture,
    default_lengths=_lengths_of_cases,
)
