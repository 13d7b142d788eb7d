"""Supervised fine-tuning: lengths mixed in a batch change neither the attention nor the loss, and it resumes."""

import json
import math

import numpy as np
import pytest
import torch

from tests.support.models import small_llama
from tests.support.workers import run_workers
from workloads.attention.interface import use_pattern
from workloads.attention.patterns import AttentionPattern
from workloads.config import ExecutionConfig, TrainingConfig
from workloads.data import Batch, ExampleCorpus, Instructions, prepare_examples
from workloads.engines.engine import Engine
from workloads.errors import InputError
from workloads.evaluation.answers import score_answers, to_device
from workloads.models.source import ModelSource
from workloads.training.loop import run
from workloads.training.setup import build_model

SOURCE = ModelSource.parse("builtin:tiny")
CONTEXT = 96


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Forty examples of some 20 to 110 tokens."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(40):
        words = [f"value_{word}" for word in generator.integers(100, size=3 + number % 12)]
        rows.append({"instruction": f"Write {number}.", "output": " ".join(words)})
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(json.dumps(rows))
    return prepare_examples(
        Instructions.parse(str(path)), SOURCE.tokenizer, SOURCE.chat_identity, tmp_path_factory.mktemp("data")
    )


def config(**overrides):
    values = dict(
        task="sft",
        context_length=CONTEXT,
        method="lora+",
        group_size=32,
        steps=4,
        batch=4,
        learning_rate=1e-3,
        warmup_steps=0,
        eval_every=4,
        eval_documents=3,
        eval_span=CONTEXT,
    )
    return TrainingConfig(**{**values, **overrides})


def train(config, examples, folder, execution=None, stop_after=None, source=SOURCE):
    events = []

    class Stopped(Exception):
        pass

    def emit(event, **fields):
        events.append({"event": event, **fields})
        if event == "saved" and fields["step"] == stop_after:
            raise Stopped

    engine = Engine(torch.device("cpu"), config.precision)
    try:
        run(source, config, execution or ExecutionConfig(checkpoint_every=2), examples, folder, engine, emit)
    except Stopped:
        pass
    return events


def losses(events):
    return {event["step"]: event["loss"] for event in events if event["event"] == "step"}


def alone(model, tokens, scored):
    """The summed loss of the scored tokens of one sequence by itself, and their number."""
    logits = model(input_ids=torch.as_tensor(tokens)[None]).logits[0]
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    places = [place for place in range(1, len(tokens)) if scored[place]]
    return -sum(log_probabilities[place - 1, tokens[place]] for place in places), len(places)


def sequences(batch):
    for tokens, scored, length in zip(batch.tokens, batch.scored, batch.lengths):
        yield tokens[:length], scored[:length]


def test_padding_on_the_right_leaves_every_sequence_as_it_is_alone():
    """Under S²-Attn, with lengths that are no multiple of anything."""
    model = small_llama(
        vocab_size=64, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2
    ).eval()
    use_pattern(model, AttentionPattern(name="s2", group_size=16))
    tokens = [np.random.default_rng(length).integers(64, size=length) for length in (57, 17, 40, 32, 16, 9)]
    batch = Batch.padded(tokens, [np.ones(len(t), dtype=bool) for t in tokens])
    with torch.inference_mode():
        together, _, mask = to_device(batch, torch.device("cpu"))
        logits = model(input_ids=together, attention_mask=mask).logits
        for row, sequence in enumerate(tokens):
            by_itself = model(input_ids=torch.from_numpy(sequence)[None]).logits[0]
            torch.testing.assert_close(logits[row, : len(sequence)], by_itself, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("micro_batch", [None, 1, 3])
def test_the_loss_is_the_mean_over_the_answers_of_the_batch(examples, tmp_path, micro_batch):
    settings = config(steps=1, attention="full", group_size=None)
    (event,) = [
        e for e in train(settings, examples, tmp_path, ExecutionConfig(micro_batch=micro_batch)) if e["event"] == "step"
    ]
    model = build_model(SOURCE, settings, Engine(torch.device("cpu"), "float32"), ExecutionConfig())
    batch = examples.train_batch(0, 4, CONTEXT, seed=0)
    assert len(set(batch.lengths.tolist())) > 2
    sums, counts = zip(*(alone(model, tokens, scored) for tokens, scored in sequences(batch)))
    mean = sum(sums) / sum(counts)
    mean.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert event["loss"] == pytest.approx(mean.item(), rel=1e-5)
    assert event["grad_norm"] == pytest.approx(torch.stack([g.norm() for g in gradients]).norm().item(), rel=1e-4)
    assert event["tokens"] == batch.lengths.sum()


def shared_run(examples, folder):
    """The events that a worker records in a run."""
    events = train(config(steps=2), ExampleCorpus.open(examples), folder)
    return {"losses": losses(events), "perplexities": evaluations(events)}


@pytest.mark.workers
def test_workers_with_unlike_shares_of_the_answers_train_what_one_trains(examples, tmp_path):
    """DDP over gloo, two processes: a mean of each worker's mean would be another loss."""
    together, _ = run_workers(tmp_path, "cpu", shared_run, examples.folder, tmp_path / "together")
    by_itself = train(config(steps=2), examples, tmp_path / "alone")
    assert together["losses"] == pytest.approx(losses(by_itself), rel=1e-4)
    assert together["perplexities"] == pytest.approx(evaluations(by_itself), rel=1e-4)


def evaluations(events):
    return [e["perplexity"] for e in events if e["event"] == "eval"]


@pytest.mark.parametrize("long_examples", ["drop", "truncate"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(examples, tmp_path, long_examples):
    settings = config(long_examples=long_examples, batch=3)
    whole = train(settings, examples, tmp_path / "whole")
    first = train(settings, examples, tmp_path / "parts", stop_after=2)
    second = train(settings, examples, tmp_path / "parts")
    assert losses(first) | losses(second) == losses(whole) and len(losses(second)) == 2
    assert evaluations(second) == evaluations(whole)[-len(evaluations(second)) :]
    assert [e["tokens"] for e in second if e["event"] == "step"] == [
        e["tokens"] for e in whole if e["event"] == "step" and e["step"] > 2
    ]


@pytest.fixture(scope="module")
def short_base(tmp_path_factory):
    """A base whose original length most of the examples exceed."""
    folder = tmp_path_factory.mktemp("base")
    small_llama(max_position_embeddings=32, initializer_range=0.1).save_pretrained(folder)
    SOURCE.tokenizer().save_pretrained(folder)
    return ModelSource.parse(str(folder))


def test_dynamic_positions_depend_on_each_example_alone(examples, short_base, tmp_path):
    """Not on the longest of its micro-batch, nor on what was computed before an interruption."""
    settings = config(positions="dynamic", attention="full", group_size=None, method="full")
    whole = train(settings, examples, tmp_path / "whole", source=short_base)
    pieces = train(settings, examples, tmp_path / "pieces", ExecutionConfig(micro_batch=1), source=short_base)
    assert losses(pieces) == pytest.approx(losses(whole), rel=1e-5)
    assert evaluations(pieces) == pytest.approx(evaluations(whole), rel=1e-5)
    first = train(settings, examples, tmp_path / "parts", stop_after=2, source=short_base)
    second = train(settings, examples, tmp_path / "parts", source=short_base)
    assert losses(first) | losses(second) == losses(whole)
    assert evaluations(second) == evaluations(whole)[-len(evaluations(second)) :]


def test_the_answers_of_held_out_examples_are_scored(examples):
    untuned = TrainingConfig(
        context_length=CONTEXT, method="untuned", attention="full", positions="none", task="sft", eval_span=CONTEXT
    )
    engine = Engine(torch.device("cpu"), "float32")
    model = build_model(SOURCE, untuned, engine, ExecutionConfig()).eval()
    held_out = examples.validation_examples(CONTEXT, 10)
    scores = score_answers(model, held_out, engine, batch_tokens=200)
    with torch.inference_mode():
        expected = [alone(model, example.tokens, example.scored) for example in held_out]
    assert scores.nll == pytest.approx([nll.item() for nll, _ in expected], rel=1e-5)
    assert scores.tokens.tolist() == [count for _, count in expected]
    assert scores.perplexity == pytest.approx(math.exp(sum(n for n, _ in expected) / sum(c for _, c in expected)))


def test_what_to_do_with_long_examples_is_asked_for_sft_alone():
    with pytest.raises(InputError, match="long_examples 'truncate' has no effect on the task 'pretraining'"):
        config(task="pretraining", long_examples="truncate")
