"""One file to post, telling names of downloads, and what a link shows elsewhere."""

import re

import httpx
import numpy as np
import pytest
from PIL import Image

from engine.request import CompareRequest
from tests.support.fake_engine import FakeWorker, record, served, until
from ui import words

CLIP = {"model": "ltx-2", "num_frames": 9, "height": 256, "width": 256, "precisions": ["nvfp4"]}


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    record(folder / "rocket")
    record(folder / "train", "a steam train on a teal background", **CLIP)
    with served(FakeWorker(), folder, models=("mini-flux", "ltx-2")) as url:
        yield url


@pytest.mark.parametrize(
    ("prompt", "further", "name"),
    [
        ("a rocket on a blue background", ["nvfp4"], "twinframe_a-rocket-on-a-blue-background_seed-7_nvfp4"),
        ("../../etc/passwd <b>", [], "twinframe_etc-passwd-b_seed-7"),
        ("猫", [], "twinframe_picture_seed-7"),
    ],
)
def test_a_download_is_called_by_what_it_shows(prompt, further, name):
    assert words.post.file_name(CompareRequest.create(prompt), *further) == name


def test_a_long_prompt_makes_no_long_name():
    assert len(words.post.file_name(CompareRequest.create("word " * 30))) < 80


@pytest.mark.browser
def test_a_picture_to_post_has_the_pictures_and_room_for_their_words(visit, app, tmp_path):
    page = visit(app)
    page.wait_for_function("[...document.querySelectorAll('#tf-stage img')].every((i) => i.complete)")
    with page.expect_download() as download:
        page.get_by_role("button", name=words.post.POST).click()
    assert download.value.suggested_filename == "twinframe_a-rocket-on-a-blue-background_seed-7.png"
    made = tmp_path / "made.png"
    download.value.save_as(made)
    with Image.open(made) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape[1] == 3 * 480 + 4 * 24 and pixels.shape[0] > 480 + 100
    middle = pixels[300, [264, 768, 1272]]  # of each picture: the rocket
    assert (abs(middle - 255).sum(axis=1) > 30).all()
    dark = (pixels.sum(axis=2) < 450).any(axis=1)
    assert dark[:60].any() and dark[-60:].any(), "the prompt above, the link below"
    told = page.get_attribute(".tf-post", "data-post")
    assert "LPIPS" in told and "emulated" in told and "of the way" in told and "?prompt=" in told


@pytest.mark.browser
def test_clips_make_a_clip(visit, app, tmp_path):
    page = visit(f"{app}/?recorded=train")
    assert until(lambda: page.locator("#tf-stage video").count() == 2)
    with page.expect_download(timeout=60_000) as download:
        page.get_by_role("button", name=words.post.POST).click()
    name = download.value.suggested_filename
    assert re.fullmatch(r"twinframe_a-steam-train-on-a-teal-background_seed-7\.(mp4|webm)", name)
    made = tmp_path / name
    download.value.save_as(made)
    assert made.stat().st_size > 2000
    assert made.read_bytes()[:4] == b"\x1aE\xdf\xa3" or b"ftyp" in made.read_bytes()[:16]


@pytest.mark.parametrize(
    ("headers", "origin"),
    [
        ({"host": "example.org"}, "http://example.org"),
        ({"host": "example.org", "x-forwarded-proto": "https"}, "https://example.org"),
        ({"host": 'x"><script>'}, ""),
        ({"host": "example.org", "x-forwarded-proto": "javascript"}, ""),
    ],
)
def test_a_link_shows_a_picture_elsewhere(app, headers, origin):
    html = httpx.get(app, headers=headers).text
    [image] = set(re.findall(r'<meta property="og:image" content="([^"]*)">', html))
    assert image == f"{origin}/preview.png"
    assert "origin.invalid" not in html and '<script>"' not in html
    answer = httpx.get(f"{app}/preview.png")
    assert answer.headers["content-type"] == "image/png" and answer.content[:4] == b"\x89PNG"
