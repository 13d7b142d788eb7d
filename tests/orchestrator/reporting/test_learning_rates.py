"""How learning rates were chosen holds for the settings for which they were, and not for others."""

import pytest

from orchestrator.recipes import RECIPES
from orchestrator.reporting.learning_rates import learning_rates_chosen


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 7}, "(steps 7 instead of "),
        ({"context_lengths": [1024, 4096]}, "(context lengths 1024 4096 instead of "),
        ({"methods": ["lora", "lora+norm"]}, "(methods lora lora+norm instead of "),
        ({"data": "./texts"}, "data ./texts instead of builtin:stdlib"),
        ({"train_layers": ["all", "last 2"]}, "(train layers all 'last 2' instead of all)"),
    ],
)
def test_rates_of_a_recipe_with_other_settings_were_not_chosen_for_these(changes, named):
    recipe = RECIPES["convergence"]()
    text = learning_rates_chosen(recipe.changed(**changes))
    assert text.startswith("for the recipe convergence, not for these settings (") and named in text
    assert text.endswith(f"): {recipe.learning_rates_chosen}")


@pytest.mark.parametrize("changes", [{}, {"methods": ["lora"]}, {"context_lengths": [2048], "seeds": [0, 1]}])
def test_a_part_of_the_recipe_has_its_rates(changes):
    recipe = RECIPES["convergence"]()
    assert learning_rates_chosen(recipe.changed(**changes)) == recipe.learning_rates_chosen


def test_what_the_user_says_stands():
    spec = RECIPES["convergence"]().changed(steps=7, learning_rates_chosen="by a grid at these settings")
    assert learning_rates_chosen(spec) == "by a grid at these settings"
