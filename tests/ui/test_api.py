"""`/compare` through gradio_client and plain HTTP, around a fake worker: arguments, files, errors, cancelling."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from engine.errors import RequestError
from engine.request import CompareRequest
from tests.support.fake_engine import NO_FP8, FakeWorker, served, until

PROMPT = "a rocket on a blue background"


@pytest.fixture(scope="module")
def app():
    worker = FakeWorker()
    with served(worker) as url:
        yield url, worker


@pytest.fixture
def slow_app():
    worker = FakeWorker(step_seconds=0.02)
    with served(worker) as url:
        yield url, worker


def client(url, **options):
    return Client(url, verbose=False, **options)


def test_a_prompt_alone_gives_the_command_lines_json(app):
    answer = client(app[0]).predict(prompt=PROMPT, api_name="/compare")
    assert answer["request"] == CompareRequest.create(PROMPT).to_json()
    assert set(answer) == {"model", "device", "versions", "created", "request", "results", "ruler"}
    assert [r["precision"] for r in answer["results"]] == ["bf16", "mxfp8", "nvfp4"]
    assert {"execution", "files", "latency_s", "latency_comparable", "memory_gb", "layers", "lpips", "psnr_db"} <= set(
        answer["results"][1]
    )
    assert answer["results"][0]["lpips"] is None
    assert 0 < answer["results"][1]["lpips"] < answer["results"][2]["lpips"] < answer["ruler"]["ceiling"]


def test_every_field_is_a_keyword_argument(app):
    fields = {
        "model": "mini-flux",
        "precisions": ["nvfp4"],
        "seed": 11,
        "num_inference_steps": 3,
        "guidance_scale": 2.5,
        "height": 256,
        "width": 256,
        "num_frames": 1,
        "batch_size": 2,
        "recipe": "full",
    }
    answer = client(app[0]).predict(prompt=PROMPT, api_name="/compare", **fields)
    assert answer["request"] == fields | {"prompt": PROMPT, "precisions": ["bf16", "nvfp4"], "previews": False}
    assert [len(r["files"]) for r in answer["results"]] == [2, 2]


def test_a_clip_comes_as_a_file_with_a_score_for_each_frame():
    with served(FakeWorker(), models=("mini-flux", "ltx-2")) as url:
        answer = client(url, download_files=False).predict(
            prompt="waves", model="ltx-2", height=256, width=256, num_frames=9, api_name="/compare"
        )
        reference, other, _ = answer["results"]
        assert reference["lpips_frames"] is None
        assert [len(frames) for frames in other["lpips_frames"]] == [9]
        clip = other["files"][0]["url"]
        whole = httpx.get(clip)
        assert whole.headers["content-type"] == "video/mp4"
        part = httpx.get(clip, headers={"Range": "bytes=100-199"})
        assert (part.status_code, part.content) == (206, whole.content[100:200]), "browsers seek by ranges"


def test_a_client_elsewhere_gets_the_files(app, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = client(app[0], download_files=tmp_path / "fetched").predict(prompt=PROMPT, api_name="/compare")
    for result in answer["results"]:
        (file,) = result["files"]
        assert Path(file).is_relative_to(tmp_path / "fetched")
        with Image.open(file) as picture:
            assert (picture.format, picture.size) == ("PNG", (256, 256))


def test_files_have_urls_for_clients_that_download_nothing_by_themselves(app):
    answer = client(app[0], download_files=False).predict(prompt=PROMPT, api_name="/compare")
    response = httpx.get(answer["results"][0]["files"][0]["url"])
    assert response.headers["content-type"] == "image/png"
    assert response.content.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": ""},
        {"prompt": "x" * 151},
        {"prompt": 5},
        {"prompt": None},
        {"prompt": ["a", "cat"]},
        {"prompt": "a\x00cat"},
        {"model": "flux.9"},
        {"model": 3},
        {"precisions": ["fp7"]},
        {"precisions": []},
        {"precisions": 8},
        {"seed": -1},
        {"seed": 2**32},
        {"seed": 1.5},
        {"seed": "seven"},
        {"num_inference_steps": 0},
        {"num_inference_steps": 51},
        {"num_inference_steps": True},
        {"guidance_scale": 0.5},
        {"guidance_scale": "much"},
        {"height": 512},
        {"width": "wide"},
        {"num_frames": 9},
        {"model": "ltx-2", "num_frames": 10},
        {"batch_size": 0},
        {"batch_size": 5},
        {"batch_size": {}},
        {"recipe": "other"},
    ],
    ids=lambda wrong: "-".join(f"{k}={str(v)[:12]}" for k, v in wrong.items()).replace("\x00", "NUL"),
)
def test_bad_input_is_answered_with_the_engines_sentence(app, wrong):
    url, worker = app
    jobs = len(worker.jobs)
    with pytest.raises(RequestError) as expected:
        CompareRequest.create(**{"prompt": PROMPT} | wrong)
    with pytest.raises(AppError) as error:
        client(url).predict(**{"prompt": PROMPT} | wrong, api_name="/compare")
    assert str(error.value) == str(expected.value)
    assert len(worker.jobs) == jobs


def test_a_precision_the_machine_cannot_run_is_refused_with_the_reason():
    with (
        served(FakeWorker(support=NO_FP8)) as url,
        pytest.raises(AppError, match="cannot run fp8: FP8 needs an RTX 40"),
    ):
        client(url).predict(prompt=PROMPT, precisions=["fp8"], api_name="/compare")


def test_a_failure_during_the_run_reaches_the_client():
    with (
        served(FakeWorker(fail_at="mxfp8", failure="Shard 2 is cut short.")) as url,
        pytest.raises(AppError, match=r"^Shard 2 is cut short\.$"),
    ):
        client(url).predict(prompt=PROMPT, api_name="/compare")


def test_no_other_endpoint_is_public(app):
    url, worker = app
    described = client(url).view_api(return_format="dict", print_info=False)
    assert list(described["named_endpoints"]) == ["/compare"]
    assert not described["unnamed_endpoints"]
    jobs = len(worker.jobs)
    for name in (
        "press",
        "run",
        "stop",
        "broken",
        "leave",
        "choose_model",
        "choose_example",
        "find",
        "open_page",
        "open_address",
        "lambda",
        "lambda_1",
        "predict",
        "js_fn",
    ):
        for route in ("call", "run", "api"):
            response = httpx.post(f"{url}/gradio_api/{route}/{name}", json={"data": []})
            assert response.status_code >= 400, f"{route}/{name}"
    assert len(worker.jobs) == jobs


def test_nobody_gets_past_the_queue(app):
    url, worker = app
    jobs = len(worker.jobs)
    response = httpx.post(f"{url}/gradio_api/run/compare", json={"data": [PROMPT] + [None] * 10})
    assert response.status_code == 404
    assert len(worker.jobs) == jobs


def test_only_what_is_on_the_shelf_is_served(app):
    source = Path(__file__).resolve()
    assert httpx.get(f"{app[0]}/gradio_api/file={source}").status_code == 403


def test_calls_take_turns(slow_app):
    url, worker = slow_app
    calls = [client(url).submit(prompt=PROMPT, num_inference_steps=5, api_name="/compare") for _ in range(3)]
    assert all(call.result()["results"] for call in calls)
    assert (len(worker.jobs), worker.most_at_once) == (3, 1)


def test_cancelling_frees_the_worker_within_a_step(slow_app):
    url, worker = slow_app
    call = client(url).submit(prompt=PROMPT, num_inference_steps=50, api_name="/compare")
    assert until(lambda: worker.jobs and worker.jobs[0].steps >= 3)
    call.cancel()
    assert until(lambda: worker.jobs[0].outcome == "cancelled", 3)
    steps = worker.jobs[0].steps
    answer = client(url).predict(prompt=PROMPT, num_inference_steps=1, api_name="/compare")
    assert len(answer["results"]) == 3
    assert worker.jobs[0].steps <= steps + 1 < 150


def test_a_client_that_goes_away_frees_the_worker(slow_app):
    url, worker = slow_app
    data = [PROMPT, None, None, None, 50, None, None, None, None, None, None, None]
    event = httpx.post(f"{url}/gradio_api/call/compare", json={"data": data}).json()["event_id"]
    with httpx.stream("GET", f"{url}/gradio_api/call/compare/{event}") as stream:
        said = (json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: "))
        assert any("step 2 of 50" in str(message) for message in said)
    assert until(lambda: worker.jobs[0].outcome == "cancelled", 3)
    assert worker.jobs[0].steps < 150
