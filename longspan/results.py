"""A sweep that has finished, as tables."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.records.storage import Storage
from orchestrator.trial_spec import TrialSpec
from workloads.errors import InputError

if TYPE_CHECKING:
    from pandas import DataFrame

# The columns of `results`, before those in which the sweep's trials differ.
COLUMNS = (
    "label", "method", "context_length", "seed", "state", "step", "perplexity", "low", "high", "tokens_per_second",
    "peak_memory_gib", "hours", "usd", "trainable_parameters",
)  # fmt: skip

SETTING_COLUMNS = (
    "name", "context_length", "perplexity", "low", "high", "hours", "usd", "learning_rate", "seeds", "lowest", "winner",
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One trained trial of a sweep."""

    storage: Storage
    label: str
    fingerprint: str
    perplexity: float

    @property
    def folder(self) -> Path:
        """Its folder on this machine, fetched from an object store where it is in one."""
        from orchestrator.fetch import fetch

        return fetch(self.storage.location, self.fingerprint)

    def export(self, out: str | Path, **options: Any) -> Path:
        """Writes the model as stock transformers loads it, and checks it against the trained one.

        Args:
            out: a folder that does not exist yet, or is empty.
            options: those of :func:`workloads.export.export_trial`, such as ``what="adapter"``.

        Raises:
            InputError: see there.
        """
        from workloads.export import export_trial

        return export_trial(self.folder, Path(out), **options).folder


class Sweep:
    """A sweep that has finished: its results as pandas DataFrames, its answer, its best trial.

    Raises:
        InputError: it has not finished.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        from longspan.commands.report import read_comparison

        self.storage, self.name = storage, name
        self.comparison: dict[str, Any] = read_comparison(storage, name)
        """Everything that the report shows, as plain data (dashboards/comparison.py describes it)."""

    def __repr__(self) -> str:
        return f"<sweep {self.name} in {self.storage.location}: {len(self.results)} models>"

    def _repr_html_(self) -> str:
        import html

        return "".join(f"<p>{html.escape(sentence)}</p>" for sentence in self.answer) + self.results.to_html()

    @property
    def answer(self) -> list[str]:
        """The answer in words, sentence by sentence."""
        each = (context["sentences"] for context in self.comparison["contexts"])
        return [*self.comparison["sentences"], *(sentence for sentences in each for sentence in sentences)]

    @property
    def report(self) -> Path:
        """The report, one HTML page."""
        return self.storage.sweep(self.name) / "report" / "report.html"

    @cached_property
    def results(self) -> DataFrame:
        """A row for each trial and for each untuned model, whose ``method`` is ``untuned``.

        ``perplexity`` is the last one at the trained length, with its 95% interval ``low`` to ``high``; ``hours`` and
        ``usd`` are of training. Fields in which the trials differ are further columns.
        """
        import pandas

        rows = []
        for context in self.comparison["contexts"]:
            for reference in context["references"]:
                rows.append({**reference, "method": "untuned", "context_length": context["context_length"]})
            for trial in context["trials"]:
                final = trial["final"] or {}
                rows.append({**trial, **final, "context_length": context["context_length"]})
        varied = self._varied()
        for row in rows:
            row.update(varied.get(row.get("fingerprint", ""), {}))
        more = list(dict.fromkeys(name for fields in varied.values() for name in fields))
        return _numbers(pandas.DataFrame(rows, columns=[*COLUMNS, *more, "fingerprint"]))

    @cached_property
    def curves(self) -> DataFrame:
        """Perplexity during training: a row for each evaluation of each trial, at the trained length."""
        import pandas

        rows = [
            {**{name: trial[name] for name in ("label", "method", "seed", "fingerprint")}, **point,
             "context_length": context["context_length"]}
            for context in self.comparison["contexts"]
            for trial in context["trials"]
            for point in trial["curve"]
        ]  # fmt: skip
        return pandas.DataFrame(
            rows,
            columns=["label", "method", "context_length", "seed", "step", "tokens", "perplexity", "low", "high",
                     "fingerprint"],
        )  # fmt: skip

    def compare(self, *trials: str) -> Any:
        """The settings side by side; or, given two trials or more, what differs between them and which is better.

        Args:
            trials: labels such as ``"lora+ 2048"``, or fingerprints.

        Returns:
            Without arguments a DataFrame with a row for each setting, over its seeds; ``winner`` is the ``lowest`` one
            if all others are distinguishable from it. With arguments plain data, as ``longspan compare --json`` prints.
        """
        if trials:
            from orchestrator.compare.runs import find_run
            from orchestrator.compare.side_by_side import side_by_side

            labels = set(self.results["label"])
            found = [find_run(f"{self.name}/{one}" if one in labels else one, self.storage) for one in trials]
            return side_by_side(found)
        import pandas

        rows = [
            {**setting, **setting["final"], "context_length": context["context_length"],
             "lowest": setting["variant"] == context["lowest"] and setting["chosen"],
             "winner": setting["variant"] == context["winner"] and setting["chosen"]}
            for context in self.comparison["contexts"]
            for setting in context["settings"]
        ]  # fmt: skip
        return _numbers(pandas.DataFrame(rows, columns=list(SETTING_COLUMNS)))

    @cached_property
    def effects(self) -> DataFrame:
        """What each axis changes with the others held, in percent of perplexity: a row for each value and length."""
        import pandas

        rows = [
            {**effect, "context_length": context["context_length"]}
            for context in self.comparison["contexts"]
            for effect in context["effects"] or ()
        ]
        columns = ["axis", "value", "against", "context_length", "percent", "low", "high", "seeds"]
        return _numbers(pandas.DataFrame(rows, columns=columns))

    def best(self, context_length: int | None = None) -> Trial:
        """The trained trial with the lowest perplexity at a context length; of several seeds the best one.

        Args:
            context_length: by default the longest at which a trial has finished.

        Raises:
            InputError: no trial of that length has finished.
        """
        from orchestrator.reporting.result_table import best_trials

        lengths = {
            trial["fingerprint"]: context["context_length"]
            for context in self.comparison["contexts"]
            for trial in context["trials"]
        }
        found = {lengths[trial["fingerprint"]]: trial for trial in best_trials(self.comparison)}
        if not found or (context_length is not None and context_length not in found):
            raise InputError(
                f"the sweep {self.name} has no best trial"
                + (f" at {context_length} tokens; it has one at {sorted(found)}" if found else ": none has finished")
            )
        trial = found[max(found) if context_length is None else context_length]
        return Trial(self.storage, trial["label"], trial["fingerprint"], trial["final"]["perplexity"])

    def _varied(self) -> dict[str, dict[str, Any]]:
        """By fingerprint, the fields in which the trained trials differ, besides those that are columns anyway."""
        trials: dict[str, TrialSpec] = {}
        for context in self.comparison["contexts"]:
            for trial in context["trials"]:
                with self.storage.set_apart():
                    trials[trial["fingerprint"]] = self.storage.trial(trial["fingerprint"]).read_trial()
        fields = {fingerprint: dataclasses.asdict(trial.training) for fingerprint, trial in trials.items()}
        names = [name for name in next(iter(fields.values()), {}) if name not in (*COLUMNS, "eval_span")]
        varied = [name for name in names if len({str(training[name]) for training in fields.values()}) > 1]
        return {fingerprint: {name: training[name] for name in varied} for fingerprint, training in fields.items()}


def _numbers(frame: DataFrame) -> DataFrame:
    """The table with NaN for numbers that are unknown, also where a whole column is."""
    measured = ("perplexity", "low", "high", "percent", "tokens_per_second", "peak_memory_gib", "hours", "usd")
    return frame.astype({name: float for name in measured if name in frame})
