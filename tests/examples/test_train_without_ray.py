"""The example scripts run, and show what they say they show."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.texts import write_texts

ROOT = Path(__file__).parents[2]


def test_trains_on_a_folder_of_texts_and_prints_both_perplexities(tmp_path):
    data = tmp_path / "texts"
    data.mkdir()
    write_texts(data, documents=20, lines=20)
    command = [sys.executable, "examples/train_without_ray.py", "--data", str(data), "--context-length", "256"]
    done = subprocess.run(
        [*command, "--steps", "8", "--folder", str(tmp_path / "run")],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = re.search(r"held-out documents: ([\d.]+) before training, ([\d.]+) after 8 steps", done.stdout)
    assert line and float(line[2]) < float(line[1])
    assert (tmp_path / "run" / "checkpoints").is_dir()


def test_imports_neither_ray_nor_mlflow():
    code = (
        "import sys; sys.path.insert(0, 'examples'); import train_without_ray; "
        "print({'ray', 'mlflow'} & set(sys.modules) or 'none')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "none"
