"""PNG files out, with the recipe that made them inside, and back in."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin

from engine.files import write_whole

KEYWORD = "twinframe"
"""The PNG text chunk that holds the recipe as JSON."""


def save_png(picture: torch.Tensor, file: Path, recipe: dict) -> None:
    """Write a picture, losslessly, with `recipe` as a text chunk. Equal input gives equal bytes.

    Args:
        picture: float (3, H, W) in [0, 1].
        recipe: plain JSON values.

    Raises:
        OutputError: the file cannot be written.
    """
    pixels = (picture.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    text = PngImagePlugin.PngInfo()
    text.add_text("Software", "Twinframe")
    text.add_itxt(KEYWORD, json.dumps(recipe, sort_keys=True, ensure_ascii=False))
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format="PNG", pnginfo=text)
    write_whole(file, encoded.getvalue())


def read_recipe(file: Path) -> dict:
    """The recipe inside a picture made here.

    Raises:
        KeyError: the picture holds none.
    """
    with Image.open(file) as picture:
        return json.loads(picture.text[KEYWORD])
