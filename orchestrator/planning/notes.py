"""What a sweep's user should know before it starts, although nothing of it is wrong: the notes at its head."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.options import RunOptions
from orchestrator.spec import SweepSpec
from workloads.data import ExampleCorpus, PackedCorpus

# An interval by bootstrap over fewer documents says little: their spread is hardly known.
FEW_DOCUMENTS = 8
# Below this share of the context, training examples do not teach the length that they are padded or cut for.
LITTLE_OF_THE_CONTEXT = 0.5


def notes(
    spec: SweepSpec, options: RunOptions, original_length: int, packed: PackedCorpus | ExampleCorpus, scored: int
) -> Iterator[str]:
    """One sentence each, without its full stop. ``scored`` documents are held out and long enough."""
    for length in spec.context_lengths:
        if length <= original_length:
            yield (
                f"{length:,} tokens lie within the model's original context of {original_length:,}: positions are not "
                "extended there"
            )
        if spec.task == "sft":
            yield from _of_examples(packed, length, spec)
    if scored < spec.eval_documents:
        fit = "are short enough" if spec.task == "sft" else "are long enough"
        yield f"{scored} held-out documents {fit} to be scored, not {spec.eval_documents}"
    if scored < FEW_DOCUMENTS:
        yield (
            f"an interval over {scored} document{'s' if scored > 1 else ''} means little: give at least "
            f"{FEW_DOCUMENTS}, by --eval-documents or more held-out data"
        )
    if spec.warmup_steps >= spec.steps:
        yield (
            f"the warm-up takes {spec.warmup_steps} steps of {spec.steps}: the learning rate only rises, to "
            f"{spec.steps / spec.warmup_steps:.0%} of its peak; lower --warmup-steps, or give more --steps"
        )
    if options.engine.startswith("zero") and options.workers == 1 and not options.offload:
        yield (
            f"--engine {options.engine} with one worker shares nothing out, and saves no memory; give more --workers, "
            "or --offload"
        )


def _of_examples(examples: ExampleCorpus, length: int, spec: SweepSpec) -> Iterator[str]:
    if left_out := examples.left_out(length, spec.long_examples):
        yield left_out
    filled = examples.filled(length, spec.long_examples)
    if filled < LITTLE_OF_THE_CONTEXT:
        yield (
            f"the training examples fill {filled:.0%} of {length:,} tokens on average, {1 - filled:.0%} of the context "
            "is unused: little is learned of its far end"
        )
