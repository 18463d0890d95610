"""What a person sees is what was asked for: pictures never stand under another prompt, in all ways in, and the address
brings back what is shown. In Chromium, around a fake worker."""

import json
import re
import shutil
from urllib.parse import parse_qsl, urlsplit

import pytest

from engine import catalog
from engine.request import CompareRequest
from tests.support import fake_engine
from tests.support.fake_engine import FakeWorker, open_tab, served, until
from tests.support.page import held
from ui import link, words

pytestmark = pytest.mark.browser
ROCKET = "a rocket on a blue background"
CAT = "a cat on a red background"
WORST = [("a fox of nobody", 7), (CAT, 7)]
"""Prompts and seeds of the Quality tab's worst pairs: of the last there is a recorded run."""
SEEN = """() => {
  const pictures = [...document.querySelectorAll('#tf-stage :is(img, video)')];
  const note = document.querySelector('#tf-stale');
  return {
    box: document.querySelector('#tf-prompt textarea')?.value.trim(),
    seed: document.querySelector('#tf-seed input')?.value,
    made: [...new Set(pictures.map((p) => (p.alt ?? p.ariaLabel).replace(/^\\S+: /, '')))],
    dimmed: pictures.length > 0 && pictures.every((p) => getComputedStyle(p.closest('.tf-frame')).opacity < 0.5),
    said: note?.checkVisibility() ? note.textContent : '',
    error: document.querySelector('.tf-notice')?.textContent ?? '',
  };
}"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Recorded runs of the first two examples and of a clip, and measurements with worst pairs."""
    recorded, scored = tmp_path_factory.mktemp("recorded"), tmp_path_factory.mktemp("scored")
    fake_engine.record(recorded / "rocket")
    fake_engine.record(recorded / "cat", CAT)
    fake_engine.record(recorded / "penguin", catalog.MINI_LTX2.examples[0], model="mini-ltx2", seed=11)
    fake_engine.record(recorded / "waves", "waves", model="ltx-2", num_frames=9)
    settings = {"num_inference_steps": 20, "guidance_scale": 1.0, "height": 256, "width": 256, "num_frames": 1}
    worst = [
        {"precision": "nvfp4", "recipe": "post", "prompt": prompt, "seed": seed, "lpips": 0.2} for prompt, seed in WORST
    ]
    found = {"model": "mini-flux", "device": "CPU", "date": "2026-11-22T10:00:00+00:00", "versions": {}, "ruler": {}}
    found |= {"settings": settings, "prompts": {"report": ["a"]}, "ablation": [], "worst": worst}
    (scored / "mini-flux.json").write_text(json.dumps(found))
    return {"recorded": recorded, "scored": scored}


@pytest.fixture(scope="module")
def all_tests_app(folders):
    worker = FakeWorker()
    with served(worker, models=("mini-flux", "mini-qwen", "mini-ltx2"), **folders) as url:
        yield url, worker


@pytest.fixture
def app(all_tests_app):
    """Its worker has no job yet, and does what it is asked."""
    _, worker = all_tests_app
    yield all_tests_app
    worker.step_seconds, worker.stands_at, worker.fail_at = 0, None, None
    worker.jobs.clear()


def seen(page):
    return page.evaluate(SEEN)


def shows(page, prompt, seed=7):
    """Whether box and pictures are those of a prompt, bright, and nothing else is said."""
    wanted = {"box": prompt, "seed": str(seed), "made": [f"{prompt}, seed {seed}"], "dimmed": False, "said": ""}
    return until(lambda: seen(page) | {"error": ""} == wanted | {"error": ""}) or seen(page)


def asks_for(page, prompt, seed=7):
    """Whether the box has a prompt, the pictures of another are dimmed, and it is said what to do."""

    def holds():
        now = seen(page)
        own = now["made"] != [f"{prompt}, seed {seed}"]
        return (now["box"], now["seed"], own, now["dimmed"]) == (prompt, str(seed), True, True) and now[
            "said"
        ].startswith(words.compare.STALE["act"])

    return until(holds) or seen(page)


def address(page):
    """As the browser has it; `page.url` lags behind it."""
    return page.evaluate("location.href")


def asked(page):
    """The request that the address holds."""
    return link.read(dict(parse_qsl(urlsplit(address(page)).query)), list(catalog.MODELS))


def generate(page, prompt=None):
    if prompt is not None:
        page.fill("#tf-prompt textarea", prompt)
    page.click("#tf-go")


# Every way in


def test_the_first_screen_shows_what_its_form_asks_for(visit, app):
    page = visit(app[0])
    assert shows(page, ROCKET) is True
    page.wait_for_timeout(500)
    assert shows(page, ROCKET) is True and urlsplit(address(page)).query == ""


def test_where_the_first_recording_is_of_other_settings_the_form_has_them(visit, tmp_path):
    fake_engine.record(tmp_path / "train", "a steam train", model="ltx-2", seed=5, num_frames=9, height=256, width=256)
    with served(FakeWorker(), tmp_path, models=("mini-flux", "ltx-2")) as url:
        page = visit(url)
        assert shows(page, "a steam train", 5) is True
        assert page.input_value("#tf-model input") == "LTX-2"


@pytest.mark.parametrize("field", ["prompt", "seed", "precision", "steps"])
def test_what_is_typed_dims_what_is_shown_until_it_fits_again(visit, app, field):
    page = visit(app[0])
    if field == "prompt":
        page.fill("#tf-prompt textarea", "a dog")
        assert asks_for(page, "a dog") is True
        assert ROCKET in seen(page)["said"]
        page.fill("#tf-prompt textarea", f" {ROCKET} ")
    elif field == "seed":
        page.fill("#tf-seed input", "8")
        assert asks_for(page, ROCKET, 8) is True
        assert words.compare.STALE["settings"] in seen(page)["said"]
        page.fill("#tf-seed input", "7")
    elif field == "precision":
        page.get_by_label("FP8", exact=True).check()
        assert until(lambda: seen(page)["dimmed"] and seen(page)["said"])
        page.get_by_label("FP8", exact=True).uncheck()
        page.get_by_label("MXFP8 · emulated").uncheck()
    else:
        page.get_by_text(words.compare.MORE, exact=True).click()
        steps = page.get_by_label(f"number input for {words.compare.STEPS_LABEL}")
        steps.wait_for()
        page.wait_for_timeout(500)
        for value, dims in (("9", True), ("20", False)):
            steps.fill(value)
            page.keyboard.press("Tab")
            assert until(lambda: seen(page)["dimmed"] is dims), value  # noqa: B023
    assert shows(page, ROCKET) is True


@pytest.mark.parametrize(("prompt", "recorded"), [(CAT, True), ("a dog", False)])
def test_a_link(visit, app, prompt, recorded):
    query = link.query(CompareRequest.create(prompt, precisions=["nvfp4"]))
    page = visit(f"{app[0]}/{query}")
    assert (shows if recorded else asks_for)(page, prompt) is True
    assert not app[1].jobs
    generate(page)
    assert until(lambda: app[1].jobs)
    assert shows(page, prompt) is True
    assert app[1].jobs[-1].request == CompareRequest.create(prompt, precisions=["nvfp4"])


def test_an_example(visit, app):
    page = visit(app[0])
    page.get_by_role("button", name=CAT).click()
    assert shows(page, CAT) is True
    snowman = catalog.MINI_FLUX.examples[2]
    page.get_by_role("button", name=snowman).click()
    assert asks_for(page, snowman) is True
    assert CAT in seen(page)["said"]
    generate(page)
    assert shows(page, snowman) is True


def test_the_next_example_of_the_stage(visit, app):
    page = visit(f"{app[0]}/?stage=1")
    page.wait_for_selector("body[data-stage]")
    page.keyboard.press("n")
    assert shows(page, CAT) is True
    page.keyboard.press("n")
    assert asks_for(page, catalog.MINI_FLUX.examples[2]) is True
    page.keyboard.press("r")  # the recorded run that is the most like it
    now = until(lambda: seen(page)["said"] == "") and seen(page)
    assert now and now["made"] == [f"{now['box']}, seed {now['seed']}"]
    assert "stage=1" in address(page)


def test_a_worst_pair(visit, app):
    page = visit(app[0])
    for (prompt, seed), judge in zip(WORST, (asks_for, shows), strict=True):
        open_tab(page, words.QUALITY)
        page.get_by_role("link", name=prompt).click()
        assert judge(page, prompt, seed) is True
        assert page.locator("#tf-prompt").is_visible()
    assert not app[1].jobs


def choose_model(page, name):
    page.click("#tf-model input")
    page.get_by_role("option", name=name, exact=True).click()


def test_another_model(visit, app):
    page = visit(app[0])
    choose_model(page, catalog.MINI_LTX2.name)
    assert shows(page, catalog.MINI_LTX2.examples[0], 11) is True, "the recorded run has another seed than the default"
    choose_model(page, catalog.MINI_QWEN.name)  # of which nothing is recorded
    assert asks_for(page, catalog.MINI_QWEN.examples[0]) is True
    page.fill("#tf-prompt textarea", "a cat of my own")
    choose_model(page, catalog.MINI_FLUX.name)
    assert asks_for(page, "a cat of my own") is True


def test_what_this_browser_made(visit, app):
    page = visit(app[0])
    for prompt in ("a dog", "a fish"):
        generate(page, prompt)
        assert shows(page, prompt) is True
    assert until(lambda: page.evaluate("JSON.parse(localStorage.getItem('twinframe-history') ?? '[]').length") == 2)
    open_tab(page, words.GALLERY)
    page.locator("#tf-mine .tf-tile").nth(1).click()
    assert shows(page, "a dog") is True, "it is still kept"
    shutil.rmtree(app[1].jobs[1].out)
    open_tab(page, words.GALLERY)
    page.locator("#tf-mine .tf-tile").first.click()
    assert asks_for(page, "a fish") is True
    assert len(app[1].jobs) == 2


def test_a_recording(visit, app):
    page = visit(app[0])
    open_tab(page, words.GALLERY)
    page.locator("[data-recorded=cat]").click()
    assert shows(page, CAT) is True
    open_tab(page, words.GALLERY)
    page.locator("[data-recorded=waves]").click()  # of a model that is not offered: there to be looked at
    assert until(lambda: "waves, seed" in "".join(seen(page)["made"]))
    now = seen(page)
    assert now["box"] == CAT and not now["dimmed"]
    assert "recording of “waves”" in now["said"] and "not offered here" in now["error"]


@pytest.mark.parametrize("how", ["stopped", "failed"])
def test_a_run_that_comes_to_nothing(visit, app, how):
    url, worker = app
    worker.step_seconds, worker.stands_at = (0.05, "bf16") if how == "stopped" else (0, None)
    worker.fail_at = "bf16" if how == "failed" else None
    page = visit(url)
    generate(page, "a dog")
    if how == "stopped":
        page.wait_for_selector(".tf-blank progress")
        page.click("#tf-stop")
    assert until(lambda: [job.outcome for job in worker.jobs] == [{"stopped": "cancelled"}.get(how, how)])
    page.wait_for_selector(".tf-recorded")
    page.wait_for_selector("#tf-go:enabled")
    assert asks_for(page, "a dog") is True


def test_another_prompt_while_one_is_made(visit, app):
    url, worker = app
    worker.stands_at = "mxfp8"
    page = visit(url)
    generate(page, "a dog")
    page.wait_for_selector("#tf-headline:not(:has(.tf-recorded))")  # the run's own, no longer what was there before
    page.fill("#tf-prompt textarea", "a fish")
    assert until(lambda: seen(page)["said"].strip() == words.compare.STALE["busy"].format(prompt="a dog"))
    assert until(lambda: seen(page)["dimmed"])
    worker.stands_at = None
    assert asks_for(page, "a fish") is True


# What arrives late


def test_a_late_link_leaves_what_was_typed_and_generate_runs_it(visit, app):
    url, worker = app
    dog = CompareRequest.create("a dog", seed=5, num_inference_steps=9)
    page = visit("about:blank", wait=False)
    with held(page) as came:
        page.goto(f"{url}/{link.query(dog)}")
        page.wait_for_selector("#tf-seed input")
        assert until(came)
        page.fill("#tf-prompt textarea", "a fish of mine")
        assert until(lambda: seen(page)["dimmed"])
    assert until(lambda: seen(page)["seed"] == "5"), "the rest of the link"
    page.wait_for_timeout(500)
    assert asks_for(page, "a fish of mine", 5) is True
    generate(page)
    assert shows(page, "a fish of mine", 5) is True
    assert (worker.jobs[-1].request.prompt, worker.jobs[-1].request.num_inference_steps) == ("a fish of mine", 9)


def test_what_is_chosen_while_an_answer_is_late_is_what_counts(visit, app):
    page, snowman = visit(app[0]), catalog.MINI_FLUX.examples[2]
    with held(page) as came:
        page.get_by_role("button", name=CAT).click()
        assert until(came)
        page.get_by_role("button", name=snowman).click()
    assert asks_for(page, snowman) is True
    with held(page) as came:
        choose_model(page, catalog.MINI_LTX2.name)
        assert until(came)
        choose_model(page, catalog.MINI_QWEN.name)
    assert asks_for(page, catalog.MINI_QWEN.examples[0]) is True
    assert page.input_value("#tf-model input") == catalog.MINI_QWEN.name


# The address


def test_the_address_holds_the_form_and_a_reload_brings_it_back(visit, app):
    page = visit(app[0])
    page.get_by_label("MXFP8 · emulated").uncheck()
    page.fill("#tf-seed input", "9")
    page.fill("#tf-prompt textarea", "waves & “stones” #1? 100%")
    wanted = CompareRequest.create("waves & “stones” #1? 100%", seed=9, precisions=["nvfp4"])
    assert until(lambda: asked(page) == wanted)
    page.reload()
    assert asks_for(page, wanted.prompt, 9) is True
    generate(page)
    assert shows(page, wanted.prompt, 9) is True
    assert until(lambda: "made=" in address(page)) and asked(page) == wanted
    page.reload()
    assert shows(page, wanted.prompt, 9) is True
    assert len(app[1].jobs) == 1


def test_back_and_forward_bring_back_what_was_shown(visit, app):
    page = visit(app[0])
    assert shows(page, ROCKET) is True
    page.get_by_role("button", name=CAT).click()
    assert shows(page, CAT) is True
    assert until(lambda: address(page).endswith("/?recorded=cat"))
    generate(page, "a dog")
    assert shows(page, "a dog") is True
    assert until(lambda: "made=" in address(page))
    for prompt in (CAT, ROCKET):
        page.go_back()
        assert shows(page, prompt) is True
    for prompt in (CAT, "a dog"):
        page.go_forward()
        assert shows(page, prompt) is True
    assert len(app[1].jobs) == 1


@pytest.mark.parametrize("late", ["what the address asks for", "what was found of the form"])
def test_back_twice_while_an_answer_is_late(visit, app, late):
    page = visit(app[0])

    def is_late(request):
        return ("query" in (request.post_data_json["event_data"] or {})) is (late == "what the address asks for")

    page.get_by_role("button", name=CAT).click()
    assert until(lambda: address(page).endswith("/?recorded=cat"))
    generate(page, "a dog")
    assert shows(page, "a dog") is True
    assert until(lambda: "made=" in address(page))
    with held(page, is_late) as came:
        page.go_back()
        assert until(lambda: address(page).endswith("/?recorded=cat") and came())
        page.go_back()
        assert until(lambda: urlsplit(address(page)).query == "")
        page.wait_for_timeout(300)  # in which the second answer must not come before the first
    assert shows(page, ROCKET) is True
    assert urlsplit(address(page)).query == ""
    for prompt in (CAT, "a dog"):
        page.go_forward()
        assert shows(page, prompt) is True


def test_every_tab_has_an_address(visit, app):
    page = visit(app[0])
    names = page.get_by_role("tab").all_inner_texts()
    assert len(names) == 7
    for name in names[1:]:
        open_tab(page, name)
        assert until(lambda: address(page).endswith(f"#{re.sub(' ', '-', name.lower())}")), name  # noqa: B023
    page.go_back()
    page.get_by_role("tab", name=names[-2], selected=True).wait_for()
    page.reload()
    page.get_by_role("tab", name=names[-2], selected=True).wait_for()
    open_tab(page, words.COMPARE)
    assert until(lambda: "#" not in address(page))
    assert shows(page, ROCKET) is True


def test_a_tabs_content_that_comes_late_does_not_bring_its_address_back(visit, app):
    page = visit(app[0])
    with held(page) as came:
        open_tab(page, words.QUALITY)
        assert until(lambda: address(page).endswith("#quality") and came())
        open_tab(page, words.COMPARE)
        assert until(lambda: "#" not in address(page))
    page.locator("#tf-quality .tf-tab").wait_for(state="attached")
    page.wait_for_timeout(200)
    assert "#" not in address(page)


def test_a_tabs_address_opens_it_on_a_phone_too(visit, app):
    page = visit(f"{app[0]}/?recorded=cat#quality", width=390, height=844)
    page.locator("#tf-quality .tf-tab").wait_for()
    open_tab(page, words.COMPARE)
    assert shows(page, CAT) is True


def test_an_address_that_names_no_folder_of_results_reads_nothing_else(visit, app):
    dog = link.query(CompareRequest.create("a dog"))
    for name in ("../secret", "pinned-cat", "", "%00"):
        page = visit(f"{app[0]}/{dog}&{link.MADE}={name}")
        assert asks_for(page, "a dog") is True
