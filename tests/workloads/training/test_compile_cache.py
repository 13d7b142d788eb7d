"""A process reuses what an earlier one compiled, but only from folders that no other user can write."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from workloads.files import cache
from workloads.files.cache import private_folder
from workloads.training import compile_cache
from workloads.training.compile_cache import VARIABLE, keep_compiled

ROOT = Path(__file__).parents[3]
# As decoder layers do, forwards and backwards, around the operator of grouped attention; without a kernel of its own,
# for which the C++ compiler would take ten seconds.
COMPILES = """
import json, os, sys
from pathlib import Path
import torch
from torch._dynamo.utils import counters
from workloads.attention.group_operator import grouped_attention
from workloads.training.compile_cache import keep_compiled
keep_compiled(Path(sys.argv[1]))

query, key, value = torch.arange(3 * 256.0).view(3, 1, 2, 16, 8).sin().requires_grad_().unbind()
compiled = torch.compile(lambda *heads: grouped_attention(*heads, 8, 1, 0.3, "cpu")[0], dynamic=False)
output = compiled(query, key, value)
gradients = torch.autograd.grad(output, (query, key, value), torch.ones_like(output))
count = {**counters["aot_autograd"], **counters["inductor"]}
count = {name: value for name, value in count.items() if name.startswith(("autograd_cache_", "fxgraph_cache_"))}
print(json.dumps([count, *(x.sum().item() for x in (output, *gradients)), os.environ["TORCHINDUCTOR_CACHE_DIR"]]))
"""


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    yield
    os.environ.pop(VARIABLE, None)


def chosen(shared):
    """The folder that a process would use."""
    os.environ.pop(VARIABLE, None)
    keep_compiled(shared)
    return Path(os.environ[VARIABLE])


def test_a_second_process_compiles_nothing(tmp_path):
    def process():
        done = subprocess.run(
            [sys.executable, "-c", COMPILES, str(tmp_path / "shared")],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return json.loads(done.stdout.splitlines()[-1])

    first, *result, folder = process()
    second, *again, same_folder = process()
    assert first == {"autograd_cache_miss": 1, "autograd_cache_saved": 1, "fxgraph_cache_miss": 2}
    assert second == {"autograd_cache_hit": 1, "fxgraph_cache_hit": 2}
    assert again == result
    assert folder == same_folder and Path(folder).is_relative_to(tmp_path / "shared")


def test_the_storage_of_the_sweep_comes_first_then_the_users_own_cache(tmp_path):
    assert chosen(tmp_path / "storage" / "compiled").is_relative_to(tmp_path / "storage" / "compiled")
    assert chosen(None).is_relative_to(tmp_path / "user" / "longspan" / "compiled")


@pytest.mark.parametrize(
    ("folder", "mode"),
    [("compiled", 0o770), ("compiled", 0o755), ("compiled", 0o707), ("", 0o775), ("", 0o777)],
)
def test_where_others_could_write_nothing_is_taken_from(folder, mode, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_is_of_this_user_alone", lambda group: False)
    storage = tmp_path / "storage"
    (storage / "compiled").mkdir(mode=0o700, parents=True)
    assert private_folder(storage / "compiled")
    (storage / folder).chmod(mode)
    assert chosen(storage / "compiled").is_relative_to(tmp_path / "user")


def test_a_group_of_the_user_alone_may_write_above_it(tmp_path, monkeypatch):
    """As with umask 002, where every user has a group of his own."""
    for folder in (tmp_path / "storage", tmp_path / "storage" / "cache"):
        folder.mkdir()
        folder.chmod(0o775)
    monkeypatch.setattr(cache, "_is_of_this_user_alone", lambda group: group == os.stat(tmp_path / "storage").st_gid)
    assert private_folder(tmp_path / "storage" / "cache" / "compiled")


def test_a_folder_of_somebody_else_is_not_private(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    assert private_folder(tmp_path / "theirs") is None


def test_a_link_that_others_can_turn_elsewhere_is_followed_once(tmp_path):
    """What is used is the folder that was looked at."""
    (tmp_path / "there").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert chosen(tmp_path / "link").is_relative_to((tmp_path / "there").resolve())


def test_with_no_private_folder_at_all_it_is_one_of_this_process_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    one, other = chosen(None), chosen(None)
    assert one.parent != other.parent and private_folder(one.parent)


def test_a_folder_that_the_user_has_named_stays(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "/of/the/user")
    keep_compiled(tmp_path)
    assert os.environ[VARIABLE] == "/of/the/user"


def test_other_code_of_an_operator_is_another_folder(tmp_path, monkeypatch):
    """Torch's caches hold an operator's backward pass as it was traced, under the operator's name.

    A changed one would not be traced again (seen on torch 2.13).
    """
    before = chosen(tmp_path)
    source = tmp_path / "source"
    shutil.copytree(compile_cache.SOURCE, source, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    monkeypatch.setattr(compile_cache, "SOURCE", source)
    assert chosen(tmp_path) == before  # the same code, elsewhere
    operator = source / "attention" / "group_operator.py"
    operator.write_text(operator.read_text().replace("return (None,) * 7", "return (None,) * 8"))
    assert chosen(tmp_path) != before
