"""Links that hold a whole request, and the program that is copied."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl

import pytest

from engine import catalog
from engine.errors import RequestError
from engine.request import CompareRequest
from tests.support.fake_engine import until
from tests.support.page import (
    PROMPT,
    card,
    finished,
    generate,
    notice,
)
from ui import link, words

browser_test = pytest.mark.browser


LINKED = {
    "model": "ltx-2",
    "precisions": ["fp8", "nvfp4"],
    "seed": 41,
    "num_inference_steps": 12,
    "guidance_scale": 2.5,
    "num_frames": 49,
    "height": 320,
    "width": 416,
    "batch_size": 2,
    "recipe": "strict",
}


@browser_test
def test_a_copied_link_restores_every_control_and_starts_nothing(visit, many):
    url, worker = many
    asked = CompareRequest.create("waves & “stones” #1? 100%", **LINKED)
    jobs = len(worker.jobs)
    page = visit(f"{url}/{link.query(asked)}", permissions=["clipboard-read", "clipboard-write"])
    assert until(lambda: page.input_value("#tf-prompt textarea") == asked.prompt)
    assert page.input_value("#tf-model input") == "LTX-2"
    page.wait_for_timeout(300)
    assert len(worker.jobs) == jobs
    assert page.locator(".tf-recorded").is_visible()
    page.click("#tf-go")
    finished(page)
    assert worker.jobs[-1].request == asked
    page.get_by_role("button", name=words.compare.LINK).click()
    assert until(lambda: page.evaluate("navigator.clipboard.readText()") == f"{url}/{link.query(asked)}")
    assert words.compare.COPIED in page.inner_text(".tf-origin")


@browser_test
def test_a_wrong_link_is_one_sentence_and_the_defaults(visit, quick):
    page = visit(f"{quick[0]}/?prompt=a+fish&seed=-1")
    assert notice(page) == words.compare.link_wrong("seed is -1: it must lie between 0 and 4294967295.")
    assert page.input_value("#tf-prompt textarea") == PROMPT
    generate(page)
    finished(page)
    assert quick[1].jobs[-1].request == CompareRequest.create(PROMPT)


@browser_test
def test_the_code_of_a_precision_is_copied(visit, quick):
    page = visit(quick[0], permissions=["clipboard-read", "clipboard-write"])
    card(page, "NVFP4").get_by_role("button", name=words.compare.CODE).click()
    expected = f"# nvfp4, emulated\nprompt = {PROMPT!r}\n"
    assert until(lambda: page.evaluate("navigator.clipboard.readText()") == expected)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"model": "flux.9"}, f"There is no model 'flux.9': choose one of {', '.join(catalog.MODELS)}."),
        ({"model": "ltx-2"}, "LTX-2 is not offered here: choose mini-flux."),
        ({"seed": "abc"}, "seed must be a whole number, not text."),
        ({"steps": "1e999"}, "num_inference_steps must be a whole number, not the number inf."),
        ({"size": "256"}, "size is '256': write it as width x height, such as 256x256."),
        ({"precisions": "fp3"}, "There is no precision 'fp3': choose from bf16, fp8, mxfp8, nvfp4, int8."),
        (
            {"precisions": "nvfp4@mine"},
            "FLUX miniature has no recipe 'mine': choose post or tuned or rebalanced or full.",
        ),
        ({"prompt": " "}, "The prompt is empty: describe the picture in a few words."),
    ],
)
def test_a_link_is_checked_like_every_request(values, sentence):
    with pytest.raises(RequestError, match=re.escape(sentence)):
        link.read(values, ["mini-flux"])


@pytest.mark.parametrize(
    "changes",
    [{}, LINKED, {"precisions": ["bf16"], "guidance_scale": 1.2345678}, {"precisions": ["nvfp4", "nvfp4@tuned"]}],
)
def test_a_link_holds_the_whole_request(changes):
    asked = CompareRequest.create("a “cat” & a dog + 50% #1", **changes)
    assert link.read(dict(parse_qsl(link.query(asked)[1:])), list(catalog.MODELS)) == asked


@pytest.mark.parametrize(("old", "new"), [("seed", "post"), ("seed-corrected", "post-corrected")])
def test_a_link_from_before_recipes_had_their_names_is_read(old, new):
    asked = link.read({"precisions": "mxfp8,nvfp4", "recipe": old, "model": "mini-ltx2"}, list(catalog.MODELS))
    assert (asked.recipe, asked.precisions) == (new, ("bf16", "mxfp8", "nvfp4"))


def test_an_address_that_asks_for_nothing_is_no_link():
    assert link.read({"__theme": "dark", "utm_source": "x"}, ["mini-flux"]) is None
