"""PNG and MP4 files out, with the recipe that made them inside, and back in."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from engine.files import whole, write_whole
from engine.results import LpipsMap

KEYWORD = "twinframe"
"""The PNG text chunk that holds the recipe as JSON; in an MP4 it is the comment."""

_BT709 = 1
"""BT.709's number as primaries, transfer and matrix in ISO/IEC 23091-2: players guess where it is not written down."""
_AUDIO_BLOCK = 1 << 16
"""Samples handed to the encoder at once."""


def save(
    pixels: Tensor,
    audio: Tensor | None,
    frame_rate: float | None,
    audio_rate: int,
    folder: Path,
    stem: str,
    recipes: Sequence[Mapping[str, Any]],
) -> tuple[str, ...]:
    """Write pictures, or the clips of a model that has a frame rate, each with its recipe inside.

    Args:
        pixels: pictures, float (N, 3, H, W), or clips, (N, F, 3, H, W), in [0, 1].
        audio, frame_rate, audio_rate: of clips, as of `save_mp4`; audio is (N, channels, samples).
        stem: of the files' names; with a number behind it where there are several.
        recipes: plain JSON values, N of them.

    Returns:
        The files' names.

    Raises:
        OutputError: they cannot be written.
    """
    files = []
    for i, (each, recipe) in enumerate(zip(pixels, recipes, strict=True)):
        name = stem if len(pixels) == 1 else f"{stem}-{i + 1}"
        if frame_rate is None:
            file = folder / f"{name}.png"
            save_png(each, file, recipe)
        else:
            file = folder / f"{name}.mp4"
            save_mp4(each, None if audio is None else audio[i], frame_rate, audio_rate, file, recipe)
        files.append(str(file))
    return tuple(files)


def save_png(picture: Tensor, file: Path, recipe: Mapping[str, Any]) -> None:
    """Write a picture, losslessly, with `recipe` as a text chunk. Equal input gives equal bytes.

    Args:
        picture: float (3, H, W) in [0, 1].
        recipe: plain JSON values.

    Raises:
        OutputError: the file cannot be written.
    """
    text = PngImagePlugin.PngInfo()
    text.add_text("Software", "Twinframe")
    text.add_itxt(KEYWORD, _json(recipe))
    encoded = io.BytesIO()
    Image.fromarray(_levels(picture)).save(encoded, format="PNG", pnginfo=text)
    write_whole(file, encoded.getvalue())


def save_map(maps: Tensor, file: Path) -> float:
    """Write maps one below the other as a PNG in grey, losslessly but for its 255 levels.

    Args:
        maps: float (F, h, w), not negative.

    Returns:
        The value of level 255, the largest there is; 0 where all are.

    Raises:
        OutputError: the file cannot be written.
    """
    below = maps.float().cpu().flatten(0, 1)
    top = float(below.max())
    levels = (below / (top or 1.0) * 255).round().to(torch.uint8).numpy()
    encoded = io.BytesIO()
    Image.fromarray(levels).save(encoded, format="PNG")
    write_whole(file, encoded.getvalue())
    return top


def save_maps(maps: Sequence[Tensor | None], pictures: Sequence[str]) -> tuple[LpipsMap | None, ...]:
    """Write LPIPS maps, one a picture or clip that has a score, beside its file.

    Raises:
        OutputError: they cannot be written.
    """
    kept: list[LpipsMap | None] = []
    for each, picture in zip(maps, pictures, strict=True):
        file = Path(picture).with_name(f"{Path(picture).stem}-lpips.png")
        kept.append(None if each is None else LpipsMap(file=str(file), top=save_map(each, file)))
    return tuple(kept)


def save_mp4(
    frames: Tensor, audio: Tensor | None, frame_rate: float, audio_rate: int, file: Path, recipe: Mapping[str, Any]
) -> None:
    """Write a clip that browsers play: H.264 (yuv420p, CRF 14, fast start) and AAC, with `recipe` as its comment.

    Equal input gives equal bytes, but for frames of about 32 pixels a side, where x264's were seen to vary. H.264 loses
    a little, alike for every precision: measure on tensors, not on files.

    Args:
        frames: float (F, 3, H, W) in [0, 1], H and W even.
        audio: float (channels, samples) in [-1, 1], one or two channels; None for a silent clip.
        frame_rate: frames a second.
        audio_rate: samples a second; AAC has fixed ones, 16000, 24000 and 48000 among them.
        recipe: plain JSON values.

    Raises:
        ValueError: an odd height or width, or a sound of another shape.
        OutputError: the file cannot be written.
    """
    if frames.shape[-1] % 2 or frames.shape[-2] % 2:
        raise ValueError(f"H.264 in yuv420p takes even sizes, not {frames.shape[-1]}x{frames.shape[-2]}.")
    if audio is not None and (audio.ndim != 2 or audio.shape[0] not in (1, 2)):
        raise ValueError(f"Sound is (1 or 2 channels, samples), not {tuple(audio.shape)}.")
    with whole(file) as partial:
        _encode(frames, audio, frame_rate, audio_rate, partial, recipe)


def read_recipe(file: Path) -> dict[str, Any]:
    """The recipe inside a picture or clip made here.

    Raises:
        KeyError: it holds none.
    """
    if file.suffix == ".mp4":
        import av

        with av.open(str(file)) as clip:
            return _object(clip.metadata["comment"])
    with Image.open(file) as picture:
        texts = picture.text if isinstance(picture, PngImagePlugin.PngImageFile) else {}
        return _object(texts[KEYWORD])


def _object(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    return found


def _encode(
    frames: Tensor, audio: Tensor | None, frame_rate: float, audio_rate: int, file: Path, recipe: Mapping[str, Any]
) -> None:
    import av  # here, so that whoever makes no clips can do without
    from av.video.reformatter import ColorRange, Colorspace

    # Bit-exact: no versions or dates inside.
    with av.open(str(file), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}) as clip:
        clip.metadata["title"] = "Twinframe"
        clip.metadata["comment"] = _json(recipe)
        video = clip.add_stream("libx264", rate=Fraction(frame_rate).limit_denominator(1001))
        video.width, video.height, video.pix_fmt = frames.shape[-1], frames.shape[-2], "yuv420p"
        # A fixed number of threads: x264's bytes depend on it.
        video.options = {"crf": "14", "preset": "veryfast", "threads": "1"}
        context = video.codec_context
        context.flags |= av.codec.context.Flags.bitexact
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = ColorRange.MPEG
        sound = None
        if audio is not None:
            sound = clip.add_stream("aac", rate=audio_rate, layout="stereo" if audio.shape[0] == 2 else "mono")
            sound.bit_rate = 192_000
            sound.codec_context.flags |= av.codec.context.Flags.bitexact
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(_levels(picture), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            clip.mux(video.encode(frame))
        clip.mux(video.encode())
        if audio is not None and sound is not None:
            samples = audio.float().nan_to_num(0).clamp(-1, 1).cpu().contiguous()
            for begin in range(0, samples.shape[1], _AUDIO_BLOCK):
                part = samples[:, begin : begin + _AUDIO_BLOCK].contiguous().numpy()
                block = av.AudioFrame.from_ndarray(part, format="fltp", layout=sound.layout.name)
                block.sample_rate, block.pts = audio_rate, begin
                clip.mux(sound.encode(block))
            clip.mux(sound.encode())


def _levels(picture: Tensor) -> np.ndarray:
    """Float (3, H, W) in [0, 1] -> uint8 (H, W, 3), to the nearest level; what is not a number becomes black."""
    levels = (picture.float().nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.permute(1, 2, 0).contiguous().cpu().numpy()


def _json(recipe: Mapping[str, Any]) -> str:
    return json.dumps(recipe, sort_keys=True, ensure_ascii=False)
