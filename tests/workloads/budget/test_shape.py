"""A model's shape: its parameter counts are those of the real model."""

import itertools

import pytest

from tests.support.budget import LLAMA2_7B, METHODS, training_config
from tests.support.models import small_model
from workloads.adaptation.methods import adapt, count_parameters
from workloads.budget import (
    ModelShape,
    what_trains,
)
from workloads.errors import InputError
from workloads.models.families import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_counts_are_those_of_the_model(family):
    for method, train_layers, tied in itertools.product(METHODS, ("all", "last 1"), (True, False)):
        model = small_model(family, tie_word_embeddings=tied)
        shape = ModelShape.of(model.config)
        trains = what_trains(shape, training_config(method=method, train_layers=train_layers))
        counted = count_parameters(adapt(model, method, train_layers=train_layers))
        assert (trains.parameters, trains.trainable) == counted, (method, train_layers, tied)


@pytest.mark.parametrize("biases", [dict(attention_bias=True), dict(mlp_bias=True)])
def test_biases_and_other_lora_targets_count(biases):
    model = small_model("llama", **biases)
    trains = what_trains(
        ModelShape.of(model.config), training_config(method="lora", lora_targets=("down_proj",), lora_rank=3)
    )
    counted = count_parameters(adapt(model, "lora", lora_targets=("down_proj",), lora_rank=3))
    assert (trains.parameters, trains.trainable) == counted


def test_what_a_model_does_not_have_is_refused():
    with pytest.raises(InputError, match=r"qproj, which the family llama does not have.*down_proj"):
        what_trains(LLAMA2_7B, training_config(lora_targets=("qproj",)))
    with pytest.raises(InputError, match="the model has 32 layers"):
        what_trains(LLAMA2_7B, training_config(train_layers="last 33"))
    with pytest.raises(InputError, match=r"an? opt model is of no family .*choose a model of the families Llama"):
        ModelShape.of(type("Config", (), {"model_type": "opt"}))
