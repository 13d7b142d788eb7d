"""The same trial trained twice, in two variants that should agree: ``python -m benchmarks.loss_parity``.

    python -m benchmarks.loss_parity --model SmolLM2-135M --data papers            # FP8 base against bfloat16
    python -m benchmarks.loss_parity --model ... --data ... --variants not-compiled bfloat16   # what compiling changes
    python -m benchmarks.loss_parity --model ... --data ... --seeds 0 1                    # and what another seed does

Same seed, same data in the same order, through longspan's training loop (``workloads.training.loop.run``). Compare the
difference of FP8 with that of two variants in bfloat16 (the second line) and of two seeds (the third). On a
GPU the layers are compiled, except with ``not-compiled``; on a CPU nothing is.
"""

from __future__ import annotations

import gc
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from benchmarks.timing import describe, machine, write_json
from dashboards.drawing import INK, MUTED, new_figure, style
from workloads.adaptation.methods import trainable_parameters
from workloads.command import quiet_transformers, run_command
from workloads.config import ExecutionConfig, Method, TrainingConfig
from workloads.data import Corpus, PackedCorpus, prepare
from workloads.engines.choose import make_engine
from workloads.models.source import ModelSource
from workloads.training.checkpoint import load_newest
from workloads.training.loop import Trial, run
from workloads.training.setup import build_model

Variant = Literal["bfloat16", "fp8", "not-compiled"]
EVERY = 50  # the printed losses are means over so many steps


@dataclass(frozen=True)
class Curve:
    """The result of training in one variant.

    Args:
        losses: of each step.
        perplexities: held-out, at the trained length, by step: before the first and after the last.
        exported: the last perplexity of the exported model: the trained parameters on the original bfloat16 base.
        seconds: of the whole run, with loading and evaluations; tokens_per_second: the median of its steps.
    """

    variant: Variant
    losses: list[float] = field(default_factory=list)
    perplexities: dict[int, float] = field(default_factory=dict)
    exported: float = 0.0
    seconds: float = 0.0
    tokens_per_second: float = 0.0


@dataclass(frozen=True)
class Parity:
    """The difference of the second variant from the first: ``second / first - 1``.

    Of each step's loss (in absolute value for ``median`` and ``largest``), of the last perplexity, and of the export's.
    """

    differences: list[float]
    median: float
    largest: float
    mean: float
    perplexity: float
    exported: float

    @classmethod
    def of(cls, first: Curve, second: Curve) -> Parity:
        differences = [b / a - 1 for a, b in zip(first.losses, second.losses, strict=True)]
        last = max(first.perplexities)
        return cls(
            differences=differences,
            median=statistics.median(map(abs, differences)),
            largest=max(map(abs, differences)),
            mean=statistics.fmean(differences),
            perplexity=second.perplexities[last] / first.perplexities[last] - 1,
            exported=second.exported / first.exported - 1,
        )


def train(
    variant: Variant, training: TrainingConfig, source: ModelSource, corpus: PackedCorpus, device: torch.device
) -> Curve:
    """A whole trial in this variant."""
    import torch._dynamo

    torch._dynamo.reset()
    gc.collect()  # frees the previous model
    compiled = device.type == "cuda" and variant != "not-compiled"
    execution = ExecutionConfig(
        compile_layers="on" if compiled else "off", checkpoint_every=training.steps, checkpoint_minutes=math.inf
    )
    curve, speeds, began = Curve(variant), [], time.monotonic()

    def emit(event: str, **fields: Any) -> None:
        if event == "step":
            curve.losses.append(fields["loss"])
            speeds.append(fields["tokens_per_second"])
        if event == "eval" and fields["context_length"] == training.context_length:
            curve.perplexities[fields["step"]] = fields["perplexity"]

    engine = make_engine(execution, device, training.precision)
    with tempfile.TemporaryDirectory() as checkpoints:
        run(source, training, execution, corpus, Path(checkpoints), engine, emit)
        seconds = time.monotonic() - began
        trained, _ = load_newest(Path(checkpoints))
    plain = replace(training, quantization="none")
    trial = Trial(build_model(source, plain, engine, execution), plain, execution, corpus, Path(), engine, emit)
    with torch.no_grad():
        for name, parameter in trainable_parameters(trial.model).items():
            parameter.copy_(trained[f"model/{name}"])
    exported = trial.evaluator.score(training.context_length).perplexity
    return replace(curve, exported=exported, seconds=seconds, tokens_per_second=statistics.median(speeds))


def table(first: Curve, second: Curve, parity: Parity) -> str:
    """Mean losses of every ``EVERY`` steps, perplexities, and the differences."""
    lines = [f"| steps | {first.variant} | {second.variant} | difference |", "|---|---|---|---|"]
    for start in range(0, len(first.losses), EVERY):
        a, b = (statistics.fmean(curve.losses[start : start + EVERY]) for curve in (first, second))
        lines.append(
            f"| {start + 1} to {min(start + EVERY, len(first.losses))} | {a:.4f} | {b:.4f} | {b / a - 1:+.3%} |"
        )
    for step, a in sorted(first.perplexities.items()):
        b = second.perplexities[step]
        lines.append(f"| held-out perplexity at {step} | {a:.4f} | {b:.4f} | {b / a - 1:+.3%} |")
    lines.append(f"| of the exported model | {first.exported:.4f} | {second.exported:.4f} | {parity.exported:+.3%} |")
    lines.append(
        f"\ndifference of each step's loss: median {parity.median:.3%}, largest {parity.largest:.3%}, signed mean "
        f"{parity.mean:+.4%}"
    )
    for curve in (first, second):
        lines.append(f"{curve.variant}: {curve.tokens_per_second:,.0f} tokens/s, {curve.seconds:.0f} s in all")
    return "\n".join(lines)


def over_seeds(pairs: Sequence[tuple[Curve, Curve, Parity]]) -> str:
    """With several seeds: how far apart the two variants end, and how far apart the seeds."""
    lines = ["held-out perplexity of the exported model, by seed"]
    for curves in zip(*((first, second) for first, second, _ in pairs)):
        ends = [curve.exported for curve in curves]
        apart = max(ends) / min(ends) - 1
        lines.append(f"{curves[0].variant}: {', '.join(f'{end:.4f}' for end in ends)} ({apart:.3%} apart)")
    mean = statistics.fmean(parity.mean for *_, parity in pairs)
    return "\n".join([*lines, f"losses differ by {mean:+.4%} on average"])


def draw(pairs: Sequence[tuple[Curve, Curve, Parity]], title: str, path: Path) -> None:
    """Writes a PNG: both losses of the first seed over the steps; below, the difference for each seed."""
    first, second, _ = pairs[0]
    steps = range(1, len(first.losses) + 1)
    with style():
        figure = new_figure(640, 400)
        figure.set_facecolor("white")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
        above.plot(steps, first.losses, color="#98a3ae", linewidth=2.4, label=first.variant)
        above.plot(steps, second.losses, color="#1a4a8a", linewidth=0.9, label=second.variant)
        above.set_ylabel("training loss, nats a token")
        above.legend(frameon=False)
        below.axhline(0, color=MUTED, linewidth=0.8)
        for (*_, parity), colour in zip(reversed(pairs), ["#c3cad2"] * (len(pairs) - 1) + ["#1a4a8a"]):
            below.plot(steps, [100 * each for each in parity.differences], color=colour, linewidth=0.9)
        below.set_ylabel("difference, %")
        below.set_xlabel("step")
        figure.suptitle(title, size=11, weight="bold", color=INK)
        figure.savefig(path, dpi=160)


def compare(
    variants: Sequence[Variant],
    training: TrainingConfig,
    source: ModelSource,
    corpus: PackedCorpus,
    device: torch.device,
) -> tuple[Curve, Curve, Parity]:
    """Trains in both variants; ``training`` is that of bfloat16."""
    first, second = (
        train(variant, replace(training, quantization="fp8" if variant == "fp8" else "none"), source, corpus, device)
        for variant in variants
    )
    return first, second, Parity.of(first, second)


def main(
    model: str,
    data: str,
    variants: tuple[Variant, Variant] = ("bfloat16", "fp8"),
    steps: int = 300,
    context_length: int = 8192,
    batch: int = 2,
    group_size: float = 0.25,
    method: Method = "lora+",
    learning_rate: float = 5e-4,
    eval_documents: int = 16,
    seeds: tuple[int, ...] = (0,),
    json_file: Annotated[Path, tyro.conf.arg(name="json")] = Path("loss_parity.json"),
    picture: Path = Path("loss_parity.png"),
) -> None:
    """Trains the same trial in two variants and prints how far apart their losses are.

    Args:
        model: a folder, a Hugging Face id, or builtin:tiny.
        data: a folder of text, or any other corpus that a sweep accepts.
        variants: the second is compared with the first.
        group_size: of S²-Attn, as a share of the context.
        seeds: the trial is trained in both variants with each.
        json_file: losses and differences.
        picture: a PNG of them.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    quiet_transformers()
    source = ModelSource.parse(model)
    training = TrainingConfig(
        context_length=context_length,
        method=method,
        group_size=int(group_size * context_length),
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        precision="bfloat16",
        eval_every=steps,
        eval_documents=eval_documents,
        eval_span=context_length,
    )
    facts = machine(device)
    print(describe(facts), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        corpus = prepare(Corpus.parse(data), source.tokenizer, source.tokenizer_identity, folder)
        corpus.check(context_length, batch)
        what = f"{Path(model).name}, {method}, {context_length:,} tokens, batch {batch}, {facts['device']}"
        content = {"machine": facts, "model": model, "data": data, "training": training.not_at_default(), "seeds": {}}
        pairs = {}
        for seed in seeds:
            pairs[seed] = first, second, parity = compare(
                variants, replace(training, seed=seed), source, corpus, device
            )
            print(f"{what}, seed {seed}\n\n{table(first, second, parity)}\n", flush=True)
            content["seeds"][seed] = {"curves": [asdict(first), asdict(second)], "parity": asdict(parity)}
            write_json(json_file, content)
            draw(list(pairs.values()), what, picture)
    if len(pairs) > 1:
        print(over_seeds(list(pairs.values())))
    print(f"{json_file}, {picture}")


if __name__ == "__main__":
    sys.exit(run_command(main, "benchmarks.loss_parity"))
