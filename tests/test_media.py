"""PNG files: lossless, with their recipe, the same bytes for the same picture, and whole or not at all."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.errors import OutputError
from engine.media import read_recipe, save_png

RECIPE = {
    "request": {"prompt": 'a "cat" \\ 🐱\nkatzenähnlich', "seed": 2**32 - 1},
    "precision": "nvfp4",
    "list": [1, 2.5, None],
}


@pytest.fixture
def picture():
    return torch.rand(3, 40, 24, generator=torch.Generator().manual_seed(0))


def pixels(file):
    with Image.open(file) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def test_all_256_levels_survive(tmp_path):
    levels = torch.arange(256).reshape(1, 16, 16).repeat(3, 1, 1)
    levels[1] = 255 - levels[1]
    save_png(levels / 255, tmp_path / "a.png", {})
    assert (pixels(tmp_path / "a.png") == levels.permute(1, 2, 0).numpy()).all()


def test_a_picture_is_rounded_to_the_nearest_level(tmp_path, picture):
    save_png(picture, tmp_path / "a.png", {})
    error = np.abs(pixels(tmp_path / "a.png") / 255 - picture.permute(1, 2, 0).numpy())
    assert pixels(tmp_path / "a.png").shape == (40, 24, 3)
    assert error.max() <= 0.5 / 255 + 1e-6


def test_values_outside_the_range_are_clamped(tmp_path):
    row = torch.tensor([-3.0, -0.001, 1.001, 7.0]).repeat(3, 1, 1)
    save_png(row, tmp_path / "a.png", {})
    assert pixels(tmp_path / "a.png")[0, :, 0].tolist() == [0, 0, 255, 255]


def test_the_recipe_comes_back(tmp_path, picture):
    save_png(picture, tmp_path / "a.png", RECIPE)
    assert read_recipe(tmp_path / "a.png") == RECIPE
    with Image.open(tmp_path / "a.png") as image:
        assert json.loads(image.text["twinframe"]) == RECIPE


def test_a_picture_of_another_maker_has_no_recipe(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(KeyError):
        read_recipe(tmp_path / "a.png")


def test_equal_input_gives_equal_bytes_and_other_input_other_bytes(tmp_path, picture):
    save_png(picture, tmp_path / "a.png", RECIPE)
    save_png(picture.clone(), tmp_path / "b.png", dict(reversed(RECIPE.items())))
    save_png(picture, tmp_path / "c.png", RECIPE | {"precision": "mxfp8"})
    save_png(1 - picture, tmp_path / "d.png", RECIPE)
    a, b, c, d = ((tmp_path / f"{name}.png").read_bytes() for name in "abcd")
    assert a == b and a != c and a != d


def test_bf16_pictures_can_be_saved(tmp_path, picture):
    save_png(picture.bfloat16(), tmp_path / "a.png", {})
    save_png(picture.bfloat16().float(), tmp_path / "b.png", {})
    assert (pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png")).all()


def test_an_older_file_is_replaced(tmp_path, picture):
    (tmp_path / "a.png").write_text("old")
    save_png(picture, tmp_path / "a.png", {})
    assert [f.name for f in tmp_path.iterdir()] == ["a.png"]
    assert pixels(tmp_path / "a.png").shape == (40, 24, 3)


def test_a_write_that_fails_half_way_leaves_nothing_and_spares_the_older_file(tmp_path, picture, monkeypatch):
    def full_disk(self, content):
        with self.open("wb") as stream:
            stream.write(content[:4])
        raise OSError(28, "No space left on device")

    (tmp_path / "a.png").write_text("old")
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OutputError, match=r"Cannot write .*a\.png: No space left on device\."):
        save_png(picture, tmp_path / "a.png", {})
    assert [f.read_text() for f in tmp_path.iterdir()] == ["old"]


def test_a_target_that_cannot_be_replaced_leaves_nothing(tmp_path, picture):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OutputError, match=r"a\.png"):
        save_png(picture, tmp_path / "a.png", {})
    assert [f.name for f in tmp_path.iterdir()] == ["a.png"]


def test_a_missing_folder_is_an_output_error(tmp_path, picture):
    with pytest.raises(OutputError, match=r"gone/a\.png"):
        save_png(picture, tmp_path / "gone" / "a.png", {})


def test_a_folder_below_a_file_is_an_output_error(tmp_path, picture):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/a\.png"):
        save_png(picture, tmp_path / "file" / "a.png", {})
