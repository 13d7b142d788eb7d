"""A user's mistake is one clear error, before anything is trained, and the exit status is not 0."""

import importlib
import os
import shutil
import subprocess
import sys

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from orchestrator.plan import main as plan
from orchestrator.planning.preparation import check_sweep, identify
from orchestrator.records.storage import Storage
from orchestrator.run_options import RunOptions
from orchestrator.spec import SweepSpec
from orchestrator.sweep import main
from tests.support.commands import ROOT, SweepCommand
from workloads.errors import InputError
from workloads.models.source import ModelSource


def errors_of(arguments, capsys, command=main):
    status = command(arguments)
    captured = capsys.readouterr()
    return status, " ".join((captured.out + captured.err).split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "./nowhere"], "nowhere"),
        (["--data", "./da[/b]\x1b[2J"], r"./da[/b]\x1b[2J"),
        (["--data", "builtin:stdlb"], "builtin:stdlib"),
        (["--model", "./nowhere"], "model './nowhere' is no folder here"),
        (["--context-lengths", "1000", "--group-size", "300"], "an even number of tokens that divides"),
        (["--context-lengths", "1022"], "group size 0.25 at context length 1022"),
        (["--context-lengths", "1024", "1536"], "multiple of the context length 1024"),
        (["--train-layers", "the last"], "expected all, a number of last layers"),
        (["--quantization", "nf4"], "'nf4' with the method 'full'"),
        (["--batch", "3", "--workers", "2"], "does not divide among 2 workers"),
        (
            ["--storage", "s3://a:b@bucket/runs"],
            "credentials do not belong into a location",
        ),  # the later flag holds
        (["--storage", "nope://bucket/runs"], "Protocol not known: nope"),
        (["--storage", "file://machine/runs"], "file://machine/runs: expected file:///folder"),
        (["--storage", "file:///a%20b"], "expected file:///folder, or better the folder's path as it is"),
        (["--storage", "github://a/b"], "github://a/b: GithubFileSystem.__init__() missing"),
        (["--storage", "~nobody-of-this-name/runs"], "'~nobody-of-this-name/runs' is no path"),
    ],
)
def test_what_can_be_known_at_once(arguments, message, tmp_path, capsys):
    status, printed = errors_of(["--storage", str(tmp_path), *arguments], capsys)
    assert status == 2
    assert "error: " in printed and message in printed
    assert not list(tmp_path.glob("trials/*"))


@pytest.mark.parametrize("size", [201, 300])
def test_a_name_that_files_beside_its_folder_could_not_have(size, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--name", "x" * size])
    assert ended.value.code == 2 and f"--name of {size} bytes" in capsys.readouterr().err


def test_a_terminal_and_a_python_that_know_ascii_only(tmp_path):
    """What cannot be printed is escaped; a name that cannot be read is one error with the remedy."""
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}

    def plan(data):
        command = [sys.executable, "-m", "orchestrator.plan", "--data", data, "--storage", str(tmp_path / "runs")]
        done = subprocess.run(command, env=ascii_only, capture_output=True)
        return done.returncode, " ".join((done.stdout + done.stderr).decode().split())

    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "größe.txt").write_text("Größe\n", "utf-8")
    status, printed = plan(str(tmp_path / "d"))
    assert status == 0 and r"it begins: Gr\xf6\xdfe" in printed
    status, printed = plan(str(tmp_path / "d" / "größe.txt"))
    assert status == 2 and "reads names of files as ascii" in printed and "Set PYTHONUTF8=1" in printed


def test_a_storage_as_a_url_of_its_folder_is_that_folder(tmp_path):
    assert Storage.at(f"file://{tmp_path}/runs") == Storage.at(f"file://localhost{tmp_path}/runs")
    assert Storage.at(f"file://{tmp_path}/runs") == Storage.at(str(tmp_path / "runs"))


@pytest.mark.parametrize("command", ["status", "compare a b", "cancel a", "fetch"])
@pytest.mark.parametrize("storage", ["{tmp}/nowhere", "x" * 300, "memory://nothing-there"])
def test_commands_that_read_a_storage_where_there_is_none(command, storage, tmp_path, capsys):
    name, *words = command.split()
    module = importlib.import_module(f"orchestrator.{name}{'.__main__' if name == 'compare' else ''}")
    location = storage.format(tmp=tmp_path)
    words += [location, "a"] if name == "fetch" else ["--storage", location]
    assert module.main(words) == 2 and "error: " in capsys.readouterr().err


def test_an_unknown_recipe(capsys):
    status, printed = errors_of(["convergance"], capsys)
    assert status == 2 and "recipe 'convergance' is unknown; did you mean convergence?" in printed


def test_a_corpus_without_anything_in_it(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    status, printed = errors_of(["--data", str(tmp_path / "empty"), "--storage", str(tmp_path / "runs")], capsys)
    assert status == 2 and "empty" in printed and ".txt" in printed


def test_a_storage_folder_that_cannot_be_written(tmp_path, capsys):
    """The process file system stands for a read-only disk: root may write anywhere else."""
    status, printed = errors_of(["--storage", "/proc/longspan"], capsys)
    assert status == 2 and "/proc/longspan cannot be written" in printed and "--storage FOLDER" in printed


def test_a_full_disk(tmp_path, capsys):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system can only be mounted as root")
    try:
        status, printed = errors_of(["--storage", str(small / "runs")], capsys)
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert status == 2 and "MiB free" in printed and str(small / "runs") in printed


def test_a_model_without_rotary_positions(tmp_path, text_folder, capsys):
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=1)).save_pretrained(tmp_path / "gpt2")
    flags = ["--model", str(tmp_path / "gpt2"), "--data", str(text_folder), "--storage", str(tmp_path / "runs")]
    status, printed = errors_of(flags, capsys, plan)  # a sweep finds it by the same call, once Ray has started
    assert status == 2 and "gpt2" in printed and "rotary position" in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_rank": 500}, "lora_rank is 500, but k_proj has a side of 128"),
        ({"lora_targets": ("query",)}, "lora_targets has query, which the layers of LlamaForCausalLM do not have"),
        ({"train_layers": "last 99"}, "train_layers is 'last 99', but the model has"),
        ({"lora_rank": 500, "methods": ("full",)}, "could not be loaded from its safetensors"),
    ],
)
def test_what_the_model_cannot_take_is_found_before_its_weights_are_loaded(change, message, tmp_path, text_folder):
    shutil.copytree(ModelSource.parse("builtin:tiny").location, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"nobody reads this")
    spec = SweepSpec(context_lengths=(1024,), model=str(tmp_path / "model"), data=str(text_folder), **change)
    sweep = check_sweep("bad", spec, RunOptions(storage=str(tmp_path / "runs")))
    with pytest.raises(InputError, match=message):
        identify(sweep)


def test_a_tokenizer_with_tokens_that_the_model_has_no_embeddings_for(tmp_path, text_folder):
    source, folder = ModelSource.parse("builtin:tiny"), tmp_path / "model"  # 258 tokens, 264 embeddings
    shutil.copytree(source.location, folder)
    tokenizer = source.tokenizer()
    tokenizer.add_tokens([f"<extra {number}>" for number in range(7)])
    tokenizer.save_pretrained(folder)
    spec = SweepSpec(context_lengths=(1024,), model=str(folder), data=str(text_folder))
    sweep = check_sweep("bad", spec, RunOptions(storage=str(tmp_path / "runs")))
    with pytest.raises(InputError, match=rf"tokenizer of {folder} does not match.* id 264, .* 264 embeddings.*resize"):
        identify(sweep)
    assert not (tmp_path / "runs" / "data").exists()  # nothing was tokenised


def test_an_adapter_is_no_base_model(tmp_path, text_folder, capsys):
    adapter = tmp_path / "adapter"
    shutil.copytree(ModelSource.parse("builtin:tiny").location, adapter)
    (adapter / "adapter_config.json").write_text("{}")
    flags = ["--model", str(adapter), "--data", str(text_folder), "--storage", str(tmp_path / "runs")]
    status, printed = errors_of(flags, capsys)
    assert status == 2 and "is an adapter" in printed and "--what merged" in printed


@pytest.mark.ray
def test_a_corpus_shorter_than_one_context(tmp_path):
    (tmp_path / "short.txt").write_text("too short\n" * 20)
    status, output = SweepCommand(tmp_path / "runs", "--data", str(tmp_path / "short.txt")).run()
    assert status == 2 and "training tokens, and one sequence needs 1,024" in " ".join(output.split())
    assert "Traceback" not in output and not list((tmp_path / "runs").glob("trials/*"))


@pytest.mark.ray
def test_a_tracking_server_that_does_not_answer(tmp_path, text_folder):
    flags = ("--tracking-uri", "http://127.0.0.1:9", "--data", str(text_folder))
    status, output = SweepCommand(tmp_path / "runs", *flags).run()
    assert status == 2 and "MLflow at http://127.0.0.1:9 does not answer" in " ".join(output.split())
    assert "Traceback" not in output and not list((tmp_path / "runs").glob("trials/*"))


def test_the_help_names_recipes_and_every_field():
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.sweep", "--help-all"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    for word in ("quickstart: ", "--context-lengths", "--learning-rate-lora-plus", "--storage"):
        assert word in done.stdout
