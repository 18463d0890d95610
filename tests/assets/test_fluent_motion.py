"""The data that mini-ltx2 learns from: what captions promise, clips show and sounds let hear."""

import random

import numpy as np
import pytest

from assets.training.fluent_emoji import COLOURS
from assets.training.fluent_motion import (
    FRAME_RATE,
    HOP,
    MOTIONS,
    NOTE,
    NUM_FRAMES,
    PLACES,
    SAMPLE_RATE,
    SAMPLES,
    VERBS,
    VOICES,
    canonical,
    caption,
    sound,
    transforms,
)

NAMES = [name for members in VOICES.values() for name in members]


def test_no_two_motions_look_alike_in_the_middle_frame():
    middle = transforms()[:, :, NUM_FRAMES // 2].reshape(-1, 4)
    motion = np.tile(np.arange(len(MOTIONS)), len(PLACES))
    apart = np.abs(middle[:, None] - middle[None]).max(-1)
    assert apart[motion[:, None] != motion].min() > 0.1


def test_a_place_moves_the_whole_clip_sideways():
    for place, moved in zip(PLACES, transforms(), strict=True):
        assert np.allclose(moved - transforms()[0], [0, place, 0, 0], atol=1e-6)


@pytest.mark.parametrize("motion", MOTIONS[1:])
def test_every_motion_but_still_moves(motion):
    assert np.ptp(transforms()[0, MOTIONS.index(motion)], axis=0).max() > 0.25


@pytest.mark.parametrize("voice", VOICES)
def test_a_voice_sounds_different_in_every_motion(voice):
    sounds = np.stack([sound(motion, voice) for motion in MOTIONS])
    assert sounds.shape == (len(MOTIONS), 2, SAMPLES)
    assert np.isfinite(sounds).all()
    assert np.abs(sounds).max() <= 0.7001
    apart = np.abs(sounds[:, None] - sounds[None]).mean((2, 3))
    assert apart[~np.eye(len(MOTIONS), dtype=bool)].min() > 0.005


def test_a_sound_is_as_long_as_its_clip_to_one_latent_frame():
    assert abs(SAMPLES / SAMPLE_RATE - NUM_FRAMES / FRAME_RATE) < 4 * HOP / SAMPLE_RATE


def test_a_steady_note_repeats_with_every_hop():
    tone = np.sin(2 * np.pi * 7 * NOTE * np.arange(2 * HOP) / SAMPLE_RATE)
    assert np.allclose(tone[:HOP], tone[HOP:])


def test_something_that_slides_in_is_heard_from_the_left_first():
    left, right = sound("sliding", "vehicle")
    assert np.abs(left[:HOP]).sum() > 5 * np.abs(right[:HOP]).sum()
    assert np.isclose(np.abs(left[-8 * HOP :]).sum(), np.abs(right[-8 * HOP :]).sum(), rtol=0.2)


@pytest.mark.parametrize("motion", MOTIONS)
def test_captions_name_what_moves_and_how(motion):
    rng = random.Random(0)
    for name in rng.sample(NAMES, 20):
        text = caption(rng, name, motion, "teal").lower()
        assert name in text
        assert "teal" in text
        assert any(verb in text for verb in VERBS[motion] or ("",))


def test_canonical_captions_are_all_different():
    every = [canonical(n, m, c) for n in NAMES for m in MOTIONS for c in COLOURS]
    assert len(set(every)) == len(every)
