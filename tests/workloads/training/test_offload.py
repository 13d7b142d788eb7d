"""Activations in host memory: results stay, device memory is as planned, and the plan offloads what costs no time.

Here the device is a CPU, whose copies are the same but for streams; ``-m gpu`` runs them on one.
"""

import copy
import dataclasses
import gc
import itertools

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

from benchmarks.live import LiveTensors
from benchmarks.memory import MODELS, start_trial
from tests.support.models import random_tokens
from tests.support.traffic import family_config
from tests.support.training import LAYERS, count_forwards, set_up_model
from workloads.adaptation.methods import decoder_layers, trainable_parameters
from workloads.budget import (
    Device,
    Loop,
    ModelShape,
    memory,
    memory_needed,
    most_offloaded,
    reduce_memory,
    smallest_change_that_fits,
    step_seconds,
    what_trains,
    with_fewest_recomputed,
)
from workloads.config import ExecutionConfig, TrainingConfig
from workloads.engines.engine import Engine
from workloads.errors import InputError
from workloads.models.families import FAMILIES
from workloads.training import offload
from workloads.training.offload import layers_to_offload, offload_activations
from workloads.training.optimization import build_optimizer
from workloads.training.recompute import recompute_activations

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture(autouse=True)
def whatever_its_size(monkeypatch):
    """Tensors of tiny models are offloaded too."""
    monkeypatch.setattr(offload, "SMALLEST", 1)


def offloading(method="lora+", count=2, recomputed=0, compiled=False, **settings):
    """(a trial's model, its configuration, the layers that are offloaded)."""
    model, training = set_up_model(method, **settings)
    away = layers_to_offload(model, count)
    recompute_activations(model, recomputed, exclude=away)
    offload_activations(model, count, CPU)
    if compiled:
        torch._dynamo.reset()
        for layer in decoder_layers(model)[1]:
            layer.compile(backend="aot_eager", dynamic=False)
    return model, training, away


def trained(model, training):
    """Losses of three steps of two micro-batches each, and what they make of the weights."""
    engine, optimizer, losses = Engine(CPU, training.precision), build_optimizer(model, training), []
    for step in range(training.steps):
        for part in range(2):
            tokens = random_tokens(6, 32)[2 * step + part :][:1]
            with engine.autocast():
                loss = model(tokens, labels=tokens).loss
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": torch.stack(losses), **trainable_parameters(model)}


def assert_equal(some, others):
    assert some.keys() == others.keys()
    for name, tensor in some.items():
        assert torch.equal(tensor, others[name]), name


@pytest.mark.parametrize(
    ("method", "precision", "compiled"),
    [
        ("lora+", "float32", False),
        ("lora+", "bfloat16", False),
        ("full", "bfloat16", False),
        ("lora+", "bfloat16", True),
    ],
)
def test_losses_and_weights_are_bit_equal(method, precision, compiled):
    plain, training, _ = offloading(method, 0, compiled=compiled, precision=precision)
    expected = trained(plain, training)
    for count, recomputed in ((2, 1),) if compiled else ((1, 0), (2, 1), (LAYERS, "all")):
        model, training, away = offloading(method, count, recomputed, compiled, precision=precision)
        assert len(away) == min(count, LAYERS - 1), "the last layer's backward pass comes at once"
        assert_equal(trained(model, training), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_offloaded_whole(family):
    """All memory that its layer saves something in, but for parameters and what all layers share: found by hooks."""
    plain, _ = set_up_model("lora", family=family)
    layer, saved, found = decoder_layers(plain)[1][0], {}, {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other takes its place
        return tensor

    def begin(_, args, shared):
        saved.clear()
        found["staying"] = [*layer.parameters(), *layer.buffers(), *tree_leaves(shared)]

    layer.register_forward_pre_hook(begin, with_kwargs=True)
    layer.register_forward_hook(lambda *_: found.update(saved=dict(saved)))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        plain(random_tokens())
    staying = {x.untyped_storage().data_ptr() for x in found["staying"] if isinstance(x, torch.Tensor)}
    expected = [x.untyped_storage().nbytes() for address, x in found["saved"].items() if address not in staying]
    model, _, (layer,) = offloading("lora", 1, family=family)
    model(random_tokens())
    assert sorted(map(len, layer.offload_schedule.own.buffers)) == sorted(expected)


def test_layers_are_those_of_the_plan_and_either_offloaded_or_recomputed():
    for count, recomputed, train_layers in ((1, 2, "all"), (2, 1, "all"), (2, "all", "all"), (1, "all", "last 2")):
        model, training, away = offloading("lora", count, recomputed, train_layers=train_layers)
        layers = list(decoder_layers(model)[1])
        planned = what_trains(ModelShape.of(model.config), training, recomputed, count)
        assert [each.layer for each in planned.offloaded] == [layers.index(layer) for layer in away]
        twice = [index for index, times in enumerate(count_forwards(model)) if times == 2]
        assert twice == list(planned.checkpointed)
        assert not planned.away & {*planned.checkpointed}


def test_evaluation_offloads_nothing():
    model, _, away = offloading()
    model.eval()(random_tokens())
    with torch.no_grad():
        model.train()(random_tokens())
    assert not any(layer.offload_schedule.own.buffers for layer in away)


def eight_layers():
    model_config = family_config("llama")
    model_config.num_hidden_layers = 8
    return model_config


def live_in_the_second_step(training, execution, tmp_path):
    """(peak of live bytes, those at the end), host memory aside, which the first step has made."""
    started, model = start_trial(eight_layers(), training, execution, CPU, tmp_path)
    started.train_step(model)
    gc.collect()
    live = LiveTensors()
    moments = [x for state in started.optimizer.state.values() for x in state.values()]
    on_the_host = host_buffers(started.model)
    live.start_with(*started.model.parameters(), *started.model.buffers(), *moments, *on_the_host)
    with live:
        started.train_step(model)
        gc.collect()
        host = sum(map(len, on_the_host))
        return live.peak - host, live.now - host


def host_buffers(model):
    places = [getattr(layer, "offload_schedule", None) for layer in decoder_layers(model)[1]]
    return [buffer for place in places if place and place.own for buffer in place.own.buffers]


@pytest.mark.parametrize(("method", "batch"), [("lora+", 1), ("lora", 2), ("full", 1)])
def test_the_device_has_what_is_planned_and_nothing_afterwards(method, batch, tmp_path):
    training = TrainingConfig(context_length=256, method=method, group_size=64, steps=2, batch=batch, eval_span=256)
    plain, after = live_in_the_second_step(training, ExecutionConfig(micro_batch=1, eval_batch_tokens=1), tmp_path)
    for count, recomputed in ((2, 0), (2, 3), (7, 0)):
        execution = ExecutionConfig(
            micro_batch=1, offload_activations=count, gradient_checkpointing=recomputed, eval_batch_tokens=1
        )
        peak, now = live_in_the_second_step(training, execution, tmp_path)
        predicted = memory(ModelShape.of(eight_layers()), training, execution)
        assert predicted.allocated == pytest.approx(peak, rel=0.10), predicted
        assert peak < plain
        assert now == after


def test_a_step_that_breaks_off_leaves_the_next_one_right():
    tokens, (model, _, away) = random_tokens(), offloading()
    expected, _, _ = offloading(count=0)
    expected(tokens, labels=tokens).loss.backward()
    last = decoder_layers(model)[1][-1]

    def broken(*_):
        raise RuntimeError("broken")

    for where in ("forward", "backward"):
        hook = last.register_forward_pre_hook(broken)
        if where == "backward":
            hook.remove()
            hook = decoder_layers(model)[1][1].register_full_backward_hook(broken)
        with pytest.raises(RuntimeError, match="broken"):
            model(tokens, labels=tokens).loss.backward()
        hook.remove()
        model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    gradients = [{name: x.grad for name, x in trainable_parameters(each).items()} for each in (model, expected)]
    assert_equal(*gradients)
    assert not any(each.device is not None for layer in away for each in layer.offload_schedule.own.stored.values())


def test_gradients_may_be_asked_for_twice_but_not_after_another_forward_pass():
    tokens, (model, _, _) = random_tokens(), offloading()
    first, second = (model(tokens, labels=tokens).loss for _ in range(2))
    with pytest.raises(RuntimeError, match="its backward pass has to come before its next forward pass"):
        first.backward()
    model.zero_grad()
    second.backward(retain_graph=True)
    once = {name: parameter.grad.clone() for name, parameter in trainable_parameters(model).items()}
    second.backward()
    assert_equal({name: 2 * gradient for name, gradient in once.items()},
                 {name: parameter.grad for name, parameter in trainable_parameters(model).items()})  # fmt: skip


def test_longer_sequences_get_larger_buffers():
    model, _, (layer,) = offloading(count=1)
    sizes = []
    for length in (16, 32, 24):
        model(random_tokens(1, length)).logits.sum().backward()
        sizes.append(sum(map(len, layer.offload_schedule.own.buffers)))
    assert sizes[0] < sizes[1] == sizes[2]


# What is chosen

LLAMA2_7B = ModelShape.of(MODELS["7B"])
H200 = dataclasses.replace(Device.named("NVIDIA H200"), host_memory=128 * GIB)
AUTO = ExecutionConfig(compile_layers="on", offload_activations="auto")


def on_gpu(context_length, group_size=8192, **overrides):
    values = dict(
        context_length=context_length, method="lora+", attention="s2", group_size=group_size, batch=1, steps=12
    )
    return TrainingConfig(**values | dict(precision="bfloat16", eval_span=context_length) | overrides)


def test_the_choice_for_98k_tokens_of_a_7b_on_an_h200():
    """Counted by hand.

    A compiled layer keeps for each token its input, the sum after attention, queries, keys, values and attention's
    output, and what three modules with LoRA matrices read (the fourth reads attention's output), 4,096 each; what the
    activation function and its gate read, 11,008 each; all in 2 bytes; attention's statistics in 4; and the outputs of
    four of LoRA's matrices, 8 each. 60% of 128 GiB of the host hold 8 layers; at 55 GB/s they take 1.45 s of a forward
    pass that is predicted at 2.5 s.
    """
    a_layer = 98_304 * (2 * (7 * 4096 + 2 * 11_008 + 4 * 8) + 4 * 32)
    chosen = with_fewest_recomputed(LLAMA2_7B, on_gpu(98_304), AUTO, 1, H200)
    assert (chosen.offload_activations, chosen.gradient_checkpointing) == (8, 14)
    needs = memory_needed(LLAMA2_7B, on_gpu(98_304), chosen, 1, H200)
    assert needs.host == pytest.approx(8 * a_layer, rel=1e-3)
    assert 0.6 * 128 * GIB // a_layer == 8
    assert needs.total < H200.memory
    alone = dataclasses.replace(AUTO, offload_activations=0)
    recomputing = with_fewest_recomputed(LLAMA2_7B, on_gpu(98_304), alone, 1, H200)
    assert recomputing.gradient_checkpointing == 23
    faster = step_seconds(LLAMA2_7B, on_gpu(98_304), recomputing, 1, H200) / step_seconds(
        LLAMA2_7B, on_gpu(98_304), chosen, 1, H200
    )
    assert 1.05 < faster < 1.12
    fit = smallest_change_that_fits(LLAMA2_7B, on_gpu(98_304), AUTO, 1, H200)
    assert fit.execution == chosen
    assert "activations of 8 of 32 layers in host memory" in fit.changes


@pytest.mark.parametrize(("name", "context_length"), [("NVIDIA H200", 65_536), ("NVIDIA A100-SXM4-80GB", 32_768)])
def test_no_number_lets_fewer_layers_recompute_and_no_smaller_one_as_few(name, context_length):
    device, training = dataclasses.replace(Device.named(name), host_memory=128 * GIB), on_gpu(context_length)
    chosen = with_fewest_recomputed(LLAMA2_7B, training, AUTO, 1, device)
    recomputed = [
        with_fewest_recomputed(LLAMA2_7B, training, dataclasses.replace(AUTO, offload_activations=n), 1, device)
        for n in range(most_offloaded(LLAMA2_7B, training, AUTO, 1, device) + 1)
    ]
    fewest = min(each.gradient_checkpointing for each in recomputed)
    assert chosen == next(each for each in recomputed if each.gradient_checkpointing == fewest)
    assert chosen.offload_activations > 0


def test_nothing_is_offloaded_where_nothing_has_to_recompute_or_it_would_cost_time():
    assert with_fewest_recomputed(LLAMA2_7B, on_gpu(32_768), AUTO, 1, H200).offload_activations == 0
    long = on_gpu(98_304)
    assert most_offloaded(LLAMA2_7B, long, AUTO, 1, H200) == 8
    slow = dataclasses.replace(H200, host_link=H200.host_link / 1e3)
    unknown = dataclasses.replace(H200, host_memory=0)
    new = dataclasses.replace(H200, bfloat16=0, name="a GPU of next year")
    for device in (slow, unknown, new, Device.cpu(cores=2, memory=128 * GIB)):
        assert most_offloaded(LLAMA2_7B, long, AUTO, 1, device) == 0
    zero = dataclasses.replace(AUTO, engine="zero2")
    assert most_offloaded(LLAMA2_7B, long, zero, 1, H200) == 0
    assert most_offloaded(LLAMA2_7B, on_gpu(98_304, task="sft"), AUTO, 1, H200) == 0
    assert most_offloaded(LLAMA2_7B, on_gpu(98_304, method="untuned", steps=0), AUTO, 1, H200) == 0
    shared = dataclasses.replace(H200, host_memory=H200.host_memory // 2)
    assert most_offloaded(LLAMA2_7B, on_gpu(98_304, batch=2), AUTO, 2, shared) == 4


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA A100-SXM4-80GB"])
def test_what_fits_with_some_that_recompute_fits_with_more(name):
    device = Device.named(name)
    for count, context_length in itertools.product((1, 5, 9, 16), (32_768, 98_304)):
        executions = [ExecutionConfig(offload_activations=count, gradient_checkpointing=n) for n in range(33)]
        totals = [memory_needed(LLAMA2_7B, on_gpu(context_length), each, 1, device).total for each in executions]
        fits = [total <= device.memory for total in totals]
        assert fits == sorted(fits)


def test_out_of_memory_gives_up_what_ran_out():
    """Each plan is one that training takes, and needs less of the device by its own prediction, or none of the host."""
    plans = [ExecutionConfig(offload_activations=8, gradient_checkpointing=14)]
    while again := reduce_memory(plans[-1], 1, 32):
        plans.append(again)
    device = Device.named("NVIDIA H200")
    needs = [memory_needed(LLAMA2_7B, on_gpu(98304), each, 1, device).total for each in plans]
    assert needs == sorted(needs, reverse=True) and needs[1] < 0.7 * needs[0]
    assert [(each.gradient_checkpointing, each.layers_offloaded) for each in plans] == [
        (14, 8), (19, 8), (23, 8), (24, 8), (32, 0)
    ]  # fmt: skip
    (of_host,) = {reduce_memory(plan, 1, 32, of_host=True) for plan in plans[:-1]}
    assert (of_host.gradient_checkpointing, of_host.offload_activations) == (32, 0)


def test_what_cannot_be_offloaded_is_refused():
    with pytest.raises(InputError, match="offload_activations is 5, but the model has 4 layers"):
        offloading(count=5)
    with pytest.raises(InputError, match="offload_activations is 33, but the model has 32 layers"):
        memory(LLAMA2_7B, on_gpu(8192), ExecutionConfig(offload_activations=33))
    for wrong in (-1, "some", True):
        with pytest.raises(InputError, match="expected a number of decoder layers, or auto"):
            ExecutionConfig(offload_activations=wrong)
    for engine in ("zero2", "zero3"):
        with pytest.raises(InputError, match=f"with the engine '{engine}', which moves tensors itself"):
            ExecutionConfig(engine=engine, offload_activations=1)
        ExecutionConfig(engine=engine, offload_activations="auto")


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("compile_layers", ["off", "on"])
def test_a_gpu_trains_the_same_in_less_memory(compile_layers, tmp_path, monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", 2**20)
    model_config = LlamaConfig(**MODELS["7B"].to_dict() | {"num_hidden_layers": 12, "vocab_size": 1000})
    shape, training, device = ModelShape.of(model_config), on_gpu(16_384, group_size=4096), torch.device("cuda", 0)
    measured, predicted, losses = {}, {}, {}
    for count in (0, 4):
        execution = ExecutionConfig(offload_activations=count, compile_layers=compile_layers)
        loop = Loop.of(shape, training, execution, 1, H200)
        predicted[count] = memory(shape, training, execution, loop=loop)
        losses[count], measured[count], buffers = steps_on_a_gpu(model_config, training, execution, device, tmp_path)
        assert all(buffer.is_pinned() for buffer in buffers)
        assert sum(map(len, buffers)) == pytest.approx(predicted[count].host, rel=0.05)
        del buffers
        gc.collect()
        torch.cuda.empty_cache()
    # On a GPU sums come in another order each time.
    assert losses[4] == pytest.approx(losses[0], rel=1e-3)
    assert measured[0] - measured[4] == pytest.approx(predicted[0].allocated - predicted[4].allocated, rel=0.1)


def steps_on_a_gpu(model_config, training, execution, device, folder):
    """(losses, peak bytes, host buffers) of a trial's steps."""
    events = []
    started, model = start_trial(
        copy.deepcopy(model_config), training, execution, device, folder,
        lambda event, **fields: events.append(fields),
    )  # fmt: skip
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(training.steps):
        started.train_step(model)
    losses = [fields["loss"] for fields in events]
    return losses, torch.cuda.max_memory_allocated(device), host_buffers(started.model)
