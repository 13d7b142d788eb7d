"""Compiled layers train what uncompiled ones train, all layers compile as one, and it happens where it pays."""

from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from transformers import LlamaConfig

from tests.support.models import small_llama
from workloads.budget import Device, Loop, ModelShape
from workloads.config import ExecutionConfig, TrainingConfig
from workloads.engines.engine import Engine
from workloads.errors import InputError
from workloads.training import compilation
from workloads.training.compilation import compile_layers, layers_compile
from workloads.training.loop import Trial
from workloads.training.setup import prepare_model

NUM_LAYERS = 12  # more than the versions of one function that dynamo makes by default (8)


class RandomWindows:
    """As much of a packed corpus as the loop uses, of random tokens."""

    eos_token_id = 0

    def train_batch(self, step, batch, context_length, seed):
        return self.tokens(step, (batch, context_length))

    def validation_windows(self, length, span, documents):
        return [SimpleNamespace(tokens=self.tokens(-1, (span // length, length)))] * documents

    def tokens(self, seed, shape):
        return torch.randint(8, 264, shape, generator=torch.Generator().manual_seed(seed)).numpy()


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch):
    """The graphs given to the compiler, each computed without compiled kernels."""
    given = []

    def backend(graph, inputs):
        given.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(compilation, "BACKEND", backend)
    return given


def config(**overrides):
    values = dict(
        context_length=64, method="lora+", group_size=16, steps=3, batch=2, learning_rate=1e-2, warmup_steps=0,
        eval_every=1, eval_documents=2, eval_span=64, precision="bfloat16",
    )  # fmt: skip
    return TrainingConfig(**{**values, **overrides})


def losses(folder, training, execution, device="cpu"):
    """Of three steps, with evaluations at the trained length and another one in between."""
    events = []

    def emit(event, **fields):
        events.append((event, fields))

    engine = Engine(torch.device(device), training.precision)
    model = small_llama(num_hidden_layers=NUM_LAYERS, use_cache=False, max_position_embeddings=32).to(engine.dtype)
    model = prepare_model(model, training, engine, execution)
    names = [name for name, _ in model.named_parameters()]
    Trial(model, training, execution, RandomWindows(), folder, engine, emit).run()
    assert [name for name, _ in model.named_parameters()] == names
    lengths = {fields["context_length"] for event, fields in events if event == "eval"}
    assert lengths == {64, 32}
    return [fields["loss"] for event, fields in events if event == "step"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["lora+", "full"])
def test_layers_compile_once_for_all_and_train_to_the_same_losses(method, checkpointing, graphs, tmp_path):
    """A graph for all layers, without a break, one for the cross-entropy, and none for evaluation at any length."""
    training = config(method=method)
    plain = losses(tmp_path / "plain", training, ExecutionConfig(gradient_checkpointing=checkpointing))
    assert not graphs
    execution = ExecutionConfig(gradient_checkpointing=checkpointing, compile_layers="on")
    assert losses(tmp_path / "compiled", training, execution) == plain
    assert len(graphs) == 2


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "near"), [("float32", 1e-3), ("bfloat16", 0.02)])
def test_the_kernels_of_the_compiler_train_to_the_same_losses_but_for_rounding(precision, near, tmp_path):
    """On a GPU alone: for a CPU the compiler takes half a minute."""
    training = config(precision=precision)
    plain = losses(tmp_path / "plain", training, ExecutionConfig(compile_layers="off"), "cuda")
    compiled = losses(tmp_path / "compiled", training, ExecutionConfig(compile_layers="on"), "cuda")
    assert compiled == pytest.approx(plain, rel=near)


def test_layers_that_are_not_alike_are_all_compiled(graphs, tmp_path):
    """A version for each kind: with LoRA or without, and with inputs that need a gradient or not."""
    training = config(method="lora", train_layers="every 2")
    plain = losses(tmp_path / "plain", training, ExecutionConfig())
    assert losses(tmp_path / "compiled", training, ExecutionConfig(compile_layers="on")) == plain
    assert 2 <= len(graphs) <= 4


def test_where_the_compiler_fails_layers_run_as_written_if_nobody_asked_for_it(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no kernels here")

    monkeypatch.setattr(compilation, "BACKEND", broken)
    tokens = torch.arange(16)[None]
    expected = small_llama(use_cache=False)(tokens).logits
    model = small_llama(use_cache=False)
    compile_layers(model, fall_back=True)
    assert torch.equal(model(tokens).logits, expected)
    torch._dynamo.reset()
    compile_layers(model)
    with pytest.raises(Exception, match="no kernels here"):
        model(tokens)


LLAMA_2_7B = SimpleNamespace(config=LlamaConfig(intermediate_size=11008))
LONG = dict(context_length=8192, group_size=2048, eval_span=8192, steps=1000, batch=64)


@pytest.mark.parametrize(
    ("overrides", "execution", "expected"),
    [
        ({}, {}, True),
        ({}, {"compile_layers": "off"}, False),
        ({"steps": 5, "batch": 1}, {}, False),
        ({"steps": 5, "batch": 1}, {"compile_layers": "on"}, True),
        ({"task": "sft"}, {"compile_layers": "on"}, True),
        ({"steps": 0, "method": "untuned"}, {}, False),
        ({"steps": 0, "method": "untuned"}, {"compile_layers": "on"}, False),
        ({"task": "sft"}, {}, False),
        ({"document_mask": True}, {}, False),
        ({"quantization": "nf4"}, {}, False),
        ({"quantization": "fp8"}, {}, True),
        ({}, {"engine": "zero2"}, True),
        ({}, {"engine": "zero3"}, False),
    ],
)
def test_auto_compiles_where_a_long_trial_gains_by_it(overrides, execution, expected, monkeypatch):
    """On a GPU with Triton, which this machine need not have; the plan says so too."""
    monkeypatch.setattr(compilation, "_can_compile", lambda device: True)
    training, engine = config(**{**LONG, **overrides}), Engine(torch.device("cuda"), "bfloat16")
    execution = ExecutionConfig(**execution)
    assert layers_compile(LLAMA_2_7B, training, execution, engine.device, engine.num_workers) == expected
    assert planned(training, execution, device=Device.named("NVIDIA H200")) == expected


def planned(training, execution, **where):
    return Loop.of(ModelShape.of(LLAMA_2_7B.config), training, execution, **where).compiled


def test_each_worker_has_its_share_of_the_work_to_gain_by():
    execution, device = ExecutionConfig(), Device.named("NVIDIA H200")
    training = config(**LONG | {"steps": 10})
    assert planned(training, execution, workers=1, device=device)
    assert not planned(training, execution, workers=8, device=device)


def test_auto_compiles_nothing_on_a_cpu():
    engine, cpu = Engine(torch.device("cpu"), "bfloat16"), Device.cpu(cores=2, memory=2**33)
    assert not layers_compile(LLAMA_2_7B, config(**LONG), ExecutionConfig(), engine.device, engine.num_workers)
    assert not planned(config(**LONG), ExecutionConfig(), device=cpu)
    assert planned(config(**LONG), ExecutionConfig(compile_layers="on"), device=cpu)


def test_compiled_layers_with_zero3_are_refused():
    engine, execution = Engine(torch.device("cpu"), "bfloat16"), ExecutionConfig(engine="zero3", compile_layers="on")
    with pytest.raises(InputError, match="compile_layers is on with the engine zero3"):
        layers_compile(LLAMA_2_7B, config(**LONG), execution, engine.device, engine.num_workers)
    with pytest.raises(InputError, match="compile_layers is on with the engine zero3"):
        planned(config(**LONG), execution)
