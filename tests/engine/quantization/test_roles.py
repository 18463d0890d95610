"""Layers are called alike wherever they are listed."""

import pytest

from engine import catalog
from engine.quantization import recipes
from engine.quantization.roles import ROLES, role_name, role_of
from engine.weights import loading


@pytest.mark.parametrize("model", catalog.BUNDLED)
def test_a_pattern_of_a_list_has_the_role_of_each_of_its_layers(model):
    plan = recipes.plan(loading.empty_transformer(catalog.MODELS[model]), recipes.recipe(model, "post"), "nvfp4")
    for layer in plan.layers:
        parts = ["*" if part.isdecimal() and i == 1 else part for i, part in enumerate(layer.name.split("."))]
        assert role_of(".".join(parts)) == role_of(layer.name)


def test_a_role_has_words():
    assert role_name("transformer_blocks.3.attn.to_q") == ROLES["q"][0] == "Attention q"
    assert role_of("nonsense") == "other"
