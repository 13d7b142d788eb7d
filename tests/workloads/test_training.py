"""The loop: the numbers it gives, and that it resumes to the bit."""

import json
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from workloads.checkpoint import load_newest
from workloads.config import ExecutionConfig, TrainingConfig
from workloads.data import Corpus, PackedCorpus, prepare
from workloads.engine import Engine
from workloads.errors import InputError
from workloads.models import ModelSource
from workloads.training import NonFiniteLoss, learning_rate, run

SOURCE = ModelSource.parse("builtin:tiny")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Text that is the same under every Python version."""
    folder = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(0)
    for number in range(30):
        words = generator.integers(10_000, size=1500)
        (folder / f"{number}.txt").write_text("\n".join(f"value_{w} = {w} + {number}" for w in words))
    root = tmp_path_factory.mktemp("data")
    return prepare(Corpus.parse(str(folder)), SOURCE.tokenizer, SOURCE.tokenizer_identity, root)


def config(method="lora+", **overrides):
    values = dict(
        context_length=1024,
        method=method,
        group_size=256,
        steps=4,
        batch=2,
        learning_rate=1e-3,
        warmup_steps=2,
        eval_every=2,
        eval_documents=2,
        eval_span=1024,
    )
    return TrainingConfig(**{**values, **overrides})


def train(config, corpus, folder, execution=None, source=SOURCE):
    """The events of a run."""
    events = []

    def emit(event, **fields):
        events.append({"event": event, **fields})

    engine = Engine(torch.device("cpu"), config.precision)
    run(source, config, execution or ExecutionConfig(checkpoint_every=2), corpus, folder, engine, emit)
    return events


def losses(events):
    return {event["step"]: event["loss"] for event in events if event["event"] == "step"}


def perplexities(events):
    return [(e["context_length"], e["step"], e["perplexity"]) for e in events if e["event"] == "eval"]


# What this version of the workload gives. If a change is meant to move them, raise RESULT_VERSION in workloads.config:
# trials that were trained before are then no longer taken for the same.
GOLDEN = {
    "lora": {1: 2.894651, 2: 2.877761, 3: 2.610996, 4: 2.385571},
    "lora+": {1: 2.894651, 2: 2.807397, 3: 2.437470, 4: 2.157846},
    "full": {1: 2.894651, 2: 1.670073, 3: 1.643226, 4: 1.311664},
}


@pytest.mark.parametrize("method", list(GOLDEN))
def test_golden_losses(method, corpus, tmp_path):
    assert losses(train(config(method), corpus, tmp_path)) == pytest.approx(GOLDEN[method], rel=2e-4)


def train_in_a_process_to_kill(source, trial, corpus_folder, folder, progress):
    torch.set_num_threads(1)
    with open(progress, "w", buffering=1) as file:
        run(
            source, trial, ExecutionConfig(checkpoint_every=3), PackedCorpus.open(corpus_folder), folder,
            Engine(torch.device("cpu"), trial.precision), lambda event, **fields: file.write(f"{event}\n"),
        )  # fmt: skip


@pytest.mark.parametrize("method", ["lora+", "full"])
def test_a_killed_run_ends_bit_equal_to_an_uninterrupted_one(method, corpus, tmp_path):
    """SIGKILL at a random moment between the first checkpoint and the end. The model drops attention scores, so that
    the random state counts."""
    shutil.copytree(SOURCE.location, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**settings, "attention_dropout": 0.1}))
    source = ModelSource.parse(str(tmp_path / "model"))
    trial = config(method, context_length=256, group_size=64, eval_span=256, steps=16, eval_every=4)
    progress, last = tmp_path / "progress", random.randrange(4, 12)
    arguments = (source, trial, corpus.folder, tmp_path / "parts", progress)
    child = torch.multiprocessing.get_context("spawn").Process(target=train_in_a_process_to_kill, args=arguments)
    child.start()
    while child.is_alive() and not (progress.exists() and progress.read_text().count("step\n") >= last):
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.05))
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    execution = ExecutionConfig(checkpoint_every=3)
    second = train(trial, corpus, tmp_path / "parts", execution, source=source)
    whole = train(trial, corpus, tmp_path / "whole", execution, source=source)
    torch.set_num_threads(threads)
    (resumed,) = (event["step"] for event in second if event["event"] == "resume")
    assert resumed % 3 == 0 and resumed < 16
    assert losses(second) == {step: loss for step, loss in losses(whole).items() if step > resumed}
    assert perplexities(second)[-1] == perplexities(whole)[-1]
    (one, state), (other, other_state) = load_newest(tmp_path / "whole"), load_newest(tmp_path / "parts")
    assert state == other_state
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one), f"killed after step {last}"
    assert not list((tmp_path / "parts").glob(".*")), "what the killed process left lies about"


def test_checkpoints_of_another_trial_are_refused_and_left_alone(corpus, tmp_path):
    train(config(steps=2), corpus, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="another trial's: learning_rate differ"):
        train(config(steps=2, learning_rate=2e-3), corpus, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_micro_batches_and_checkpointing_change_nothing_but_memory(corpus, tmp_path):
    plain = losses(train(config(), corpus, tmp_path / "a"))
    saving = ExecutionConfig(micro_batch=1, gradient_checkpointing=True)
    assert losses(train(config(), corpus, tmp_path / "b", saving)) == pytest.approx(plain, rel=1e-5)


def test_bfloat16_keeps_what_trains_in_float32_and_the_losses_near(corpus, tmp_path):
    """The precision of a GPU, here computed on the CPU."""
    plain = losses(train(config(), corpus, tmp_path / "plain"))
    assert losses(train(config(precision="bfloat16"), corpus, tmp_path / "bf16")) == pytest.approx(plain, rel=0.02)
    tensors, _ = load_newest(tmp_path / "bf16")
    trained = [t for name, t in tensors.items() if name.startswith(("model/", "optimizer/"))]
    assert trained and {t.dtype for t in trained} == {torch.float32}


def test_a_loss_that_is_no_number_ends_the_run_in_that_step(corpus, tmp_path):
    with pytest.raises(NonFiniteLoss, match="Lower the learning rate"):
        train(config("full", learning_rate=1e30, warmup_steps=0, max_grad_norm=None), corpus, tmp_path)


def test_the_untuned_model_is_evaluated_at_both_lengths_and_nothing_is_trained(corpus, tmp_path):
    untuned = TrainingConfig(
        context_length=1024, method="untuned", attention="full", positions="yarn", eval_documents=2, eval_span=1024
    )
    events = train(untuned, corpus, tmp_path)
    assert [(length, step) for length, step, _ in perplexities(events)] == [(1024, 0), (512, 0)]
    assert not losses(events)


def test_the_order_of_events_and_what_tokens_count(corpus, tmp_path):
    events = [e for e in train(config(), corpus, tmp_path) if e["event"] in ("eval", "step")]
    order = [(e["event"], e["step"], e["tokens"]) for e in events if e.get("context_length") != 512]
    assert order == [
        ("eval", 0, 0), ("step", 1, 2048), ("step", 2, 4096), ("eval", 2, 4096), ("step", 3, 6144), ("step", 4, 8192),
        ("eval", 4, 8192),
    ]  # fmt: skip


def test_the_learning_rate_warms_up_and_stays():
    rates = [learning_rate(config(warmup_steps=4, learning_rate=8.0), step) for step in range(6)]
    assert rates == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"group_size": 300}, "not a multiple of the group size"),
        ({"eval_span": 1000}, "multiple of the context length"),
        ({"batch": 0}, "batch is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"attention": "full"}, "only s2 has groups"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_where_it_is_made(overrides, message):
    with pytest.raises(InputError, match=message):
        config(**overrides)
