"""A sweep as data: every recipe, written and read."""

import json

import pytest

from orchestrator.expansion import expand
from orchestrator.recipes import RECIPES
from orchestrator.spec import SweepSpec
from orchestrator.trial_spec import Identities

IDENTITIES = Identities(model="sha256:m", tokenizer="sha256:t", data="stdlib:d")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_a_sweep_that_survives_its_file(recipe):
    spec = RECIPES[recipe]()
    assert SweepSpec.of(json.loads(json.dumps(spec.values()))) == spec
    assert expand(spec, IDENTITIES, "float32").trials
