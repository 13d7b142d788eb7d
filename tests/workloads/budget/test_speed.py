"""Seconds: against measurements on GPUs and CPUs and the paper's hours."""

import dataclasses
import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.memory import RandomTokens
from tests.support.budget import AS_USERS_WRITE_IT, GIB, H200, LLAMA2_7B, on_gpu, training_config
from tests.support.traffic import family_config
from workloads.budget import (
    Device,
    ModelShape,
    calibrated,
    evaluation_seconds,
    memory,
    model_flops_utilisation,
    step_seconds,
    trial_seconds,
)
from workloads.budget.activations import Widths
from workloads.budget.loop import Loop
from workloads.config import ExecutionConfig
from workloads.engines.engine import Engine
from workloads.models.source import ModelSource
from workloads.training.loop import Trial
from workloads.training.setup import prepare_model

# Tokens/s on one H200: the runs of MEASURED_GIB; the last is with cuDNN's attention, which this package takes there.
MEASURED_SPEED = {
    (8192, "all"): 7869,
    (32768, "all"): 5651,
    (65536, "all"): 4052,
    (98304, "all"): 3126,
    (8192, 0): 10898,
}


@pytest.mark.parametrize(("context_length", "checkpointing"), MEASURED_SPEED)
def test_speeds_measured_on_an_h200(context_length, checkpointing):
    """Two of the device's shares are fitted to these."""
    execution = ExecutionConfig(gradient_checkpointing=checkpointing)
    seconds = step_seconds(LLAMA2_7B, on_gpu(context_length), execution, 1, H200, loop=AS_USERS_WRITE_IT)
    assert context_length / seconds == pytest.approx(MEASURED_SPEED[context_length, checkpointing], rel=0.025)


# benchmarks.training_speed on one H200: tokens/s and GiB by (method, context, group size, layers that recompute, and
# that are offloaded).
COMPILED_MEASURED = {
    ("lora+", 8192, 2048, 0, 0): (19_310, 39.50),
    ("lora+", 8192, None, 0, 0): (16_295, 39.50),
    ("lora+", 32768, 8192, 0, 0): (16_316, 116.16),
    ("lora+", 32768, None, 0, 0): (9_708, 116.16),
    ("lora+", 98304, 8192, 23, 0): (13_295, 123.93),
    ("lora+", 98304, 8192, 14, 8): (14_230, 126.49),
    ("full", 8192, 2048, 0, 0): (12_588, 121.9),
}


@pytest.mark.parametrize(("method", "context_length", "group_size", "recomputed", "offloaded"), COMPILED_MEASURED)
def test_compiled_layers_measured_on_an_h200(method, context_length, group_size, recomputed, offloaded):
    """One number is fitted to the speeds, and one chosen with full fine-tuning in view; none to the memory."""
    training = training_config(context_length, method, group_size, precision="bfloat16")
    execution = ExecutionConfig(compile_layers="on", gradient_checkpointing=recomputed, offload_activations=offloaded)
    speed, peak = COMPILED_MEASURED[method, context_length, group_size, recomputed, offloaded]
    assert context_length / step_seconds(LLAMA2_7B, training, execution, 1, H200) == pytest.approx(speed, rel=0.035)
    loop = Loop.of(LLAMA2_7B, training, execution, 1, H200)
    assert memory(LLAMA2_7B, training, execution, 1, loop=loop).allocated / GIB == pytest.approx(peak, rel=0.015)


SMOLLM2_135M = ModelShape.of(
    LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    )
)  # fmt: skip


@pytest.mark.parametrize(("method", "measured"), [("lora+", 95_000), ("full", 103_000)])
def test_a_small_models_speed_is_predicted_from_a_large_ones(method, measured):
    """Nothing is fitted to these: one H200, 32,768 tokens, S²-Attn, layers not compiled, docs/performance.md."""
    training, loop = on_gpu(32768, method, 8192, batch=8), Loop(widths=Widths.of("bfloat16"))
    seconds = step_seconds(SMOLLM2_135M, training, ExecutionConfig(micro_batch=1), 1, H200, loop=loop)
    assert 8 * 32768 / seconds == pytest.approx(measured, rel=0.06)


def test_a_tiny_models_step_is_as_long_as_its_kernels_take_to_launch():
    """builtin:tiny's sweep of 1,024 and 2,048 tokens on an H200, in its shape of then: 100,000 to 230,000 tokens/s."""
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, vocab_size=264)
    shape = ModelShape.of(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))
    loop, speeds = Loop(widths=Widths.of("bfloat16")), []  # that sweep's groups went through autograd
    for tokens, method in itertools.product((1024, 2048), ("lora", "lora+", "full")):
        training = on_gpu(tokens, method, tokens // 4, batch=2)
        speeds.append(2 * tokens / step_seconds(shape, training, ExecutionConfig(), 1, H200, loop=loop))
    assert 100_000 == pytest.approx(min(speeds), rel=0.15)
    assert 230_000 == pytest.approx(max(speeds), rel=0.15)


# Tokens/s of builtin:tiny on one core of an AMD EPYC (docs/performance.md), at 1,024 and 2,048 tokens.
CPU_SPEED = {"lora": (4559, 3890), "lora+": (4410, 3653), "full": (3693, 2997)}


@pytest.mark.parametrize("method", CPU_SPEED)
def test_speeds_measured_on_a_cpu(method):
    """Their groups went through autograd."""
    shape, device = ModelShape.of(ModelSource.parse("builtin:tiny").config()), Device.cpu(cores=1, memory=8 * GIB)
    loop = Loop(widths=Widths.of("float32"))
    for context_length, measured in zip((1024, 2048), CPU_SPEED[method]):
        training = training_config(context_length, method, context_length // 4, batch=2)
        seconds = step_seconds(shape, training, ExecutionConfig(), 1, device, loop=loop)
        assert 2 * context_length / seconds == pytest.approx(measured, rel=0.05)


# LongLoRA v3 table 12: hours of 1,000 steps of 64 sequences on 8 A100.
PAPER_HOURS = {"lora": (6.0, 14.0, 36.5, 92.5), "lora+": (5.2, 11.3, 24.6, 52.4)}
A100 = dataclasses.replace(Device.named("NVIDIA A100-SXM4-80GB"), link=float("inf"))


@pytest.mark.parametrize("method", PAPER_HOURS)
@pytest.mark.parametrize(("fitted", "within"), [(True, 0.07), (False, 0.16)])
def test_hours_that_the_paper_reports_on_a100s(method, fitted, within):
    """LoRA with full attention, LoRA+ with S²-Attn; only compute is compared.

    With an H200's shares nothing is fitted to these hours.
    """
    shares = ("linear_efficiency", "attention_efficiency", "bandwidth_efficiency", "streaming_efficiency")
    device = A100 if fitted else dataclasses.replace(A100, **{name: getattr(H200, name) for name in shares})
    for context_length, hours in zip((8192, 16384, 32768, 65536), PAPER_HOURS[method]):
        group_size = context_length // 4 if method == "lora+" else None
        training = on_gpu(context_length, method, group_size, batch=64, steps=1000)
        execution = ExecutionConfig(gradient_checkpointing="all", micro_batch=1, engine="zero2")
        seconds = 1000 * step_seconds(LLAMA2_7B, training, execution, 8, device, loop=AS_USERS_WRITE_IT)
        assert seconds / 3600 == pytest.approx(hours, rel=within)


def test_a_measured_trial_sets_the_speed_of_others():
    """The one measured comes out as it was; another scales by its FLOPs."""
    execution = ExecutionConfig(gradient_checkpointing="all")
    measured = on_gpu(8192, batch=4)
    device = calibrated(H200, LLAMA2_7B, measured, execution, 1, tokens_per_second=4000)
    assert step_seconds(LLAMA2_7B, measured, execution, 1, device) == pytest.approx(4 * 8192 / 4000)
    other = on_gpu(32768, batch=8)
    ratio = step_seconds(LLAMA2_7B, other, execution, 1, device) / step_seconds(LLAMA2_7B, other, execution, 1, H200)
    before = step_seconds(LLAMA2_7B, measured, execution, 1, H200)
    assert ratio == pytest.approx((4 * 8192 / 4000) / before)


def test_a_trial_is_its_steps_and_its_evaluations():
    training = on_gpu(8192, steps=10, eval_every=4, eval_documents=6, batch=2)
    execution = ExecutionConfig()
    step = step_seconds(LLAMA2_7B, training, execution, 2, H200)
    evaluation = evaluation_seconds(LLAMA2_7B, training, 2, H200)
    shorter = evaluation_seconds(LLAMA2_7B, training, 2, H200, 4096)

    def seconds(**where):
        return trial_seconds(LLAMA2_7B, training, execution, 2, H200, **where)

    assert seconds() == pytest.approx(10 * step + 4 * evaluation)  # at steps 0, 4, 8 and 10
    assert seconds(original_length=4096) == pytest.approx(10 * step + 4 * evaluation + shorter)
    assert seconds(from_step=8) == pytest.approx(2 * step + evaluation)
    assert shorter < evaluation  # as many tokens, in shorter windows
    untuned = on_gpu(8192, "untuned", steps=0, eval_documents=6)
    assert trial_seconds(LLAMA2_7B, untuned, execution, 2, H200) == evaluation_seconds(LLAMA2_7B, untuned, 2, H200)
    assert seconds(step_0_known=True) == pytest.approx(10 * step + 3 * evaluation)


def test_utilisation_counts_nothing_twice():
    """6 FLOPs a weight and token for what trains, twice the forward for attention's backward; by hand."""
    training = on_gpu(8192, "full")
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000
    attention = 3 * 4 * 4096 * 32 * (8192 + 1) / 2
    expected = (6 * weights + attention) * 5000 / 989.4e12
    assert model_flops_utilisation(LLAMA2_7B, training, 5000, H200) == pytest.approx(expected)


class OnAnH200(Engine):
    """A CPU that says that it is a GPU of known peak."""

    def device_name(self):
        return "NVIDIA H200"


@pytest.mark.parametrize(("engine", "told"), [(OnAnH200, True), (Engine, False)])
def test_a_step_tells_its_utilisation_where_the_device_is_known(engine, told, tmp_path):
    model_config, training = family_config("llama"), training_config(32, "lora+")
    engine = engine(torch.device("cpu"), "float32")
    model = prepare_model(AutoModelForCausalLM.from_config(model_config), training, engine, ExecutionConfig())
    events = []
    trial = Trial(
        model, training, ExecutionConfig(), RandomTokens(512), tmp_path, engine,
        lambda event, **fields: events.append(fields),
    )  # fmt: skip
    trial.train_step(trial.start())
    (step,) = events
    assert ("mfu" in step) == told
    if told:
        shape = ModelShape.of(model_config)
        assert step["mfu"] == model_flops_utilisation(shape, training, step["tokens_per_second"], H200)
