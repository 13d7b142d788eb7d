"""The AWS cluster file passes Ray's check and ours, and each of our rules catches a file broken on purpose."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from clusters.check import MACHINES, check

REPOSITORY = Path(__file__).parents[2]
SHIPPED = REPOSITORY / "clusters" / "aws-p4d.yaml"

Config = dict[str, Any]

# A name for each blank of the template, in its order, and what a user might write there.
VALUES = {
    "availability_zone": "us-west-2b",
    "head_subnet": "subnet-0123456789abcdef0",
    "worker_subnet": "subnet-0123456789abcdef1",
    "security_group": "sg-0123456789abcdef0",
    "key_pair": "longspan",
    "image": "ami-0123456789abcdef0",
    "mount_storage": "fs-0123456789abcdef0",  # Within a command.
}


@pytest.fixture
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped file with every blank filled in, in a home that has the files it copies to the nodes."""
    text = SHIPPED.read_text().replace("FILL_IN_FILE_SYSTEM_ID", "fs-0123456789abcdef0")
    for key, value in VALUES.items():
        text = re.sub(rf"(?m)^(  {key}: &\w+) FILL_IN.*$", rf"\1 {value}", text)
    for folder in (".longspan", ".ssh", "build/cluster"):
        (tmp_path / folder).mkdir(parents=True)
    for name in (".longspan/ray_token", ".ssh/longspan.pem"):
        (tmp_path / name).touch(mode=0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cluster.yaml").write_text(text)
    return tmp_path / "cluster.yaml"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clusters.check", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_passes_rays_own_check() -> None:
    validate_config(prepare_config(yaml.safe_load(SHIPPED.read_text())))


def test_template_passes_with_placeholders_allowed() -> None:
    result = run("--allow-placeholders", SHIPPED)
    assert result.returncode == 0, result.stdout


def test_template_is_refused_with_the_list_of_what_to_fill_in() -> None:
    result = run(SHIPPED)
    assert result.returncode == 1
    for key in VALUES:
        assert sum(line.startswith(f"metadata.{key}: found 'FILL_IN") for line in result.stdout.splitlines()) == 1


def test_blanks_are_all_in_one_place() -> None:
    config = yaml.safe_load(SHIPPED.read_text())
    reported = [problem.where for problem in check(config) if "FILL_IN" in str(problem)]
    assert reported == [f"metadata.{key}" for key in VALUES]


def test_filled_in_file_passes(filled: Path) -> None:
    assert check(yaml.safe_load(filled.read_text())) == []


def test_unreadable_file_is_status_2(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("a: [")
    assert run(tmp_path / "broken.yaml").returncode == 2
    assert run(tmp_path / "none.yaml").returncode == 2


def head(config: Config) -> Config:
    return config["available_node_types"]["head"]


def p4d(config: Config) -> Config:
    return config["available_node_types"]["p4d"]


def interfaces(config: Config) -> list[Config]:
    return p4d(config)["node_config"]["NetworkInterfaces"]


def change(commands: list[str], old: str, new: str) -> None:
    commands[:] = [command.replace(old, new) for command in commands]


def without(options: list[str], start: str) -> None:
    options[:] = [option for option in options if not option.startswith(start)]


BROKEN: dict[str, tuple[Callable[[Config], Any], str]] = {
    "unknown key": (lambda c: c.update(max_wrokers=2), "max_wrokers"),
    "no head type": (lambda c: c.pop("head_node_type"), "head_node_type"),
    "spot head": (
        lambda c: head(c)["node_config"].update(InstanceMarketOptions={"MarketType": "spot"}),
        "found spot head, expected a head on demand",
    ),
    "head trains": (lambda c: head(c).update(resources={"CPU": 16}), "found CPU 16, expected CPU 0"),
    "head trains by default": (lambda c: head(c).update(resources={}), "expected CPU 0"),
    "head has GPUs": (lambda c: head(c)["resources"].update(GPU=8), "found GPU 8, expected no GPU"),
    "head type for workers": (lambda c: head(c).update(max_workers=1), "found max_workers 1, expected 0"),
    "latest": (lambda c: c["docker"].update(worker_image="rayproject/ray:latest-py312-cu130"), "the exact version"),
    "no tag": (lambda c: c["docker"].update(head_image="rayproject/ray"), "the exact version"),
    "no tag, registry with port": (lambda c: c["docker"].update(head_image="local:5000/ray"), "the exact version"),
    "other Ray": (lambda c: c["docker"].update(head_image="rayproject/ray:2.59.0-py312-cpu"), "the Ray installed here"),
    "no image": (lambda c: c.update(docker={}), "found no image"),
    "head without token mode": (
        lambda c: change(c["head_start_ray_commands"], "RAY_AUTH_MODE=token ", ""),
        "head_start_ray_commands: found `ray start` without it",
    ),
    "worker without token mode": (
        lambda c: change(c["worker_start_ray_commands"], "RAY_AUTH_MODE=token ", ""),
        "worker_start_ray_commands: found `ray start` without it",
    ),
    "token mode off": (
        lambda c: change(c["head_start_ray_commands"], "MODE=token", "MODE=disabled"),
        "head_start_ray_commands: found `ray start` without it",
    ),
    "never starts": (lambda c: c.update(worker_start_ray_commands=["ray stop"]), "found no `ray start`"),
    "open dashboard": (
        lambda c: change(c["head_start_ray_commands"], "127.0.0.1", "0.0.0.0"),
        "found dashboard on 0.0.0.0",
    ),
    "token not on the nodes": (lambda c: c["file_mounts"].pop("/home/ray/.longspan"), "below a file_mounts target"),
    "token at Ray's default": (
        lambda c: without(c["docker"]["run_options"], "-e RAY_AUTH_TOKEN_PATH"),
        "found token ~/.ray/auth_token",
    ),
    "token in the file": (
        lambda c: change(c["worker_start_ray_commands"], "RAY_AUTH_MODE", "RAY_AUTH_TOKEN=0a1b RAY_AUTH_MODE"),
        "found a value for RAY_AUTH_TOKEN",
    ),
    "keys in the file": (
        lambda c: c["provider"].update(aws_credentials={"aws_secret_access_key": "0a1b"}),
        "found a value for aws_secret_access_key",
    ),
    "min over max": (lambda c: p4d(c).update(min_workers=2, max_workers=1), "min_workers 2, expected at most its"),
    "type over cluster": (lambda c: p4d(c).update(max_workers=4), "max_workers 4, expected at most the cluster's 2"),
    "cluster over types": (lambda c: c.update(max_workers=4), "found 4, expected at most 2"),
    "seven GPUs": (lambda c: p4d(c)["resources"].update(GPU=7), "found GPU 7, expected 8"),
    "too many CPUs": (lambda c: p4d(c)["resources"].update(CPU=128), "found CPU 128, expected 96"),
    "too much memory": (lambda c: p4d(c)["resources"].update(memory=2 * 2**40), "expected at most 1152 GiB"),
    "machine that does not exist": (
        lambda c: p4d(c)["node_config"].update(InstanceType="p4d.48xlarge"),
        "found p4d.48xlarge, expected one of",
    ),
    "machine with more EFA": (
        lambda c: p4d(c)["node_config"].update(InstanceType="p5.48xlarge"),
        "found 4 EFA interfaces on 4 network cards, expected 32",
    ),
    "three EFA": (lambda c: interfaces(c).pop(), "found 3 EFA interfaces"),
    "no EFA": (lambda c: [each.pop("InterfaceType") for each in interfaces(c)], "found 0 EFA interfaces"),
    "two EFA on a card": (lambda c: interfaces(c)[3].update(NetworkCardIndex=2), "on 3 network cards"),
    "two subnets": (lambda c: interfaces(c)[3].update(SubnetId="subnet-0"), "found several subnets"),
    "two zones": (lambda c: c["provider"].update(availability_zone="us-west-2a,us-west-2b"), "expected one zone"),
    "no placement group": (lambda c: p4d(c)["node_config"].pop("Placement"), "expected a cluster placement group"),
    "no EFA device": (lambda c: without(c["docker"]["worker_run_options"], "--device"), "no --device=/dev/infiniband"),
    "memlock": (lambda c: without(c["docker"]["worker_run_options"], "--ulimit memlock"), "no --ulimit memlock=-1"),
    "shm": (lambda c: without(c["docker"]["worker_run_options"], "--shm-size"), "no --shm-size="),
    "market misspelt": (
        lambda c: p4d(c)["node_config"]["InstanceMarketOptions"].update(MarketType="Spot"),
        "expected MarketType: spot",
    ),
    "market options misspelt": (
        lambda c: p4d(c)["node_config"].update(
            InstanceMarketOption=p4d(c)["node_config"].pop("InstanceMarketOptions"),
        ),
        "Fix: write InstanceMarketOptions",
    ),
    "moving AMI": (lambda c: p4d(c)["node_config"].update(ImageId="latest_dlami"), "found latest_dlami, expected ami-"),
    "no AMI": (lambda c: head(c)["node_config"].pop("ImageId"), "found None, expected ami-"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_caught(name: str, filled: Path) -> None:
    break_it, message = BROKEN[name]
    config = yaml.safe_load(filled.read_text())
    break_it(config)
    problems = [str(problem) for problem in check(config)]
    assert any(message in problem for problem in problems), problems
    assert all("\n" not in problem for problem in problems)


def test_readable_token_is_caught(filled: Path) -> None:
    (filled.parent / ".longspan" / "ray_token").chmod(0o644)
    [problem] = check(yaml.safe_load(filled.read_text()))
    assert "mode 644" in str(problem) and "chmod 600" in str(problem)


def test_missing_local_files_are_to_fill_in(filled: Path) -> None:
    (filled.parent / ".ssh" / "longspan.pem").unlink()
    [problem] = check(yaml.safe_load(filled.read_text()))
    assert problem.fill_in and problem.where == "auth.ssh_private_key"


def test_secret_is_not_repeated_in_the_message(filled: Path) -> None:
    config = yaml.safe_load(filled.read_text())
    config["setup_commands"].append("export HF_TOKEN=hf_planted")
    [problem] = check(config)
    assert "HF_TOKEN" in str(problem) and "hf_planted" not in str(problem)


def test_machines_of_the_file_are_in_the_table() -> None:
    nodes = yaml.safe_load(SHIPPED.read_text())["available_node_types"].values()
    assert {node["node_config"]["InstanceType"] for node in nodes} <= MACHINES.keys()


def test_imports_no_other_package() -> None:
    code = "import sys, clusters.check; assert not {'workloads', 'orchestrator', 'dashboards'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
