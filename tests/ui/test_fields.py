"""What a form sends while it is being set to another model."""

import pytest

from engine.catalog import MODELS
from engine.request import CompareRequest
from tests.support.fake_engine import FakeWorker, served, until
from ui import fields, words


@pytest.mark.parametrize("before", MODELS)
@pytest.mark.parametrize("after", MODELS)
def test_what_suits_the_model_before_never_stands_in_the_way_of_the_one_after(before, after):
    spec = MODELS[before]
    height, width = spec.limits.sizes[-1]
    ends = {name: max(getattr(spec.limits, name)) for name in ("num_inference_steps", "guidance_scale", "num_frames")}
    values = ends | {"batch_size": 8, "size": f"{width}x{height}", "recipe": spec.recipes[-2]}
    made = CompareRequest.create("a cat", model=after, **fields.fitting(after, values))
    low, high = MODELS[after].limits.num_frames
    assert low <= made.num_frames <= high and made.recipe in MODELS[after].recipes


@pytest.mark.parametrize("value", [None, "25", "x", float("nan"), -1, 10**9, True, [], {}, "1x", "9x9x9"])
@pytest.mark.parametrize("name", fields.FOLLOWING)
def test_any_value_is_taken_or_becomes_the_models_default(name, value):
    made = CompareRequest.create("a cat", **fields.fitting("mini-flux", {name: value}))
    assert made == CompareRequest.create("a cat")


@pytest.mark.browser
@pytest.mark.parametrize("models", [("mini-ltx2", "mini-flux"), ("flux.1-dev", "mini-qwen")])
def test_generate_works_while_another_model_is_still_being_set(visit, models):
    """The server has set the form to the new model, and its answer is still on the way to the browser."""
    worker, held = FakeWorker(), []
    with served(worker, models=models) as url:
        page = visit(url)
        assert until(lambda: "model=" in page.evaluate("location.search"))

        def hold(route):
            if held or route.request.method != "POST":
                route.continue_()
            else:
                held.append((route, route.fetch()))

        page.route("**/gradio_api/run/**", hold)
        page.click("#tf-model input")
        page.get_by_role("option", name=MODELS[models[1]].name, exact=True).click()
        assert until(lambda: page.wait_for_timeout(20) or held)
        page.fill("#tf-prompt textarea", "a cat")
        page.click("#tf-go")
        assert until(lambda: page.wait_for_timeout(20) or (worker.jobs and worker.jobs[-1].outcome == "completed"))
        made = worker.jobs[-1].request
        assert made.model == models[1] and made.prompt == "a cat"
        held[0][0].fulfill(response=held[0][1])
        assert "maximum value" not in page.locator("body").inner_text()
        assert until(lambda: page.locator("#tf-headline .tf-verdict").inner_text() != words.STARTING)
