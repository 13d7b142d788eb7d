"""How a sweep ends: its trials compared, the report written and logged, the answer printed."""

from __future__ import annotations

import datetime
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrator.compare import Outcome, cautions, compare, headline, labels, summarise
from orchestrator.planning.cost import Totals
from orchestrator.planning.preparation import Prepared
from orchestrator.planning.sweep_plan import SweepPlan
from orchestrator.records.events import Started
from orchestrator.records.json_files import expect_fields, read_json, write_json
from orchestrator.records.mlflow_store import without_password
from orchestrator.records.mlflow_sync import Tracker
from orchestrator.records.provenance import Provenance
from orchestrator.records.trial_record import TrialRecord
from orchestrator.reporting.learning_rates import learning_rates_chosen
from orchestrator.reporting.plan_vs_actual import FILE, compare_with_plan
from orchestrator.terminal import shell_command, shown_path
from orchestrator.variants import variants_of
from workloads.attention.patterns import PATTERNS
from workloads.evaluation.intervals import ANSWERS_RULE, CONFIDENCE, RULE
from workloads.models.positions import POSITIONS
from workloads.wording import axis_label, shared_settings

FEWEST_SEEDS = 3  # intervals of two are wide (docs/comparison.md)
MOST_REFUSALS = 3  # of MLflow's, that are printed: they are mostly alike


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """The end of a sweep whose trials have run, or had run before.

    Args:
        began: the command's start, on the monotonic clock.
        announced: the totals that were printed before this command trained; None if there was nothing to train.
    """

    sweep: Prepared
    plan: SweepPlan
    began: float
    announced: Totals | None
    tracker: Tracker
    provenance: Provenance
    console: Console

    def conclude(self) -> list[Outcome]:
        """Compares the trials, writes and logs the report, and prints the answer; returns each trial's outcome."""
        from dashboards.report import render
        from orchestrator.reporting.result_table import print_comparison

        sweep = self.sweep
        outcomes = self._outcomes()
        self.tracker.follow(self.plan.trials, sweep.name, self.provenance, check_runs=True)
        comparison = self._describe(outcomes)
        report: list[Path] = []
        try:
            write_json(sweep.folder / "comparison.json", comparison)
            report = render(comparison, sweep.folder / "report")
            diff = self.provenance.keep_diff(sweep.folder)
            sweep.storage.push(sweep.folder)
            kept = [sweep.folder / "comparison.json", sweep.folder / "spec.json", *([diff] if diff else [])]
            if not self.tracker.outage:
                self.tracker.log_sweep(
                    sweep.name, sweep.spec.digest(), comparison, list(self.plan.trials), [*report, *kept]
                )
        except OSError as error:
            self.console.print(f"note: the report could not be written: {error}")

        self.console.print()
        print_comparison(comparison, self.console)
        self.console.print()
        if report:
            self.console.print(f"report: {shown_path(sweep.folder / 'report' / 'report.html')}", soft_wrap=True)
        links = self.tracker.links(sweep.name) if not self.tracker.outage else []
        for name, address in links:
            self.console.print(f"MLflow, {name}: {address}", soft_wrap=True)
        if not links:
            self.console.print(f"MLflow: {self._mlflow_command(shown_path(sweep.storage.root))}", soft_wrap=True)
        self._print_mlflow()
        for step in comparison["next_steps"]:
            self.console.print(f"{step['purpose']}: {step['command']}", markup=False, soft_wrap=True)
        self._print_unfinished(outcomes)
        return outcomes

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self.began

    def _outcomes(self) -> list[Outcome]:
        folders = [self.sweep.storage.trial(trial.fingerprint) for trial in self.plan.trials]
        return [
            Outcome(trial, TrialRecord.of(folder.journal), folder.log_url or shown_path(folder.log))
            for trial, folder in zip(self.plan.trials, folders)
        ]

    def _print_unfinished(self, outcomes: list[Outcome]) -> None:
        """Prints which trials were stopped early, cancelled or failed, and why."""
        num_cancelled = 0
        for outcome in outcomes:
            label, record = outcome.trial.label, outcome.record
            if record.state == "stopped" and record.stopped:
                step = f"step {record.stopped.step} of {outcome.trial.training.steps}"
                self.console.print(f"stopped early: {label} at {step}: {record.reason}")
        for outcome in outcomes:
            label, record = outcome.trial.label, outcome.record
            if record.state == "cancelled" and record.cancelled:
                num_cancelled += 1
                step = f"step {record.cancelled.step} of {outcome.trial.training.steps}"
                self.console.print(f"cancelled: {label} at {step}, {record.reason}")
        if num_cancelled:
            self.console.print(
                f"The sweep is unfinished: {num_cancelled} of {len(outcomes)} trials "
                f"{'was' if num_cancelled == 1 else 'were'} cancelled. The same command resumes them."
            )
        for outcome in failures(outcomes):
            gone = "it has no journal: its folder was removed while the sweep ran, or it never began"
            line = f"failed: {outcome.trial.label}: {outcome.record.reason or gone}; log: {outcome.log}"
            self.console.print(line, style="red")

    def _print_mlflow(self) -> None:
        """Prints what MLflow lacks of the results, which are all in the storage, and what brings it there."""
        tracker, kept = self.tracker, f"the results are kept in {self.sweep.options.storage}"
        for note in tracker.store.notes:
            self.console.print(f"note: {note}")
        if tracker.outage:
            self.console.print(
                f"note: MLflow does not answer ({tracker.outage}); {kept}, and the same command logs them once it does",
            )
        refused = list(tracker.refused.values())
        for refusal in refused[:MOST_REFUSALS]:
            self.console.print(f"error: {refusal}; {kept}", style="red")
        if len(refused) > MOST_REFUSALS:
            self.console.print(f"error: MLflow refuses {len(refused) - MOST_REFUSALS} more runs", style="red")

    def _describe(self, outcomes: list[Outcome]) -> dict[str, Any]:
        """The content of comparison.json, which the report and MLflow show."""
        sweep, spec, trials = self.sweep, self.sweep.spec, self.plan.trials
        as_good = sweep.options.as_good_within
        axes, options = self._axes, sweep.options
        contexts = compare(
            outcomes, sweep.original_length, as_good, options.target_perplexity, axes=axes, baseline=options.baseline
        )
        variants = variants_of([trial.training for trial in trials], axes)
        names = {variant.id: variant.name for variant in variants}
        run_ids = {trial.fingerprint: self.tracker.run_id(trial) for trial in trials}
        for context in contexts:
            for described in context["trials"]:
                described["mlflow_run_id"] = run_ids[described["fingerprint"]]
        started = next((o.record.started for o in outcomes if o.record.started), Started())
        parameters = next((o.record.model.parameters for o in outcomes if o.record.model), None)
        documents = sweep.scored_documents(trials)
        peaks = [o.record.peak_memory_gib for o in outcomes if o.record.peak_memory_gib]
        described = {
            "sweep": sweep.name,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "longspan_version": self.provenance.packages.get("longspan", "unknown"),
            "question": "Which setting is best at each context length, and what does each axis change?"
            if axes
            else "Which method is best at each context length, and how close are the others?",
            "headline": headline(contexts, names),
            "sentences": summarise(contexts, list(spec.seeds), names) + self._compare_with_plan(),
            "cautions": cautions(contexts),
            "rule": ANSWERS_RULE if spec.task == "sft" else RULE,
            "model": {
                "name": spec.model,
                "original_context_length": sweep.original_length,
                "parameters": parameters,
                "identity": sweep.identities.model,
            },
            "data": {
                "name": spec.data,
                "identity": sweep.identities.data,
                "validation_documents": len(documents),
                # At the shortest context; at a longer one a few more, since a window's first token is not scored.
                "scored_tokens": sum(document.num_scored for document in documents),
            },
            "attention": self._describe_attention(),
            "shared_settings": self._describe_settings(),
            **labels(variants, axes),
            "baseline": options.baseline,
            "seeds": list(spec.seeds),
            "confidence": CONFIDENCE,
            "as_good": as_good,
            "learning_rates_chosen": self._describe_learning_rates(),
            "price": started.price_source,
            "driver": f"{started.driver}, CUDA {started.cuda}" if started.driver else None,
            "hardware": started.hardware or "unknown",
            "packages": {name: v for name, v in self.provenance.packages.items() if name != "longspan"},
            "git_commit": self.provenance.git_commit,
            "git_diff": self.provenance.diff_name,
            "wall_seconds": self._elapsed if self.announced else None,  # of a command that trained
            "peak_memory_gib": max(peaks, default=None),
            "storage": sweep.storage.location,
            "mlflow_command": self._mlflow_command(str(sweep.storage.root)),
            "contexts": contexts,
        }
        return described | {"next_steps": self._next_steps(described)}

    def _next_steps(self, comparison: dict[str, Any]) -> list[dict[str, str]]:
        """Commands that go on from the answer: export the best trials, train them longer, with more seeds."""
        from orchestrator.reporting.result_table import best_trials

        sweep, spec = self.sweep, self.sweep.spec
        steps = [
            {"purpose": f"export {trial['label']}", "command": self._export_command(trial["fingerprint"])}
            for trial in best_trials(comparison)
        ]
        if sweep.storage.store or not steps:
            return steps
        again = (shown_path(Path(sys.executable)), "-m", "orchestrator.sweep", shown_path(sweep.folder / "spec.json"))
        longer = ("--steps", str(2 * spec.steps), "--name", f"{sweep.name}-{2 * spec.steps}-steps")
        seeds = [str(seed) for seed in range(max(spec.seeds) + 3)] if len(spec.seeds) < FEWEST_SEEDS else []
        steps.append({"purpose": "train longer", "command": shell_command(*again, *longer)})
        if seeds:
            steps.append({"purpose": "more seeds", "command": shell_command(*again, "--seeds", *seeds)})
        return steps

    @property
    def _axes(self) -> tuple[str, ...]:
        """The fields that have several values."""
        return tuple(self.sweep.spec.axes)

    def _compare_with_plan(self) -> list[str]:
        """Writes planned and actual values to the sweep's folder, and returns a sentence on them.

        What an earlier run wrote stays if this one has trained nothing.
        """
        file, both = self.sweep.folder / FILE, {}
        if self.announced:
            both = compare_with_plan(
                self.plan.planned, self.announced, self.sweep.storage, self.plan.cluster, self._elapsed
            )
            try:
                write_json(file, both)
            except OSError as error:
                self.console.print(f"note: {file.name} could not be written: {error}")
        else:
            with self.sweep.storage.set_apart():
                both = expect_fields(read_json(file) or {}, str(file))
        return [both["summary"]] if both.get("summary") else []

    def _describe_settings(self) -> dict[str, str]:
        """What all trained trials have in common; the report shows attention and seeds elsewhere."""
        shared = shared_settings([trial.training for trial in self.plan.trials if trial.training.method != "untuned"])
        positions = self.sweep.spec.positions
        same = positions != "none" and "positions" not in self._axes
        extended = {"Positions": POSITIONS[positions].label} if same else {}
        return extended | {k: v for k, v in shared.items() if k not in ("Attention in training", "Seed")}

    def _describe_attention(self) -> str:
        spec = self.sweep.spec
        if varied := [axis_label(name).lower() for name in ("attention", "group_size") if name in self._axes]:
            return f"{' and '.join(varied)} as named in each setting"
        inside = ", inside documents" if spec.document_mask else ""
        if not PATTERNS[spec.attention].has_group_size:
            return f"full attention in training{inside}"
        size = spec.group_size
        group = f"{size:g} of the context" if size <= 1 else f"{size:,.0f} tokens"
        return f"{PATTERNS[spec.attention].label}, in training, groups of {group}{inside}"

    def _describe_learning_rates(self) -> str:
        spec, chosen = self.sweep.spec, learning_rates_chosen(self.sweep.spec)
        if len(spec.learning_rate_sweep) == 1:
            return chosen
        multiples = ", ".join(f"{multiple:g}" for multiple in spec.learning_rate_sweep)
        return (
            f"for each method and context length the best of {multiples} times its own rate, by final perplexity on "
            f"the scored documents themselves, which flatters every method; those rates: {chosen}"
        )

    def _mlflow_command(self, storage: str) -> str:
        if self.tracker.uri.startswith("sqlite:"):
            return shell_command(shown_path(Path(sys.executable)), "-m", "dashboards.mlflow", "--storage", storage)
        return f"open {without_password(self.tracker.uri)} and choose the experiment {self.sweep.options.experiment}"

    def _export_command(self, fingerprint: str) -> str:
        storage = self.sweep.storage
        python, folder = shown_path(Path(sys.executable)), shown_path(storage.trial(fingerprint).path)
        if storage.store:
            fetch = shell_command(python, "-m", "orchestrator.fetch", storage.location, fingerprint)
            return f'{shell_command(python, "-m", "workloads.export")} "$({fetch})" DIR'
        return shell_command(python, "-m", "workloads.export", folder, "DIR")


def failures(outcomes: list[Outcome]) -> list[Outcome]:
    """The trials without an outcome: failed, or never run."""
    return [o for o in outcomes if o.record.state not in ("finished", "stopped", "cancelled")]
