"""Where a result comes from: what git, the machine and the price list say, and what must not be said."""

import subprocess
from importlib import metadata
from pathlib import Path

import psutil
import pytest
import torch

from orchestrator.records import provenance
from orchestrator.records.provenance import describe_machine, git_commit, git_diff, own_prices
from orchestrator.run_options import RunOptions
from workloads.errors import InputError


def git(folder, *arguments):
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A git checkout that looks like longspan's, inside a larger one."""
    source = tmp_path / "house" / "longspan"
    (source / "orchestrator" / "records").mkdir(parents=True)
    (source / "orchestrator" / "records" / "provenance.py").write_text("line = 1\n")
    (source / "clusters.yaml").write_text("key: FILL_IN\n")
    (source / ".env").write_text("A=1\n")
    (source / "my_token.txt").write_text("nothing\n")
    (source.parent / "private.txt").write_text("somebody else's\n")
    git(tmp_path, "init", "house")
    git(source.parent, "add", "-f", ".")
    git(source.parent, "commit", "-m", "first")
    return source


def test_a_clean_checkout_has_a_commit_and_a_changed_one_says_so(checkout):
    commit = git(checkout, "rev-parse", "--short=12", "HEAD")
    assert git_commit(checkout) == commit
    (checkout.parent / "private.txt").write_text("changed")  # not longspan's
    (checkout / "untracked.py").write_text("x")
    assert git_commit(checkout) == commit
    (checkout / "orchestrator" / "records" / "provenance.py").write_text("line = 2\n")
    assert git_commit(checkout) == f"{commit}-dirty"


def test_an_installation_inside_somebody_elses_checkout_has_no_commit(checkout):
    installed = checkout.parent / "site-packages"
    (installed / "orchestrator" / "records").mkdir(parents=True)
    (installed / "orchestrator" / "records" / "provenance.py").write_text("line = 1\n")
    assert git_commit(installed) is None
    assert git_commit(checkout.parent / "nowhere") is None


def test_the_diff_is_of_tracked_files_and_applies(checkout):
    (checkout / "orchestrator" / "records" / "provenance.py").write_text("line = 2\nmore = 3\n")
    diff = git_diff(checkout)
    assert git(checkout, "rev-parse", "--short=12", "HEAD") + "." in diff.splitlines()[0]
    git(checkout, "checkout", "--", ".")
    (checkout / "kept.diff").write_text(diff)
    git(checkout, "apply", "--directory=longspan", "kept.diff")
    assert (checkout / "orchestrator" / "records" / "provenance.py").read_text() == "line = 2\nmore = 3\n"


SECRETS = {
    "hf_" + "a1B2" * 8: "token: hf_" + "a1B2" * 8,
    "AKIA" + "Q7" * 8: "id = AKIA" + "Q7" * 8,
    "correct-horse": 'DB_PASSWORD = "correct-horse"',
    "s3cr3t-value": "export MY_API_KEY=s3cr3t-value",
    "hunter2hunter": "uri: postgres://me:hunter2hunter@db.example.org/mlflow",
    "abcdef123456": '"client_secret": "abcdef123456"',
}


def test_no_secret_is_in_the_diff(checkout):
    (checkout / "clusters.yaml").write_text("\n".join(SECRETS.values()) + "\nmax_workers: 7\n")
    for name in (".env", "my_token.txt"):
        (checkout / name).write_text("in-a-file-of-secrets\n")
    (checkout / "untracked.txt").write_text("in-an-untracked-file\n")
    (checkout.parent / "private.txt").write_text("in-another-folder\n")
    diff = git_diff(checkout)
    for secret in (*SECRETS, "in-a-file-of-secrets", "in-an-untracked-file", "in-another-folder"):
        assert secret not in diff
    assert "+max_workers: 7" in diff and diff.count("[left out]") == len(SECRETS)
    heading = diff.split("diff --git")[0]
    assert "untracked files (1 here)" in heading and ".env" in heading


def test_ordinary_code_about_tokens_is_shown(checkout):
    lines = ["tokens = batch * context_length", "num_tokens=self.num_tokens", "token_ids: list[int] = []"]
    (checkout / "orchestrator" / "tokenizer.py").write_text("\n".join(lines))
    git(checkout, "add", "orchestrator")
    diff = git_diff(checkout)
    assert all(line in diff for line in lines)


def test_a_huge_diff_is_cut_and_says_so(checkout, monkeypatch):
    monkeypatch.setattr(provenance, "MOST_DIFF_BYTES", 10_000)
    (checkout / "orchestrator" / "records" / "provenance.py").write_text("ä" * 50_000)
    diff = git_diff(checkout)
    assert len(diff.encode()) < 11_000
    assert "bytes more are left out" in diff


def test_the_machine_without_gpus_is_described_in_threads_of_cpus():
    machine = describe_machine(torch.device("cpu"), 3)
    assert machine["devices"] == 3 * torch.get_num_threads() and machine["device"] == "cpu"
    assert machine["memory_gib"] == pytest.approx(psutil.virtual_memory().total / 2**30, abs=0.1)
    assert machine["cpus"] == psutil.cpu_count()
    assert machine["packages"]["torch"] == metadata.version("torch") and machine["packages"]["ray"]
    assert machine["usd_per_device_hour"] is None
    priced = describe_machine(torch.device("cpu"), 1, {"any": 0.05, "p4d.24xlarge": 9})
    assert (priced["usd_per_device_hour"], priced["price_source"]) == (0.05, "given by the user")


def test_the_users_prices_from_flags(tmp_path):
    (tmp_path / "prices.json").write_text('{"p4d.24xlarge": 11.5}')
    assert own_prices(RunOptions()) == {}
    both = RunOptions(prices=str(tmp_path / "prices.json"), price_per_hour=2.5)
    assert own_prices(both) == {"p4d.24xlarge": 11.5, "any": 2.5}
    with pytest.raises(InputError, match=r"--prices: .*nothing.toml cannot be read"):
        own_prices(RunOptions(prices=str(tmp_path / "nothing.toml")))
    with pytest.raises(InputError, match="price_per_hour is -1"):
        RunOptions(price_per_hour=-1)
