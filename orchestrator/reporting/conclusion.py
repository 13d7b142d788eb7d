"""How a sweep ends: its trials compared, the report written and logged, the answer printed."""

from __future__ import annotations

import contextlib
import datetime
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.cli import EXIT_FAILED_TRIALS
from orchestrator.compare import Outcome, compare, method_labels, summarise
from orchestrator.records.events import Started
from orchestrator.records.mlflow_tracking import without_password
from orchestrator.records.storage import read_json, write_json
from orchestrator.records.trial_record import TrialRecord
from orchestrator.reporting.plan_vs_actual import FILE, plan_and_truth
from orchestrator.terminal import shown_path
from workloads.command import EXIT_INTERRUPTED
from workloads.evaluation.bootstrap import ANSWERS_RULE, CONFIDENCE, RULE
from workloads.wording import POSITIONS, shared_settings

if TYPE_CHECKING:
    from orchestrator.sweep import Sweep


class Conclusion:
    """The end of one sweep whose trials have run."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep

    def tell(self) -> int:
        """Compares the trials, writes and logs the report, and prints the answer."""
        from dashboards.report import render
        from orchestrator.reporting.result_table import result_table, winners

        folders = [self.sweep.storage.trial(trial.fingerprint) for trial in self.sweep.trials]
        outcomes = [
            Outcome(trial, TrialRecord.of(folder.journal), folder.log_url or shown_path(folder.log))
            for trial, folder in zip(self.sweep.trials, folders)
        ]
        self.follow_in_mlflow()
        comparison = self.describe(outcomes)
        try:
            write_json(self.sweep.folder / "comparison.json", comparison)
            report = render(comparison, self.sweep.folder / "report")
            diff = self.sweep.provenance.keep_diff(self.sweep.folder)
            self.sweep.storage.push(self.sweep.folder)
            kept = [self.sweep.folder / "comparison.json", self.sweep.folder / "spec.json", *([diff] if diff else [])]
            self.log_to_mlflow(comparison, [*report, *kept])
        except OSError as error:
            self.sweep.console.print(f"note: the report could not be written: {error}", markup=False)

        self.sweep.console.print(result_table(comparison))
        for sentence in comparison["sentences"] + [s for c in comparison["contexts"] for s in c["sentences"]]:
            self.sweep.console.print(sentence, markup=False)
        seconds = time.time() - self.sweep.began
        self.sweep.console.print(f"\n{seconds:.0f} s in all.")
        self.sweep.console.print(f"report: {shown_path(self.sweep.folder / 'report' / 'report.html')}", soft_wrap=True)
        self.sweep.console.print(f"MLflow: {self.mlflow_command(shown_path(self.sweep.storage.root))}", soft_wrap=True)
        for trial in winners(comparison):
            command = self.export_command(trial["fingerprint"])
            self.sweep.console.print(f"export {trial['label']}: {command}", soft_wrap=True, markup=False)
        for outcome in outcomes:
            if outcome.record.state == "stopped":
                step = f"step {outcome.record.stopped.step} of {outcome.trial.training.steps}"
                self.sweep.console.print(
                    f"stopped early: {outcome.trial.label} at {step}: {outcome.record.reason}", markup=False
                )
        cancelled = [o for o in outcomes if o.record.state == "cancelled"]
        for outcome in cancelled:
            step = f"step {outcome.record.cancelled.step} of {outcome.trial.training.steps}"
            self.sweep.console.print(
                f"cancelled: {outcome.trial.label} at {step}, {outcome.record.reason}", markup=False
            )
        if cancelled:
            self.sweep.console.print(
                f"The sweep is unfinished: {len(cancelled)} of {len(outcomes)} trials "
                f"{'was' if len(cancelled) == 1 else 'were'} cancelled. The same command goes on with them."
            )
        failed = [o for o in outcomes if o.record.state not in ("finished", "stopped", "cancelled")]
        for outcome in failed:
            self.sweep.console.print(
                f"failed: {outcome.trial.label}: {outcome.record.reason}; log: {outcome.log}", style="red", markup=False
            )
        if self.sweep.is_cancelled():
            return EXIT_INTERRUPTED
        return EXIT_FAILED_TRIALS if failed else 0

    def follow_in_mlflow(self) -> None:
        with self.mlflow_may_be_away():
            self.sweep.tracker.follow(self.sweep.trials, self.sweep.name, self.sweep.provenance)

    def log_to_mlflow(self, comparison: dict[str, Any], artifacts: list[Path]) -> None:
        with self.mlflow_may_be_away():
            self.sweep.tracker.log_sweep(self.sweep.name, comparison, self.sweep.trials, artifacts)

    @contextlib.contextmanager
    def mlflow_may_be_away(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the results are on disk, and the next run of the command logs them
            self.sweep.console.print(
                f"note: MLflow does not answer ({str(error).splitlines()[0][:120]}); the results are kept in "
                f"{self.sweep.options.storage}, and the same command logs them later",
                markup=False,
            )

    def describe(self, outcomes: list[Outcome]) -> dict[str, Any]:
        as_good = self.sweep.options.as_good_within
        contexts = compare(outcomes, self.sweep.original_length, as_good, self.sweep.options.target_perplexity)
        run_ids = {trial.fingerprint: self.sweep.tracker.run_id(trial) for trial in self.sweep.trials}
        for context in contexts:
            for described in context["trials"]:
                described["mlflow_run_id"] = run_ids[described["fingerprint"]]
        started = next((o.record.started for o in outcomes if o.record.started), Started())
        parameters = next((o.record.model.parameters for o in outcomes if o.record.model), None)
        documents = self.sweep.validation_documents()
        peaks = [o.record.peak_memory_gib for o in outcomes if o.record.peak_memory_gib]
        return {
            "sweep": self.sweep.name,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "longspan_version": self.sweep.provenance.packages.get("longspan", "unknown"),
            "question": "Which method is best at each context length, and how close are the others?",
            "sentences": summarise(contexts, list(self.sweep.spec.seeds)) + self.lay_truth_beside_plan(),
            "rule": ANSWERS_RULE if self.sweep.spec.task == "sft" else RULE,
            "model": {
                "name": self.sweep.spec.model,
                "original_context_length": self.sweep.original_length,
                "parameters": parameters,
                "identity": self.sweep.identities.model,
            },
            "data": {
                "name": self.sweep.spec.data,
                "identity": self.sweep.identities.data,
                "validation_documents": len(documents),
                # At the shortest context; at a longer one a few more, since a window's first token is not scored.
                "scored_tokens": sum(document.num_scored for document in documents),
            },
            "attention": self.describe_attention(),
            "shared_settings": self.describe_settings(),
            **method_labels(contexts),
            "seeds": list(self.sweep.spec.seeds),
            "confidence": CONFIDENCE,
            "as_good": as_good,
            "learning_rates_chosen": self.describe_learning_rates(),
            "price": started.price_source,
            "driver": f"{started.driver}, CUDA {started.cuda}" if started.driver else None,
            "hardware": started.hardware or "unknown",
            "packages": {name: v for name, v in self.sweep.provenance.packages.items() if name != "longspan"},
            "git_commit": self.sweep.provenance.git_commit,
            "git_diff": self.sweep.provenance.diff_name,
            "wall_seconds": time.time() - self.sweep.began,
            "peak_memory_gib": max(peaks, default=None),
            "storage": self.sweep.storage.location,
            "mlflow_command": self.mlflow_command(str(self.sweep.storage.root)),
            "contexts": contexts,
        }

    def lay_truth_beside_plan(self) -> list[str]:
        """Writes both to the sweep's folder and returns a sentence of it; what an earlier run wrote stays if this one
        has trained nothing.
        """
        file = self.sweep.folder / FILE
        if self.sweep.said:
            price = self.sweep.estimator.price.usd_per_gpu_hour if self.sweep.estimator.price else None
            both = plan_and_truth(
                self.sweep.planned, self.sweep.said, self.sweep.storage, self.sweep.cluster, self.sweep.began, price
            )
            write_json(file, both)
        else:
            both = read_json(file) or {}
        return [both["summary"]] if both.get("summary") else []

    def describe_settings(self) -> dict[str, str]:
        """What all that is trained has in common; the report has a place of its own for attention and seeds."""
        shared = shared_settings([trial.training for trial in self.sweep.trials if trial.training.method != "untuned"])
        positions = {"Positions": POSITIONS[self.sweep.spec.positions]} if self.sweep.spec.positions != "none" else {}
        return positions | {k: v for k, v in shared.items() if k not in ("Attention in training", "Seed")}

    def describe_attention(self) -> str:
        inside = ", inside documents" if self.sweep.spec.document_mask else ""
        if self.sweep.spec.attention == "full":
            return f"full attention in training{inside}"
        size = self.sweep.spec.group_size
        group = f"{size:g} of the context" if size <= 1 else f"{size:,.0f} tokens"
        pattern = (
            "shifted sparse attention (S²-Attn)" if self.sweep.spec.attention == "s2" else self.sweep.spec.attention
        )
        return f"{pattern} in training, groups of {group}{inside}"

    def describe_learning_rates(self) -> str:
        chosen = self.sweep.spec.learning_rates_chosen
        if len(self.sweep.spec.learning_rate_sweep) == 1:
            return chosen
        multiples = ", ".join(f"{multiple:g}" for multiple in self.sweep.spec.learning_rate_sweep)
        return (
            f"for each method and context length the best of {multiples} times its own rate, by final perplexity on "
            f"the scored documents themselves, which flatters every method; those rates: {chosen}"
        )

    def mlflow_command(self, storage: str) -> str:
        if self.sweep.tracker.uri.startswith("sqlite:"):
            return f"{shown_path(Path(sys.executable))} -m dashboards.mlflow --storage {storage}"
        return (
            f"open {without_password(self.sweep.tracker.uri)} and choose the experiment {self.sweep.options.experiment}"
        )

    def export_command(self, fingerprint: str) -> str:
        python, folder = shown_path(Path(sys.executable)), shown_path(self.sweep.storage.trial(fingerprint).path)
        if self.sweep.storage.store:
            folder = f"$({python} -m orchestrator.fetch {self.sweep.storage.location} {fingerprint})"
        return f"{python} -m workloads.export {folder} DIR"
