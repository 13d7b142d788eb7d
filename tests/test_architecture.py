"""Rules of the repository layout: which package may import which, and what no file may do."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("longspan", "orchestrator", "workloads", "clusters", "dashboards")
# What each package may not import: leaves import no other package, and workloads is a plain PyTorch library.
FORBIDDEN = {
    "workloads": {*PACKAGES, "ray", "mlflow"} - {"workloads"},
    "clusters": {*PACKAGES} - {"clusters"},
    "dashboards": {*PACKAGES} - {"dashboards"},
    "orchestrator": {"longspan"},
}
# The levels of orchestrator: none imports from one further down this list. What stands in no level is a command.
LEVELS = (
    {
        *(
            "terminal",
            "process",
            "gpus",
            "run_options",
            "spec",
            "expansion",
            "axes",
            "learning_rates",
            "trial_spec",
            "variants",
        ),
        *("recipes", "field_help", "flags", "sweep_help", "sweep_file", "sweep_schema", "yaml_loader", "cli"),
        "ray_internals",
    },
    {"records"},
    {"planning"},
    {"compare"},
    {"reporting"},
    {"running"},
)


def imported_names(path: Path) -> Iterator[tuple[str, str | None]]:
    """(module, name) of each import in a file, in functions and under TYPE_CHECKING too; no name for ``import a.b``."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*parents, *filter(None, [node.module])])
            yield from ((module, alias.name) for alias in node.names)


def imported_files(path: Path) -> set[Path]:
    """The files of this repository that a file imports.

    ``from package import name`` imports the submodule ``name`` if there is one, else the package's ``__init__``.
    """
    files = set()
    for module, name in imported_names(path):
        folder = ROOT.joinpath(*module.split("."))
        candidates = [folder.with_suffix(".py"), folder / "__init__.py"]
        if name:
            candidates = [folder / f"{name}.py", folder / name / "__init__.py", *candidates]
        files |= set(next(([found] for found in candidates if found.is_file()), []))
    return files


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def cycles(graph: dict[Path, set[Path]]) -> list[list[str]]:
    """Strongly connected components of more than one file (Tarjan's algorithm), and files that import themselves."""
    index: dict[Path, int] = {}
    low: dict[Path, int] = {}
    stack: list[Path] = []
    found = []

    def visit(node: Path) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = [stack.pop()]
            while component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1 or node in graph[node]:
                found.append(sorted(str(path.relative_to(ROOT)) for path in component))

    for node in graph:
        if node not in index:
            visit(node)
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_package_imports_one_above_it(package):
    for path in sources(package):
        imported = {module.partition(".")[0] for module, _ in imported_names(path)}
        assert not imported & FORBIDDEN[package], path


def test_no_import_cycle():
    files = sources(*PACKAGES, "benchmarks")
    graph = {path: imported_files(path) & set(files) for path in files}
    assert cycles(graph) == []


def test_orchestrators_packages_import_downwards_only():
    def level(path: Path) -> int:
        name = path.relative_to(ROOT / "orchestrator").parts[0].removesuffix(".py")
        return next((number for number, names in enumerate(LEVELS) if name in names), len(LEVELS))

    files = set(sources("orchestrator")) - {ROOT / "orchestrator" / "__init__.py"}
    upwards = [
        f"{path.relative_to(ROOT)} imports {imported.relative_to(ROOT)}"
        for path in sorted(files)
        for imported in sorted(imported_files(path) & files)
        if level(imported) > level(path)
    ]
    assert upwards == []


def test_no_test_module_imports_another():
    """Shared code belongs into tests/support or a fixture of a conftest."""
    for path in sources("tests"):
        for imported in imported_files(path):
            assert not imported.name.startswith("test_") and imported.name != "conftest.py", (path, imported)


def test_commands_start_without_torch():
    """What every command pays before it does anything."""
    heavy = "{'torch', 'transformers', 'peft', 'mlflow', 'datasets', 'matplotlib'}"
    code = f"import sys, longspan.__main__, orchestrator.sweep; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_no_pickle_is_loaded():
    for path in sources(*PACKAGES):
        text = path.read_text()
        assert not re.search(r"torch\.load\((?!.*weights_only=True)|pickle\.loads?\(", text), path
        assert "trust_remote_code=True" not in text, path


def test_ray_does_not_start_in_a_test_without_its_marker():
    """tests/conftest.py sees to it, in commands too."""
    code = "import ray; ray.init(num_cpus=1, include_dashboard=False)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and "needs-the-marker-ray" in done.stderr
