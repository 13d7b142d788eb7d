"""A sweep and its trials as data: frozen, typed, checked where they are made; and a trial's identity.

A recipe makes a :class:`SweepSpec`; with what its model and data turn out to be (:class:`Identities`) it becomes
:class:`TrialSpec` s. A trial's fingerprint is a hash of all that changes its result and nothing else: the same
fingerprint names its folder, its Ray Train run and its MLflow run, so that the same trial is never trained twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from workloads.config import (
    RESULT_VERSION,
    Attention,
    AttentionBackend,
    CompileLayers,
    EngineName,
    ExecutionConfig,
    LongExamples,
    Positions,
    Precision,
    Quantization,
    Schedule,
    Task,
    TrainingConfig,
    group_size_in_tokens,
    trains_embeddings,
    trains_norms,
)
from workloads.errors import InputError

TrainedMethod = Literal["lora", "lora+norm", "lora+embed", "lora+", "full"]


@dataclass(frozen=True, kw_only=True)
class SweepSpec:
    """What a sweep compares: every context length with every method and seed, and the untuned references."""

    model: str = "builtin:tiny"
    """Base model: builtin:tiny, a folder, a .gguf file, or a Hugging Face id (org/name, or org/name@revision)."""
    data: str = "builtin:stdlib"
    """Corpus: builtin:stdlib, a file or folder of .txt, .md, .tex, .jsonl or .parquet, or a Hugging Face id."""
    text_column: str | None = None
    """Column of .jsonl, .parquet and Hugging Face data that holds the text; found by itself where there is but one."""
    task: Task = "pretraining"
    """pretraining on documents; or sft, on the answers of instruction data: rows with messages, or with instruction
    and output (.json, .jsonl, .parquet, or a Hugging Face id such as Yukang/LongAlpaca-12k)."""
    long_examples: LongExamples = "drop"
    """What sft does with training examples longer than the context: drop or truncate."""
    max_train_tokens: int | None = None
    """Training tokens to prepare: reads only the beginning of data too large for a disk. By default all of it."""
    context_lengths: tuple[int, ...]
    """Context lengths to train, in tokens."""
    methods: tuple[TrainedMethod, ...] = ("lora", "lora+", "full")
    """What trains: lora; lora+norm; lora+embed; lora+ (with norms and embeddings, the paper's improved LoRA); full."""
    train_layers: str = "all"
    """Layers that train: all, 'last 4', 'every 2', or a list such as 0,5,11; full then trains nothing outside them."""
    quantization: Quantization = "none"
    """Of the frozen weights of the LoRA methods; references stay as they are. nf4: in 4 bits (QLoRA; needs a GPU). fp8:
    multiplied in FP8, all layers but the last, attention's in the backward pass alone; faster where layers are compiled
    (GPUs from compute capability 8.9 on; slow on CPUs)."""
    references: tuple[Positions, ...] = ("none", "yarn")
    """Untuned models to compare with, by their positions; none: no change. What tuning starts from joins by itself."""
    attention: Attention = "s2"
    """Attention in training: s2 (shifted sparse attention) across heads, or across layers (s2-layers); only unshifted
    (short) or only shifted groups; dilated, block-sparse, stride-sparse; or full. Evaluation always attends fully."""
    group_size: float = 0.25
    """Group size (window, block) of every pattern but full: a share of the context length (up to 1), or tokens."""
    document_mask: bool = False
    """Stop attention in training at the boundaries of the documents that a sequence is packed from."""
    positions: Positions = "linear"
    """How positions reach beyond the original length: linear interpolation, (dynamic) NTK, YaRN, Llama 3's, none."""
    lora_rank: int = 8
    """Rank of the LoRA methods."""
    lora_alpha: float = 16.0
    """LoRA's alpha: updates are scaled by alpha / rank."""
    lora_targets: tuple[str, ...] | None = None
    """Linear modules that LoRA adapts, such as q_proj v_proj; by default the attention projections."""
    steps: int = 1000
    """Optimiser steps of each trial."""
    batch: int = 64
    """Sequences in an optimiser step, over all workers of a trial."""
    learning_rate_lora: float = 2e-5
    """Learning rate of the methods lora and lora+norm."""
    learning_rate_lora_plus: float = 2e-5
    """Learning rate of the methods lora+ and lora+embed."""
    learning_rate_full: float = 2e-5
    """Learning rate of the method full."""
    learning_rate_embeddings: float | None = None
    """Learning rate of embeddings where they train; by default the method's own."""
    learning_rate_norms: float | None = None
    """Learning rate of norms where they train; by default the method's own."""
    learning_rate_sweep: tuple[float, ...] = (1.0,)
    """Multiples of each method's own learning rates to train with, such as 0.3 1 3: each is a trial, and the comparison
    takes each method's best."""
    learning_rates_chosen: str = "not stated"
    """How the methods' learning rates were chosen, in words for the report; it changes no trial."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    schedule: Schedule = "constant"
    """Learning rate after warm-up: constant, or down to zero at the last step by cosine or linear."""
    beta1: float = 0.9
    """AdamW's beta1."""
    beta2: float = 0.95
    """AdamW's beta2."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float | None = 1.0
    """Gradients are clipped to this norm."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on GPUs and on processors that multiply in it, else float32."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; each is a trial of its own."""
    eval_every: int = 100
    """Steps between evaluations; step 0 and the last are always evaluated."""
    eval_documents: int = 100
    """Held-out documents that are scored."""
    eval_span: int | None = None
    """Tokens scored of each held-out document, the same at every context length; the longest one where not given."""
    search: Literal["none", "random", "optuna"] = "none"
    """Looks for each method's best setting at each context length: at random, or by Optuna's TPE (Bayesian)."""
    search_trials: int = 16
    """Trials of a search for each method and context length; its own setting first, where that lies in the ranges."""
    search_learning_rate: tuple[float, float] | None = None
    """Lowest and highest learning rate of a search; by default from a tenth to ten times the method's own."""
    search_rank: tuple[int, ...] = (4, 8, 16, 32, 64)
    """Ranks that a search chooses from for the LoRA methods."""
    search_group_size: tuple[float, ...] = (0.125, 0.25, 0.5)
    """Group sizes that a search chooses from: shares of the context length (up to 1), or tokens."""

    def __post_init__(self) -> None:
        for field in ("context_lengths", "methods", "seeds", "learning_rate_sweep"):
            values = getattr(self, field)
            flag = f"--{field.replace('_', '-')}"
            if not values:
                raise InputError(f"{flag} is empty; expected at least one value")
            if len(set(values)) != len(values):
                given = " ".join(str(value) for value in values)
                raise InputError(f"{flag} {given}: expected none of the values twice")
        for multiple in self.learning_rate_sweep:
            if not 0 < multiple < math.inf:
                raise InputError(f"--learning-rate-sweep {multiple:g}: expected positive multiples, such as 0.3 1 3")
        for flag, given in (("--text-column", self.text_column), ("--max-train-tokens", self.max_train_tokens)):
            if self.task == "sft" and given is not None:
                raise InputError(f"{flag} {given} has no effect with --task sft. Leave it out")
        if self.steps < 1:
            raise InputError(f"--steps {self.steps}: expected at least 1; the untuned models are always evaluated")
        self._check_search()
        for field in ("learning_rate_embeddings", "learning_rate_norms"):
            if getattr(self, field) is not None and not any(field in self.learning_rates(m) for m in self.methods):
                raise InputError(
                    f"--{field.replace('_', '-')} {getattr(self, field)}: none of the methods {' '.join(self.methods)} "
                    "trains them; leave it out, or add a method that does, such as lora+"
                )

    def _check_search(self) -> None:
        if self.search_trials < 1:
            raise InputError(f"--search-trials {self.search_trials}: expected at least 1")
        if self.search_learning_rate is not None:
            low, high = self.search_learning_rate
            if not 0 < low <= high < math.inf:
                raise InputError(f"--search-learning-rate {low:g} {high:g}: expected a positive number, then a higher")
        if self.search != "none" and (len(self.seeds) > 1 or len(self.learning_rate_sweep) > 1):
            flag = "--seeds" if len(self.seeds) > 1 else "--learning-rate-sweep"
            raise InputError(
                f"{flag} with --search {self.search}: a search compares settings of one seed, and chooses learning "
                "rates itself. Leave it out, and train the best setting with several seeds afterwards"
            )

    def learning_rates(self, method: TrainedMethod, multiple: float = 1.0) -> dict[str, float | None]:
        """The learning rates of a method, by TrainingConfig's fields; those of what it does not train are left out.

        With a multiple of ``learning_rate_sweep`` all of them are scaled by it, so that their ratio stays.
        """
        rate = {
            "lora": self.learning_rate_lora,
            "lora+norm": self.learning_rate_lora,
            "lora+embed": self.learning_rate_lora_plus,
            "lora+": self.learning_rate_lora_plus,
            "full": self.learning_rate_full,
        }[method]
        rates = {"learning_rate": rate}
        if trains_embeddings(method, self.train_layers):
            rates["learning_rate_embeddings"] = self.learning_rate_embeddings
        if trains_norms(method):
            rates["learning_rate_norms"] = self.learning_rate_norms
        if multiple != 1:
            # Rounded, so that 0.3 x 2e-5 is the trial that somebody has trained at 6e-6.
            rates = {name: rate and float(f"{rate * multiple:.12g}") for name, rate in rates.items()}
        return rates

    def trials(self, identities: Identities, precision: Precision) -> list[TrialSpec]:
        """The trials of this sweep: by context length, untuned ones first.

        Where there are references, the untuned model that the tuned ones start from is always among them: it takes
        seconds, and its score is step 0 of every tuned trial.

        Raises:
            InputError: a setting that no trial can have, such as a context that is no multiple of the group size.
        """
        configs = []
        for context_length in self.context_lengths:
            shared = {
                "context_length": context_length,
                "precision": precision,
                "eval_documents": self.eval_documents,
                "eval_span": self.eval_span or max(self.context_lengths),
                "task": self.task,
            }
            if self.task == "sft":  # examples are scored whole
                shared["eval_span"] = context_length
            untuned = dict.fromkeys((*self.references, self.positions)) if self.references else ()
            configs += [
                TrainingConfig(method="untuned", attention="full", positions=positions, **shared)
                for positions in untuned
            ]
            group_size = group_size_in_tokens(self.group_size, context_length) if self.attention != "full" else None
            for method in self.methods:
                lora = ("lora_rank", "lora_alpha", "lora_targets") if method != "full" else ()
                configs += [
                    TrainingConfig(
                        method=method,
                        attention=self.attention,
                        group_size=group_size,
                        document_mask=self.document_mask,
                        positions=self.positions,
                        train_layers=self.train_layers,
                        quantization=self.quantization,
                        steps=self.steps,
                        batch=self.batch,
                        **self.learning_rates(method, multiple),
                        warmup_steps=self.warmup_steps,
                        schedule=self.schedule,
                        beta1=self.beta1,
                        beta2=self.beta2,
                        weight_decay=self.weight_decay,
                        max_grad_norm=self.max_grad_norm,
                        eval_every=self.eval_every,
                        seed=seed,
                        long_examples=self.long_examples,
                        **{field: getattr(self, field) for field in lora},
                        **shared,
                    )
                    for multiple in self.learning_rate_sweep
                    for seed in self.seeds
                ]
        return [
            TrialSpec(
                model=self.model,
                data=self.data,
                text_column=self.text_column,
                identities=identities,
                training=config,
                distinction=f"lr {config.learning_rate:g}"
                if config.method != "untuned" and self.learning_rate_sweep != (1.0,)
                else "",
            )
            for config in configs
        ]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str, where: str) -> SweepSpec:
        """A saved sweep.

        Raises:
            InputError: it is no JSON object, or has a field that a sweep does not have.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise InputError(f"{where} is not JSON ({error}); expected the spec.json of a sweep's folder") from error
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or (unknown := sorted(set(values) - known)):
            found = f"the unknown fields {', '.join(unknown)}" if isinstance(values, dict) else "no object"
            raise InputError(f"{where} has {found}; expected a sweep's fields: {', '.join(sorted(known))}")
        return cls(**_without_lists(values))


def _without_lists(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class Identities:
    """What a model, its tokenizer and a corpus turned out to be: hashes of their content, or ids with a revision."""

    model: str
    tokenizer: str
    data: str


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """One trial. ``model`` and ``data`` say where things are; ``identities`` and ``training`` are what it is;
    ``distinction`` is what tells it from its sweep's other trials of the method, for its label.
    """

    model: str
    data: str
    text_column: str | None = None
    identities: Identities
    training: TrainingConfig
    distinction: str = ""

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that stand for the trial's result.

        Fields at their default are left out of the hash, so that a new field orphans no trial; a default that changes
        raises RESULT_VERSION.
        """
        what = {
            "result_version": RESULT_VERSION,
            **dataclasses.asdict(self.identities),
            "training": self.training.not_at_default(),
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    def untuned(self) -> TrialSpec:
        """The untuned model that this trial starts from, as a trial; a reference is its own."""
        training = self.training
        untuned = TrainingConfig(
            method="untuned",
            attention="full",
            context_length=training.context_length,
            positions=training.positions,
            precision=training.precision,
            eval_documents=training.eval_documents,
            eval_span=training.eval_span,
            task=training.task,
        )
        return dataclasses.replace(self, training=untuned, distinction="")

    @property
    def label(self) -> str:
        """How people call it: ``lora+ 2048``, ``untuned yarn 2048``, ``lora+ 2048 lr 3e-3 r 16``."""
        training = self.training
        name = f"untuned {training.positions}" if training.method == "untuned" else training.method
        seed = f" seed {training.seed}" if training.seed else ""
        distinction = f" {self.distinction}" if self.distinction else ""
        return f"{name} {training.context_length}{distinction}{seed}"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrialSpec:
        """A trial as ``to_dict`` gives it, or with more beside it, as in a trial.json."""
        fields = {field.name for field in dataclasses.fields(cls)}
        return cls(
            **{
                **{name: value for name, value in values.items() if name in fields},
                "identities": Identities(**values["identities"]),
                "training": TrainingConfig(**_without_lists(values["training"])),
            }
        )


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where and how a sweep runs; nothing here changes its result."""

    storage: Annotated[str, tyro.conf.arg(metavar="FOLDER|URL")] = "./runs"
    """Storage root: trials, prepared data, reports and (by default) MLflow's store. A folder that every node sees, or
    an object store such as s3://bucket/prefix."""
    name: str | None = None
    """Name of the sweep: its folder, and its run in MLflow. By default the recipe's, with a hash if fields differ."""
    tracking_uri: str | None = None
    """MLflow tracking server; by default MLFLOW_TRACKING_URI, else a store under the storage root."""
    experiment: str = "longspan"
    """MLflow experiment."""
    address: str | None = None
    """Ray cluster to join (auto, or host:port); by default the one of a submitted job or RAY_ADDRESS, else a new one
    on this machine."""
    cluster: str | None = None
    """Plan for the machines of a file in clusters/, such as aws-p4d, at its full size. A sweep waits for those that its
    cluster does not have yet: its autoscaler is asked for them."""
    workers: int = 1
    """Ray Train workers of each trial, one GPU each where there are GPUs; the batch must divide by it."""
    cpus_per_worker: float = 1
    """CPUs each worker reserves and computes with where it has no GPU."""
    gpus_per_worker: float = 1
    """GPUs each worker reserves where there are GPUs; a share such as 0.25 lets several small trials use one."""
    max_concurrent: int | None = None
    """Trials at the same time; by default as many as the cluster has room for."""
    max_failures: int = 2
    """Times a trial is started again after its worker or node was lost."""
    max_preemptions: int = 100
    """Times a trial goes on elsewhere after a notice that its node is about to be taken away."""
    hang_timeout: int = 540
    """Seconds that workers wait for one that has gone silent before it counts as lost."""
    micro_batch: int | None = None
    """Sequences in one forward and backward pass of a worker; by default the worker's whole share of the batch."""
    gradient_checkpointing: Literal["auto", "all", "none"] | int = "auto"
    """How many decoder layers recompute their activations in the backward pass: less memory, more time. auto: on a GPU
    the fewest with which the trial fits, else none."""
    offload_activations: Literal["auto", "none"] | int = "auto"
    """How many decoder layers keep their activations in pinned host memory until the backward pass, instead of
    recomputing them. auto: where layers would have to recompute, as many as the host's memory and the copies' time
    allow; none with a --gradient-checkpointing of your own."""
    attention_backend: AttentionBackend = "auto"
    """What computes the attention pattern: auto takes the fastest that the worker has."""
    compile_layers: CompileLayers = "auto"
    """Run decoder layers through torch.compile: faster steps after a slow first one. auto: on a GPU, where a trial is
    long enough to gain by it."""
    checkpoint_every: int = 100
    """Steps between checkpoints, and so the most that a crash or Ctrl-C loses."""
    checkpoint_minutes: float = 10.0
    """Where steps are slow, a checkpoint is also written when the last one is this old."""
    keep_last: int = 2
    """Checkpoints kept of each trial: so many of the newest. A trial always goes on from the newest whole one."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest perplexity at the trained length; each such evaluation writes one."""
    keep_every: int | None = None
    """Also keep the checkpoints of every so-manieth step."""
    engine: EngineName = "auto"
    """How a trial's workers train one model: ddp; zero2, zero3 (DeepSpeed); auto: ddp where there are several."""
    offload: bool = False
    """Keep in host memory what zero2 or zero3 shares out, and update there."""
    price_per_hour: float | None = None
    """USD an hour of one GPU (an instance's price divided by its GPUs), or of one CPU thread where there are no GPUs;
    by default of the cheapest instance on demand that has this GPU (clusters/prices.py), else unknown."""
    prices: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Your prices as .toml or .json: USD an hour by instance type ("p4d.24xlarge") or of one GPU ("NVIDIA H200")."""
    force: bool = False
    """Train all of the sweep's trials from the beginning, whatever is known of them; that is kept in the trial's folder
    as earlier-1, earlier-2 and so on. Only where an earlier result is not to be trusted: it would be the same again."""
    force_trials: tuple[str, ...] = ()
    """The same for these trials alone: fingerprints, or their first digits (4 or more)."""
    fit: bool = False
    """Where a trial does not fit into memory, run it with the smallest change that does: smaller micro-batches, ZeRO,
    more workers, gradient checkpointing, offload. None of them changes its result beyond rounding."""
    budget_hours: float | None = None
    """GPU hours (CPU hours where there are no GPUs) that this sweep may take, in all runs of its command: a plan beyond
    them is refused, a run that comes to them stops with checkpoints."""
    budget_usd: float | None = None
    """The same in US dollars."""
    target_perplexity: float | None = None
    """Compare what it takes to reach this perplexity; by default the one that full fine-tuning ends with."""
    as_good_within: float = 0.01
    """How far above full fine-tuning's perplexity still counts as as good, as a share of it."""
    early_stopping: Literal["none", "asha", "median"] = "none"
    """Stop trials that fall behind others of their context length: asha (asynchronous successive halving), or median.
    With none, one that was stopped goes on to its end."""
    reduction_factor: float = 3
    """ASHA's eta: of the trials at a rung one in so many goes on, to a rung so many times as far."""
    first_rung: float | None = None
    """When a trial is judged first: a share of its tokens (up to 1), or tokens. By default 1 / reduction factor²."""
    min_trials: int = 3
    """Trials that must have come to a rung before one is stopped there."""
    early_stopping_among: Literal["auto", "context", "method"] = "auto"
    """Whom a trial is compared with: all of its context length, or those of its method there. auto: of its method in
    a search, which looks for the best of each; else all."""

    def __post_init__(self) -> None:
        if self.name is not None and not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", self.name):
            raise InputError(
                f"--name {self.name!r}: expected letters, digits and any of . _ + -, since it names a folder"
            )
        for field in (
            *("workers", "cpus_per_worker", "max_concurrent", "micro_batch", "checkpoint_every"),
            *("hang_timeout", "price_per_hour", "as_good_within", "budget_hours", "budget_usd"),
        ):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{field} is {value}; expected a positive number")
        if self.gpus_per_worker <= 0 or (self.gpus_per_worker > 1 and self.gpus_per_worker % 1):
            raise InputError(f"gpus_per_worker is {self.gpus_per_worker:g}; expected a share of one, or a whole number")
        if self.target_perplexity is not None and not 1 < self.target_perplexity < math.inf:
            raise InputError(f"target_perplexity is {self.target_perplexity}; expected a number above 1")
        self.execution()  # refuses what cannot go together

    def execution(self) -> ExecutionConfig:
        """How a trial's workers run it, with ``auto`` checkpointing as none (:mod:`orchestrator.planning.estimate` chooses)."""
        layers, offloaded = self.gradient_checkpointing, self.offload_activations
        if layers != "auto" and offloaded == "auto":
            offloaded = 0
        return ExecutionConfig(
            micro_batch=self.micro_batch,
            gradient_checkpointing=0 if layers in ("auto", "none") else layers,
            offload_activations=0 if offloaded == "none" else offloaded,
            checkpoint_every=self.checkpoint_every,
            checkpoint_minutes=self.checkpoint_minutes,
            keep_last=self.keep_last,
            keep_best=self.keep_best,
            keep_every=self.keep_every,
            attention_backend=self.attention_backend,
            compile_layers=self.compile_layers,
            engine=self.engine,
            offload=self.offload,
        )
