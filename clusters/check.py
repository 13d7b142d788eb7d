"""Check a cluster file before it costs money: ``python -m clusters.check clusters/aws-p4d.yaml``.

Ray's own schema check runs first. The rules below, one function each, find what Ray accepts but is wrong for a sweep: a
spot head, an open job server, an image without an exact version, numbers that disagree. No cloud is contacted: whether
an id exists, a quota suffices or a zone has capacity is not checked.

Exit status: 0 no problems; 1 problems, one line each; 2 the file could not be read.
"""

import argparse
import copy
import dataclasses
import difflib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import yaml

# Private: Ray has no public function for the check of a cluster file that `ray up` runs.
from ray.autoscaler._private.util import prepare_config, validate_config

Config = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """One problem in a cluster file, and its fix.

    Args:
        where: the dotted path of the field.
        fill_in: a value that only the user knows: normal in a template, an error at launch.
    """

    where: str
    found: object
    expected: object
    fix: str
    fill_in: bool = False

    def __str__(self) -> str:
        return f"{self.where}: found {self.found}, expected {self.expected}. Fix: {self.fix}."


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What an EC2 instance type has; ``efa``: its network cards with EFA."""

    vcpus: int
    memory_gib: int
    gpus: int = 0
    efa: int = 0


# AWS's pages on instance types and on EFA.
MACHINES = {
    "m6i.2xlarge": Machine(vcpus=8, memory_gib=32),
    "m6i.4xlarge": Machine(vcpus=16, memory_gib=64),
    "p4d.24xlarge": Machine(vcpus=96, memory_gib=1152, gpus=8, efa=4),
    "p4de.24xlarge": Machine(vcpus=96, memory_gib=1152, gpus=8, efa=4),
    "p5.48xlarge": Machine(vcpus=192, memory_gib=2048, gpus=8, efa=32),
}

# EC2's RunInstances parameters that a node_config may set, and Ray's SubnetIds. Ray's schema takes any name here.
NODE_CONFIG_KEYS = """
    BlockDeviceMappings CapacityReservationSpecification CpuOptions CreditSpecification DisableApiStop
    DisableApiTermination EbsOptimized EnclaveOptions HibernationOptions IamInstanceProfile ImageId
    InstanceInitiatedShutdownBehavior InstanceMarketOptions InstanceType KeyName LaunchTemplate LicenseSpecifications
    MaintenanceOptions MetadataOptions Monitoring NetworkInterfaces NetworkPerformanceOptions Placement
    PrivateDnsNameOptions SecurityGroupIds SubnetId SubnetIds TagSpecifications UserData
""".split()

MARKETS = ("spot", "capacity-block")
PLACEHOLDER = "FILL_IN"


def _placeholders(config: Config) -> Iterator[Problem]:
    seen = set()
    for path, value in _leaves(config):
        if PLACEHOLDER in value and value not in seen:  # YAML aliases repeat a value.
            seen.add(value)
            yield Problem(path, f"'{value[value.index(PLACEHOLDER) :]}'", "your value", "fill it in", fill_in=True)


def _local_files(config: Config) -> Iterator[Problem]:
    """Local files that ``ray up`` copies. Ray notices a missing one only when the head is running and paid for."""
    sources = {f"file_mounts.{target}": source for target, source in config["file_mounts"].items()}
    if key := config["auth"].get("ssh_private_key"):
        sources["auth.ssh_private_key"] = key
    for where, source in sources.items():
        path = Path(source).expanduser()
        if not path.exists():
            yield Problem(where, f"no {source} here", "a local path", "create it (docs/aws.md)", fill_in=True)
        for secret in path.glob("*token*"):
            if (mode := secret.stat().st_mode & 0o777) & 0o077:
                yield Problem(where, f"mode {mode:o} on {secret}", "mode 600", f"chmod 600 {secret}")


def _secrets(config: Config) -> Iterator[Problem]:
    pattern = re.compile(r"\b(\w*(?:TOKEN|SECRET|PASSWORD|ACCESS_KEY|API_KEY))=\S", re.IGNORECASE)
    for path, value in _leaves(config):
        if match := pattern.search(f"{path.rpartition('.')[2]}={value}"):
            fix = "put it in a file that file_mounts distributes, and name that file's path"
            yield Problem(path, f"a value for {match[1]}", "no secret in a cluster file", fix)


def _node_counts(config: Config) -> Iterator[Problem]:
    total, workers = config["max_workers"], _workers(config)
    for name, node in workers.items():
        where, low, high = f"available_node_types.{name}", node["min_workers"], node["max_workers"]
        if low > high:
            yield Problem(where, f"min_workers {low}", f"at most its max_workers {high}", "make the two agree")
        if high > total:
            yield Problem(where, f"max_workers {high}", f"at most the cluster's {total}", "make the two agree")
    if total > (reachable := sum(node["max_workers"] for node in workers.values())):
        yield Problem("max_workers", total, f"at most {reachable}, the worker types' sum", "make the two agree")


def _head_does_not_train(config: Config) -> Iterator[Problem]:
    head, where = config["available_node_types"][config["head_node_type"]], f"head type {config['head_node_type']}"
    if (cpus := head["resources"].get("CPU", "not set, which means all of the machine's")) != 0:
        yield Problem(where, f"CPU {cpus}", "CPU 0, to keep trials off the head", "set resources: {CPU: 0}")
    if gpus := head["resources"].get("GPU", 0):
        yield Problem(where, f"GPU {gpus}", "no GPU", "remove it; workers have the GPUs")
    if head["max_workers"]:
        yield Problem(where, f"max_workers {head['max_workers']}", 0, "give the workers another node type")


def _images(config: Config) -> Iterator[Problem]:
    docker = config["docker"]
    found = {f"docker.{key}": docker[key] for key in ("image", "head_image", "worker_image") if key in docker}
    for name, node in config["available_node_types"].items():
        if image := node.get("docker", {}).get("worker_image"):
            found[f"available_node_types.{name}.docker.worker_image"] = image
    expected = f"a tag with the exact version, as rayproject/ray:{ray.__version__}-py312-cu130, or a digest"
    if not found:
        yield Problem("docker", "no image", expected, "set head_image and worker_image")
    for where, image in found.items():
        tag = image.rpartition("/")[2].partition(":")[2]
        if "@sha256:" in image:
            continue
        if not re.search(r"\d+\.\d+\.\d+", tag):
            yield Problem(where, image, expected, "pin the version in the tag")
        elif image.startswith("rayproject/") and not tag.startswith(f"{ray.__version__}-py"):
            yield Problem(where, image, f"a tag {ray.__version__}-py..., as the Ray installed here", "use that tag")


def _authentication(config: Config) -> Iterator[Problem]:
    starts = {key: config[key] for key in ("head_start_ray_commands", "worker_start_ray_commands")}
    for key, commands in starts.items():
        ray_starts = [command for command in commands if "ray start" in command]
        if not ray_starts:
            yield Problem(key, "no `ray start`", "one", "add it")
        for command in ray_starts:
            if not re.search(r"(?s)\bRAY_AUTH_MODE=token\b.*\bray start\b", command):
                fix = "write RAY_AUTH_MODE=token ray start ..., or anyone who reaches the ports can run code"
                yield Problem(key, "`ray start` without it", "RAY_AUTH_MODE=token", fix)
            host = re.search(r"--dashboard-host[= ](\S+)", command)
            if host and host[1] not in ("127.0.0.1", "localhost"):
                yield Problem(key, f"dashboard on {host[1]}", "127.0.0.1", "bind it there and reach it through ssh")
    commands = " ".join(command for each in starts.values() for command in each)
    for name in config["available_node_types"]:
        match = re.search(r"\bRAY_AUTH_TOKEN_PATH=(\S+)", f"{_run_options(config, name)} {commands}")
        token = match[1] if match else "~/.ray/auth_token"
        if not any(token.startswith(f"{target.rstrip('/')}/") for target in config["file_mounts"]):
            where, expected = f"available_node_types.{name}", "a path below a file_mounts target, on every node"
            yield Problem(where, f"token {token}", expected, "mount the token's folder there")


def _market(config: Config) -> Iterator[Problem]:
    for name, node in config["available_node_types"].items():
        where = f"available_node_types.{name}.node_config"
        for key in node["node_config"].keys() - set(NODE_CONFIG_KEYS):
            close = difflib.get_close_matches(key, NODE_CONFIG_KEYS, n=1)
            fix = f"write {close[0]}" if close else "remove it"
            yield Problem(where, key, "a parameter of EC2's RunInstances", fix)
        options = node["node_config"].get("InstanceMarketOptions")
        if options and name == config["head_node_type"]:
            fix = "remove InstanceMarketOptions: without its head the cluster is lost"
            yield Problem(where, f"{options.get('MarketType')} head", "a head on demand", fix)
        if options and (options.keys() - {"MarketType", "SpotOptions"} or options.get("MarketType") not in MARKETS):
            expected = f"MarketType: {' or '.join(MARKETS)}"
            yield Problem(f"{where}.InstanceMarketOptions", options, expected, "correct it, or remove the whole field")


def _machines(config: Config) -> Iterator[Problem]:
    for name, node in config["available_node_types"].items():
        where, kind = f"available_node_types.{name}", node["node_config"].get("InstanceType")
        image = str(node["node_config"].get("ImageId"))
        if PLACEHOLDER not in image and not re.fullmatch(r"ami-[0-9a-f]{8,17}", image):
            fix = "name an AMI by id; Ray's default has CUDA 11 on Ubuntu 18.04"
            yield Problem(f"{where}.node_config.ImageId", image, "ami-...", fix)
        if (machine := MACHINES.get(kind)) is None:
            fix = "correct it, or add it to MACHINES in clusters/check.py"
            yield Problem(f"{where}.node_config.InstanceType", kind, f"one of {', '.join(MACHINES)}", fix)
            continue
        has = {"CPU": machine.vcpus, "GPU": machine.gpus}
        if (memory := node["resources"].get("memory", 0)) > machine.memory_gib * 2**30:
            expected = f"at most {machine.memory_gib} GiB, in bytes"
            yield Problem(f"{where}.resources", f"memory {memory}", expected, "lower it, or leave it to Ray")
        for resource, count in node["resources"].items():
            if resource in has and count != has[resource] and name != config["head_node_type"]:
                expected = f"{has[resource]}, as a {kind} has"
                yield Problem(f"{where}.resources", f"{resource} {count}", expected, f"set {resource}: {has[resource]}")
        yield from _efa(config, name, machine)


def _efa(config: Config, name: str, machine: Machine) -> Iterator[Problem]:
    node_config, where = config["available_node_types"][name]["node_config"], f"available_node_types.{name}.node_config"
    interfaces = node_config.get("NetworkInterfaces", [])
    efa = [each for each in interfaces if each.get("InterfaceType") in ("efa", "efa-only")]
    cards = {each.get("NetworkCardIndex", 0) for each in efa}
    if not len(efa) == len(cards) == machine.efa:
        found = f"{len(efa)} EFA interfaces on {len(cards)} network cards"
        yield Problem(f"{where}.NetworkInterfaces", found, f"{machine.efa}, one a card", "give each card one")
    if not efa:
        return
    if len({each.get("SubnetId") for each in interfaces}) != 1:
        yield Problem(f"{where}.NetworkInterfaces", "several subnets", "one", "EFA stays in its zone: use one subnet")
    zone = config["provider"].get("availability_zone")
    if not zone or "," in zone:
        yield Problem("provider.availability_zone", zone, "one zone", "EFA stays in its zone: name one")
    if not node_config.get("Placement", {}).get("GroupName"):
        yield Problem(f"{where}.Placement", "no GroupName", "a cluster placement group", "name it")
    for option in ("--device=/dev/infiniband", "--ulimit memlock=-1", "--shm-size="):
        if option not in _run_options(config, name):
            yield Problem("docker.worker_run_options", f"no {option}", f"{option} for EFA and NCCL", "add it")


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Every scalar below ``value``, with its dotted path."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _leaves(child, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _leaves(child, f"{path}[{index}]")
    else:
        yield path, str(value)


def _workers(config: Config) -> dict[str, Config]:
    return {name: node for name, node in config["available_node_types"].items() if name != config["head_node_type"]}


def _run_options(config: Config, name: str) -> str:
    """The ``docker run`` options of a node type, joined as Ray does."""
    key = "head_run_options" if name == config["head_node_type"] else "worker_run_options"
    docker = config["docker"] | config["available_node_types"][name].get("docker", {})
    return " ".join([*docker.get("run_options", []), *docker.get(key, [])])


RULES = (_local_files, _node_counts, _head_does_not_train, _images, _authentication)
AWS_RULES = (_market, _machines)


def check(config: Config) -> list[Problem]:
    """All problems of a loaded cluster file, placeholders first."""
    problems = [*_placeholders(config), *_secrets(config)]
    try:
        prepared = prepare_config(copy.deepcopy(config))
        validate_config(prepared)
    except Exception as error:  # Ray raises many types; each means that `ray up` refuses the file.
        message = f"{type(error).__name__}: {getattr(error, 'message', error)}"
        where = "/".join(map(str, getattr(error, "absolute_path", ()))) or "the file"
        return [*problems, Problem(where, message, f"what Ray {ray.__version__} accepts", "correct it")]
    rules = RULES + (AWS_RULES if prepared["provider"]["type"] == "aws" else ())
    return [*problems, *(problem for rule in rules for problem in rule(prepared))]


def print_problems(file: Path, allow_placeholders: bool) -> int:
    """Prints the problems of a cluster file; returns the exit status: 1 if there are any, 2 if it cannot be read."""
    try:
        config = yaml.safe_load(file.read_text("utf-8"))
    except Exception as error:  # of the file system, the encoding, or YAML
        print(f"{file}: {error}".encode("unicode_escape").decode(), file=sys.stderr)
        return 2
    problems = [each for each in check(config) if not (each.fill_in and allow_placeholders)]
    for problem in problems:
        print(str(problem).encode("unicode_escape").decode())  # it quotes the file
    print(f"{file}: {len(problems)} problems, of which {sum(each.fill_in for each in problems)} to fill in.")
    return 1 if problems else 0


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m clusters.check", description="Check a Ray cluster file, offline.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--allow-placeholders", action="store_true", help="accept values still to be filled in")
    arguments = parser.parse_args()
    sys.exit(print_problems(arguments.file, arguments.allow_placeholders))


if __name__ == "__main__":
    main()
