"""Labels and descriptions of a trial's settings, for model cards and reports."""

from __future__ import annotations

from typing import Any

from workloads.attention.patterns import PATTERNS
from workloads.config import OF_LORA, TrainingConfig, labels, trains_embeddings, trains_norms
from workloads.models.positions import POSITIONS

METHOD_LABELS: dict[str, str] = {
    "untuned": "untuned",
    "lora": "LoRA",
    "lora+norm": "LoRA+norm",
    "lora+embed": "LoRA+embed",
    "lora+": "LoRA+",
    "full": "full fine-tuning",
}
METHODS: dict[str, str] = {
    "untuned": "nothing is trained; only the positions are changed",
    "lora": "low-rank updates are trained",
    "lora+norm": "low-rank updates and norms are trained",
    "lora+embed": "low-rank updates and embeddings are trained",
    "lora+": "low-rank updates, embeddings and norms are trained (the LongLoRA paper's improved LoRA, not the "
    "optimiser of that name)",
    "full": "the weights themselves are trained",
}
QUANTIZATION = {
    "nf4": "quantised to 4 bits (nf4)",
    "fp8": "in FP8 (e4m3, a scale for each row), like their inputs, except in the last layer and, for attention's, in "
    "the forward pass; the export is not in FP8",
}
SCHEDULES = {
    "constant": "then constant",
    "cosine": "then to zero along half a cosine",
    "linear": "then to zero linearly",
}

LABELS = labels(TrainingConfig)


def has_effect(training: TrainingConfig, field: str) -> bool:
    """Whether a field changes what a trial trains: LoRA's rank does so for the LoRA methods alone."""
    if field in (*OF_LORA, "quantization"):
        return training.method.startswith("lora")
    if field == "group_size":
        return training.group_size is not None
    if field == "learning_rate_embeddings":
        return trains_embeddings(training.method, training.train_layers)
    if field == "learning_rate_norms":
        return trains_norms(training.method)
    return True


def axis_label(field: str) -> str:
    """What reports call an axis: ``Positions``, ``Layers that train``."""
    return LABELS[field].text


def axis_value(field: str, value: Any) -> str:
    """A field's value as part of a name: ``YaRN``, ``last 4 layers``, ``rank 8``, ``cosine schedule``."""
    if field == "method":
        return METHOD_LABELS[value]
    if field == "positions":
        return "unchanged positions" if value == "none" else POSITIONS[value].label
    if field == "train_layers":
        return f"{value} layers" if value[0].isalpha() else f"layers {value}"
    if field == "group_size":
        return f"groups of {value:,}"
    if field == "steps":
        return f"{value:,} steps"
    if field == "quantization":
        return "not quantised" if value == "none" else value
    name = LABELS[field].text.removeprefix("LoRA ").removesuffix(" in training")
    name = name[0].lower() + name[1:]
    if isinstance(value, bool):
        return f"{name} {'on' if value else 'off'}"
    if value is None:
        return f"no {name}" if field == "max_grad_norm" else f"{name} by default"
    if isinstance(value, str):
        return f"{value} {name}"
    return f"{name} {', '.join(value) if isinstance(value, tuple) else format(value, '.12g')}"


def settings(training: TrainingConfig) -> dict[str, str]:
    """What was trained and how, by label; settings that had no effect are left out.

    Neither the method nor the positions are included: readers name them beside the model.
    """
    rows = {}
    if training.task == "sft":
        long = {"drop": "left out", "truncate": "cut at the context's end"}[training.long_examples]
        rows["Task"] = "supervised fine-tuning: the loss is the mean over the tokens of the answers"
        rows["Prompt"] = (
            "of rows with instruction and output: [INST]{instruction}[/INST]{output}; of messages: the chat template"
        )
        rows[LABELS["long_examples"].text] = f"{long} in training, not scored"
    if training.steps:
        rows |= _of_training(training)
    if training.original_length:
        rows[LABELS["original_length"].text] = f"{training.original_length:,} tokens, as given"
    rows["Precision"] = training.precision
    return rows | _of_evaluation(training)


def _of_training(training: TrainingConfig) -> dict[str, str]:
    groups = f", in groups of {training.group_size:,} tokens" if training.group_size else ""
    inside = ", inside documents" if training.document_mask else ""
    rows = {
        LABELS["context_length"].text: f"{training.context_length:,} tokens",
        LABELS["attention"].text: f"{PATTERNS[training.attention].label}{groups}{inside}",
    }
    if training.method.startswith("lora"):
        targets = ", ".join(training.lora_targets) if training.lora_targets else "the attention projections"
        rows["LoRA"] = f"rank {training.lora_rank}, alpha {training.lora_alpha:g}, on {targets}"
    if training.train_layers != "all":
        rows[LABELS["train_layers"].text] = training.train_layers
    if training.quantization != "none":
        rows[LABELS["quantization"].text] = QUANTIZATION[training.quantization]
    rows |= {
        "Steps": f"{training.steps:,}",
        "Batch": f"{training.batch} sequence{'s' if training.batch > 1 else ''}",
        LABELS["learning_rate"].text: f"{training.learning_rate:g} after {training.warmup_steps} steps of warm-up, "
        f"{SCHEDULES[training.schedule]}",
    }
    for field in ("learning_rate_embeddings", "learning_rate_norms"):
        if rate := getattr(training, field):
            rows[LABELS[field].text] = f"{rate:g}"
    decay = f"weight decay {training.weight_decay:g}" if training.weight_decay else "no weight decay"
    clipped = f"gradients clipped to a norm of {training.max_grad_norm:g}" if training.max_grad_norm else "no clipping"
    rows["Optimiser"] = f"AdamW, betas {training.beta1:g} and {training.beta2:g}, {decay}, {clipped}"
    rows["Seed"] = str(training.seed)
    return rows


def _of_evaluation(training: TrainingConfig) -> dict[str, str]:
    scored = (
        f"up to {training.eval_documents:,} held-out documents, the first {training.eval_span:,} tokens of each, and "
        "further ones where there are fewer documents"
    )
    if training.task == "sft":
        scored = f"the answers of up to {training.eval_documents:,} held-out examples that fit into the context"
    often = f", every {training.eval_every:,} steps" if training.steps else ""
    return {"Evaluation": f"full attention, {scored}{often}"}


def shared_settings(trainings: list[TrainingConfig]) -> dict[str, str]:
    """The settings in which no two trials differ; one that only some have (LoRA's rank) is shared if these agree."""
    texts: dict[str, set[str]] = {}
    for training in trainings:
        for name, text in settings(training).items():
            texts.setdefault(name, set()).add(text)
    return {name: same.pop() for name, same in texts.items() if len(same) == 1}
