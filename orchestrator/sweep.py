"""``python -m orchestrator.sweep [RECIPE] [flags]``: plan, run or resume, and compare a sweep.

The same command always continues: finished trials are known by their fingerprint and not trained again, others go on
from their last checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import importlib.util
import itertools
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrator.cli import parse
from orchestrator.cluster import DRIVER_CPU, Cluster, join_or_start
from orchestrator.compare import Outcome, compare, summarise
from orchestrator.credentials import share_token
from orchestrator.journal import TrialRecord
from orchestrator.plan import Planned, plan, summary
from orchestrator.provenance import Provenance
from orchestrator.spec import Identities, RunOptions, SweepSpec, TrialSpec
from orchestrator.storage import Storage, write_json
from orchestrator.tracking import Tracker, TrackingThread, tracking_uri, without_password
from orchestrator.trial import drive_trial
from orchestrator.view import LiveView, Row, make_console
from workloads.config import ExecutionConfig, TrainingConfig, trained_layers
from workloads.data import (
    Corpus,
    Instructions,
    ValidationDocument,
    ValidationExample,
    prepare,
    prepare_examples,
)
from workloads.errors import InputError
from workloads.evaluation.bootstrap import ANSWERS_RULE, CONFIDENCE, RULE
from workloads.models import ModelSource
from workloads.positions import extend, original_context_length

# How often a preparation that takes long says what it is at.
PREPARING_NOTE_SECONDS = 15

EXIT_FAILED_TRIALS, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130


def main(arguments: list[str] | None = None) -> int:
    console = make_console()
    sweep = None
    try:
        _end_as_ctrl_c_does()
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


def _end_as_ctrl_c_does() -> None:
    """SIGTERM (a stopped job) ends as Ctrl-C does; and a shell that starts a command in the background has it ignore
    Ctrl-C unless it says otherwise."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)


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


def _shown(path: Path) -> str:
    """A path as a person here would type it: relative inside the working directory, whole elsewhere."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


class Sweep:
    """One sweep on one storage root, from its spec to its report."""

    def __init__(self, name: str, spec: SweepSpec, options: RunOptions, console: Console) -> None:
        self.name, self.spec, self.options, self.console = name, spec, options, console
        self.began = time.time()
        self.planned: list[Planned] = []
        self.doing = "reading the model and the data"  # said where it takes long

    def run(self) -> int:
        self.check()
        # Joining Ray, opening MLflow's store and preparing the corpus do not wait for each other.
        others = [_Background(self.prepare), _Background(self.tracker.connect)]
        self.cluster: Cluster = join_or_start(self.options.address)  # Ray wants the main thread for its signals
        _end_as_ctrl_c_does()  # Ray has put a handler of its own on SIGTERM
        for other in others:
            other.wait(meanwhile=lambda: self.console.print(f"{self.doing} ...", markup=False))
        self.make_trials()
        self.say_plan()
        if any(p.action != "known" for p in self.planned):
            self.train()
        else:
            self.console.print("Nothing is left to train: every trial of this sweep is finished.")
        return self.conclude()

    def check(self) -> None:
        """What can be known to be wrong at once, before anything is started."""
        self.spec.trials(Identities(model="", tokenizer="", data=""), "float32")
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
        self.storage = Storage.open(self.options.storage)
        self.folder = self.storage.sweep(self.name)
        self.source = ModelSource.parse(self.spec.model)
        if self.spec.task == "sft":
            self.corpus = Instructions.parse(self.spec.data)
        else:
            self.corpus = Corpus.parse(self.spec.data, self.spec.text_column, self.spec.max_train_tokens)
        self.provenance = Provenance.collect()
        self.tracker = Tracker(
            tracking_uri(self.storage, self.options.tracking_uri), self.options.experiment, self.storage
        )

    def prepare(self) -> None:
        """What the model and the data are: the original length, identities, and the corpus tokenised."""
        self.doing = f"reading the model {self.spec.model}"
        config = self.source.config()
        self.original_length = original_context_length(config)
        trained_layers(self.spec.train_layers, config.num_hidden_layers)
        all_positions = {self.spec.positions, *self.spec.references}
        for length, positions in itertools.product(self.spec.context_lengths, all_positions):
            extend(copy.deepcopy(config), length, positions)  # refuses what the model's family does not take
        self.doing = f"reading and tokenising {self.spec.data}"
        if self.spec.task == "sft":
            tokenizer = self.source.chat_identity
            self.packed = prepare_examples(
                self.corpus, self.source.tokenizer, tokenizer, self.storage.data, fetch=self.storage.fetch_data
            )
        else:
            tokenizer = self.source.tokenizer_identity
            self.packed = prepare(
                self.corpus, self.source.tokenizer, tokenizer, self.storage.data,
                on_progress=self.has_tokenised, fetch=self.storage.fetch_data,
            )  # fmt: skip
        self.storage.push_data(self.packed.folder)
        self.identities = Identities(model=self.source.identity, tokenizer=tokenizer, data=self.corpus.identity())

    def has_tokenised(self, documents: int) -> None:
        self.doing = f"tokenising {self.spec.data}: {documents:,} documents so far"

    def make_trials(self) -> None:
        """The sweep's trials, checked against the corpus and the cluster, and what is to be done about each."""
        precision = self.spec.precision
        if precision == "auto":
            precision = "bfloat16" if self.cluster.gpus else "float32"
        if self.spec.quantization == "nf4" and not self.cluster.gpus:
            raise InputError("--quantization nf4 needs CUDA GPUs, and the cluster has none; leave it out")
        self.trials = self.spec.trials(self.identities, precision)
        for training in (trial.training for trial in self.trials if trial.training.steps):
            if training.task == "sft":
                self.packed.check(training.context_length, training.batch, training.long_examples)
            else:
                self.packed.check(training.context_length, training.batch)
        for trial in self.trials:
            self.held_out(trial.training)
        self.concurrency = self.cluster.concurrency(self.options)
        self.storage.read_ahead([trial.fingerprint for trial in self.trials])
        self.planned = plan(self.trials, self.storage)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "spec.json").write_text(self.spec.to_json())
        write_json(self.folder / "sweep.json", {"name": self.name, "trials": [t.fingerprint for t in self.trials]})
        self.storage.push(self.folder)

    def say_plan(self) -> None:
        print_line = self.console.print
        print_line(f"sweep {self.name}: {self.spec.model} on {self.spec.data}, storage {self.options.storage}")
        print_line(summary(self.planned))
        for planned in self.planned:
            print_line(f"  {planned.trial.label:<22} {planned.action:<7} {planned.reason}", markup=False)
        for length in self.spec.context_lengths:
            if length <= self.original_length:
                print_line(
                    f"note: {length:,} tokens lie within the model's original context of {self.original_length:,}: "
                    "positions are not extended there"
                )
            if self.spec.task == "sft" and (left_out := self.packed.left_out(length, self.spec.long_examples)):
                print_line(f"note: {left_out}")
        if self.storage.store and self.tracker.uri.startswith("sqlite:"):
            print_line(
                f"note: MLflow's store lies on this machine, in {self.storage.mlflow}, as no database lies in an "
                "object store; --tracking-uri names a server instead",
                soft_wrap=True,
            )
        fit = "are short enough" if self.spec.task == "sft" else "are long enough"
        if (scored := len(self.validation_documents())) < self.spec.eval_documents:
            print_line(f"note: {scored} held-out documents {fit} to be scored, not {self.spec.eval_documents}")

    def train(self) -> None:
        """Runs every trial that is not finished, with Tune over Train."""
        to_train = [p.trial for p in self.planned if p.action != "known"]
        # The largest first, so that none is left to run alone at the end.
        to_train.sort(key=lambda t: t.training.steps * t.training.batch * t.training.context_length, reverse=True)
        for trial in to_train:
            self.storage.add_trial(trial, self.source.location)
        tracking = TrackingThread(self.tracker, self.trials, self.name, self.provenance)
        rows = [Row(p.trial, p.record, known=p.action == "known") for p in self.planned]
        view = LiveView(self.name, rows, self.concurrency, self.console)
        view.note = lambda: tracking.trouble or (self.storage.store and self.storage.store.trouble)
        tracking.start()
        try:
            with view:
                self.tune(to_train)
        except KeyboardInterrupt:
            self.end_ray()
            tracking.stop()
            self.tracker.interrupted()
            raise
        tracking.stop()
        if tracking.trouble:
            self.console.print(f"note: {tracking.trouble} at the next run of this command", markup=False)

    def tune(self, trials: list[TrialSpec]) -> None:
        from ray import tune
        from ray.tune.progress_reporter import TrialProgressCallback

        class Silent(TrialProgressCallback):
            """Tune's own prints a line of a trial without any result, whatever its verbosity."""

            def on_trial_complete(self, *args: Any, **kwargs: Any) -> None:
                pass

        # The untuned first: what they score is step 0 of the trials that start from them.
        untuned = [trial for trial in trials if trial.training.method == "untuned"]
        drives = ([untuned] if untuned else []) + [[trial] for trial in trials if trial not in untuned]
        name = f"{self.name}-{uuid.uuid4().hex[:8]}"
        tuner = tune.Tuner(
            # A driver only waits for its workers. One that held a whole CPU could keep them from ever starting.
            tune.with_resources(drive_trial, {"CPU": DRIVER_CPU}),
            param_space=tune.grid_search([self.run_config(drive) for drive in drives]),
            tune_config=tune.TuneConfig(max_concurrent_trials=self.concurrency, reuse_actors=True),
            run_config=tune.RunConfig(
                name=name,
                storage_path=str(self.storage.ray_train),
                # A driver raises nothing of its own; what Tune tries again is one whose node was lost.
                failure_config=tune.FailureConfig(max_failures=self.options.max_failures),
                callbacks=[Silent()],
                verbose=0,
            ),
        )
        keeper = None if self.cluster.own else share_token()
        try:
            tuner.fit()
        finally:
            del keeper
            shutil.rmtree(self.storage.ray_train / name, ignore_errors=True)

    def run_config(self, trials: list[TrialSpec]) -> dict[str, Any]:
        """What :func:`drive_trial` and its workers need to know to train these trials, one after the other."""
        options = self.options
        execution = ExecutionConfig(
            micro_batch=options.micro_batch,
            gradient_checkpointing=options.gradient_checkpointing,
            checkpoint_every=options.checkpoint_every,
            attention_backend=options.attention_backend,
            engine=options.engine,
            offload=options.offload,
        )
        return {
            "trials": [trial.to_dict() for trial in trials],
            "sweep": self.name,
            "storage": self.storage.location,
            "model_location": self.source.location,
            "model_revision": self.source.revision,
            "corpus": self.packed.folder.name,
            "execution": dataclasses.asdict(execution),
            "resources": self.cluster.trial_resources(options),
            "threads": options.cpus_per_worker,
            "max_failures": options.max_failures,
            # Names this drive of the trials, so that an error is final for it and tried again by the next command.
            "attempt": uuid.uuid4().hex,
        }

    def conclude(self) -> int:
        """Compares the trials, writes and logs the report, and prints the answer."""
        from dashboards.report import render
        from orchestrator.results import result_table, winners

        folders = [self.storage.trial(trial.fingerprint) for trial in self.trials]
        outcomes = [
            Outcome(trial, TrialRecord.of(folder.journal), folder.log_url or _shown(folder.log))
            for trial, folder in zip(self.trials, folders)
        ]
        self.follow_in_mlflow()
        comparison = self.describe(outcomes)
        write_json(self.folder / "comparison.json", comparison)
        report = render(comparison, self.folder / "report")
        self.storage.push(self.folder)
        self.log_to_mlflow(comparison, [*report, self.folder / "comparison.json"])

        self.console.print(result_table(comparison))
        for sentence in comparison["sentences"] + [s for c in comparison["contexts"] for s in c["sentences"]]:
            self.console.print(sentence, markup=False)
        seconds = time.time() - self.began
        self.console.print(f"\n{seconds:.0f} s in all.")
        self.console.print(f"report: {_shown(self.folder / 'report' / 'report.html')}", soft_wrap=True)
        self.console.print(f"MLflow: {self.mlflow_command(_shown(self.storage.root))}", soft_wrap=True)
        for trial in winners(comparison):
            command = self.export_command(trial["fingerprint"])
            self.console.print(f"export {trial['label']}: {command}", soft_wrap=True, markup=False)
        failed = [o for o in outcomes if not o.finished]
        for outcome in failed:
            self.console.print(
                f"failed: {outcome.trial.label}: {outcome.record.reason}; log: {outcome.log}", style="red", markup=False
            )
        return EXIT_FAILED_TRIALS if failed else 0

    def follow_in_mlflow(self) -> None:
        with self.mlflow_may_be_away():
            self.tracker.follow(self.trials, self.name, self.provenance)

    def log_to_mlflow(self, comparison: dict[str, Any], artifacts: list[Path]) -> None:
        with self.mlflow_may_be_away():
            self.tracker.log_sweep(self.name, comparison, self.trials, artifacts)

    @contextlib.contextmanager
    def mlflow_may_be_away(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the results are on disk, and the next run of the command logs them
            self.console.print(
                f"note: MLflow does not answer ({str(error).splitlines()[0][:120]}); the results are kept in "
                f"{self.options.storage}, and the same command logs them later",
                markup=False,
            )

    def describe(self, outcomes: list[Outcome]) -> dict[str, Any]:
        contexts = compare(outcomes, self.original_length)
        run_ids = {trial.fingerprint: self.tracker.run_id(trial) for trial in self.trials}
        for context in contexts:
            for described in context["trials"]:
                described["mlflow_run_id"] = run_ids[described["fingerprint"]]
        started = next((o.record.started for o in outcomes if o.record.started), {})
        parameters = next((o.record.model["parameters"] for o in outcomes if o.record.model), None)
        documents = self.validation_documents()
        peaks = [o.record.peak_memory_gib for o in outcomes if o.record.peak_memory_gib]
        return {
            "sweep": self.name,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "longspan_version": self.provenance.packages.get("longspan", "unknown"),
            "question": "Which way to adapt wins at each context length, and how near do the others come?",
            "sentences": summarise(contexts, list(self.spec.seeds)),
            "rule": ANSWERS_RULE if self.spec.task == "sft" else RULE,
            "model": {
                "name": self.spec.model,
                "original_context_length": self.original_length,
                "parameters": parameters,
                "identity": self.identities.model,
            },
            "data": {
                "name": self.spec.data,
                "identity": self.identities.data,
                "validation_documents": len(documents),
                # At the shortest context; at a longer one a few more, since a window's first token is not scored.
                "scored_tokens": sum(document.num_scored for document in documents),
            },
            "attention": self.describe_attention(),
            "train_layers": self.spec.train_layers if self.spec.train_layers != "all" else None,
            "quantization": self.spec.quantization if self.spec.quantization != "none" else None,
            "seeds": list(self.spec.seeds),
            "confidence": CONFIDENCE,
            "hardware": started.get("hardware", "unknown"),
            "packages": {name: v for name, v in self.provenance.packages.items() if name != "longspan"},
            "git_commit": self.provenance.git_commit,
            "wall_seconds": time.time() - self.began,
            "peak_memory_gib": max(peaks, default=None),
            "storage": self.storage.location,
            "mlflow_command": self.mlflow_command(str(self.storage.root)),
            "contexts": contexts,
        }

    def validation_documents(self) -> list[ValidationDocument] | list[ValidationExample]:
        """What every trial of the sweep is scored on, as at the shortest context."""
        return self.held_out(min((t.training for t in self.trials), key=lambda training: training.context_length))

    def held_out(self, training: TrainingConfig) -> list[ValidationDocument] | list[ValidationExample]:
        if training.task == "sft":
            return self.packed.validation_examples(training.context_length, training.eval_documents)
        return self.packed.validation_windows(training.context_length, training.eval_span, training.eval_documents)

    def describe_attention(self) -> str:
        inside = ", inside documents" if self.spec.document_mask else ""
        if self.spec.attention == "full":
            return f"full attention in training{inside}"
        size = self.spec.group_size
        group = f"{size:g} of the context" if size <= 1 else f"{size:,.0f} tokens"
        pattern = "shifted sparse attention (S²-Attn)" if self.spec.attention == "s2" else self.spec.attention
        return f"{pattern} in training, groups of {group}{inside}"

    def mlflow_command(self, storage: str) -> str:
        if self.tracker.uri.startswith("sqlite:"):
            return f"{_shown(Path(sys.executable))} -m dashboards.mlflow --storage {storage}"
        return f"open {without_password(self.tracker.uri)} and choose the experiment {self.options.experiment}"

    def export_command(self, fingerprint: str) -> str:
        python, folder = _shown(Path(sys.executable)), _shown(self.storage.trial(fingerprint).path)
        if self.storage.store:
            folder = f"$({python} -m orchestrator.fetch {self.storage.location} {fingerprint})"
        return f"{python} -m workloads.export {folder} DIR"

    def end_ray(self) -> None:
        import ray

        ray.shutdown()

    def explain_interruption(self) -> None:
        """What is kept of each trial, and how to go on."""
        for planned in self.planned:
            record = TrialRecord.of(self.storage.trial(planned.trial.fingerprint).journal)
            if record.state == "finished":
                kept = "finished"
            elif record.saved_step:
                kept = f"kept up to step {record.saved_step} of {planned.trial.training.steps}"
            elif record.launched:
                kept = "begins again (no checkpoint yet)"
            else:
                kept = "not begun"
            self.console.print(f"  {planned.trial.label:<22} {kept}", markup=False)
        self.console.print("The same command goes on from there.")


if __name__ == "__main__":
    sys.exit(main())
