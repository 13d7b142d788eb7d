"""The rules of the house that a test can hold."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"orchestrator", "workloads", "clusters", "dashboards"}
# What each room may not import: leaves import no other room, and workloads is a plain PyTorch library.
FORBIDDEN = {
    "workloads": (ROOMS - {"workloads"}) | {"ray", "mlflow"},
    "clusters": ROOMS - {"clusters"},
    "dashboards": ROOMS - {"dashboards"},
}


def imported_packages(path: Path) -> set[str]:
    packages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            packages.add(node.module.partition(".")[0])
    return packages


@pytest.mark.parametrize("room", FORBIDDEN)
def test_leaves_import_no_other_room(room):
    for path in (ROOT / room).rglob("*.py"):
        assert not imported_packages(path) & FORBIDDEN[room], path


def test_the_sweeps_own_process_starts_without_torch():
    """What every command pays before it does anything."""
    heavy = "{'torch', 'transformers', 'peft', 'mlflow', 'datasets', 'matplotlib'}"
    code = f"import sys, orchestrator.sweep; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_no_pickle_is_loaded():
    for path in ROOT.glob("*/**/*.py"):
        if path.parts[len(ROOT.parts)] in ROOMS:
            text = path.read_text()
            assert not re.search(r"torch\.load\((?!.*weights_only=True)|pickle\.loads?\(", text), path
            assert "trust_remote_code=True" not in text, path
