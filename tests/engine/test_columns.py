"""Columns: written and read in one place, in one order, and by the names that recipes had before."""

from types import SimpleNamespace

import pytest

from engine import catalog, quantized
from engine.columns import EXACT, POST, Column, format_of, label, ordered, recipe_named, recipe_of
from engine.errors import RequestError
from engine.formats import QUANTIZED

FLUX, LTX2 = catalog.MINI_FLUX, catalog.MINI_LTX2


def test_a_column_comes_back_as_it_was_written():
    for spec in catalog.MODELS.values():
        for own in spec.recipes:
            for name in QUANTIZED:
                for recipe in spec.recipes:
                    column = Column(name, own)
                    written = column.written(recipe)
                    assert Column.parse(written, spec, recipe) == Column.of(written, recipe) == column
                    assert ("@" in written) == (own != recipe)
                    assert format_of(written) == name


def test_the_reference_has_no_recipe():
    for recipe in FLUX.recipes:
        assert Column.parse("bf16", FLUX, recipe) == Column.of("bf16", recipe) == EXACT
        assert EXACT.written(recipe) == "bf16"


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("+no-lora+fp8-attention", "+no-lora+fp8-attention"),
        ("+fp8-attention+no-lora", "+no-lora+fp8-attention"),
        ("+fp8-attention+fp8-attention", "+fp8-attention"),
    ],
)
def test_options_are_read_in_any_order_and_written_in_one(written, kept):
    column = Column.of(f"nvfp4@tuned{written}", POST)
    assert column == Column("nvfp4", f"tuned{kept}") and (column.rules, column.options) == ("tuned", kept)
    assert column.fp8_attention and column.adapted == ("no-lora" not in kept)
    assert [column.written(recipe) for recipe in (POST, "tuned")] == [f"nvfp4@tuned{kept}", f"nvfp4{kept}"]
    assert Column.of(f"bf16{written}", POST) == Column("bf16", kept) != EXACT


def test_a_stored_checkpoint_may_have_fp8_attention_and_stays_itself(monkeypatch):
    held = SimpleNamespace(name="mine", models=(FLUX.id,), format="nvfp4")
    monkeypatch.setattr(quantized, "named", lambda name: held if name == "mine" else None)
    column = Column.parse("nvfp4@mine+fp8-attention", FLUX, POST)
    assert column.rules == "mine" and column.fp8_attention
    with pytest.raises(RequestError, match=r"has no LoRA to leave out"):
        Column.parse("nvfp4@mine+no-lora", FLUX, POST)


def test_the_posts_recipe_is_every_models_first():
    assert {spec.recipes[0] for spec in catalog.MODELS.values()} == {POST}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nvfp5@tuned", "There is no precision 'nvfp5': choose from bf16, fp8, "),
        ("@tuned", "There is no precision '': choose from bf16, fp8, "),
        (4, "There is no precision 4: choose from bf16, fp8, "),
        (["nvfp4"], "There is no precision ['nvfp4']: choose from bf16, fp8, "),
        ("nvfp4@", "FLUX miniature has no recipe '': choose post or tuned or rebalanced or full."),
        ("nvfp4@best", "FLUX miniature has no recipe 'best': choose post or tuned or rebalanced or full."),
        ("nvfp4@tuned@full", "FLUX miniature has no recipe 'tuned@full': choose post or tuned or rebalanced or full."),
        ("bf16@tuned", "bf16 is the reference, which no recipe changes: leave out '@tuned'."),
        ("bf16@", "bf16 is the reference, which no recipe changes: leave out '@'."),
        ("fp8+fp4-attention", "There is no precision 'fp8+fp4-attention': choose from bf16, fp8, "),
        ("fp8@post+attention", "FLUX miniature has no recipe 'post+attention': choose post or "),
        ("fp8+no-lora+fp8-attention", "FLUX miniature has no LoRA to leave out: leave out +no-lora, or name one"),
    ],
)
def test_what_is_no_column_is_refused_in_one_sentence(text, sentence):
    with pytest.raises(RequestError) as caught:
        Column.parse(text, FLUX, POST)
    assert str(caught.value).startswith(sentence) and str(caught.value).count(". ") == 0


def test_columns_stand_in_the_formats_order_then_in_the_recipes():
    given = [Column("nvfp4", "full"), Column("fp8", POST), Column("nvfp4", "tuned"), EXACT, Column("nvfp4", POST)]
    given += [Column("nvfp4", f"{POST}+fp8-attention"), Column("bf16", "+fp8-attention")]
    wanted = ["bf16", "bf16+fp8-attention", "fp8", "nvfp4", "nvfp4+fp8-attention", "nvfp4@tuned", "nvfp4@full"]
    assert [column.written(POST) for column in ordered([*given, *given], FLUX)] == wanted
    assert [column.written(POST) for column in ordered([Column("nvfp4", "gone"), *given], FLUX)][-1] == "nvfp4@gone"


def test_the_names_that_recipes_had_are_read():
    assert recipe_of(LTX2, "seed") == POST and recipe_of(LTX2, "seed-corrected") == "post-corrected"
    assert Column.parse("nvfp4@seed", LTX2, "full") == Column("nvfp4", POST)
    assert [recipe_named(name) for name in ("seed", "post", "mine")] == [POST, POST, "mine"]


def test_a_label_is_for_people():
    assert [label(written) for written in ("bf16", "nvfp4", "mxfp8@full")] == ["bf16", "NVFP4", "MXFP8 full"]
