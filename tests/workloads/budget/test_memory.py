"""Memory: what autograd saves and the training loop takes on a CPU, and peaks measured on an H200."""

import contextlib
import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.memory import MODELS, POINTS, Point, RandomTokens, as_json, compare, configure, measure, table
from tests.support.budget import AS_USERS_WRITE_IT, GIB, H200, LLAMA2_7B, on_gpu, training_config
from tests.support.models import plain_losses
from tests.support.traffic import family_config
from workloads.attention import group_kernels as shifted
from workloads.budget import (
    Device,
    ModelShape,
    checkpoint_bytes,
    memory,
    what_trains,
)
from workloads.budget.activations import Activations
from workloads.budget.loop import Loop
from workloads.config import ExecutionConfig
from workloads.engines.engine import Engine
from workloads.errors import InputError
from workloads.models.families import FAMILIES
from workloads.training.loop import Trial
from workloads.training.setup import prepare_model


def kept_for_backward(model_config, training):
    """Bytes of the distinct storages that autograd saves in a forward pass, parameters aside."""
    bfloat16 = training.precision == "bfloat16"
    model = AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    model.config.use_cache = False
    model = prepare_model(model, training, Engine(torch.device("cpu"), training.precision), ExecutionConfig())
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address is used twice
        return tensor

    tokens = torch.randint(8, 512, (training.batch, training.context_length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16) if bfloat16 else contextlib.nullcontext():
            logits = model.train()(input_ids=tokens).logits
        plain_losses(logits, tokens).sum()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "lora+", "full"])
@pytest.mark.parametrize("one_operator", [True, False])
def test_kept_activations_are_what_autograd_saves(family, method, one_operator, monkeypatch):
    """Within 10%; bfloat16 under autocast, several sequences, groups, by the operator and where it has no kernel.

    Not GPT-NeoX under autocast: on CUDA that makes its LayerNorm float32, on a CPU not.
    """
    if not one_operator:
        monkeypatch.setattr(shifted, "kernel_for", lambda *_: None)
    cases = [("float32", None, 1), ("float32", 64, 2), ("bfloat16", None, 2), ("bfloat16", 64, 1)]
    for precision, group_size, batch in cases:
        if (family == "gpt_neox" and precision == "bfloat16") or not (group_size or one_operator):
            continue
        model_config = family_config(family)
        training = training_config(256, method, group_size, precision=precision, batch=batch)
        shape = ModelShape.of(model_config)
        trains, widths = what_trains(shape, training), Loop.of(shape, training, ExecutionConfig()).widths
        kept = Activations(trains, widths, rows=batch, one_operator=one_operator)
        a_token = sum(count * kept.layer(layer) for layer, count in trains.kinds) + kept.head() + 4 * shape.vocab_size
        casts = trains.linear_weights * 2 * (precision == "bfloat16")
        predicted = batch * 256 * a_token + casts
        assert predicted == pytest.approx(kept_for_backward(model_config, training), rel=0.10), (precision, batch)


@pytest.mark.parametrize(
    ("name", "overrides", "execution", "expected"),
    [
        (None, {}, {}, True),
        (None, {"document_mask": True}, {}, False),
        ("NVIDIA H200", {}, {}, True),
        ("NVIDIA H200", {}, {"attention_backend": "sdpa"}, True),
        ("NVIDIA H200", {}, {"attention_backend": "flash2"}, False),
        ("NVIDIA H200", {"document_mask": True}, {}, False),
        ("NVIDIA H200", {"precision": "float32"}, {}, False),
        ("Tesla T4", {}, {}, False),
    ],
)
def test_groups_are_one_operator_where_it_has_a_kernel(name, overrides, execution, expected):
    training = on_gpu(8192, group_size=2048, **overrides)
    device = Device.named(name) if name else None
    assert Loop.of(LLAMA2_7B, training, ExecutionConfig(**execution), 1, device).one_operator == expected


def test_an_evaluation_has_the_logits_of_a_chunk():
    """Of 2^26 at a time: as the output layer gives them, in float32, and their log-probabilities."""
    untuned = on_gpu(65536, "untuned", steps=0)
    assert memory(LLAMA2_7B, untuned, ExecutionConfig()).logits == 2**26 * (2 + 4 + 4)
    short = on_gpu(1024, "untuned", steps=0)
    assert memory(LLAMA2_7B, short, ExecutionConfig(eval_batch_tokens=1)).logits == 1024 * 32000 * (2 + 4 + 4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [0, 2, "all"])
@pytest.mark.parametrize("method", ["lora", "lora+", "full"])
def test_the_peak_of_the_training_loop_is_predicted(method, checkpointing, precision):
    """Live tensors in two steps of the loop itself, with one micro-batch and with two; within 10%."""
    model_config = family_config("llama")
    for batch, micro_batch in ((1, None), (4, 2)):
        training = training_config(256, method, 64, precision=precision, batch=batch)
        execution = ExecutionConfig(gradient_checkpointing=checkpointing, micro_batch=micro_batch, eval_batch_tokens=1)
        peak, _ = measure(model_config, training, execution, torch.device("cpu"))
        predicted = memory(ModelShape.of(model_config), training, execution)
        assert predicted.allocated == pytest.approx(peak, rel=0.10), predicted


# GiB on one H200 by (context, checkpointing).
MEASURED_GIB = {
    (8192, "all"): 18.8, (32768, "all"): 35.6, (65536, "all"): 58.1, (98304, "all"): 80.5, (8192, 0): 69.0,
}  # fmt: skip


@pytest.mark.parametrize(("context_length", "checkpointing"), MEASURED_GIB)
def test_peaks_measured_on_an_h200(context_length, checkpointing):
    execution = ExecutionConfig(gradient_checkpointing=checkpointing)
    predicted = memory(LLAMA2_7B, on_gpu(context_length), execution, loop=AS_USERS_WRITE_IT)
    assert predicted.allocated / GIB == pytest.approx(MEASURED_GIB[context_length, checkpointing], rel=0.01)


def test_the_peak_of_compiled_layers_measured_on_an_h200():
    """The same run with each layer compiled; nothing is fitted to it."""
    compiled = dataclasses.replace(AS_USERS_WRITE_IT, compiled=True)
    predicted = memory(LLAMA2_7B, on_gpu(8192), ExecutionConfig(), loop=compiled)
    assert predicted.allocated / GIB == pytest.approx(47.6, rel=0.01)


def test_the_parts_make_the_total_and_a_4_bit_base_is_a_quarter_of_a_16_bit_one():
    sizes = {}
    for quantization in ("none", "nf4"):
        training = on_gpu(8192, quantization=quantization)
        predicted = memory(LLAMA2_7B, training, ExecutionConfig(gradient_checkpointing="all"))
        assert predicted.total == sum(getattr(predicted, part) for part in predicted.parts())
        sizes[quantization] = predicted.weights
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert sizes["none"] - sizes["nf4"] == pytest.approx(linear * (2 - 0.516), rel=1e-3)


def test_workers_share_out_what_their_engine_says():
    trainable = what_trains(LLAMA2_7B, on_gpu(8192, "full")).trainable
    settings = dict(gradient_checkpointing="all", micro_batch=1)
    training = on_gpu(8192, "full", batch=8)
    by_engine = {
        engine: memory(LLAMA2_7B, training, ExecutionConfig(engine=engine, **settings), workers=8)
        for engine in ("ddp", "zero2", "zero3")
    }
    alone = memory(LLAMA2_7B, on_gpu(8192, "full"), ExecutionConfig(**settings))
    assert by_engine["ddp"].total > alone.total  # DDP's buckets
    assert by_engine["ddp"].optimizer == alone.optimizer == 8 * trainable
    assert by_engine["zero2"].optimizer == by_engine["zero3"].optimizer == trainable
    assert by_engine["zero2"].trained == 4 * trainable + trainable // 2
    assert by_engine["zero3"].trained == trainable
    assert by_engine["zero3"].total < by_engine["zero2"].total < by_engine["ddp"].total
    offload = ExecutionConfig(engine="zero2", offload=True, **settings)
    offloaded = memory(LLAMA2_7B, training, offload, workers=8)
    assert (offloaded.optimizer, offloaded.host) == (0, 4 * 4 * trainable // 8)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="a batch of 8 sequences does not divide among 3 workers"):
        memory(LLAMA2_7B, on_gpu(8192, batch=8), ExecutionConfig(), workers=3)


def test_a_checkpoint_has_the_size_that_was_said(tmp_path):
    model_config, training = family_config("llama"), training_config(32, "lora+")
    engine = Engine(torch.device("cpu"), "float32")
    model = prepare_model(AutoModelForCausalLM.from_config(model_config), training, engine, ExecutionConfig())
    corpus = RandomTokens(512)
    trial = Trial(model, training, ExecutionConfig(), corpus, tmp_path, engine, lambda event, **fields: None)
    trial.train_step(trial.start())
    trial.save()
    written = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert checkpoint_bytes(ModelShape.of(model_config), training) == pytest.approx(written, rel=0.03)


# benchmarks.memory on one H200: GiB by (model, method, context, checkpointing). Nothing is fitted to them.
MEMORY_MEASURED = {
    ("1B", "lora", 8192, False): 12.98,
    ("1B", "lora", 32768, True): 8.46,
    ("1B", "lora+", 8192, False): 19.68,
    ("1B", "lora+", 32768, True): 12.14,
    ("1B", "lora+", 65536, True): 18.46,
    ("1B", "full", 8192, False): 33.03,
    ("1B", "full", 32768, True): 22.97,
    ("7B", "lora", 8192, False): 47.78,
    ("7B", "lora", 32768, True): 27.26,
    ("7B", "lora+", 8192, True): 17.69,
    ("7B", "lora+", 8192, False): 53.19,
    ("7B", "lora+", 32768, True): 28.98,
    ("7B", "lora+", 65536, True): 44.04,
    ("7B", "full", 8192, True): 101.58,
}


@pytest.mark.parametrize("point", MEMORY_MEASURED)
def test_peaks_of_the_training_loop_measured_on_an_h200(point):
    training, execution = configure(Point(*point), on_gpu=True)
    shape = ModelShape.of(MODELS[point[0]])
    predicted = memory(shape, training, execution, loop=Loop.of(shape, training, execution, 1, H200))
    assert predicted.allocated / GIB == pytest.approx(MEMORY_MEASURED[point], rel=0.10)


def test_the_benchmark_shows_every_point_beside_its_prediction():
    device = torch.device("cpu")
    results = [
        compare(Point("tiny", "lora+", 64, checkpointing), family_config("llama"), device)
        for checkpointing in (False, True)
    ]
    rows = table(results).splitlines()[2:]
    assert [row.split(" | ")[3] for row in rows] == ["no", "yes"]
    for result, row in zip(json.loads(as_json(results, device))["points"], rows):
        assert result["predicted_bytes"] == pytest.approx(result["measured"], rel=0.1)
        assert f"{result['predicted_bytes'] / result['measured'] - 1:+.1%}" in row
    fitting = [
        point
        for point in POINTS
        if memory(ModelShape.of(MODELS[point.model]), *configure(point, True)).total < H200.memory
    ]
    assert len(fitting) >= 12
