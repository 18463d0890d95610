"""Every field of a request: its default, what it takes, and one clear sentence for what it does not take."""

import json
import math
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine import catalog
from engine.columns import EXACT, Column
from engine.errors import RequestError
from engine.formats import PRECISIONS
from engine.request import CompareRequest

PROMPT = "a rocket on a blue background"
SPEC = catalog.MINI_FLUX
NUMBERS = ("seed", "num_inference_steps", "batch_size", "height", "width", "num_frames")
RANGED = {
    "seed": (0, 2**32 - 1),
    "num_inference_steps": SPEC.limits.num_inference_steps,
    "guidance_scale": SPEC.limits.guidance_scale,
    "batch_size": SPEC.limits.batch_size,
}


def refused(prompt=PROMPT, **fields):
    """The sentence with which a request is refused."""
    with pytest.raises(RequestError) as caught:
        CompareRequest.create(prompt, **fields)
    return sentence(str(caught.value))


def sentence(text):
    assert len(text.splitlines()) == 1
    assert text == text.strip() and text.endswith(".")
    assert ". " not in text, "more than one sentence"
    return text


def test_a_prompt_alone_takes_the_models_defaults():
    request = CompareRequest.create(PROMPT)
    assert request == CompareRequest(
        model="mini-flux",
        precisions=("bf16", "mxfp8", "nvfp4"),
        prompt=PROMPT,
        seed=SPEC.defaults.seed,
        num_inference_steps=SPEC.defaults.num_inference_steps,
        guidance_scale=SPEC.defaults.guidance_scale,
        height=SPEC.defaults.height,
        width=SPEC.defaults.width,
        num_frames=1,
        batch_size=1,
        recipe="post",
    )


def test_every_models_defaults_lie_within_its_limits():
    for spec in catalog.MODELS.values():
        assert CompareRequest.create(spec.examples[0], model=spec.id).model == spec.id


def test_every_example_is_a_valid_prompt():
    for spec in catalog.MODELS.values():
        assert len(spec.examples) >= 3
        for prompt in spec.examples:
            assert CompareRequest.create(prompt, model=spec.id).prompt == prompt


def test_json_round_trip():
    request = CompareRequest.create(
        'ein "Tiger" \\ 🐯\nnext line',
        precisions=["nvfp4"],
        seed=0,
        num_inference_steps=3,
        guidance_scale=4,
        batch_size=2,
    )
    values = json.loads(json.dumps(request.to_json()))
    assert CompareRequest.from_json(values) == request
    assert set(values) == set(CompareRequest.__dataclass_fields__)


def test_from_json_fills_in_defaults_and_refuses_unknown_fields():
    assert CompareRequest.from_json({"prompt": PROMPT}) == CompareRequest.create(PROMPT)
    with pytest.raises(RequestError, match="no field sampler, vae") as caught:
        CompareRequest.from_json({"prompt": PROMPT, "vae": 1, "sampler": 2})
    sentence(str(caught.value))


def test_from_json_without_a_prompt_says_so():
    with pytest.raises(RequestError, match="prompt must be text"):
        CompareRequest.from_json({"seed": 3})


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (["nvfp4", "fp8"], ("bf16", "fp8", "nvfp4")),
        (("mxfp8", "mxfp8", "bf16"), ("bf16", "mxfp8")),
        ("nvfp4, mxfp8", ("bf16", "mxfp8", "nvfp4")),
        ("fp8", ("bf16", "fp8")),
        (["bf16"], ("bf16",)),
        ("nvfp4@tuned fp8 nvfp4", ("bf16", "fp8", "nvfp4", "nvfp4@tuned")),
        (["nvfp4@full", "nvfp4@tuned", "nvfp4@post", "nvfp4"], ("bf16", "nvfp4", "nvfp4@tuned", "nvfp4@full")),
        ("nvfp4@seed", ("bf16", "nvfp4")),
    ],
)
def test_precisions_come_in_one_order_and_always_with_the_reference(asked, expected):
    assert CompareRequest.create(PROMPT, precisions=asked).precisions == expected


def test_a_column_of_the_requests_own_recipe_does_not_name_it():
    asked = CompareRequest.create(PROMPT, precisions=["nvfp4@tuned", "nvfp4", "nvfp4@seed", "mxfp8"], recipe="tuned")
    assert asked.precisions == ("bf16", "mxfp8", "nvfp4@post", "nvfp4")
    assert asked.columns == (EXACT, Column("mxfp8", "tuned"), Column("nvfp4", "post"), Column("nvfp4", "tuned"))
    assert CompareRequest.from_json(asked.to_json()) == asked


def test_a_request_covers_another_by_what_its_columns_are():
    def asked(precisions, **fields):
        return CompareRequest.create(PROMPT, precisions=precisions, **fields)

    tuned, both = asked("nvfp4", recipe="tuned"), asked("nvfp4 nvfp4@tuned")
    assert both.covers(tuned) and tuned.covers(asked("nvfp4@tuned")) and not tuned.covers(both)
    assert both.covers(asked("bf16", recipe="full")), "which recipe changes nothing of the reference"
    assert not both.covers(asked("nvfp4", recipe="full")) and not both.covers(asked("nvfp4@tuned", seed=8))


@pytest.mark.parametrize(("old", "new"), [("seed", "post"), ("seed-corrected", "post-corrected")])
def test_the_names_that_recipes_had_are_still_taken(old, new):
    saved = {"prompt": PROMPT, "model": "mini-ltx2", "recipe": old, "precisions": ["bf16", "nvfp4"]}
    asked = CompareRequest.from_json(saved)
    assert asked.recipe == asked.to_json()["recipe"] == new and asked.precisions == ("bf16", "nvfp4")


@pytest.mark.parametrize(
    ("precisions", "said"),
    [
        (["nvfp4@mine"], "FLUX miniature has no recipe 'mine': choose post or tuned or rebalanced or full."),
        ("nvfp9@tuned", "There is no precision 'nvfp9': choose from"),
        ("bf16@full", "bf16 is the reference, which no recipe changes: leave out '@full'."),
    ],
)
def test_a_column_that_there_is_not_is_refused(precisions, said):
    assert refused(precisions=precisions).startswith(said)


def test_prompts_are_stripped_and_may_have_several_lines():
    assert CompareRequest.create("  a cat\n\ton a mat \n").prompt == "a cat\n\ton a mat"


@pytest.mark.parametrize(
    "prompt",
    ["🐱 猫 on a røed background", "a\u00a0cat", "猫\u3000赤い背景", "👩\u200d🚀 on a red background", "می\u200cخواهم"],
)
def test_prompts_in_any_script_are_text(prompt):
    """A no-break or an ideographic space and the joiners of emoji and Persian are no control characters."""
    assert CompareRequest.create(prompt).prompt == prompt


def test_whole_numbers_may_come_as_floats():
    request = CompareRequest.create(PROMPT, seed=5.0, num_inference_steps=4.0, batch_size=2.0, height=256.0)
    assert (request.seed, request.num_inference_steps, request.batch_size, request.height) == (5, 4, 2, 256)
    assert all(type(getattr(request, name)) is int for name in NUMBERS)
    assert type(CompareRequest.create(PROMPT, guidance_scale=2).guidance_scale) is float


@pytest.mark.parametrize("name", RANGED)
def test_both_ends_of_each_range_are_allowed_and_no_more(name):
    low, high = RANGED[name]
    for value in (low, high):
        assert getattr(CompareRequest.create(PROMPT, **{name: value}), name) == value
    for value in (low - 1, high + 1, -1e300, 10**30):
        text = refused(**{name: value})
        assert name in text
        assert f"between {low:g} and {high:g}." in text or f"between {low} and {high}." in text


@pytest.mark.parametrize("name", ["height", "width"])
@pytest.mark.parametrize("value", [0, -256, 255, 512, 10**9])
def test_sizes_off_the_models_list(name, value):
    text = refused(**{name: value})
    assert str(value) in text and "256x256" in text


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value",
    [True, False, "7", "", "abc", math.nan, math.inf, -math.inf, [7], [], {"a": 1}, (7,), 7.5, b"7", 7j, Fraction(7)],
)
def test_wrong_types_for_whole_numbers(name, value):
    text = refused(**{name: value})
    assert f"{name} must be a whole number, not " in text


@pytest.mark.parametrize("value", [True, "2.5", math.nan, math.inf, -math.inf, [2.5], {}, 2j, Fraction(5, 2)])
def test_wrong_types_for_guidance(value):
    assert "guidance_scale must be a number, not " in refused(guidance_scale=value)


@pytest.mark.parametrize("name", [*RANGED, "height", "width"])
@pytest.mark.parametrize("digits", [400, 4000])
def test_numbers_of_absurd_length(name, digits):
    assert len(refused(**{name: 10**digits})) < 10_000


@pytest.mark.parametrize(
    "model", ["flux", "", "mini-flux ", "MINI-FLUX", 3, True, ["mini-flux"], {}, "a\nb", "../mini-flux"]
)
def test_unknown_models(model):
    text = refused(model=model)
    assert repr(model) in text and "mini-flux" in text


@pytest.mark.parametrize("name", ["int4", "", "BF16", "bf16\n", None, 8, ["bf16"], {}])
def test_unknown_precisions(name):
    text = refused(precisions=["nvfp4", name])
    assert repr(name) in text and all(p in text for p in PRECISIONS)


@pytest.mark.parametrize("precisions", [[], (), "", " , "])
def test_no_precision(precisions):
    text = refused(precisions=precisions)
    assert "No precision" in text and all(p in text for p in PRECISIONS)


@pytest.mark.parametrize("precisions", [8, True, 1.5, b"bf16", {"bf16": 1}])
def test_precisions_of_the_wrong_type(precisions):
    text = refused(precisions=precisions)
    assert "list" in text and all(p in text for p in PRECISIONS)


@pytest.mark.parametrize("recipe", ["half", "", 1, ["seed"], "seed\n", False])
def test_unknown_recipes(recipe):
    text = refused(recipe=recipe)
    assert repr(recipe) in text and "post or tuned or rebalanced or full" in text


@pytest.mark.parametrize("prompt", ["", " ", "\n\t  \r\n", "\u3000"])
def test_empty_prompts(prompt):
    assert "empty" in refused(prompt)


def test_over_long_prompts_are_told_how_long_they_are_and_what_the_limit_is():
    limit = SPEC.limits.prompt_characters
    assert CompareRequest.create("x" * limit).prompt == "x" * limit
    text = refused("x" * (limit + 7))
    assert str(limit + 7) in text and str(limit) in text
    assert str(10**6) in refused("x" * 10**6)


@pytest.mark.parametrize("prompt", [None, 5, 1.5, True, b"a cat", ["a cat"], {"prompt": "a cat"}, math.nan])
def test_prompts_that_are_not_text(prompt):
    assert "must be text, not " in refused(prompt)


@pytest.mark.parametrize("character", ["\x00", "\x07", "\x1b", "\x7f", "\x85", "\ud800", "\udcff"])
def test_prompts_with_control_characters_or_broken_unicode(character):
    assert "control characters" in refused(f"a cat{character} on a mat")


# ---------------------------------------------------------------------------------------------------------------------
# Sizes by rule, and clips

LARGE = [spec.id for spec in catalog.MODELS.values() if not spec.bundled]


@pytest.mark.parametrize("model", LARGE)
def test_any_size_within_the_models_rules_is_allowed(model):
    limits = catalog.model(model).limits
    step = limits.size_multiple
    for width in (limits.side[0], limits.side[0] + step, limits.side[1]):
        request = CompareRequest.create(PROMPT, model=model, height=limits.side[0], width=width)
        assert (request.height, request.width) == (limits.side[0], width)


@pytest.mark.parametrize(
    ("model", "width", "height", "words"),
    [
        ("flux.1-dev", 1000, 1024, ["multiples of 16", "such as 992x1024"]),
        ("qwen-image", 1024, 1030, ["multiples of 16", "such as 1024x1024"]),
        ("ltx-2", 768, 500, ["multiples of 32", "such as 768x480", "clips"]),
        ("ltx-2", 784, 512, ["multiples of 32", "such as 768x512"]),
        ("flux.1-dev", 2048, 2048, ["2,097,152 pixels", "4,194,304", "pictures"]),
        ("flux.1-dev", 128, 1024, ["between 256 and 2048"]),
        ("ltx-2", 4096, 512, ["between 256 and 1920"]),
        ("ltx-2", 10**400, 512, ["between 256 and 1920"]),
    ],
)
def test_sizes_that_a_model_cannot_make(model, width, height, words):
    text = refused(model=model, width=width, height=height)
    assert all(word in text for word in words), text


@pytest.mark.parametrize("frames", [9, 17, 121, 257])
def test_clips_have_one_frame_more_than_a_multiple_of_eight(frames):
    assert CompareRequest.create(PROMPT, model="ltx-2", num_frames=frames).num_frames == frames


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (120, ["num_frames is 120", "one more than a multiple of 8", "113 or 121"]),
        (10, ["9 or 17"]),
        (256, ["249 or 257"]),
        (1, ["between 9 and 257"]),
        (265, ["between 9 and 257"]),
        (0, ["between 9 and 257"]),
        (-7, ["between 9 and 257"]),
        (10**400, ["between 9 and 257"]),
        (12.5, ["whole number"]),
        ("121", ["whole number"]),
    ],
)
def test_frames_that_no_clip_has(frames, words):
    text = refused(model="ltx-2", num_frames=frames)
    assert all(word in text for word in words), text


def test_pictures_have_no_frames_to_choose():
    assert CompareRequest.create(PROMPT, num_frames=1).num_frames == 1
    assert "makes pictures" in refused(num_frames=9) and "makes pictures" in refused(model="flux.1-dev", num_frames=121)
    assert CompareRequest.create(PROMPT, model="ltx-2").num_frames == 121


def test_a_model_without_guidance_takes_none():
    assert CompareRequest.create(PROMPT, model="flux.1-schnell").guidance_scale == 0
    assert "no guidance" in refused(model="flux.1-schnell", guidance_scale=3.5)


def test_requests_for_clips_survive_json():
    request = CompareRequest.create(PROMPT, model="ltx-2", num_frames=49, height=704, width=1216)
    assert CompareRequest.from_json(json.loads(json.dumps(request.to_json()))) == request


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=9)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
PLAUSIBLE = {
    "model": st.just("mini-flux"),
    "precisions": st.lists(st.sampled_from(PRECISIONS)),
    "prompt": st.text(min_size=1, max_size=310),
    "seed": st.integers(-1, 2**32),
    "num_inference_steps": st.integers(0, 51) | st.floats(0, 51),
    "guidance_scale": st.floats(0, 7),
    "height": st.just(256),
    "width": st.just(256),
    "num_frames": st.just(1),
    "batch_size": st.integers(0, 5),
    "recipe": st.sampled_from(("post", "full", "seed")),
}


@given(st.fixed_dictionaries({}, optional={name: kind | JUNK for name, kind in PLAUSIBLE.items()}))
@example({"prompt": PROMPT, "guidance_scale": 10**400})
@example({"prompt": PROMPT, "seed": 10**4000})
def test_any_junk_is_refused_in_one_sentence_or_makes_a_valid_request(values):
    fields = {"prompt": None} | values
    try:
        request = CompareRequest.create(fields.pop("prompt"), **fields)
    except RequestError as error:
        assert len(str(error).splitlines()) == 1
        return
    assert CompareRequest.from_json(json.loads(json.dumps(request.to_json()))) == request
    for name, (low, high) in RANGED.items():
        assert low <= getattr(request, name) <= high
    assert (request.height, request.width) in SPEC.limits.sizes
    assert request.precisions[0] == "bf16" and set(request.precisions) <= set(PRECISIONS)
    assert 1 <= len(request.prompt) <= SPEC.limits.prompt_characters
    request.prompt.encode()


@given(st.dictionaries(st.text(max_size=8) | st.sampled_from(sorted(PLAUSIBLE)), JUNK, max_size=4))
@example({"a\nb": 1, "prompt": PROMPT})
def test_any_saved_junk_is_refused_in_one_sentence_or_makes_a_valid_request(values):
    try:
        CompareRequest.from_json(values)
    except RequestError as error:
        assert len(str(error).splitlines()) == 1
