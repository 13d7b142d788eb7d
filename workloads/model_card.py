"""The model card of an exported trial: README.md with the YAML front matter that the Hugging Face hub reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from workloads.models import ModelSource
from workloads.positions import original_context_length, reach
from workloads.trained import TrainedTrial

METHODS = {
    "untuned": "nothing is trained; only the positions are changed",
    "lora": "LoRA",
    "lora+norm": "LoRA with trained norms",
    "lora+embed": "LoRA with trained embeddings",
    "lora+": "LoRA with trained embeddings and norms (LongLoRA's improved LoRA)",
    "full": "full fine-tuning",
}
HUB = "hub:"  # how the identity of what came from the Hugging Face hub begins


def model_card(trial: TrainedTrial, base: ModelSource, config: Any, *, what: str, step: int, rounding: str) -> str:
    """Markdown: what it is made from and how, its perplexities, how to load it, how near it is to what was trained.

    ``config`` is the exported model's configuration; ``rounding`` a sentence without its full stop.
    """
    name = base.location if base.revision else Path(base.name).name
    metadata = ModelCardData(
        library_name="peft" if what == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=["long-context", "longspan", *(["lora"] if what == "adapter" else [])],
        # Only what the hub can link to.
        base_model=base.location if base.revision else None,
        datasets=_hub_id(trial.data_identity),
    )
    return "\n".join(
        [
            f"---\n{metadata.to_yaml()}\n---",
            f"\n# {name} for {reach(config):,} tokens\n",
            f"{name}, whose original context is {original_context_length(config):,} tokens, made to reach "
            f"{reach(config):,} with longspan, which implements [LongLoRA](https://arxiv.org/abs/2309.12307).\n",
            *_table(_facts(trial, base, config, step), "", ""),
            *_perplexities(trial, step),
            "\n## How to load it\n",
            *_loading(base, what),
            "\n## Exactness\n",
            f"{rounding[0].upper()}{rounding[1:]}.\n",
        ]
    )


def _facts(trial: TrainedTrial, base: ModelSource, config: Any, step: int) -> list[tuple[str, str]]:
    training = trial.training
    facts = [
        ("Base", f"{base.name} (`{trial.model_identity}`)"),
        ("Positions", f"`{json.dumps(config.rope_parameters)}`"),
        ("Method", f"{training.method}: {METHODS.get(training.method, training.method)}"),
    ]
    if training.steps:
        groups = f" in groups of {training.group_size:,} tokens" if training.group_size else ""
        rank = f", rank {training.lora_rank}, alpha {training.lora_alpha:g}" if "lora" in training.method else ""
        facts[-1] = (facts[-1][0], facts[-1][1] + rank)
        facts += [
            ("Data", f"{trial.data} (`{trial.data_identity}`)"),
            ("Context length in training", f"{training.context_length:,} tokens"),
            ("Attention in training", f"{training.attention}{groups}; full attention in evaluation and from here on"),
            ("Steps", f"{step:,}" + (f" of {training.steps:,}" if step < training.steps else "")),
            ("Batch", f"{training.batch} sequences"),
            ("Learning rate", f"{training.learning_rate:g} after {training.warmup_steps} steps of warm-up"),
            ("Precision", training.precision),
            ("Seed", str(training.seed)),
        ]
    return [*facts, ("Trial", f"`{trial.folder.resolve().name}`")]


def _perplexities(trial: TrainedTrial, step: int) -> list[str]:
    events = [event for event in trial.evaluations() if event["step"] in (0, step)]
    if not events:
        return []
    rows = [(f"{e['context_length']:,}", str(e["step"]), f"{e['perplexity']:.3f}") for e in events]
    return [
        "\n## Perplexity\n",
        f"Of held-out documents of {trial.data}: full attention, windows of the given length that neither overlap nor "
        "cross documents, every token scored. Step 0 is the model before training.\n",
        *_table(rows, "window", "step", "perplexity"),
    ]


def _loading(base: ModelSource, what: str) -> list[str]:
    if what == "merged":
        return [
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")',
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
            "```",
        ]
    where = f'"{base.location}", revision="{base.revision}"' if base.revision else f'"{base.pretrained}"'
    return [
        "The base has to be loaded with the configuration that lies here: it holds the extended positions. (What loads "
        "a base by its name alone, such as `AutoPeftModelForCausalLM`, takes the base's own, and the long context is "
        "lost.)\n",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer",
        "",
        'config = AutoConfig.from_pretrained("THIS_FOLDER")',
        f'base = AutoModelForCausalLM.from_pretrained({where}, config=config, dtype="auto")',
        'model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        "```",
    ]


def _table(rows: list[tuple[str, ...]], *head: str) -> list[str]:
    return [_row(head), _row(("---",) * len(head)), *map(_row, rows)]


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _hub_id(identity: str) -> str | None:
    """``org/name`` of ``hub:org/name@commit``, None for what is not from the hub."""
    return identity.removeprefix(HUB).partition("@")[0] if identity.startswith(HUB) else None
