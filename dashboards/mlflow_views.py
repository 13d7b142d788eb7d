"""Saved views of MLflow's UI: one link opens a sweep's charts, arranged.

From 3.15 on MLflow keeps a view as a tag of its experiment, ``mlflow.sharedViewState.<id>``: JSON with a name, two
times and the page's state, compressed. That is no documented interface: everything that knows it is in this file, and
tests/dashboards/test_mlflow_ui.py opens one in a browser. Written for MLflow 3.17.2.
"""

from __future__ import annotations

import base64
import json
import re
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

# Of an experiment of this kind the page opens on the runs, not on traces.
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
TAG = "mlflow.sharedViewState."
FIRST_VERSION = (3, 15)
MOST_TAG_CHARACTERS = 20_000  # MLflow's limit on the value of an experiment's tag
# The views, and whether charts or the table of runs are shown.
MODES = {"step": "CHART", "tokens": "CHART", "hours": "CHART", "cost": "CHART", "failures": "TABLE"}
COLUMNS = ("tags.`method`", "tags.`context_length`", "tags.`positions`")


@dataclass(frozen=True)
class View:
    """A saved view of one sweep's runs.

    Args:
        id: in its link and its tag's key; begins with the sweep's name.
        state: what the page restores: filters, columns, charts and their sections.
    """

    id: str
    name: str
    state: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The key of its tag."""
        return TAG + self.id

    def value(self, earlier: str | None) -> str | None:
        """The value of its tag; None if the earlier value has the same name and state."""
        saved = _read(earlier) if earlier else {}
        packed = zlib.compress(json.dumps(self.state, separators=(",", ":")).encode(), 9)
        content = {"name": self.name, "state": "deflate;" + base64.b64encode(packed).decode()}
        if all(saved.get(key) == value for key, value in content.items()):
            return None
        now = int(time.time() * 1000)
        value = json.dumps({**content, "createdAt": saved.get("createdAt", now), "updatedAt": now})
        return value if len(value) <= MOST_TAG_CHARACTERS else None


def supports_views(version: str) -> bool:
    """Whether an MLflow server of that version opens saved views."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) >= FIRST_VERSION


def in_sweep_tag(sweep: str) -> str:
    """The tag of every run that a sweep uses, by which its views find them."""
    return f"in_sweep.{_key(sweep)}"


def links(page: str, experiment_id: str, tags: Mapping[str, str], sweep: str | None = None) -> list[tuple[str, str]]:
    """(name, address) of the saved views of a sweep, by default of the one whose views changed last.

    Args:
        page: the address of MLflow's UI.
        tags: of the experiment.
    """
    saved = {key.removeprefix(TAG): _read(value) for key, value in tags.items() if key.startswith(TAG)}
    ours = {id: view for id, view in saved.items() if view and id.rpartition(".")[2] in MODES}
    if sweep is None and ours:
        sweep = max(ours, key=lambda id: ours[id]["updatedAt"]).rpartition(".")[0]
    ids = [(f"{_key(sweep or '')}.{kind}", mode) for kind, mode in MODES.items()]
    address = f"{page.rstrip('/')}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    return [
        (ours[id]["name"], f"{address}&compareRunsMode={mode}&viewStateShareKey={quote(id)}")
        for id, mode in ids
        if id in ours
    ]


def views(sweep: str, contexts: Iterable[int], other_lengths: Iterable[int], hours: str) -> list[View]:
    """The views of a sweep.

    Args:
        contexts: the context lengths that it trains.
        other_lengths: further lengths that it evaluates at.
        hours: the name of the hours in the views' names, such as ``GPU hours``.
    """
    trained = [(f"Context {length:,}", length) for length in sorted(contexts)]
    others = [(f"Evaluated at {length:,}", length) for length in sorted(set(other_lengths) - set(contexts))]
    curves = [(name, [_line(f"eval/perplexity_{n}", name), _bar(f"eval/perplexity_{n}")], True) for name, n in trained]
    curves += [("Training loss", [_line("train/loss", "Training loss")], True)]
    curves += [(name, [_line(f"eval/perplexity_{length}", name)], True) for name, length in others]
    intervals = [_line(f"eval/perplexity_{n}", f"Context {n:,}", "_low", "_high") for _, n in trained]
    curves += [("95% intervals (solid: perplexity, dashed and dotted: the ends)", intervals, False)]
    costs = [
        ("Speed", [_line(f"perf/{name}", title) for name, title in SPEED], True),
        ("Memory", [_line("perf/peak_memory_gib", "Peak memory, GiB"), _bar("perf/peak_memory_gib")], True),
    ]
    tokens, device_hours = _axis("train/tokens"), _axis("train/device_hours")
    failures = _state(
        sweep, [], " and attributes.status != 'FINISHED' and attributes.status != 'RUNNING'",
        columns=("attributes.`Duration`", *COLUMNS, "tags.`failure`", "tags.`stopped_early`", "tags.`cancelled`"),
    )  # fmt: skip
    named = {
        "step": ("perplexity by step", _state(sweep, curves)),
        "tokens": ("perplexity by tokens", _state(sweep, curves, axis=tokens)),
        "hours": (f"perplexity by {hours}", _state(sweep, curves, axis=device_hours)),
        "cost": ("speed and memory", _state(sweep, costs)),
        "failures": ("failed, stopped or cancelled", failures),
    }
    return [View(f"{_key(sweep)}.{kind}", f"{sweep}: {name}", state) for kind, (name, state) in named.items()]


SPEED = (("tokens_per_second_per_gpu", "Tokens/s per worker"), ("mfu", "Model FLOPs utilisation"))
Section = tuple[str, list[dict[str, Any]], bool]


def _state(
    sweep: str,
    sections: list[Section],
    more_filter: str = "",
    axis: Mapping[str, str] | None = None,
    columns: tuple[str, ...] = COLUMNS,
) -> dict[str, Any]:
    """A page's state: sections of charts, each shown or collapsed. What MLflow adds itself comes below, collapsed."""
    charts: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    rest: list[Section] = [(name, [], False) for name in ("eval", "train", "perf", "Model metrics", "System metrics")]
    for number, (name, cards, display) in enumerate([*sections, *rest]):
        section = {"uuid": f"s{number}", "name": name, "display": display, "isReordered": True, "deleted": False}
        shown.append(section | {"isGenerated": False, "columns": 2})
        for card in cards:
            charts.append({**card, "uuid": f"c{len(charts)}", "metricSectionId": f"s{number}"})
    return {
        "searchFilter": f"tags.`{in_sweep_tag(sweep)}` = 'yes'{more_filter}",
        "orderByKey": "tags.`mlflow.runName`",  # by their start MLflow nests runs, and hides nested ones from charts
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(columns),
        "columnOrder": [column for column in columns if "tags" in column],
        "columnWidths": {column: 400 for column in columns if column not in COLUMNS and "tags" in column},
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": charts,
        "compareRunSections": shown,
        "isAccordionReordered": True,
        "hideEmptyCharts": True,
        "globalLineChartConfig": axis or {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


def _axis(metric: str) -> dict[str, Any]:
    return {"xAxisKey": "metric", "lineSmoothness": 0, "selectedXAxisMetricKey": metric}


def _line(metric: str, name: str, *suffixes: str) -> dict[str, Any]:
    """A chart of a metric against the page's axis; with suffixes, of the metrics named so as well."""
    return {
        **_card("LINE", metric, name),
        "selectedMetricKeys": [metric, *(f"{metric}{suffix}" for suffix in suffixes)],
        "lineSmoothness": 0,
        "xAxisScaleType": "linear",
        "scaleType": "log" if metric.startswith("eval/perplexity") else "linear",
        "range": {},
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }


def _bar(metric: str) -> dict[str, Any]:
    return {**_card("BAR", metric, "Last value of each run"), "selectedMetricKeys": [metric]}


def _card(kind: str, metric: str, name: str) -> dict[str, Any]:
    shared = {"type": kind, "metricKey": metric, "displayName": name, "runsCountToCompare": 100}
    return shared | {"deleted": False, "isGenerated": False}


def _key(sweep: str) -> str:
    """A sweep's name of the characters that MLflow takes in a tag's key."""
    return sweep.replace("+", "_plus")


def _read(value: str) -> dict[str, Any]:
    """A saved view's JSON; empty if it is not one."""
    try:
        found = json.loads(value)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("updatedAt"), int) else {}
