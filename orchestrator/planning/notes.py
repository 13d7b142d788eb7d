"""The notes that a sweep prints before it starts: settings that are allowed but may not be intended."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from orchestrator.run_options import RunOptions
from orchestrator.spec import SweepSpec
from workloads.config import LongExamples, Positions
from workloads.data import ExampleCorpus, PackedCorpus
from workloads.evaluation.intervals import FEWEST_DOCUMENTS
from workloads.models.positions import POSITIONS, is_extended, reach

# Training examples that fill less of the context hardly train its far end.
MIN_FILLED = 0.5


def notes(
    spec: SweepSpec, options: RunOptions, original_length: int, packed: PackedCorpus | ExampleCorpus, scored: int
) -> Iterator[str]:
    """One sentence each, without its full stop.

    Args:
        scored: held-out documents that are long enough (examples: short enough) to be scored.
    """
    for length in spec.context_lengths:
        if length <= original_length:
            yield (
                f"{length:,} tokens are within the model's original context of {original_length:,}: positions are not "
                "extended there"
            )
        if isinstance(packed, ExampleCorpus):
            for long_examples in spec.values_of("long_examples"):
                yield from _example_notes(packed, length, long_examples)
    if scored < spec.eval_documents:
        fits = "short" if spec.task == "sft" else "long"
        verb = "is" if scored == 1 else "are"
        spans = "" if spec.task == "sft" else "; further spans of them are scored where they are longer"
        yield (
            f"only {scored} of the {spec.eval_documents} requested held-out documents {verb} {fits} enough to score"
            f"{spans}. For more documents hold out a larger share (--holdout), give your own (--eval-data)"
            f"{'' if spec.task == 'sft' else ', or score less of each (--eval-span)'}"
        )
    if scored < FEWEST_DOCUMENTS:
        yield (
            f"{scored} document{'s are' if scored > 1 else ' is'} too few for an interval, and so for a winner: give "
            f"at least {FEWEST_DOCUMENTS}, by --eval-documents, --holdout or --eval-data"
        )
    for warmup, steps in itertools.product(spec.values_of("warmup_steps"), spec.values_of("steps")):
        if warmup >= steps:
            yield (
                f"the warm-up takes {warmup} steps of {steps}: the learning rate only rises, to "
                f"{steps / warmup:.0%} of its peak; lower --warmup-steps, or give more --steps"
            )
    if options.engine.startswith("zero") and options.workers == 1 and not options.offload:
        yield (
            f"--engine {options.engine} with one worker has nothing to shard, and saves no memory; give more "
            "--workers, or --offload"
        )


def position_notes(config: Any, lengths: Sequence[int], positions: Sequence[Positions]) -> Iterator[str]:
    """What is assumed about a base's own positions, and where a sweep replaces them; one sentence each."""
    found = reach(config)
    if found.assumption:
        yield f"{found.assumption}: then give --original-length"
    replaced = [length for length in lengths if length > found.longest]
    new = [POSITIONS[each].label for each in positions if POSITIONS[each].parameters]
    if is_extended(config) and replaced and new:
        yield (
            f"the model's own positions ({config.rope_parameters['rope_type']}, from {found.original:,} to "
            f"{found.longest:,} tokens) are replaced by {' or '.join(new)} from {found.original:,} tokens at "
            f"{', '.join(f'{length:,}' for length in replaced)}"
        )


def _example_notes(examples: ExampleCorpus, length: int, long_examples: LongExamples) -> Iterator[str]:
    if left_out := examples.left_out(length, long_examples):
        yield left_out
    filled = examples.filled(length, long_examples)
    if filled < MIN_FILLED:
        yield (
            f"the training examples fill {filled:.0%} of {length:,} tokens on average, {1 - filled:.0%} of the context "
            "is unused: its far end is hardly trained"
        )
