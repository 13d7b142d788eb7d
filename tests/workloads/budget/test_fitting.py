"""What makes a trial fit its device."""

import dataclasses
import itertools
import subprocess
import sys

import pytest

from tests.support.budget import GIB, H200, LLAMA2_7B, on_gpu, training_config
from workloads.budget import (
    Device,
    memory_needed,
    resolve_auto,
    smallest_change_that_fits,
    step_seconds,
    with_fewest_recomputed,
)
from workloads.config import ExecutionConfig
from workloads.errors import InputError


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB"])
def test_what_does_not_fit_is_changed_by_what_costs_least(name):
    """At least as good as every micro-batch with every number of layers that recompute, on one device."""
    asked, device = ExecutionConfig(), Device.named(name)
    training = on_gpu(8192, group_size=2048, batch=64)
    assert memory_needed(LLAMA2_7B, training, asked, 1, device).total > device.memory
    fit = smallest_change_that_fits(LLAMA2_7B, training, asked, 1, device)
    assert fit.memory == memory_needed(LLAMA2_7B, training, fit.execution, fit.workers, device)
    assert fit.memory.total <= device.memory
    every = [
        ExecutionConfig(micro_batch=rows, gradient_checkpointing=layers)
        for rows, layers in itertools.product((64, 32, 16, 8, 4, 2, 1), range(33))
    ]
    fitting = [e for e in every if memory_needed(LLAMA2_7B, training, e, 1, device).total <= device.memory]
    cheapest = min(step_seconds(LLAMA2_7B, training, each, 1, device) for each in fitting)
    assert step_seconds(LLAMA2_7B, training, fit.execution, 1, device) <= cheapest
    layers = fit.execution.gradient_checkpointing
    assert f"micro-batches of {fit.execution.micro_batch}" in fit.changes
    assert (f"gradient checkpointing of {layers} of 32 layers" in fit.changes) == (layers > 0)


@pytest.mark.parametrize("method", ["lora", "lora+", "full"])
@pytest.mark.parametrize("context_length", [8192, 32768, 98304])
def test_no_more_layers_recompute_than_it_takes(context_length, method):
    for device in map(Device.named, ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB")):
        training = on_gpu(context_length, method, 2048)
        found = with_fewest_recomputed(LLAMA2_7B, training, ExecutionConfig(), 1, device)
        fits = [
            memory_needed(LLAMA2_7B, training, ExecutionConfig(gradient_checkpointing=n), 1, device).total
            <= device.memory
            for n in range(33)
        ]
        assert (found.gradient_checkpointing if found else None) == (fits.index(True) if any(fits) else None)
        assert fits == sorted(fits), "what fits with some fits with more"


def test_layers_without_a_backward_pass_are_none_that_recompute():
    for method, train_layers, whole in (
        ("lora", "all", 32), ("lora", "last 4", 4), ("lora+norm", "5,31", 27), ("full", "last 4", 4),
        ("lora+", "last 4", 32), ("untuned", "all", 0),
    ):  # fmt: skip
        training = training_config(method=method, train_layers=train_layers, steps=2 * (method != "untuned"))
        execution = resolve_auto(LLAMA2_7B, training, ExecutionConfig(gradient_checkpointing="all"))
        assert execution.gradient_checkpointing == whole
        assert resolve_auto(LLAMA2_7B, training, execution) == execution
    with pytest.raises(InputError, match="gradient_checkpointing is 33, but the model has 32 layers"):
        resolve_auto(LLAMA2_7B, training_config(), ExecutionConfig(gradient_checkpointing=33))


def test_more_workers_and_zero_come_where_one_device_is_not_enough():
    training = on_gpu(8192, "full", 2048, batch=64)
    device = Device.named("NVIDIA A100-SXM4-80GB")
    execution = ExecutionConfig(gradient_checkpointing="all", micro_batch=1)
    alone = smallest_change_that_fits(LLAMA2_7B, training, execution, 1, device)
    assert alone.execution.offload
    together = smallest_change_that_fits(LLAMA2_7B, training, execution, 1, device, max_workers=8)
    assert (together.workers, together.execution.engine, together.execution.offload) == (4, "zero2", False)
    small = Device.named("NVIDIA A100-SXM4-40GB")
    assert (
        smallest_change_that_fits(LLAMA2_7B, training, execution, 1, small, max_workers=8).execution.engine == "zero3"
    )
    compiled = dataclasses.replace(execution, compile_layers="on")  # which ZeRO-3 refuses
    assert smallest_change_that_fits(LLAMA2_7B, training, compiled, 1, small, max_workers=8) is None
    tiny = dataclasses.replace(device, memory=4 * GIB)
    assert smallest_change_that_fits(LLAMA2_7B, training, execution, 1, tiny, max_workers=8) is None


def test_what_fits_is_left_as_it_is():
    execution = ExecutionConfig(micro_batch=1)
    fit = smallest_change_that_fits(LLAMA2_7B, on_gpu(8192, batch=8), execution, 1, H200, max_workers=8)
    assert (fit.execution, fit.workers, fit.changes) == (execution, 1, ())


def test_planning_needs_no_torch():
    code = "import sys, workloads.budget; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
