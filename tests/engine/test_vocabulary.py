"""What the miniatures have learnt, and what of a prompt they have not."""

import json

import pytest

from assets.training import fluent_emoji
from assets.training import vocabulary as script
from engine import catalog, vocabulary
from engine.outputs import recordings

RECORDED = [bundle.comparison.request for bundle in recordings.read(recordings.FOLDER)]


def test_the_file_is_what_the_script_makes_of_the_training_data():
    """As far as that needs nothing fetched."""
    found = json.loads(vocabulary.FILE.read_text())
    assert found["learnt"]["animated"] == script.clips()
    assert found["around"] == script.frames()
    assert found["colours"] == {c: list(fluent_emoji.SYNONYMS.get(c, ())) for c in fluent_emoji.COLOURS}
    assert set(found["models"]) == set(catalog.BUNDLED)
    readme = (catalog.ASSETS / "models" / "README.md").read_text()
    for kind in found["learnt"].values():
        assert f"{len(kind['things'])} " in readme
    assert len(found["colours"]) == 14


@pytest.mark.parametrize("model", catalog.BUNDLED)
def test_examples_are_of_what_was_learnt(model):
    known = vocabulary.of(model)
    assert [known.read(example) for example in catalog.model(model).examples if not known.read(example).drawn] == []


@pytest.mark.parametrize("asked", RECORDED, ids=lambda asked: f"{asked.model}: {asked.prompt}")
def test_recorded_prompts_are_of_what_was_learnt(asked):
    assert vocabulary.of(asked.model).read(asked.prompt).drawn


@pytest.mark.parametrize(
    ("model", "prompt", "things", "unknown"),
    [
        ("mini-flux", "a cat on a red background", ["cat"], []),
        ("mini-flux", "A Hot Dog, on SKY BLUE!", ["hot dog"], []),
        ("mini-flux", "an orange on an orange background", ["orange"], []),
        ("mini-qwen", "a rose", ["rose"], []),
        ("mini-flux", "a cat riding a bicycle", ["cat", "bicycle"], ["riding"]),
        ("mini-flux", "an astronaut on mars", [], ["astronaut", "mars"]),
        ("mini-flux", "a blue background", [], []),
        ("mini-flux", "a penguin bouncing on a teal background", ["penguin"], ["bouncing"]),
        ("mini-ltx2", "a penguin bouncing on a teal background", ["penguin"], []),
        ("mini-ltx2", "a fire engine sliding in on a white background", ["fire engine"], []),
        ("mini-ltx2", "a castle", [], ["castle"]),
        ("mini-flux", "", [], []),
        ("mini-flux", "猫 ${x} <b>", [], ["猫", "${x}", "<b>"]),
    ],
)
def test_a_prompt_is_read_as_captions_were_built(model, prompt, things, unknown):
    found = vocabulary.of(model).read(prompt)
    assert (list(found.things), list(found.unknown)) == (things, unknown)
    assert found.drawn == (len(things) == 1 and not unknown)


def test_every_thing_on_every_colour_is_known():
    for model in catalog.BUNDLED:
        known = vocabulary.of(model)
        missed = [
            caption
            for name in known.things
            for colour in ("white", "orange", "sky blue")
            if not known.read(caption := fluent_emoji.canonical(name.lower(), colour)).drawn
        ]
        assert missed == []


def test_a_model_that_knows_more_than_a_list_has_none():
    assert vocabulary.of("flux.1-dev") is None
