"""The command ``longspan``: its help fits a screen, its mistakes are one line, and it ends as other programs do."""

import os
import subprocess
import sys

import pytest

from longspan.__main__ import main
from longspan.commands import COMMANDS
from tests.support.commands import ROOT

LONGSPAN = [sys.executable, "-m", "longspan"]


def printed(arguments, capsys):
    try:
        status = main(arguments)
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["sweep", "--help"], ["plan", "--help"]])
def test_help_fits_a_screen(arguments, capsys):
    status, help, _ = printed(arguments, capsys)
    lines = help.splitlines()
    assert status == 0 and len(lines) <= 40 and max(map(len, lines)) <= 80


def test_the_whole_help_has_the_default_that_holds(capsys):
    _, help, _ = printed(["sweep", "--help-all"], capsys)
    text = " ".join(help.split())
    assert "--batch INT ... Sequences in an optimiser step, over all workers of a trial. Default: 2." in text
    assert "--engine {auto,ddp,zero2,zero3}" in text and "\noptimisation\n" in help
    assert "Default: 64." in " ".join(printed(["plan", "convergence-llama2-7b", "--help-all"], capsys)[1].split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_describes_itself_by_its_own_name(name, capsys):
    status, help, _ = printed([name, "--help"], capsys)
    assert status == 0 and help.startswith(f"usage: longspan {name} ")


@pytest.mark.parametrize(
    ("arguments", "message", "absent"),
    [
        (["swep"], "did you mean sweep?", None),
        (["convergence"], "longspan sweep convergence", "did you mean"),
        (["--steps", "3"], "Known: sweep, plan", "did you mean"),
        (["plan", "plan"], "recipe 'plan' is unknown. Known: quickstart, convergence,", "did you mean"),
        (["sweep", "convergance"], "did you mean convergence?", None),
        (["--print-completion", "csh"], "expected one of bash", None),
        (["report", "none"], "sweep 'none' is unknown", None),
        (["cluster", "aws-p4e"], "did you mean aws-p4d?", None),
    ],
)  # fmt: skip
def test_a_wrong_name_is_one_line_with_a_suggestion_only_if_it_is_near(arguments, message, absent, capsys):
    status, out, err = printed(arguments, capsys)
    assert status == 2 and not out and message in " ".join(err.split())
    assert absent is None or absent not in err


@pytest.mark.parametrize(
    "arguments", [["sweep", "--help-all"], ["recipes"], ["cluster", "aws-p4d"], ["status", "--help"]]
)
def test_a_reader_that_has_gone_is_no_traceback(arguments):
    """As ``longspan ... | head -1``, whose reader is gone before the first line at the latest here."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*LONGSPAN, *arguments], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_completion_knows_the_commands_and_their_flags():
    """Bash itself asks the script for what follows ``longspan sweep --context-l``."""
    script = subprocess.run([*LONGSPAN, "--print-completion", "bash"], cwd=ROOT, capture_output=True, text=True).stdout
    ask = 'COMP_WORDS=("${@}"); COMP_CWORD=$(($# - 1)); _tyro_longspan; printf "%s\\n" "${COMPREPLY[@]}"'

    def completed(*words):
        return subprocess.run(
            ["bash", "-c", f"{script}\n{ask}", "bash", "longspan", *words], capture_output=True, text=True
        ).stdout.split()

    assert completed("swe") == ["sweep"]
    assert completed("sweep", "--context-l") == ["--context-lengths"]
    assert all(word.startswith("--s") for word in completed("sweep", "--s"))
    assert completed("sweep", "--engine", "ze") == ["zero2", "zero3"]


def test_doctor_says_what_to_do(tmp_path, monkeypatch, capsys):
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    status, out, _ = printed(["doctor", "--storage", str(tmp_path / "runs")], capsys)
    assert status == 1 and f"chmod 600 {token}" in out and "secret" not in out
    assert f"ok  storage: {tmp_path / 'runs'} is writable" in out and "ok  MLflow: sqlite" in out
    (tmp_path / "file").write_text("")
    _, out, _ = printed(["doctor", "--storage", str(tmp_path / "file")], capsys)
    assert "FIX storage" in out and "choose another with --storage FOLDER" in out
