"""What ``pip install .`` installs: everything that a sweep needs, from any folder."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"longspan", "orchestrator", "workloads", "clusters", "dashboards"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """What git would clone, in a folder named longspan: nothing built here is left in the tree or taken from it."""
    source = tmp_path_factory.mktemp("clones") / "longspan"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    return source


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(clone)], check=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_model_the_report_and_the_cluster_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in (
        "workloads/builtin/tiny/model.safetensors",
        "workloads/builtin/tiny/tokenizer.json",
        "workloads/builtin/tiny/README.md",
        "dashboards/report.html",
        "clusters/aws-p4d.yaml",
        "orchestrator/recipes/convergence.py",
        *(f"{package}/py.typed" for package in PACKAGES),  # type checkers of other projects read our annotations
    ):
        assert needed in names
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == PACKAGES
    assert wheel.stat().st_size < 12 * 2**20


def test_the_installed_package_starts_from_any_folder(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import orchestrator.sweep, workloads.models.source as models; "
        "print(models.__file__, models.ModelSource.parse('builtin:tiny').identity)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(site)],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(str(site)) and "sha256:" in done.stdout


@pytest.mark.parametrize("how", ["build_wheel", "build_editable"])
def test_a_clone_named_longspan_does_not_hide_the_package_from_its_parent_folder(clone, tmp_path, how):
    """There Python finds the clone's folder first, as a namespace without content."""
    build = f"import sys, setuptools.build_meta as backend; backend.{how}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=clone, capture_output=True, check=True)
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(tmp_path / "site")
    # An environment's folder of packages: its .pth files count. -S leaves out this environment's own installation.
    code = (
        "import site, sys; site.addsitedir(sys.argv[1]); from importlib.util import find_spec; "
        "print(find_spec('longspan').origin, find_spec('orchestrator').origin)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(tmp_path / "site")],
        cwd=clone.parent, capture_output=True, text=True, env={},
    )  # fmt: skip
    expected = clone if how == "build_editable" else tmp_path / "site"
    assert done.stdout.split() == [f"{expected}/longspan/__init__.py", f"{expected}/orchestrator/__init__.py"], done
