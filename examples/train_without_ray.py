"""Extend builtin:tiny from 512 to 1,024 tokens with `workloads` alone: LoRA+, shifted sparse attention, no Ray.

    python examples/train_without_ray.py                        # the standard library's source, on any CPU
    python examples/train_without_ray.py --data ./my-texts      # a folder of .txt, .md, .jsonl or .parquet files
    torchrun --nproc-per-node 2 examples/train_without_ray.py --folder ./run     # two workers, one model

It prints the perplexity on held-out documents before and after training. `orchestrator` does the same for many trials
at once, and adds a plan, a journal, MLflow and a comparison.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from workloads.config import ExecutionConfig, TrainingConfig
from workloads.data import Corpus, prepare
from workloads.engines.choose import make_engine
from workloads.models.source import ModelSource
from workloads.training.loop import run


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny", help="builtin:tiny, a folder, a GGUF file or a hub id")
    parser.add_argument("--data", default="builtin:stdlib", help="builtin:stdlib, a file, a folder or a hub data set")
    parser.add_argument("--context-length", type=int, default=1024, help="tokens of a training sequence")
    parser.add_argument("--steps", type=int, default=24, help="optimiser steps, of two sequences each")
    parser.add_argument("--folder", type=Path, help="keeps tokens and checkpoints here; the same command then resumes")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[int, float]:
    """Trains, and returns the perplexity at the trained context length by step."""
    options = parse_arguments(arguments)
    if "RANK" in os.environ and not dist.is_initialized():  # started by torchrun
        dist.init_process_group()
    with tempfile.TemporaryDirectory() as temporary:
        return train(options, options.folder or Path(temporary))


def train(options: argparse.Namespace, folder: Path) -> dict[int, float]:
    """One trial: configuration, data, device, training loop."""
    # What changes the result. Every field has a type, a default and a check: workloads/config.py.
    config = TrainingConfig(
        context_length=options.context_length,
        method="lora+",  # LoRA on the attention projections; embeddings and norms train too
        attention="s2",  # shifted sparse attention, in training only: evaluation attends fully
        group_size=options.context_length // 4,
        positions="linear",  # position interpolation, by the ratio of the new context to the model's own
        steps=options.steps,
        batch=2,
        learning_rate=3e-3,
        warmup_steps=min(5, options.steps),
        eval_every=options.steps,
        eval_documents=8,
        eval_span=options.context_length,
    )
    # What only changes how fast it runs, and where.
    execution = ExecutionConfig(checkpoint_every=options.steps)

    # The corpus is tokenised once into a memory-mapped file. Documents are held out by a hash of their text.
    source = ModelSource.parse(options.model)
    data = prepare(Corpus.parse(options.data), source.tokenizer, source.tokenizer_identity, folder / "data")
    data.check(config.context_length, config.batch)

    # One device, or DDP where torch.distributed is initialised.
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    engine = make_engine(execution, device, config.precision)

    perplexities: dict[int, float] = {}

    def emit(event: str, **fields: Any) -> None:
        """Receives every event of the loop; they are listed at the top of workloads/training/loop.py."""
        if event == "eval" and fields["context_length"] == config.context_length:
            perplexities[fields["step"]] = fields["perplexity"]
        if engine.rank:
            return
        if event == "model":
            share = fields["trainable_parameters"] / fields["parameters"]
            print(f"{fields['trainable_parameters']:,} of {fields['parameters']:,} parameters train ({share:.0%})")
        elif event == "eval":
            print(
                f"step {fields['step']:3}: perplexity {fields['perplexity']:.3f} at {fields['context_length']:,} tokens"
            )
        elif event == "step" and fields["step"] % 8 == 0:
            print(f"step {fields['step']:3}: loss {fields['loss']:.3f}, {fields['tokens_per_second']:,.0f} tokens/s")

    run(source, config, execution, data, folder / "checkpoints", engine, emit)
    if engine.rank == 0 and 0 in perplexities:
        before, after = perplexities[0], perplexities[config.steps]
        print(
            f"Perplexity on held-out documents: {before:.3f} before training, {after:.3f} after {config.steps} steps."
        )
    return perplexities


if __name__ == "__main__":
    main()
