"""PNG files out, with the recipe that made them inside, and back in.

A file appears whole or not at all.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin

from engine.errors import OutputError

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
    partial = file.with_name(f".{file.name}.part")
    try:
        Image.fromarray(pixels).save(partial, format="PNG", pnginfo=text)
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"Cannot write {file}: {error.strerror or error}.") from error


def read_recipe(file: Path) -> dict:
    """The recipe inside a picture made here.

    Raises:
        KeyError: the picture holds none.
    """
    with Image.open(file) as picture:
        return json.loads(picture.text[KEYWORD])
