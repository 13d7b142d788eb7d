"""The example script runs, and shows what its docstring promises."""

import os
import re
import subprocess
import sys

from tests.support.commands import ROOT
from tests.support.texts import write_texts


def test_trains_on_a_folder_of_texts_and_prints_both_perplexities_without_ray_and_mlflow(tmp_path):
    data = tmp_path / "texts"
    data.mkdir()
    write_texts(data, documents=20, lines=20)
    code = (
        "import runpy, sys; runpy.run_path('examples/train_without_ray.py', run_name='__main__'); "
        "print('imported:', sorted({'ray', 'mlflow'} & set(sys.modules)))"
    )
    flags = ["--data", str(data), "--context-length", "256", "--steps", "8", "--folder", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = re.search(r"held-out documents: ([\d.]+) before training, ([\d.]+) after 8 steps", done.stdout)
    assert line and float(line[2]) < float(line[1])
    assert (tmp_path / "run" / "checkpoints").is_dir()
    assert done.stdout.splitlines()[-1] == "imported: []"
