"""Words that a prompt asks for, and how many of them are in the picture, read back by the real networks."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from engine.metrics import scores
from engine.results import SCORES


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ('a sign that says "Open at midnight"', "Open at midnight"),
        ("a storefront with 'Deep Learning' written on it", "Deep Learning"),
        ("A sign that says 'Don't panic'.", "Don't panic"),
        ("A book with “Nuit” and “Jour” on it", "Nuit Jour"),
        ("a neon sign that says hello world, at night", "hello world"),
        ("a poster titled Nuit de France", "Nuit de France"),
        ("a man who says hello", ""),
        ("rock 'n' roll", ""),
        ("a dog's bone and a cat's ear", ""),
        ("a rocket on a blue background", ""),
        ("", ""),
    ],
)
def test_only_what_is_to_be_written_is_asked_for(prompt, asked):
    assert scores.asked_words(prompt) == asked
    assert scores.MADE_BY["words_read"].asks(prompt) is bool(asked)


@pytest.mark.parametrize(
    ("asked", "read", "share"),
    [
        ("Hello, world", "HELLO WORLD!", 1.0),
        ("hello", "a sign of hello and more", 1.0),
        ("hello", "hallo", 0.8),
        ("hello", "helo", 0.8),
        ("hello", "", 0.0),
        ("hello", "xyz", 0.0),
        ("привет", "Привет", 1.0),
    ],
)
def test_the_share_is_that_of_the_asked_characters(asked, read, share):
    assert scores.share_read(asked, read) == pytest.approx(share)


def test_a_long_text_beside_the_words_buys_nothing():
    letters = "".join(chr(97 + i % 26) for i in range(400))
    assert scores.share_read("hello", letters) < 0.5


def written(*lines):
    picture = Image.new("RGB", (384, 256), (200, 210, 180))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(52)
    for index, line in enumerate(lines):
        draw.text((40, 50 + 80 * index), line, fill="black", font=font)
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255


def test_written_words_are_read_and_a_black_frame_has_none():
    prompt = 'a sign that says "Open midnight"'
    pixels = torch.cat([written("Open", "midnight"), written("Open", "mudniqht"), torch.zeros(1, 3, 256, 384)])
    found = scores.scored(prompt, pixels)
    right, wrong, black = found["words_read"]
    assert right == 1 and 0.5 < wrong < 1 and black == 0
    assert found.keys() == SCORES.keys()


def test_nothing_is_scored_that_is_not_asked_for_or_cannot_be_had(monkeypatch, caplog):
    assert scores.scored("a cat on a red background", written("cat")) == {}
    monkeypatch.setattr(scores, "find_spec", lambda name: None)
    assert scores.scored('a sign that says "cat"', written("cat")) == {}
    monkeypatch.undo()

    def broken():
        raise RuntimeError("no such network")

    monkeypatch.setattr(scores, "_reader", broken)
    assert scores.scored('a sign that says "cat"', written("cat")) == {}
    assert "words_read could not be computed" in caplog.text
