"""Whether the head of a Ray cluster takes this process in: asked before ``ray.init``, which waits for minutes.

A child process asks. Ray's client waits in C++, where neither a deadline nor Ctrl-C reaches it; a child can be ended.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

from workloads.errors import InputError

# Seconds for all answers of the head together, after Ray is imported.
DEADLINE_S = 10
START_ONE = "start it (ray start --head), correct the port (6379 unless --port was given)"
RUN_HERE = "leave out --address and unset RAY_ADDRESS to run on this machine"


def check_head(address: str, given: str) -> None:
    """Returns once the head of a Ray cluster has answered, and runs the same Ray and Python.

    Args:
        given: how a person gave the address, for the error.

    Raises:
        InputError: it cannot be joined; the error says why, and what to do.
    """
    scheme, separator, _ = address.partition("://")
    if separator:
        kind = "Ray Client's" if scheme == "ray" else "the dashboard's, to submit jobs"
        raise InputError(
            f"{given}: that address is {kind}; expected HOST:PORT of a cluster's head, such as 10.0.0.1:6379, or "
            "submit the sweep: ray job submit -- python -m orchestrator.sweep"
        )
    command = [sys.executable, "-m", __name__, address, str(DEADLINE_S)]
    child = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    answers: dict[str, Any] = {}
    for line in child.stdout.splitlines():
        if line.startswith("{"):
            answers |= json.loads(line)
    if problem := _describe(answers, child.returncode, child.stderr):
        raise InputError(f"{given}: {problem}, or {RUN_HERE}")


def _describe(answers: dict[str, Any], status: int, stderr: str) -> str | None:
    """What keeps this process from joining, with its remedy; None if nothing does."""
    there = answers.get("address", "that address")
    message = answers.get("message", "")
    match answers.get("answer"):
        case "joins":
            return None
        case "invalid":
            return f"{message}; expected HOST:PORT, or auto (a cluster on this machine)"
        case "none":
            return "no Ray cluster runs on this machine; start one (ray start --head)"
        case "unknown host":
            return f"no machine of that name is known here ({message}); correct the name"
        case "refused":
            return f"nothing listens at {there}; {START_ONE}"
        case "unreachable":
            return f"{there} cannot be reached ({message}); check the address and the network"
        case "token missing":
            return (
                f"the cluster at {there} wants a token, and this process sends none; set RAY_AUTH_MODE=token, and put "
                "the cluster's token into ~/.ray/auth_token or a file that RAY_AUTH_TOKEN_PATH names"
            )
        case "token refused":
            return (
                f"the cluster at {there} refuses the token ({message}); put the cluster's own into ~/.ray/auth_token, "
                "or into the file that RAY_AUTH_TOKEN_PATH names"
            )
        case "other version":
            return (
                f"the cluster at {there} runs Ray {answers['ray']} on Python {answers['python']}, and this is Ray "
                f"{answers['own_ray']} on Python {answers['own_python']}; install the same versions here, or submit "
                "the sweep to it (ray job submit)"
            )
        case "not Ray":
            return f"what listens at {there} is no head of a Ray cluster ({message}); {START_ONE}"
    if status != -signal.SIGALRM:
        lines = stderr.strip().splitlines() or [f"status {status}"]
        return f"Ray could not ask it ({lines[-1] if status > 0 else lines[0]})"  # a traceback, or that of an abort
    if answers.get("connected"):
        return f"what listens at {there} does not answer as a Ray head within {DEADLINE_S} s; {START_ONE}"
    return f"{there} does not answer within {DEADLINE_S} s; check the address, firewalls and whether the machine is up"


def _ask(address: str, deadline_s: int) -> None:
    """In the child: prints what is known of the head as JSON lines, and is killed when the deadline has passed."""
    from orchestrator.ray_internals import probe_head

    signal.alarm(deadline_s)
    for known in probe_head(address):
        print(json.dumps(known), flush=True)


if __name__ == "__main__":
    _ask(sys.argv[1], int(sys.argv[2]))
