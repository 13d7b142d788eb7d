"""python -m workloads.evaluate: from a command to tables, JSON and pictures, and its errors."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.records.storage import Storage
from orchestrator.trial_spec import Identities, TrialSpec
from tests.support.texts import write_texts
from workloads.ask import load_model
from workloads.config import ExecutionConfig, TrainingConfig
from workloads.data import Corpus, prepare
from workloads.engines.engine import Engine
from workloads.errors import InputError
from workloads.evaluate import main
from workloads.export import export_trial
from workloads.models.source import ModelSource
from workloads.training.loop import run

SOURCE = ModelSource.parse("builtin:tiny")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"), documents=30, lines=200)


def evaluated(output, *arguments):
    """The results by file name, of a command that succeeds."""
    assert main([*map(str, arguments), "--output", str(output)]) == 0
    for picture in output.glob("*.png"):
        assert picture.read_bytes().startswith(PNG)
    assert {p.stem for p in output.glob("*.png")} == {p.stem for p in output.glob("*.json")}
    return {path.stem: json.loads(path.read_text()) for path in output.glob("*.json")}


def test_perplexity_at_several_lengths_and_at_the_original_one(texts, tmp_path, capsys):
    results = evaluated(
        tmp_path, "builtin:tiny", "--data", texts, "--lengths", 1024, "--positions", "yarn", "--documents", 2
    )
    result = results["perplexity-builtin-tiny-yarn"]
    assert [(row["length"], row["windows"]) for row in result["lengths"]] == [(512, 4), (1024, 2)]
    for row in result["lengths"]:
        for rule, scored in (("all", row["length"] - 1), ("last", 256)):
            nll, tokens = (sum(document[rule][key] for document in row["documents"]) for key in ("nll", "tokens"))
            assert tokens == row["rules"][rule]["tokens"] == row["windows"] * scored
            assert row["rules"][rule]["perplexity"] == pytest.approx(np.exp(nll / tokens))
            assert row["rules"][rule]["low"] is None
    assert result["model"]["identity"] == SOURCE.identity and result["model"]["original_context_length"] == 512
    printed = capsys.readouterr().out
    assert printed.index("4,096 tokens to forward") < printed.index("Perplexity of")
    assert "2 scored documents are too few for an interval; expected at least 5" in printed


def test_answers_to_other_questions_are_kept_and_the_same_question_is_answered_in_place(texts, tmp_path):
    flags = ["builtin:tiny", "--data", texts, "--documents", 1]
    evaluated(tmp_path, *flags, "--lengths", 512)
    evaluated(tmp_path, *flags, "--lengths", 256)
    results = evaluated(tmp_path, *flags, "--lengths", 256)
    lengths = {name: [row["length"] for row in result["lengths"]] for name, result in results.items()}
    assert lengths == {"perplexity-builtin-tiny": [512], "perplexity-builtin-tiny-2": [256]}


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """What an export looks like: extended by longspan, to 1,024 tokens."""
    folder = tmp_path_factory.mktemp("extended")
    SOURCE.load(1024, "linear", torch.float32).save_pretrained(folder)
    SOURCE.tokenizer().save_pretrained(folder)
    return folder


def test_positions_that_were_trained_are_not_replaced(extended, texts, tmp_path, capsys):
    flags = [str(extended), "--data", str(texts), "--documents", "1", "--output", str(tmp_path), "--lengths", "2048"]
    assert main([*flags, "--positions", "yarn"]) == 2
    assert "positions of its own, made for 1,024 tokens" in capsys.readouterr().err
    assert main(flags) == 0
    assert "2,048 tokens lie beyond the 1,024" in capsys.readouterr().out


def test_positions_that_a_model_comes_with_are_replaced_with_a_note(texts, tmp_path, capsys):
    shutil.copytree(SOURCE.location, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    settings["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    flags = [tmp_path / "model", "--data", texts, "--documents", 1, "--lengths", 2048, "--positions", "yarn"]
    evaluated(tmp_path / "out", *flags)
    printed = " ".join(capsys.readouterr().out.split())
    assert "yarn replaces them by others, from 512 to 2,048, at every length that is scored" in printed
    assert "its original length is 256: then give --original-length" in printed


def test_the_original_length_that_a_sweep_takes_is_taken_here_too(extended, texts, tmp_path, capsys):
    shutil.copytree(SOURCE.location, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    settings["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    flags = ["--data", texts, "--documents", 1, "--lengths", 512, "--original-length"]
    (result,) = evaluated(tmp_path / "out", tmp_path / "model", *flags, 256).values()
    assert (result["model"]["original_context_length"], result["model"]["reach"]) == (256, 512)
    assert [row["length"] for row in result["lengths"]] == [256, 512]
    assert "max_position_embeddings" not in capsys.readouterr().out  # nothing was assumed
    assert main([str(extended), *map(str, flags), "256"]) == 2
    assert "records an original length of 512" in " ".join(capsys.readouterr().err.split())


def test_what_cannot_work_is_found_before_the_first_task_runs(texts, tmp_path, capsys):
    flags = ["builtin:tiny", "perplexity", "topics", "--data", str(texts), "--documents", "1", "--lengths", "200"]
    assert main([*flags, "--output", str(tmp_path)]) == 2
    assert "a prompt on topics needs" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_part_of_the_windows_with_the_error_it_brings(texts, tmp_path):
    flags = ["builtin:tiny", "--data", texts, "--documents", 2, "--span", 1024, "--stride", 128]
    (whole,) = evaluated(tmp_path / "whole", *flags).values()
    (part,) = evaluated(tmp_path / "part", *flags, "--max-windows", 4).values()
    assert [(row["windows_scored"], row["windows"]) for row in part["lengths"]] == [(4, 10)]
    true, score = (one["lengths"][0]["rules"]["all"] for one in (whole, part))
    assert true["subsampling_error"] == 0 < score["subsampling_error"] < 1
    assert score["tokens"] == 4 * 511


def test_nothing_is_scored_in_a_dry_run(texts, tmp_path, capsys):
    assert main(["builtin:tiny", "passkey", "--dry-run", "--output", str(tmp_path / "none")]) == 0
    assert "tokens to forward" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_passkey_and_topics_from_the_command_line(tmp_path):
    results = evaluated(
        tmp_path, "builtin:tiny", "passkey", "topics", "--lengths", 700, "--form", "lines", "--tests", 3,
        "--depths", 0, 50, 100,
    )  # fmt: skip
    passkey, lines = results["passkey-builtin-tiny"], results["topics-builtin-tiny"]
    assert [row["length"] for row in passkey["lengths"]] == [512, 700]
    for row in passkey["lengths"]:
        assert [(cell["depth"], cell["tests"]) for cell in row["depths"]] == [(0, 1), (0.5, 1), (1, 1)]
        assert row["correct"] == sum(cell["correct"] for cell in row["depths"])
    assert len(passkey["answers"]) == 6
    # The original length is too short for a prompt of lines in bytes, which is no reason to fail.
    assert [(row["length"], row["tests"]) for row in lines["lengths"]] == [(700, 3)]


def test_longchats_cases_make_positions_reach_the_longest_of_them(tmp_path):
    cases = [{"prompt": "word " * n, "topics": ["Art"] * k} for n, k in ((50, 1), (190, 3))]
    (tmp_path / "cases.jsonl").write_text("\n".join(json.dumps(case) for case in cases))
    flags = ["builtin:tiny", "topics", "--cases", tmp_path / "cases.jsonl", "--positions", "linear"]
    (result,) = evaluated(tmp_path / "out", *flags).values()
    assert [(row["group"], row["tests"]) for row in result["lengths"]] == [("1 topics", 1), ("3 topics", 1)]
    assert result["model"]["reach"] >= max(row["length"] for row in result["lengths"]) > 512


def test_a_trial_scores_as_it_did_when_its_training_ended(texts, tmp_path, capsys):
    corpus = Corpus.parse(str(texts))
    packed = prepare(corpus, SOURCE.tokenizer, SOURCE.tokenizer_identity, tmp_path / "data")
    config = TrainingConfig(
        context_length=1024, method="lora+", group_size=256, steps=2, batch=1, learning_rate=1e-2, warmup_steps=0,
        eval_documents=3, eval_span=1024,
    )  # fmt: skip
    identities = Identities(model=SOURCE.identity, tokenizer=SOURCE.tokenizer_identity, data=corpus.identity())
    trial = TrialSpec(model="builtin:tiny", data=str(texts), identities=identities, training=config)
    folder = Storage.open(str(tmp_path / "runs")).add_trial(trial)
    events = []
    engine = Engine(torch.device("cpu"), "float32")
    run(SOURCE, config, ExecutionConfig(), packed, folder.checkpoints, engine, lambda e, **f: events.append((e, f)))
    ends = {f["context_length"]: f for event, f in events if event == "eval" and f["step"] == 2}

    (result,) = evaluated(tmp_path / "out", folder.path, "--data", texts, "--documents", 3).values()
    assert result["model"]["step"] == 2 and result["model"]["method"] == "lora+"
    assert result["model"]["label"] == f"builtin:tiny, {trial.label}"
    for row in result["lengths"]:
        assert [document["all"]["nll"] for document in row["documents"]] == pytest.approx(ends[row["length"]]["nll"])
    assert {row["length"] for row in result["lengths"]} == {512, 1024}

    # The same as an adapter on its base.
    export_trial(folder.path, tmp_path / "adapter", what="adapter", dtype="float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # a library's own is none of the user's business
        (adapter,) = evaluated(
            tmp_path / "adapted", tmp_path / "adapter", "--data", texts, "--documents", 3, "--lengths", 1024
        ).values()
    for row, of_adapter in zip(result["lengths"], adapter["lengths"], strict=True):
        assert of_adapter["rules"]["all"]["perplexity"] == pytest.approx(row["rules"]["all"]["perplexity"], rel=1e-5)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    capsys.readouterr()
    assert main([str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]) == 2
    assert "write there where it is now" in capsys.readouterr().err

    shutil.rmtree(folder.checkpoints)
    assert main([str(folder.path), "--output", str(tmp_path / "out")]) == 2


def broken(folder: Path, kind: str) -> str:
    shutil.copytree(SOURCE.location, folder)
    config = json.loads((folder / "config.json").read_text())
    if kind == "truncated":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    elif kind == "foreign":
        config |= {"num_hidden_layers": 6}
    elif kind == "misshapen":
        config |= {"intermediate_size": 256}
    elif kind == "tokenizer":
        tokenizer = SOURCE.tokenizer()
        tokenizer.add_tokens([f"<extra {number}>" for number in range(42)])
        tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


BROKEN = [
    ("truncated", "could not be loaded from its safetensors"),
    ("foreign", "18 of its weights are not in its safetensors or have another shape"),
    ("misshapen", "12 of its weights are not in its safetensors or have another shape"),
    ("tokenizer", "it has a token with id 299, and the model has 264 embeddings"),
]


@pytest.mark.parametrize(("kind", "message"), BROKEN)
def test_a_broken_model_is_one_clear_error(kind, message, tmp_path, capsys):
    assert main([broken(tmp_path / "model", kind), "--output", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1


@pytest.mark.parametrize(("kind", "message"), BROKEN)
def test_a_broken_model_is_not_asked(kind, message, tmp_path):
    with pytest.raises(InputError, match=message) as refused:
        load_model(broken(tmp_path / "model", kind), "cpu")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lengths", "8192"], "Long enough are 3 at 512"),
        (["--text-column", "body"], "--text-column body has no effect"),
        (["topics", "--cases", "nowhere"], "--cases nowhere is neither"),
        (["passkey", "--lengths", "200"], "a passkey prompt needs 261 tokens"),
        (["topics", "--cases", "/proc/self/mem"], "--cases /proc/self/mem cannot be read"),
    ],
)
def test_a_mistake_is_one_clear_error(flags, message, texts, tmp_path, capsys):
    assert main(["builtin:tiny", "--data", str(texts), *flags, "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_results_that_could_not_be_written_are_refused_before_they_are_computed(texts, capsys):
    assert main(["builtin:tiny", "--data", str(texts), "--output", "/proc/results"]) == 2
    assert "--output /proc/results cannot be made" in capsys.readouterr().err


def test_beyond_the_reach_without_positions_is_noted(texts, tmp_path, capsys):
    evaluated(tmp_path, "builtin:tiny", "--data", texts, "--lengths", 1024, "--documents", 1)
    assert "1,024 tokens lie beyond the 512" in capsys.readouterr().out


def test_help_does_not_wait_for_torch():
    code = "import sys, workloads.evaluate; print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.gpu
def test_a_gpu_computes_what_the_cpu_does(texts, tmp_path):
    """bfloat16 weights and computation against float32."""
    flags = ["builtin:tiny", "perplexity", "passkey", "--data", texts, "--documents", 3, "--tests", 2]
    one = evaluated(tmp_path / "cpu", *flags, "--device", "cpu")
    other = evaluated(tmp_path / "gpu", *flags)
    cpu, gpu = (each["perplexity-builtin-tiny"] for each in (one, other))
    assert gpu["environment"]["precision"] == "bfloat16"
    for rule in ("all", "last"):
        values = [each["lengths"][0]["rules"][rule]["perplexity"] for each in (cpu, gpu)]
        assert values[1] == pytest.approx(values[0], rel=0.02)
    assert other["passkey-builtin-tiny"]["lengths"][0]["tests"] == 2
