"""PNG and MP4 files: true to what was made, with its recipe, the same bytes each time, and whole or not at all."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import Colorspace
from PIL import Image

from engine.errors import OutputError
from engine.outputs.media import read_recipe, save_map, save_mp4, save_png

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


def test_a_map_comes_back_from_its_levels_and_the_value_of_the_highest(tmp_path):
    maps = torch.rand(3, 8, 6) * 0.4
    top = save_map(maps, tmp_path / "map.png")
    assert top == maps.max().item()
    with Image.open(tmp_path / "map.png") as found:
        assert (found.mode, found.size) == ("L", (6, 24))
        back = torch.from_numpy(np.array(found)).reshape(3, 8, 6) / 255 * top
    torch.testing.assert_close(back, maps, rtol=0, atol=top / 255)
    assert save_map(torch.zeros(1, 2, 2), tmp_path / "map.png") == 0


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


# ---------------------------------------------------------------------------------------------------------------------
# Clips


FRAMES, RATE, AUDIO_RATE = 9, 24.0, 24000


@pytest.fixture(scope="module")
def clip():
    """A grey ramp that gets brighter with every frame, left half darker, and a tone that is louder on the right."""
    frames = torch.linspace(0.2, 0.9, FRAMES).view(-1, 1, 1, 1).expand(-1, 3, 48, 64).clone()
    frames[:, 0, :, :32] *= 0.5
    tone = torch.sin(2 * torch.pi * 440 * torch.arange(round(FRAMES / RATE * AUDIO_RATE)) / AUDIO_RATE)
    return frames, torch.stack((0.2 * tone, 0.8 * tone))


def streams(file):
    with av.open(str(file)) as container:
        return {s.type: s for s in container.streams}, container.duration / av.time_base


def decoded(file, kind):
    with av.open(str(file)) as container:
        return list(container.decode(**{kind: 0}))


def test_a_clip_is_what_browsers_play(tmp_path, clip):
    save_mp4(*clip, RATE, AUDIO_RATE, tmp_path / "a.mp4", RECIPE)
    found, duration = streams(tmp_path / "a.mp4")
    video, audio = found["video"], found["audio"]
    assert (video.codec_context.name, video.pix_fmt, video.width, video.height) == ("h264", "yuv420p", 64, 48)
    assert video.average_rate == 24 and video.frames == FRAMES
    assert (audio.codec_context.name, audio.rate, audio.layout.name) == ("aac", AUDIO_RATE, "stereo")
    assert abs(duration - FRAMES / RATE) < 1 / RATE
    assert abs(audio.duration * audio.time_base - FRAMES / RATE) < 1 / RATE
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # so that it plays before it has come whole


def test_a_clip_shows_the_frames_in_their_colours(tmp_path, clip):
    frames, _ = clip
    save_mp4(*clip, RATE, AUDIO_RATE, tmp_path / "a.mp4", {})
    shown = decoded(tmp_path / "a.mp4", "video")
    assert len(shown) == FRAMES
    for frame, wanted in zip(shown, frames, strict=True):
        made = frame.to_ndarray(format="rgb24", src_colorspace=Colorspace.ITU709) / 255
        # Away from the edge between the halves, where chroma has half the resolution.
        error = np.abs(made - wanted.permute(1, 2, 0).numpy())[:, [8, 20, 44, 56]]
        assert error.max() < 0.03


def test_a_clip_sounds_as_it_was(tmp_path, clip):
    _, audio = clip
    save_mp4(*clip, RATE, AUDIO_RATE, tmp_path / "a.mp4", {})
    heard = np.concatenate([frame.to_ndarray() for frame in decoded(tmp_path / "a.mp4", "audio")], axis=1)
    assert np.corrcoef(heard[1, : audio.shape[1]], audio[1].numpy())[0, 1] > 0.99
    assert np.abs(heard[1]).mean() / np.abs(heard[0]).mean() == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("channels", [0, 1, 2])
def test_a_clip_has_the_channels_it_was_given(tmp_path, clip, channels):
    frames, audio = clip
    save_mp4(frames, audio[:channels] if channels else None, RATE, AUDIO_RATE, tmp_path / "a.mp4", {})
    found, _ = streams(tmp_path / "a.mp4")
    assert ("audio" in found) == (channels > 0)
    assert not channels or found["audio"].channels == channels


def test_a_clips_recipe_comes_back(tmp_path, clip):
    recipe = RECIPE | {"prompt": "word " * 2000}
    save_mp4(*clip, RATE, AUDIO_RATE, tmp_path / "a.mp4", recipe)
    assert read_recipe(tmp_path / "a.mp4") == recipe


def test_a_clip_of_another_maker_has_no_recipe(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width = stream.height = 16
        container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        container.mux(stream.encode())
    with pytest.raises(KeyError):
        read_recipe(tmp_path / "a.mp4")


def test_equal_clips_give_equal_bytes_and_other_clips_other_bytes(tmp_path, clip):
    frames, audio = clip
    for name, given in {"a": (frames, audio, RECIPE), "b": (frames.clone(), audio.clone(), RECIPE)}.items():
        save_mp4(*given[:2], RATE, AUDIO_RATE, tmp_path / f"{name}.mp4", given[2])
    save_mp4(1 - frames, audio, RATE, AUDIO_RATE, tmp_path / "c.mp4", RECIPE)
    save_mp4(frames, -audio, RATE, AUDIO_RATE, tmp_path / "d.mp4", RECIPE)
    a, b, c, d = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abcd")
    assert a == b and a != c and a != d


def test_bf16_clips_can_be_saved(tmp_path, clip):
    frames, audio = clip
    save_mp4(frames.bfloat16(), audio.bfloat16(), RATE, AUDIO_RATE, tmp_path / "a.mp4", {})
    assert len(decoded(tmp_path / "a.mp4", "video")) == FRAMES


@pytest.mark.parametrize("shape", [(2, 3, 31, 32), (2, 3, 32, 31)])
def test_odd_sizes_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match="even"):
        save_mp4(torch.zeros(shape), None, RATE, 0, tmp_path / "a.mp4", {})
    assert not list(tmp_path.iterdir())


def test_a_clip_that_cannot_be_written_leaves_nothing(tmp_path, clip):
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(OutputError, match=r"a\.mp4"):
        save_mp4(*clip, RATE, AUDIO_RATE, tmp_path / "a.mp4", {})
    assert [f.name for f in tmp_path.iterdir()] == ["a.mp4"]
