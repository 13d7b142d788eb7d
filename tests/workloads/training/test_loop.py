"""The loop: the numbers it gives, and that it resumes to the bit."""

import dataclasses
import json
import math
import random
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.support.models import plain_losses
from tests.support.texts import prepare_texts
from tests.support.workers import FORK_SERVER
from workloads.attention.documents import document_ids
from workloads.attention.masks import dense_mask
from workloads.attention.patterns import AttentionPattern
from workloads.config import ExecutionConfig, TrainingConfig
from workloads.data import PackedCorpus
from workloads.engines.engine import Engine
from workloads.errors import InputError
from workloads.models.source import ModelSource
from workloads.training.checkpoint import load_newest, whole_steps
from workloads.training.loop import NonFiniteLoss, Trial, run
from workloads.training.setup import build_model

SOURCE = ModelSource.parse("builtin:tiny")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return prepare_texts(tmp_path_factory.mktemp, documents=30, lines=1500)


# A context that costs a quarter, where the losses themselves do not matter.
SHORT = dict(context_length=256, group_size=64, eval_span=256)


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


def train(config, corpus, folder, execution=None, source=SOURCE, make_engine=Engine, **asking):
    """The events of a run."""
    events = []

    def emit(event, **fields):
        events.append({"event": event, **fields})

    engine = make_engine(torch.device("cpu"), config.precision)
    run(source, config, execution or ExecutionConfig(checkpoint_every=2), corpus, folder, engine, emit, **asking)
    return events


def losses(events):
    return {event["step"]: event["loss"] for event in events if event["event"] == "step"}


def perplexities(events):
    return [(e["context_length"], e["step"], e["perplexity"]) for e in events if e["event"] == "eval"]


# What this version of the workload gives. If a change is meant to move them, raise RESULT_VERSION in workloads.config:
# trials that were trained before are then no longer taken for the same.
GOLDEN = {
    "lora": {1: 2.681518, 2: 2.463916, 3: 2.249715, 4: 2.160389},
    "lora+": {1: 2.681518, 2: 2.391391, 3: 2.089327, 4: 1.921558},
    "full": {1: 2.681518, 2: 1.573177, 3: 1.259457, 4: 1.576460},
}


@pytest.fixture(scope="module")
def default_events(corpus, tmp_path_factory):
    """The events of a run of each method with the settings of ``config``."""
    return {method: train(config(method), corpus, tmp_path_factory.mktemp(method)) for method in GOLDEN}


@pytest.mark.parametrize("method", list(GOLDEN))
def test_golden_losses(method, default_events):
    assert losses(default_events[method]) == pytest.approx(GOLDEN[method], rel=2e-4)


GROUPS = dict(learning_rate_embeddings=1e-4, learning_rate_norms=3e-3, schedule="cosine", train_layers="last 2")


def train_in_a_process_to_kill(source, trial, corpus_folder, folder, progress):
    torch.set_num_threads(1)
    with open(progress, "w", buffering=1) as file:
        run(
            source, trial, ExecutionConfig(checkpoint_every=3), PackedCorpus.open(corpus_folder), folder,
            Engine(torch.device("cpu"), trial.precision), lambda event, **fields: file.write(f"{event}\n"),
        )  # fmt: skip


@pytest.mark.parametrize(("method", "changes"), [("lora+", GROUPS), ("full", {})])
def test_a_killed_run_ends_bit_equal_to_an_uninterrupted_one(method, changes, corpus, tmp_path):
    """SIGKILL at a random moment between the first checkpoint and the end.

    The model has attention dropout, which makes the result depend on the random state.
    """
    shutil.copytree(SOURCE.location, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**settings, "attention_dropout": 0.1}))
    source = ModelSource.parse(str(tmp_path / "model"))
    trial = config(method, **SHORT, steps=12, eval_every=4, **changes)
    progress, last = tmp_path / "progress", random.randrange(4, 9)
    arguments = (source, trial, corpus.folder, tmp_path / "parts", progress)
    child = FORK_SERVER.Process(target=train_in_a_process_to_kill, args=arguments)
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
    assert resumed % 3 == 0 and resumed < 12
    assert losses(second) == {step: loss for step, loss in losses(whole).items() if step > resumed}
    assert perplexities(second)[-1] == perplexities(whole)[-1]
    (one, state), (other, other_state) = load_newest(tmp_path / "whole"), load_newest(tmp_path / "parts")
    assert state == other_state
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one), f"killed after step {last}"
    assert not list((tmp_path / "parts").glob(".*")), "what the killed process left lies about"


def test_a_run_saves_and_stops_when_asked_and_goes_on_from_there(corpus, tmp_path):
    trial = config(**SHORT, steps=6, eval_every=3)
    execution = ExecutionConfig(checkpoint_every=5)
    answers = iter([None, "save", None, "stop"])
    first = train(trial, corpus, tmp_path / "parts", execution, poll_request=lambda: next(answers))
    assert [event["step"] for event in first if event["event"] == "saved"] == [2, 4]
    assert max(losses(first)) == 4
    second = train(trial, corpus, tmp_path / "parts", execution)
    whole = train(trial, corpus, tmp_path / "whole", execution)
    assert losses(first) | losses(second) == losses(whole)
    assert perplexities(second)[-1] == perplexities(whole)[-1]


def test_a_checkpoint_is_also_written_when_the_last_one_is_old(corpus, tmp_path):
    trial = config(**SHORT, steps=4, eval_every=4)
    always = ExecutionConfig(checkpoint_every=3, checkpoint_minutes=1e-9)
    events = train(trial, corpus, tmp_path, always)
    assert [event["step"] for event in events if event["event"] == "saved"] == [1, 2, 3, 4]


def test_the_best_checkpoint_is_saved_where_it_was_found_and_kept_over_a_restart(corpus, tmp_path):
    """With this rate the perplexity rises: the best is the first."""
    trial = config("full", **SHORT, steps=6, warmup_steps=4, eval_every=1, learning_rate=1e-2)
    keep = ExecutionConfig(checkpoint_every=100, keep_last=1, keep_best=True, keep_every=4)
    answers = iter([None] * 4 + ["stop"])
    first = train(trial, corpus, tmp_path, keep, poll_request=lambda: next(answers))
    second = train(trial, corpus, tmp_path, keep)
    scores = {step: perplexity for _, step, perplexity in perplexities(first + second) if step}
    best = min(scores, key=scores.get)
    assert best < 4, "the best lies before the restart"
    assert whole_steps(tmp_path) == [best, 4, 6]
    # A checkpoint at each evaluation that was the best so far, at every fourth step, where it stopped, and at the end.
    so_far = [step for step in scores if all(scores[step] < scores[other] for other in range(1, step))]
    assert [e["step"] for e in first + second if e["event"] == "saved"] == sorted({*so_far, 4, 5, 6})
    # The next attempt goes on from the newest, never from the best.
    assert [event["step"] for event in second if event["event"] == "resume"] == [5]


def test_checkpoints_of_another_trial_are_refused_and_left_alone(corpus, tmp_path):
    train(config(**SHORT, steps=2), corpus, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="another trial's: learning_rate differ"):
        train(config(**SHORT, steps=2, learning_rate=2e-3), corpus, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def short_losses(corpus, tmp_path_factory):
    return losses(train(config(**SHORT), corpus, tmp_path_factory.mktemp("short")))


def test_micro_batches_and_checkpointing_change_nothing_but_memory(short_losses, corpus, tmp_path):
    saving = ExecutionConfig(micro_batch=1, gradient_checkpointing="all")
    assert losses(train(config(**SHORT), corpus, tmp_path, saving)) == pytest.approx(short_losses, rel=1e-5)


def test_bfloat16_keeps_what_trains_in_float32_and_the_losses_near(short_losses, corpus, tmp_path):
    """The precision of a GPU, here computed on the CPU."""
    events = train(config(**SHORT, precision="bfloat16"), corpus, tmp_path)
    assert losses(events) == pytest.approx(short_losses, rel=0.02)
    tensors, _ = load_newest(tmp_path)
    trained = [t for name, t in tensors.items() if name.startswith(("model/", "optimizer/"))]
    assert trained and {t.dtype for t in trained} == {torch.float32}


@pytest.mark.parametrize("attention", ["s2", "full"])
def test_attention_stops_at_documents_where_asked(attention, corpus, tmp_path):
    """The first loss against the stock model with a dense mask."""
    asked = config(attention=attention, group_size=256 if attention == "s2" else None, document_mask=True, steps=1)
    # Documents longer than a sequence would not show: a token that is frequent ends them here.
    corpus = dataclasses.replace(corpus, eos_token_id=ord("\n"))
    events = train(asked, corpus, tmp_path)
    assert [e["attention_backend"] for e in events if e["event"] == "model"] == ["sdpa"]

    tokens = torch.from_numpy(corpus.train_batch(0, 2, 1024, asked.seed))
    model = SOURCE.load(1024, "linear", torch.float32)
    pattern = AttentionPattern(name=attention, group_size=asked.group_size)
    mask = dense_mask(pattern, model.config.num_attention_heads, 1024, document_ids=document_ids(tokens, ord("\n")))
    with torch.no_grad():
        expected = plain_losses(model(tokens, attention_mask=mask).logits, tokens).mean().item()
    assert losses(events)[1] == pytest.approx(expected, rel=1e-5)
    assert losses(events)[1] != pytest.approx(GOLDEN["full"][1], rel=1e-3)


def running_ahead(device, precision):
    """An engine whose host gives the device a step before it knows of the last: on a CPU too."""
    engine = Engine(device, precision)
    engine.runs_ahead = True
    return engine


def test_a_host_that_runs_ahead_of_its_device_tells_the_same_in_the_same_order(corpus, tmp_path):
    kept = ExecutionConfig(checkpoint_every=3)
    trial = config(**SHORT, steps=5, eval_every=4)
    at_once = train(trial, corpus, tmp_path / "at-once", kept)
    ahead = train(trial, corpus, tmp_path / "ahead", kept, make_engine=running_ahead)
    measured = ("seconds", "tokens_per_second", "peak_memory_gib")
    for events in (at_once, ahead):
        for event in events:
            assert all(event.pop(name) > 0 for name in measured if event["event"] == "step")
    assert ahead == at_once
    one, other = (load_newest(tmp_path / name)[0] for name in ("at-once", "ahead"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("make_engine", [Engine, running_ahead])
def test_a_loss_that_is_no_number_ends_the_run_and_updates_nothing(make_engine, corpus, tmp_path):
    """The loss of the second step. The third may have started by then."""
    diverging = config("full", **SHORT, learning_rate=1e30, warmup_steps=0, max_grad_norm=None, eval_every=5, steps=5)
    engine = make_engine(torch.device("cpu"), "float32")
    model = build_model(SOURCE, diverging, engine, ExecutionConfig())
    events, after_one = [], None

    def keep_the_weights_of_the_first_update(*_):
        nonlocal after_one
        after_one = after_one or {name: parameter.clone() for name, parameter in engine.weights().items()}

    trial = Trial(
        model, diverging, ExecutionConfig(), corpus, tmp_path, engine, lambda event, **_: events.append(event)
    )
    registered = register_optimizer_step_post_hook(keep_the_weights_of_the_first_update)
    with pytest.raises(NonFiniteLoss, match=r"step 2: .* nothing was updated. Lower the learning rate"):
        trial.run()
    registered.remove()
    assert events.count("step") == 1
    assert all(torch.equal(after_one[name], parameter) for name, parameter in engine.weights().items())


def test_the_untuned_model_is_evaluated_at_both_lengths_and_nothing_is_trained(corpus, tmp_path):
    untuned = TrainingConfig(
        context_length=1024, method="untuned", attention="full", positions="yarn", eval_documents=2, eval_span=1024
    )
    events = train(untuned, corpus, tmp_path)
    assert [(length, step) for length, step, _ in perplexities(events)] == [(1024, 0), (512, 0)]
    assert not losses(events)


@pytest.mark.parametrize(
    ("factor", "error", "message"),
    [
        (1e38, NonFiniteLoss, "evaluation at 1,024 tokens: the loss of 2 of 2 held-out documents is NaN or infinite"),
        (math.nan, InputError, r"its weight model\.norm\.weight holds NaN or infinity"),
    ],
)
@pytest.mark.parametrize("method", ["untuned", "lora"])
def test_a_base_that_gives_no_finite_loss_is_named_before_the_first_step(
    factor, error, message, method, tmp_path, corpus
):
    shutil.copytree(SOURCE.location, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * factor
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    settings = dict(attention="full", group_size=None, **({"steps": 0} if method == "untuned" else {}))
    with pytest.raises(error, match=message):
        train(config(method, **settings), corpus, tmp_path / "run", source=ModelSource.parse(str(tmp_path / "base")))


def test_the_order_of_events_and_what_tokens_count(default_events):
    events = [e for e in default_events["lora+"] if e["event"] in ("eval", "step")]
    order = [(e["event"], e["step"], e["tokens"]) for e in events if e.get("context_length") != 512]
    assert order == [
        ("eval", 0, 0), ("step", 1, 2048), ("step", 2, 4096), ("eval", 2, 4096), ("step", 3, 6144), ("step", 4, 8192),
        ("eval", 4, 8192),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"group_size": 300}, "not a multiple of the group size"),
        ({"eval_span": 1000}, "multiple of the context length"),
        ({"batch": 0}, "batch is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"attention": "full"}, "full has none"),
        ({"attention": "dilated", "group_size": None}, "but full has a group size"),
        ({"attention": "s3"}, "expected one of s2"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_where_it_is_made(overrides, message):
    with pytest.raises(InputError, match=message):
        config(**overrides)
