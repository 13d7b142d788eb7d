"""``python -m orchestrator.sweep [RECIPE] [flags]``: plan, run or resume, and compare a sweep.

The same command always continues: finished trials are known by their fingerprint and not trained again, others go on
from their last checkpoint.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import itertools
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console

from orchestrator.cli import parse
from orchestrator.options import RunOptions
from orchestrator.plan import (
    Planned,
    Totals,
    as_json,
    plan,
    plan_table,
    refuse_beyond_budget,
    refuse_what_cannot_run,
    summary,
    totals,
    totals_line,
)
from orchestrator.planning.cluster import Cluster, join_or_start
from orchestrator.planning.early_stopping import EarlyStopping, Rungs
from orchestrator.planning.estimate import Estimate, Estimator
from orchestrator.planning.notes import notes
from orchestrator.planning.search import Search, Space
from orchestrator.planning.spending import Spending
from orchestrator.process import enable_gc, log_libraries_to, stop_on_sigterm
from orchestrator.records import cancellation
from orchestrator.records.heartbeat import Heartbeat
from orchestrator.records.json_files import write_json
from orchestrator.records.mlflow_tracking import Tracker, tracking_uri
from orchestrator.records.provenance import Provenance, own_prices
from orchestrator.records.storage import Storage
from orchestrator.records.trial_record import TrialRecord
from orchestrator.reporting.conclusion import Conclusion
from orchestrator.reporting.overview import Overview
from orchestrator.running.sweep_runner import Running
from orchestrator.spec import Identities, SweepSpec, TrialSpec
from orchestrator.terminal import make_console, shown_path
from workloads.budget import ModelShape
from workloads.budget.shape import ATTENTION
from workloads.command import EXIT_INTERRUPTED, EXIT_USER_ERROR
from workloads.config import TrainingConfig
from workloads.data import (
    Corpus,
    Instructions,
    ValidationDocument,
    ValidationExample,
    prepare,
    prepare_examples,
)
from workloads.errors import InputError
from workloads.models.positions import extend, original_context_length
from workloads.models.source import ModelSource, check_vocabulary

# How often a preparation that takes long says what it is at.
PREPARING_NOTE_SECONDS = 15


def main(arguments: list[str] | None = None) -> int:
    console = make_console()
    sweep = None
    try:
        stop_on_sigterm()
        name, spec, options = parse(sys.argv[1:] if arguments is None else arguments)
        sweep = Sweep(name, spec, options, console)
        return sweep.run()
    except InputError as error:
        console.print(f"error: {error}", style="bold red", markup=False)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        console.print("\ninterrupted.", markup=False)
        if sweep:
            sweep.explain_interruption()
        return EXIT_INTERRUPTED
    finally:
        if ray := sys.modules.get("ray"):
            ray.shutdown()


class _Background(threading.Thread):
    """A function in a thread that does not outlive the command, so that Ctrl-C never waits for it."""

    def __init__(self, function: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.function, self.error = function, None
        self.start()

    def run(self) -> None:
        try:
            self.function()
        except BaseException as error:
            self.error = error

    def wait(self, meanwhile: Callable[[], None]) -> None:
        """Waits for its end and raises what it raised; calls ``meanwhile`` now and then."""
        while self.is_alive():
            self.join(PREPARING_NOTE_SECONDS)
            if self.is_alive():
                meanwhile()
        if self.error is not None:
            raise self.error


class Sweep:
    """One sweep on one storage root, from its spec to its report."""

    def __init__(self, name: str, spec: SweepSpec, options: RunOptions, console: Console) -> None:
        self.name, self.spec, self.options, self.console = name, spec, options, console
        self.began = time.time()
        self.planned: list[Planned] = []
        self.search: Search | None = None
        self.rungs: Rungs | None = None
        self.said: Totals | None = None  # what it was going to take, if there was something to train
        self.doing = "reading the model and the data"  # said where it takes long

    def run(self) -> int:
        self.check()
        with Heartbeat(self.storage, self.name, self.tell):
            return self.run_checked()

    def tell(self) -> dict[str, Any]:
        """What other terminals may know of this command (orchestrator/status.py)."""
        if not self.planned:
            return {"doing": self.doing}
        to_come = self.search.tokens_to_come if self.search else 0
        return {"doing": None, "concurrency": self.concurrency, "tokens_to_come": to_come}

    def run_checked(self) -> int:
        cancellation.withdraw(self.storage, f"sweeps/{self.name}")
        # Joining Ray, opening MLflow's store and preparing the corpus do not wait for each other.
        others = [_Background(self.prepare), _Background(self.tracker.connect)]
        self.cluster: Cluster = join_or_start(self.options)  # Ray wants the main thread for its signals
        stop_on_sigterm()  # Ray has put a handler of its own on SIGTERM
        for other in others:
            other.wait(meanwhile=lambda: self.console.print(f"{self.doing} ...", markup=False))
        self.make_trials()
        self.say_plan()
        self.say_notes()
        self.refuse()
        self.put_aside()
        if any(p.trains for p in self.planned) or (self.search and self.search.to_come):
            self.said = self.totals()
            enable_gc()
            Running(self).train()
        else:
            stopped = any(p.action == "stopped" for p in self.planned)
            ended = "finished, or was stopped early" if stopped else "finished"
            self.console.print(f"Nothing is left to train: every trial of this sweep is {ended}.")
        return Conclusion(self).tell()

    def check(self) -> None:
        """What can be known to be wrong at once, before anything is started."""
        precision = "bfloat16" if self.spec.precision == "auto" else self.spec.precision  # whatever auto will be
        for trial in self.spec.trials(Identities(model="", tokenizer="", data=""), precision):
            if self.spec.search != "none" and trial.training.steps:
                Space.of(self.spec, trial)
        if self.spec.search != "none" and (self.options.force or self.options.force_trials):
            raise InputError(
                "--force with --search: what a search suggests follows from what its trials have scored. Leave it out, "
                "or begin a new search in another --storage"
            )
        early_stopping = EarlyStopping.of(self.options, self.spec)
        if self.spec.batch % self.options.workers:
            raise InputError(
                f"a batch of {self.spec.batch} sequences does not divide among {self.options.workers} workers; "
                "change --batch or --workers"
            )
        if self.options.engine.startswith("zero") and not importlib.util.find_spec("deepspeed"):
            raise InputError(
                f"--engine {self.options.engine} needs DeepSpeed, which is not installed; install it with pip install "
                "'longspan[deepspeed]', or choose --engine ddp"
            )
        if self.options.cluster is not None:
            Cluster.named(self.options.cluster)
        self.storage = Storage.open(self.options.storage)
        if self.storage.store and (self.options.keep_best or self.options.keep_every):
            raise InputError(
                f"--keep-best and --keep-every with the storage {self.options.storage}: an object store keeps the last "
                "checkpoints only; leave them out, or give a shared folder"
            )
        self.folder = self.storage.sweep(self.name)
        self.rungs = Rungs(self.storage, self.name, early_stopping) if early_stopping else None
        self.source = ModelSource.parse(self.spec.model)
        self.source.refuse_adapter()
        if self.spec.task == "sft":
            self.corpus = Instructions.parse(self.spec.data)
        else:
            self.corpus = Corpus.parse(self.spec.data, self.spec.text_column, self.spec.max_train_tokens)
        self.provenance = Provenance.collect()
        self.prices = own_prices(self.options)
        self.tracker = Tracker(
            tracking_uri(self.storage, self.options.tracking_uri), self.options.experiment, self.storage
        )

    def identify(self) -> None:
        """What the model and the data are, without reading more of them than that takes."""
        self.doing = f"reading the model {self.spec.model}"
        config = self.source.config()
        self.original_length = original_context_length(config)
        self.shape = ModelShape.of(config)
        check_vocabulary(self.source.tokenizer(), self.shape.vocab_size, self.spec.model)
        self.check_adaptation(config)
        all_positions = {self.spec.positions, *self.spec.references}
        for length, positions in itertools.product(self.spec.context_lengths, all_positions):
            extend(copy.deepcopy(config), length, positions)  # refuses what the model's family does not take
        self.doing = f"reading {self.spec.data}"
        tokenizer = self.source.chat_identity if self.spec.task == "sft" else self.source.tokenizer_identity
        self.identities = Identities(model=self.source.identity, tokenizer=tokenizer, data=self.corpus.identity())

    def check_adaptation(self, config: Any) -> None:
        """Whether the model has the layers that are to train, and takes LoRA as asked; from its shapes alone."""
        spec = self.spec
        sides = [min(each.inputs, each.outputs) for each in self.shape.linears if each.reads in ATTENTION]
        if spec.lora_targets is None and spec.train_layers == "all" and spec.lora_rank <= min(sides):
            return  # nothing can be refused: saves half a second of importing a model's code
        from workloads.adaptation.methods import check_adaptation

        for method in spec.methods:
            check_adaptation(
                config, method, lora_rank=spec.lora_rank, lora_targets=spec.lora_targets, train_layers=spec.train_layers
            )

    def prepare(self) -> None:
        """What the model and the data are, and the corpus tokenised."""
        self.identify()
        enable_gc()  # reading a large corpus may take hours
        self.doing = f"reading and tokenising {self.spec.data}"
        tokenizer, identity = self.source.tokenizer, self.identities.tokenizer
        if self.spec.task == "sft":
            self.packed = prepare_examples(
                self.corpus, tokenizer, identity, self.storage.data, fetch=self.storage.fetch_data
            )
        else:
            self.packed = prepare(
                self.corpus, tokenizer, identity, self.storage.data,
                on_progress=self.has_tokenised, fetch=self.storage.fetch_data,
            )  # fmt: skip
        self.storage.push_data(self.packed.folder)

    def has_tokenised(self, documents: int) -> None:
        self.doing = f"tokenising {self.spec.data}: {documents:,} documents so far"

    def plan_trials(self) -> None:
        """The sweep's trials, what is to be done about each on the cluster, and what that takes."""
        precision = self.spec.precision
        if precision == "auto":
            precision = self.cluster.precision
        if self.spec.quantization == "nf4" and not self.cluster.gpus:
            raise InputError("--quantization nf4 needs CUDA GPUs, and the cluster has none; leave it out")
        self.trials = self.spec.trials(self.identities, precision)
        self.concurrency = self.cluster.concurrency(self.options)
        self.estimator = Estimator(self.shape, self.original_length, self.cluster, self.options, self.prices)
        if self.spec.quantization == "fp8" and not self.estimator.device.multiplies_float8:
            raise InputError(
                "--quantization fp8 needs GPUs that multiply in FP8 (compute capability 8.9 or higher), and "
                f"{self.estimator.device.name} does not; leave it out"
            )
        self.storage.read_ahead([trial.fingerprint for trial in self.trials])
        self.planned = self.plan(self.trials)
        self.spending = Spending(self.name, self.trials, self.storage, self.options, self.stop)

    def make_trials(self) -> None:
        """The sweep's trials, checked against the corpus too, and its folder."""
        self.plan_trials()
        for training in (trial.training for trial in self.trials if trial.training.steps):
            if training.task == "sft":
                self.packed.check(training.context_length, training.batch, training.long_examples)
            else:
                self.packed.check(training.context_length, training.batch)
        for trial in self.trials:
            self.held_out(trial.training)
        self.folder.mkdir(parents=True, exist_ok=True)
        log_libraries_to(self.folder / "log.txt")
        (self.folder / "spec.json").write_text(self.spec.to_json())
        if self.spec.search != "none":
            bases = [trial for trial in self.trials if trial.training.steps]
            self.search = Search(self.spec, bases, self.storage, self.storage.search_journal(self.name))
            self.search.begin()
            self.trials = [trial for trial in self.trials if not trial.training.steps] + self.search.trials
            self.planned = self.plan(self.trials)
            self.spending.trials = self.trials
        self.list_trials()

    def plan(self, trials: list[TrialSpec]) -> list[Planned]:
        stopping = self.name if self.rungs else None
        return plan(trials, self.storage, self.estimator, self.options.fit, stopping, self.forced(trials))

    def forced(self, trials: list[TrialSpec]) -> set[str]:
        """The trials that --force and --force-trials begin anew.

        Raises:
            InputError: the sweep has no trial of these digits.
        """
        forced = {trial.fingerprint for trial in trials if self.options.force}
        for digits in self.options.force_trials:
            found = [trial.fingerprint for trial in trials if trial.fingerprint.startswith(digits)]
            if len(found) != 1 or len(digits) < 4:
                each = ", ".join(f"{trial.fingerprint} ({trial.label})" for trial in trials)
                raise InputError(f"--force-trials {digits}: expected 4 or more digits of one of {each}")
            forced.add(found[0])
        return forced

    def put_aside(self) -> None:
        """What there is of trials that begin anew.

        Raises:
            InputError: one is being trained, or another sweep that runs is to train it.
        """
        if not (forced := [planned.trial for planned in self.planned if planned.forced]):
            return
        overview = Overview(self.storage)
        for trial in forced:
            others = [name for name, listed in overview.running.items() if trial.fingerprint in listed]
            holder = self.storage.trial(trial.fingerprint).holder()
            if others := [name for name in others if name != self.name] or ([holder["sweep"]] if holder else []):
                raise InputError(
                    f"--force: {trial.label} is a trial of {others[0]}, which runs; wait, or cancel it there"
                )
        for trial in forced:
            aside = self.storage.trial(trial.fingerprint).put_aside()
            if self.rungs:
                self.rungs.forget(trial)
            self.console.print(f"{trial.label}: what there was is kept in {shown_path(aside)}", soft_wrap=True)

    def coming(self) -> list[Estimate]:
        """Of the trials that a search has still to suggest, about: as of its first of the method and length."""
        if self.spec.search == "none":
            return []
        if self.search:
            each = [(study.base, study.to_come) for study in self.search.studies]
        else:
            each = [(p.trial, self.spec.search_trials - 1) for p in self.planned if p.trial.training.steps]
        return [self.estimator.of(trial) for trial, number in each for _ in range(number)]

    def list_trials(self) -> None:
        write_json(self.folder / "sweep.json", {"name": self.name, "trials": [t.fingerprint for t in self.trials]})
        write_json(self.folder / "plan.json", as_json(self.planned, self.totals()))
        self.storage.push(self.folder)

    @property
    def estimates(self) -> dict[str, Estimate]:
        return {p.trial.fingerprint: p.estimate for p in self.planned}

    def totals(self) -> Totals:
        return totals(self.planned, self.coming(), self.cluster, self.options)

    def refuse(self) -> None:
        """Raises InputError where a trial does not fit, or all together take more than they may."""
        refuse_what_cannot_run(self.planned)
        refuse_beyond_budget(self.totals(), self.spending.so_far(), self.options)

    def next_of_search(self) -> Planned | None:
        """The next trial that a search suggests, as part of the sweep from now on."""
        trial = self.search.next() if self.search else None
        if trial is None:
            return None
        (planned,) = self.plan([trial])
        self.trials.append(trial)
        self.planned.append(planned)
        self.list_trials()
        return planned

    def say_plan(self) -> None:
        print_line = self.console.print
        print_line(f"sweep {self.name}: {self.spec.model} on {self.spec.data}, storage {self.options.storage}")
        print_line(summary(self.planned))
        print_line(plan_table(self.planned, "GPU" if self.cluster.gpus else "CPU"))
        if coming := self.coming():
            print_line(f"  and {len(coming)} more, which the search suggests ({self.spec.search})")
        if coming or any(p.trains for p in self.planned):
            print_line(totals_line(self.totals(), self.cluster), markup=False)
            print_line(f"  ({self.estimator.source}; {self.describe_price()})", markup=False)

    def describe_price(self) -> str:
        price, unit = self.estimator.price, "GPU" if self.cluster.gpus else "CPU"
        if price is None:
            return f"no price is known of {self.estimator.device.name}s here: --price-per-hour"
        return f"{price.usd_per_gpu_hour:.2f} USD a {unit} hour: {price.source}"

    def say_notes(self) -> None:
        """What a user should know before it starts, although nothing of it is wrong."""
        scored = len(self.validation_documents())
        for note in notes(self.spec, self.options, self.original_length, self.packed, scored):
            self.console.print(f"note: {note}", markup=False)
        if self.rungs and not any(self.rungs.settings.rungs(trial.training) for trial in self.trials):
            self.console.print(
                f"note: --early-stopping {self.options.early_stopping} judges nothing: no evaluation lies between the "
                "first rung and the last step; lower --first-rung or --eval-every"
            )
        if self.storage.store and self.tracker.uri.startswith("sqlite:"):
            self.console.print(
                f"note: MLflow's store lies on this machine, in {self.storage.mlflow}, as no database lies in an "
                "object store; --tracking-uri names a server instead",
                soft_wrap=True,
            )

    def is_cancelled(self) -> bool:
        """Whether a person has asked for the end of the whole sweep."""
        return cancellation.pending_request(self.storage, f"sweeps/{self.name}") is not None

    def stop(self, reason: str) -> None:
        """Ends all that runs, each trial with a checkpoint, and begins nothing more."""
        cancellation.request(self.storage, f"sweeps/{self.name}", reason)
        for trial in list(self.trials):
            cancellation.request(self.storage, self.storage.trial(trial.fingerprint).name, reason)

    def validation_documents(self) -> list[ValidationDocument] | list[ValidationExample]:
        """What every trial of the sweep is scored on, as at the shortest context."""
        return self.held_out(min((t.training for t in self.trials), key=lambda training: training.context_length))

    def held_out(self, training: TrainingConfig) -> list[ValidationDocument] | list[ValidationExample]:
        if training.task == "sft":
            return self.packed.validation_examples(training.context_length, training.eval_documents)
        return self.packed.validation_windows(training.context_length, training.eval_span, training.eval_documents)

    def explain_interruption(self) -> None:
        """What is kept of each trial, and how to go on."""
        for planned in self.planned:
            record = TrialRecord.of(self.storage.trial(planned.trial.fingerprint).journal)
            if record.state == "finished":
                kept = "finished"
            elif record.state == "stopped":
                kept = f"stopped early at step {record.stopped.step} of {planned.trial.training.steps}"
            elif record.state == "cancelled":
                kept = f"cancelled at step {record.cancelled.step} of {planned.trial.training.steps}"
            elif record.saved_step:
                kept = f"kept up to step {record.saved_step} of {planned.trial.training.steps}"
            elif record.launched:
                kept = "begins again (no checkpoint yet)"
            else:
                kept = "not begun"
            self.console.print(f"  {planned.trial.label:<22} {kept}", markup=False)
        self.console.print("The same command goes on from there.")


if __name__ == "__main__":
    # A third of the seconds of its beginning and its end went into looking for garbage among what its imports make.
    gc.disable()
    status = main()
    gc.freeze()  # nor is there anything to look for at the end
    sys.exit(status)
