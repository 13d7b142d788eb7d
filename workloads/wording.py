"""Labels and descriptions of a trial's settings, for model cards and reports."""

from __future__ import annotations

from workloads.attention.patterns import PATTERNS
from workloads.config import TrainingConfig, labels

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
