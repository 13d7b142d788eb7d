"""From what a user asks for to what can be planned and trained: check, identify, prepare.

Each step returns what it has found as a frozen type that extends the one before: :class:`Checked`, then
:class:`Identified`, which is all that a plan needs, then :class:`Prepared`, with which trials can run.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.expansion import expand
from orchestrator.planning.cluster import Cluster
from orchestrator.planning.early_stopping import EarlyStopping, Rungs
from orchestrator.planning.notes import position_notes
from orchestrator.planning.search import Space
from orchestrator.process import enable_gc
from orchestrator.records import cancellation
from orchestrator.records.provenance import own_prices
from orchestrator.records.storage import Storage
from orchestrator.run_options import RunOptions
from orchestrator.spec import SweepSpec
from orchestrator.trial_spec import Identities, TrialSpec
from orchestrator.variants import find_variant, variants_of
from workloads.budget import ModelShape
from workloads.budget.shape import ATTENTION
from workloads.config import Precision, TrainingConfig
from workloads.data import (
    Corpus,
    ExampleCorpus,
    Instructions,
    PackedCorpus,
    ValidationDocument,
    ValidationExample,
    prepare_examples,
)
from workloads.data import prepare as prepare_corpus
from workloads.errors import HubUnreachable, InputError
from workloads.files.given import existing_path
from workloads.models.known import KnownModel
from workloads.models.positions import extend, original_context_length
from workloads.models.source import ModelSource, check_vocabulary

Report = Callable[[str], None]
UNREAD = "unread"  # the identity of data that only a plan may go without


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A sweep whose settings agree with each other; neither its model nor its data has been read.

    Args:
        source, corpus: where the model and the data are.
        prices: the user's own, in USD an hour (see :func:`orchestrator.records.provenance.own_prices`).
        early_stopping: None: trials are not stopped early.
        plan_only: nothing will be trained.
    """

    name: str
    spec: SweepSpec
    options: RunOptions
    storage: Storage
    source: ModelSource
    corpus: Corpus | Instructions
    prices: dict[str, float]
    early_stopping: EarlyStopping | None
    plan_only: bool = False

    @property
    def folder(self) -> Path:
        """The sweep's own folder below the storage root."""
        return self.storage.sweep(self.name)

    @property
    def rungs(self) -> Rungs | None:
        """Where early stopping keeps its scores; None without early stopping."""
        return Rungs(self.storage, self.name, self.early_stopping) if self.early_stopping else None

    def is_cancelled(self) -> bool:
        """Whether a user has cancelled the whole sweep, or its budget is exhausted."""
        return cancellation.pending_request(self.storage, f"sweeps/{self.name}") is not None


@dataclass(frozen=True, kw_only=True)
class Identified(Checked):
    """A checked sweep whose model and data are known by their identities: enough to plan it.

    Args:
        original_length: the model's original context length, in tokens.
        model_notes: what was assumed about the model's own positions, where they are replaced, and what in its files
            differs from its configuration or could not be checked.
        unread: model and data that the hub does not give, in a plan.
    """

    shape: ModelShape
    original_length: int
    model_notes: tuple[str, ...]
    identities: Identities
    unread: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Prepared(Identified):
    """An identified sweep whose data is tokenised: enough to train it."""

    packed: PackedCorpus | ExampleCorpus

    def check_trials(self, trials: Sequence[TrialSpec]) -> None:
        """Raises InputError if the data is too short for a trial's batches, or for its evaluation."""
        for training in (trial.training for trial in trials if trial.training.steps):
            if isinstance(self.packed, ExampleCorpus):
                self.packed.check(training.context_length, training.batch, training.long_examples)
            else:
                self.packed.check(training.context_length, training.batch)
        for trial in trials:
            self.held_out(trial.training)

    def held_out(self, training: TrainingConfig) -> Sequence[ValidationDocument | ValidationExample]:
        """The documents or examples that a trial is scored on."""
        if isinstance(self.packed, ExampleCorpus):
            return self.packed.validation_examples(training.context_length, training.eval_documents)
        return self.packed.validation_windows(training.context_length, training.eval_span, training.eval_documents)

    def scored_documents(self, trials: Sequence[TrialSpec]) -> Sequence[ValidationDocument | ValidationExample]:
        """What every trial of the sweep is scored on, as at the shortest context."""
        return self.held_out(min((t.training for t in trials), key=lambda training: training.context_length))


def check_sweep(name: str, spec: SweepSpec, options: RunOptions, *, plan_only: bool = False) -> Checked:
    """Checks everything that is known without reading the model and the data, and opens the storage root.

    Args:
        plan_only: nothing will be trained: a well-known model and a data set need not be there.

    Raises:
        InputError: settings that cannot be, or that contradict each other.
    """
    precision: Precision = "bfloat16" if spec.precision == "auto" else spec.precision  # either passes the same checks
    trials = expand(spec, Identities(model="", tokenizer="", data=""), precision).trials
    if options.baseline is not None:
        find_variant(options.baseline, variants_of([trial.training for trial in trials], spec.axes))
    for trial in trials:
        if spec.search != "none" and trial.training.steps:
            Space.of(spec, trial)
    if spec.search != "none" and (options.force or options.force_trials):
        raise InputError(
            "--force with --search: a search bases its suggestions on the scores of its trials. Leave it out, or begin "
            "a new search in another --storage"
        )
    early_stopping = EarlyStopping.of(options, spec)
    for batch in spec.values_of("batch"):
        if batch % options.workers:
            raise InputError(
                f"a batch of {batch} sequences does not divide among {options.workers} workers; "
                "change --batch or --workers"
            )
    if options.engine.startswith("zero") and not importlib.util.find_spec("deepspeed"):
        raise InputError(
            f"--engine {options.engine} needs DeepSpeed, which is not installed; install it with pip install "
            "'longspan[deepspeed]', or choose --engine ddp"
        )
    if options.cluster is not None:
        Cluster.named(options.cluster)
    storage = Storage.open(options.storage)
    if storage.store and (options.keep_best or options.keep_every):
        raise InputError(
            f"--keep-best and --keep-every with the storage {options.storage}: an object store keeps the last "
            "checkpoints only; leave them out, or give a shared folder"
        )
    source = _model_to_plan(spec.model) if plan_only else ModelSource.parse(spec.model)
    source.refuse_adapter()
    return Checked(
        name=name,
        spec=spec,
        options=options,
        storage=storage,
        source=source,
        corpus=Instructions.parse(spec.data, spec.holdout, spec.eval_data)
        if spec.task == "sft"
        else Corpus.parse(spec.data, spec.text_column, spec.max_train_tokens, spec.holdout, spec.eval_data),
        prices=own_prices(options),
        early_stopping=early_stopping,
        plan_only=plan_only,
    )


def _model_to_plan(name: str) -> ModelSource:
    """The model, or its known configuration if the hub does not give it: no network, or no token for a gated one."""
    known = KnownModel.named(name)
    if known is None or existing_path(name):
        return ModelSource.parse(name)
    try:
        source = ModelSource.parse(name)
        source.config()
    except InputError:
        return known
    return source


def identify(sweep: Checked, report: Report = lambda doing: None) -> Identified:
    """Finds out what the model and the data are, reading no more of them than that takes.

    Args:
        report: called with what is being read.

    Raises:
        InputError: the model or the data cannot be read, or the model does not take what the sweep asks for.
    """
    spec, source = sweep.spec, sweep.source
    report(f"reading the model {spec.model}")
    config = source.config(spec.original_length)
    original_length = original_context_length(config)
    shape = ModelShape.of(config)
    if not isinstance(source, KnownModel):
        loaded = source.tokenizer()
        check_vocabulary(loaded, shape.vocab_size, spec.model)
        source.refuse_no_end(loaded)
    _check_adaptation(spec, config, shape)
    used = dict.fromkeys((*spec.values_of("positions"), *spec.references))
    for length, positions in itertools.product(spec.context_lengths, used):
        extend(copy.deepcopy(config), length, positions)  # refuses what the model's family does not take
    config, file_notes = source.check_files(config)
    report(f"reading {spec.data}")
    tokenizer = source.chat_identity if spec.task == "sft" else source.tokenizer_identity
    data = _data_identity(sweep)
    unread = [spec.model] * isinstance(source, KnownModel) + [spec.data] * (data == UNREAD)
    return Identified(
        **vars(sweep),
        shape=ModelShape.of(config),
        original_length=original_length,
        model_notes=(*position_notes(config, spec.context_lengths, spec.values_of("positions")), *file_notes),
        identities=Identities(model=source.identity, tokenizer=tokenizer, data=data),
        unread=tuple(unread),
    )


def _data_identity(sweep: Checked) -> str:
    """The identity of the data; ``UNREAD`` if only a plan is wanted and the hub does not give it."""
    try:
        return sweep.corpus.identity()
    except HubUnreachable:
        if sweep.plan_only:
            return UNREAD
        raise


def _check_adaptation(spec: SweepSpec, config: Any, shape: ModelShape) -> None:
    """Raises InputError if the model lacks layers to train, or cannot take LoRA as requested; uses shapes only."""
    sides = [min(each.inputs, each.outputs) for each in shape.linears if each.reads in ATTENTION]
    targets, layers, ranks = (spec.values_of(name) for name in ("lora_targets", "train_layers", "lora_rank"))
    if targets == (None,) and layers == ("all",) and max(ranks) <= min(sides):
        return  # nothing to refuse: saves half a second of importing the model's code
    from workloads.adaptation.methods import check_adaptation

    for method, adapted, trained, rank in itertools.product(spec.methods, targets, layers, ranks):
        check_adaptation(config, method, lora_rank=rank, lora_targets=adapted, train_layers=trained)


def prepare(sweep: Identified, report: Report = lambda doing: None) -> Prepared:
    """Tokenises the data, unless the storage root has it from before.

    Raises:
        InputError: the data cannot be read, or has nothing to train on.
    """
    enable_gc()  # reading a large corpus may take hours
    spec, storage = sweep.spec, sweep.storage
    report(f"reading and tokenising {spec.data}")
    tokenizer, identity = sweep.source.tokenizer, sweep.identities.tokenizer
    packed: PackedCorpus | ExampleCorpus
    if isinstance(sweep.corpus, Instructions):
        packed = prepare_examples(sweep.corpus, tokenizer, identity, storage.data, fetch=storage.fetch_data)
    else:
        packed = prepare_corpus(
            sweep.corpus, tokenizer, identity, storage.data, fetch=storage.fetch_data,
            on_progress=lambda documents: report(f"tokenising {spec.data}: {documents:,} documents so far"),
        )  # fmt: skip
    storage.push_data(packed.folder)
    return Prepared(**vars(sweep), packed=packed)
