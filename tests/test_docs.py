"""What the pages refer to exists: files, folders, modules; and their tables fit a screen."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md")})
TOP = "orchestrator|workloads|clusters|dashboards|benchmarks|tests|examples|docs"
# Files that a page tells its reader to make.
TO_BE_MADE = {
    "clusters/mine.yaml",
    "clusters/gcp-a2.yaml",
    "workloads/attention/patterns/sink.py",
    "workloads/evaluation/tasks/colour.py",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_paths_and_modules_exist(page):
    text = page.read_text()
    links = [page.parent / link for link in re.findall(r"\]\(([^)#:]+)[^)]*\)", text) if not link.startswith("http")]
    paths = re.findall(rf"(?<![\w/.-])(?:{TOP})/[\w./-]*\w", text)
    modules = re.findall(rf"python -m ((?:{TOP})[\w.]*\w)", text)
    missing = [str(link) for link in links if not link.exists()]
    missing += [path for path in paths if path not in TO_BE_MADE and not exists(ROOT / path)]
    missing += [module for module in modules if not exists(ROOT / module.replace(".", "/"))]
    assert not missing


def exists(path: Path) -> bool:
    return path.exists() or path.with_name(path.name + ".py").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_have_at_most_eight_columns(page):
    rows = [line for line in page.read_text().splitlines() if line.lstrip().startswith("|")]
    assert not [row for row in rows if len(re.findall(r"(?<!\\)\|", row)) - 1 > 8]
