"""The Python library: a finished sweep as tables, and docs/python.md as a user runs it."""

import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import longspan
from orchestrator.cli import parse
from orchestrator.recipes import find_recipe
from tests.support.commands import ROOT
from workloads.errors import InputError

STORAGE = ROOT / "tests" / "data" / "b1875aa"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An earlier version's sweep, whose journals are complete."""
    storage = tmp_path_factory.mktemp("finished") / "runs"
    shutil.copytree(STORAGE, storage)
    return longspan.open(storage)


def test_results_have_a_row_for_every_model_and_a_column_for_what_differs(finished):
    table = finished.results
    trained = table[table.method != "untuned"]
    assert sorted(trained.label) == [f"{method} {n}" for method in ("full", "lora", "lora+") for n in (1024, 2048)]
    assert len(table) == 6 + 2 * 3
    full = trained.set_index("label").loc["full 1024"]
    assert full.perplexity == pytest.approx(2.7922, abs=1e-4) and full.low < full.perplexity < full.high
    assert (full.learning_rate, full.state, full.step) == (1e-3, "finished", 48)
    assert trained.learning_rate.nunique() == 2 and "beta1" not in table


def test_curves_begin_at_the_untuned_model_and_end_at_the_result(finished):
    curves, results = finished.curves, finished.results.set_index("label")
    for label, curve in curves.groupby("label"):
        assert list(curve.step) == [0, 16, 32, 48]
        assert curve.perplexity.iloc[-1] == results.loc[label].perplexity


def test_settings_trials_and_the_best_one(finished):
    settings = finished.compare()
    best = finished.best(1024)
    assert settings[settings.lowest].context_length.tolist() == [1024, 2048]
    assert finished.effects.empty  # of a sweep without axes
    assert best.perplexity == settings[settings.context_length == 1024].perplexity.min()
    assert finished.best().label.endswith("2048")
    assert finished.compare("lora 1024", best.fingerprint)["differences"]
    assert finished.answer[0] in finished._repr_html_()
    with pytest.raises(InputError, match=r"has one at \[1024, 2048\]"):
        finished.best(4096)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: longspan.open(STORAGE, "convergance"), "did you mean convergence"),
        (lambda: longspan.open(ROOT / "docs"), "expected the name of a sweep: none"),
        (lambda: longspan.plan("convergance"), "did you mean convergence"),
        (lambda: longspan.plan(stpes=3), "field 'stpes' is unknown; did you mean steps"),
        (lambda: longspan.plan(steps="many"), "steps is 'many'; expected INT"),
        (lambda: longspan.sweep({"steps": 3}), "names no recipe"),
        (lambda: longspan.sweep(workers=0), "workers is 0"),
        (lambda: longspan.plan("nowhere.yaml"), "cannot be read"),
        (lambda: longspan.plan(None), "the sweep is None; expected a recipe's name"),
        (lambda: longspan.plan(data="\ud800"), "in which this is none"),
        (lambda: longspan.open(STORAGE, 3), "sweep '3' is unknown"),
    ],
)
def test_a_mistake_is_one_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_sweep_in_another_thread_is_refused_and_signal_handlers_are_left_alone():
    with ThreadPoolExecutor(1) as pool, pytest.raises(InputError, match="expected the main thread"):
        pool.submit(longspan.sweep).result()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(InputError, match="is no folder here"):
        longspan.sweep(model="./nowhere/at/all")
    assert signal.getsignal(signal.SIGTERM) == before


def test_python_flags_and_files_mean_the_same_sweep():
    from longspan.library import _resolve

    flags = ["convergence", "--steps", "7", "--positions", "linear", "yarn", "--workers", "2"]
    overrides = dict(steps=7, positions=["linear", "yarn"], workers=2)
    assert _resolve("convergence", overrides) == parse(flags)
    assert _resolve(
        {"recipe": "convergence", "steps": 7, "run": {"workers": 2}}, {"positions": ["linear", "yarn"]}
    ) == (parse(flags))
    assert _resolve(find_recipe("convergence")(), overrides) == parse(flags)
    assert _resolve("convergence", {"name": "mine", "steps": 7})[0] == "mine"
    plain = dict(seeds=[0, 1, 2], context_lengths=[512, 1024], learning_rate_full=1e-4, data="texts")
    as_in_notebooks = dict(
        seeds=range(3), context_lengths=np.array([512, 1024]), learning_rate_full=np.float64(1e-4), data=Path("texts")
    )
    assert _resolve("convergence", as_in_notebooks) == _resolve("convergence", plain)


def test_a_plan_is_a_table(tmp_path):
    plan = longspan.plan("convergence", context_lengths=[512], steps=4, methods=["lora", "full"], storage=str(tmp_path))
    assert list(plan.label) == [t for t in plan.label if t.endswith("512")] and set(plan.action) == {"run"}
    assert (plan.seconds > 0).all() and (plan.memory_gib > 0).all()


@pytest.mark.ray
def test_the_page_runs_as_it_stands(tmp_path):
    page = (ROOT / "docs" / "python.md").read_text()
    (tmp_path / "page.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)))
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert "lora 512" in done.stdout and "Traceback" not in done.stderr
