"""Gradient checkpointing of some layers: which are computed again, and that nothing else changes."""

import pytest
import torch

from tests.support.models import random_tokens
from tests.support.training import LAYERS, count_forwards, set_up_model
from workloads.adaptation.methods import trainable_parameters
from workloads.budget import ModelShape, what_trains
from workloads.config import ExecutionConfig
from workloads.engines.engine import Engine
from workloads.errors import InputError
from workloads.models.families import FAMILIES
from workloads.training import compilation
from workloads.training.compilation import compile_layers
from workloads.training.optimization import build_optimizer


@pytest.mark.parametrize(
    ("method", "train_layers", "count", "expected"),
    [
        ("lora+", "all", 0, [1, 1, 1, 1]),
        ("lora+", "all", 1, [2, 1, 1, 1]),
        ("lora+", "all", "all", [2, 2, 2, 2]),
        ("full", "all", 3, [2, 2, 2, 1]),
        ("lora", "all", 2, [2, 2, 1, 1]),
        # Nothing trains in or before the first two layers: they have no backward pass, and nothing to recompute for it.
        ("lora", "last 2", "all", [1, 1, 2, 2]),
        ("lora", "last 2", 1, [1, 1, 2, 1]),
        ("lora+norm", "1", "all", [1, 2, 2, 2]),
        ("full", "last 1", 4, [1, 1, 1, 2]),
        # Here the embeddings train, so that gradients come down to them.
        ("lora+", "last 2", "all", [2, 2, 2, 2]),
    ],
)
def test_the_first_layers_with_a_backward_pass_run_twice(method, train_layers, count, expected):
    model, training = set_up_model(method, train_layers, count)
    assert count_forwards(model) == expected
    planned = what_trains(ModelShape.of(model.config), training, count).checkpointed
    assert [index for index, times in enumerate(expected) if times == 2] == list(planned), "the plan says the same"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_recomputes(family):
    assert count_forwards(set_up_model("lora", count=2, family=family)[0]) == [2, 2, 1, 1]


def test_evaluation_recomputes_nothing():
    model, _ = set_up_model("lora+", count="all")
    assert count_forwards(model.eval()) == [1] * LAYERS


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora+", "full"])
def test_losses_and_weights_are_bit_equal_with_any_number(method, precision):
    outcomes = []
    for count in (0, 1, LAYERS - 1, "all"):
        model, training = set_up_model(method, count=count, precision=precision)
        engine, optimizer, losses = Engine(torch.device("cpu"), precision), build_optimizer(model, training), []
        for step in range(training.steps):
            tokens = random_tokens(2 + step, 32)[step:]
            with engine.autocast():
                loss = model(tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        outcomes.append({"losses": torch.stack(losses), **trainable_parameters(model)})
    for other in outcomes[1:]:
        assert other.keys() == outcomes[0].keys()
        assert all(torch.equal(tensor, outcomes[0][name]) for name, tensor in other.items())


@pytest.mark.parametrize("count", [2, "all"])
def test_layers_that_recompute_keep_no_more_where_they_are_compiled(count, monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    kept, gradients = {}, {}
    for compiled in (False, True):
        model, _ = set_up_model("lora+", count=count)
        if compiled:
            compile_layers(model)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        sizes = {}  # by memory: what several layers keep of the same counts once

        def pack(tensor, sizes=sizes, weights=weights):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(random_tokens(), labels=random_tokens()).loss
        loss.backward()
        kept[compiled] = sum(sizes.values())
        gradients[compiled] = {name: parameter.grad for name, parameter in trainable_parameters(model).items()}
    # The rotary positions, which all layers share, are kept once.
    assert kept[True] <= 1.05 * kept[False]
    torch.testing.assert_close(gradients[True], gradients[False])


def test_more_layers_than_the_model_has_are_refused():
    with pytest.raises(InputError, match="gradient_checkpointing is 5, but the model has 4 layers"):
        set_up_model("lora", count=5)
    for wrong in (-1, "some", 2.5):
        with pytest.raises(InputError, match=r"expected a number of decoder layers, or all"):
            ExecutionConfig(gradient_checkpointing=wrong)


def test_what_an_earlier_version_wrote_down_means_all_or_none():
    assert ExecutionConfig(gradient_checkpointing=True) == ExecutionConfig(gradient_checkpointing="all")
    assert ExecutionConfig(gradient_checkpointing=False) == ExecutionConfig()
