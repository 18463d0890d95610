"""Training data of `mini-ltx2`: animated Fluent emoji, the motions they are put through, and a sound for each.

Sources, fetched once by `npm pack` and never committed: @lobehub/fluent-emoji-anim-1 to -4 1.0.0 (MIT; Microsoft's
Fluent Emoji, MIT), animated webp of 256x256 by code point, and emojibase-data 17.0.0 (MIT) for the names.

`python -m assets.training.fluent_motion DIR` prepares everything that does not need a GPU: `DIR/motion.zip` (25 frames
of each emoji), `DIR/captions.npz` (tokenized captions), `DIR/tokenizer` and `DIR/names.json`.

The sounds are synthesized here. Every note is a multiple of `NOTE` Hz, one period of which is one hop of the mel
spectrogram: a vocoder, which is shift-equivariant by hops, can then reproduce a steady note without a seam.

It knows nothing of models: what is learnt from this data is in mini_ltx2.py.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import zipfile
from pathlib import Path

import numpy as np
from transformers import GemmaTokenizer

from assets.training.fluent_emoji import BARE_FRAMES, COLOURS, FRAMES, SYNONYMS, article, download

PACKAGES = (*(f"@lobehub/fluent-emoji-anim-{k}@1.0.0" for k in (1, 2, 3, 4)), "emojibase-data@17.0.0")
NUM_FRAMES, FRAME_RATE = 25, 12.0
STORED_SIDE = 128
"""Pixels a stored frame measures."""
TEXT_TOKENS = 32
"""Tokens a caption is padded to, on the left."""
CAPTIONS_PER_CLIP = 8
"""Different captions drawn for every emoji, motion and colour."""

VOICES: dict[str, dict[str, str]] = {
    "bird": dict.fromkeys(("eagle", "penguin", "dove", "peacock", "flamingo", "parrot", "owl", "duck", "rooster"), "")
    | {"chick": "hatching chick"},
    "beast": dict.fromkeys(
        ("raccoon", "monkey", "kangaroo", "wolf", "cat", "polar bear", "zebra", "horse", "lion", "koala", "panda"), ""
    )
    | {"rabbit": "rabbit face", "dog": "dog face", "sheep": "ewe", "cow": "cow face", "tiger": "tiger face"}
    | {"pig": "pig face", "mouse": "mouse face", "unicorn": "", "fox": "", "bat": ""},
    "insect": dict.fromkeys(("butterfly", "cricket", "beetle", "spider", "ant", "snail"), "")
    | {"bee": "honeybee", "ladybird": "lady beetle"},
    "sea animal": dict.fromkeys(
        ("squid", "dolphin", "crab", "octopus", "blowfish", "whale", "shark", "lobster", "shrimp", "tropical fish"), ""
    ),
    "reptile": dict.fromkeys(("lizard", "dragon", "turtle", "snake", "crocodile", "frog"), "") | {"dinosaur": "T-Rex"},
    "face": {
        "grinning face": "grinning squinting face",
        "face blowing a kiss": "",
        "angry face": "enraged face",
        "nauseated face": "",
        "cold face": "",
        "face with sunglasses": "smiling face with sunglasses",
        "partying face": "",
        "star-struck face": "star-struck",
        "sleeping face": "",
        "crying face": "loudly crying face",
        "screaming face": "face screaming in fear",
        "face with hearts": "smiling face with hearts",
        "exploding head": "",
        "clown": "clown face",
    },
    "weather": dict.fromkeys(("sun", "snowflake", "rainbow", "tornado", "cyclone", "star", "snowman", "fire"), "")
    | {"planet": "ringed planet", "thunder cloud": "cloud with lightning and rain", "rain cloud": "cloud with rain"},
    "vehicle": dict.fromkeys(("flying saucer", "helicopter", "rocket", "parachute", "police car", "sailboat"), "")
    | {"aeroplane": "airplane", "steam train": "locomotive", "fire engine": "", "roller skate": "", "canoe": ""},
    "thing": dict.fromkeys(
        ("party popper", "birthday cake", "teddy bear", "skull", "ghost", "alien monster", "robot", "alien"), ""
    )
    | {"beer mugs": "clinking beer mugs", "champagne bottle": "bottle with popping cork"}
    | {"camera": "camera with flash", "pumpkin": "jack-o-lantern", "umbrella": "umbrella with rain drops"}
    | {"telephone": "telephone receiver", "wilted flower": "", "cup of coffee": "hot beverage"},
}
"""What is learnt, by the voice it sounds with: the name in captions -> emojibase's label where that differs."""
MOTIONS = ("still", "bouncing", "spinning", "growing", "sliding", "swinging")
"""What a clip does with its emoji, besides the emoji's own animation, which always runs."""
PLACES = (0.0, -0.2, 0.2)
"""How far aside, to the right in half widths, a clip may take place: the seed decides. A tenth of the width, so that
an autoencoder that compresses as much sees the same thing one cell further."""
VERBS = {
    "still": (),
    "bouncing": ("bouncing", "jumping", "hopping"),
    "spinning": ("spinning", "turning", "rotating"),
    "growing": ("growing", "getting bigger", "growing bigger"),
    "sliding": ("sliding in", "sliding", "entering"),
    "swinging": ("swinging", "swaying", "rocking"),
}

SAMPLE_RATE, HOP = 16_000, 256
NOTE = SAMPLE_RATE / HOP
"""62.5 Hz."""
SAMPLES = 129 * HOP
"""Length of every sound: 129 mel frames, which the audio VAE packs into 33 latent ones, as many as
`round(NUM_FRAMES / FRAME_RATE * SAMPLE_RATE / HOP / 4)`."""
TIMBRES: dict[str, tuple[int, tuple[float, ...], float]] = {
    "bird": (16, (1.0, 0.25), 0.12),
    "beast": (4, (1.0, 0.8, 0.5, 0.35, 0.2), 0.22),
    "insect": (8, (0.6, 0.2, 0.6, 0.1, 0.5, 0.0, 0.3), 0.10),
    "sea animal": (8, (1.0, 0.0, 0.15), 0.16),
    "reptile": (4, (0.8, 0.0, 0.8, 0.0, 0.5), 0.14),
    "face": (8, (1.0, 0.5, 0.3, 0.15), 0.20),
    "weather": (12, (1.0, 0.0, 0.0, 0.5, 0.0, 0.25), 0.45),
    "vehicle": (4, (0.7, 1.0, 0.3, 0.6, 0.2, 0.3), 0.30),
    "thing": (12, (1.0, 0.3, 0.1), 0.09),
}
"""By voice: its keynote in multiples of NOTE, the strength of each partial, and the seconds a note takes to fade."""
Note = tuple[float, float, float]
"""(Where in the clip it begins, 0 to 1; its pitch over the keynote; where it sounds, -1 left to 1 right.)"""


def transforms() -> np.ndarray:
    """Where each motion in each place has the emoji in each frame: (places, motions, frames, 4) of size, x, y, angle.

    Size is a share of the picture's width, x and y are the centre in [-1, 1], the angle is in radians, clockwise. In
    the middle frame no two motions look alike, wherever they take place.
    """
    t = np.linspace(0, 1, NUM_FRAMES)
    one, none = np.ones_like(t), np.zeros_like(t)
    motions = np.stack(
        [
            np.stack(row, axis=1)
            for row in (
                (0.88 * one, none, none, none),
                (0.60 * one, none, 0.36 - 0.70 * np.abs(np.sin(3 * np.pi * t)), none),
                (0.74 * one, none, none, 2 * np.pi * t),
                (0.30 + 0.60 * t, none, none, none),
                (0.74 * one, -1.6 * (1 - t) ** 2.2, none, none),
                (0.70 * one, 0.16 * np.cos(4 * np.pi * t), 0.06 * one, -np.pi / 6 * np.cos(4 * np.pi * t)),
            )
        ]
    )
    return np.stack([motions + np.array([0.0, place, 0.0, 0.0]) for place in PLACES]).astype(np.float32)


def notes(motion: str, voice: str) -> list[Note]:
    """What is heard: a motif of the voice when nothing moves, else what the motion suggests, in its rhythm."""
    eighths = np.arange(8) / 8
    if motion == "bouncing":  # a note and its octave at every touch of the ground
        return [(t + d, p, 0.0) for t in (0.0, 1 / 3, 2 / 3) for d, p in ((0.0, 1.0), (0.05, 2.0))]
    if motion == "spinning":  # a trill that goes round the listener
        return [(k / 16, (1.0, 1.25)[k % 2], float(np.sin(2 * np.pi * k / 16))) for k in range(16)]
    if motion == "growing":  # up the harmonic series
        return [(t, (4 + k) / 4, 0.0) for k, t in enumerate(eighths)]
    if motion == "sliding":  # down to the keynote, from the left to the middle
        return [(t, (11 - k) / 4, -float((1 - t) ** 1.5)) for k, t in enumerate(eighths)]
    if motion == "swinging":  # tick on the right, tock on the left
        return [(k / 4, (1.5, 1.0)[k % 2], (0.8, -0.8)[k % 2]) for k in range(4)]
    motifs: dict[str, tuple[tuple[float, float], ...]] = {
        "bird": ((0.0, 1.5), (0.08, 2.0), (0.16, 1.5), (0.5, 1.5), (0.58, 2.0), (0.66, 1.5)),
        "beast": ((0.0, 1.5), (0.12, 1.0), (0.5, 1.5), (0.62, 1.0)),
        "insect": tuple((k / 12, 1.0 + (k % 3) / 8) for k in range(12)),
        "sea animal": ((0.0, 1.0), (0.1, 1.5), (0.2, 2.0), (0.55, 1.25), (0.65, 2.0)),
        "reptile": ((0.0, 1.0), (0.2, 1.0), (0.4, 0.75), (0.7, 1.0)),
        "face": ((0.0, 1.0), (0.15, 1.25), (0.3, 1.5), (0.45, 2.0)),
        "weather": ((0.0, 2.0), (0.25, 1.5), (0.5, 1.25), (0.75, 1.0)),
        "vehicle": tuple((k / 6, (1.0, 1.25)[k % 2]) for k in range(6)),
        "thing": ((0.0, 1.0), (0.33, 1.0), (0.5, 1.5)),
    }
    return [(t, p, 0.0) for t, p in motifs[voice]]


def sound(motion: str, voice: str) -> np.ndarray:
    """One clip's sound, float32 (2, SAMPLES) within [-1, 1], left channel first."""
    key, partials, fade = TIMBRES[voice]
    time = np.arange(SAMPLES) / SAMPLE_RATE
    out = np.zeros((2, SAMPLES))
    for begin, pitch, place in notes(motion, voice):
        begin = round(begin * NUM_FRAMES / FRAME_RATE * SAMPLE_RATE / HOP) * HOP / SAMPLE_RATE
        after = (time - begin).clip(min=0)
        envelope = np.minimum(after / 0.006, 1) * np.exp(-after / fade)
        pitch = round(key * pitch) * NOTE
        wave = sum(
            strength * np.sin(2 * np.pi * pitch * k * time)
            for k, strength in enumerate(partials, 1)
            if pitch * k < 0.45 * SAMPLE_RATE
        )
        angle = (place + 1) * np.pi / 4
        out += np.stack([np.cos(angle) * envelope * wave, np.sin(angle) * envelope * wave])
    fading = np.minimum((SAMPLES - np.arange(SAMPLES)) / (0.03 * SAMPLE_RATE), 1)
    return (0.7 * out * fading / np.abs(out).max()).astype(np.float32)


def select(pictures: list[Path], names: Path) -> list[dict]:
    """The emoji that are trained on: `{"name", "voice", "file"}`.

    Raises:
        KeyError: a label is not emojibase's, or its animation is missing.
    """
    files = {f.stem.replace("-fe0f", ""): f for folder in pictures for f in folder.glob("assets/*.webp")}
    codes = {e["label"]: e["hexcode"] for e in json.loads((names / "en" / "data.json").read_text())}
    return [
        {"name": name, "voice": voice, "file": files[codes[label or name].lower().replace("-fe0f", "")]}
        for voice, members in VOICES.items()
        for name, label in members.items()
    ]


def _moving(rng: random.Random, name: str, motion: str) -> str:
    verb = rng.choices(VERBS[motion], (4, 1, 1))[0]
    return f"{verb} {name}" if " " not in verb and rng.random() < 0.4 else f"{name} {verb}"


def caption(rng: random.Random, name: str, motion: str, colour: str) -> str:
    """One caption of an emoji that moves on a background; word order, synonyms and capitals varied."""
    subject = _moving(rng, name, motion) if motion != "still" else name
    frames = BARE_FRAMES if colour == "white" and rng.random() < 0.5 else FRAMES
    frame = rng.choices([f for f, _ in frames], [w for _, w in frames])[0]
    shade = rng.choice((colour, colour, *SYNONYMS.get(colour, ())))
    text = frame.format(a=article(subject), n=subject, c=shade).replace("a orange ", "an orange ")
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.05 else text


def canonical(name: str, motion: str, colour: str) -> str:
    """The plain caption that the evaluation uses."""
    subject = " ".join((article(name), *VERBS[motion][:1]))
    return f"{subject} on a {colour} background".replace("a orange ", "an orange ")


def train_tokenizer(captions: list[str], folder: Path) -> None:
    """A Gemma tokenizer with byte-pair merges, within words, learnt from `captions`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"],
        initial_alphabet=[chr(c) for c in range(33, 127)],
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = GemmaTokenizer(
        vocab=trained["vocab"],
        merges=[tuple(m) for m in trained["merges"]],
        model_max_length=TEXT_TOKENS,
        padding_side="left",
        add_bos_token=True,
    )
    tokenizer.save_pretrained(folder / "tokenizer")


def load_tokenizer(folder: Path) -> GemmaTokenizer:
    """The tokenizer as the pipeline loads it."""
    return GemmaTokenizer.from_pretrained(folder / "tokenizer")


def tokenize(tokenizer: GemmaTokenizer, captions: list[str]) -> np.ndarray:
    """Token ids, (N, TEXT_TOKENS) int16, padded on the left with id 0 as LTX2Pipeline pads them."""
    ids = tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True)["input_ids"]
    return np.asarray(ids, dtype=np.int16)


def _clip(file: Path) -> bytes:
    """NUM_FRAMES frames over one run of an animation, as an animated webp of STORED_SIDE pixels."""
    from PIL import Image

    frames = []
    with Image.open(file) as picture:
        for k in range(NUM_FRAMES):
            picture.seek(round(k * picture.n_frames / NUM_FRAMES))
            frame = picture.convert("RGBa").resize((STORED_SIDE, STORED_SIDE), Image.Resampling.LANCZOS)
            frames.append(frame.convert("RGBA"))
    out = io.BytesIO()
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:], quality=75, alpha_quality=80, duration=83)
    return out.getvalue()


def prepare(folder: Path, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    *pictures, names = download(folder, PACKAGES)
    emoji, colours = select(pictures, names), list(COLOURS)
    every = [(e["name"], m, c) for e in emoji for m in MOTIONS for c in colours]
    captions = [caption(rng, *one) for one in every for _ in range(CAPTIONS_PER_CLIP)]
    train_tokenizer(captions, folder)
    tokenizer = load_tokenizer(folder)
    shape = (len(emoji), len(MOTIONS), len(colours))
    np.savez_compressed(
        folder / "captions.npz",
        captions=tokenize(tokenizer, captions).reshape(*shape, CAPTIONS_PER_CLIP, TEXT_TOKENS),
        canonical=tokenize(tokenizer, [canonical(*one) for one in every]).reshape(*shape, TEXT_TOKENS),
        empty=tokenize(tokenizer, [""]),
    )
    with zipfile.ZipFile(folder / "motion.zip", "w", zipfile.ZIP_STORED) as archive:
        for i, e in enumerate(emoji):
            archive.writestr(f"{i:04d}.webp", _clip(e["file"]))
    (folder / "names.json").write_text(json.dumps([{k: e[k] for k in ("name", "voice")} for e in emoji], indent=0))
    longest = max((tokenizer(t)["input_ids"] for t in captions), key=len)
    print(f"{len(emoji)} emoji, {len(captions)} captions of at most {len(longest)} tokens")
    for text in rng.sample(captions, 16):
        print("  ", text)


def read_frames(folder: Path, limit: int | None = None) -> np.ndarray:
    """All emoji as (N, NUM_FRAMES, STORED_SIDE, STORED_SIDE, 4) uint8, alpha premultiplied."""
    from concurrent.futures import ThreadPoolExecutor

    from PIL import Image, ImageSequence

    def read(blob: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(blob)) as picture:
            return np.stack([np.asarray(f.convert("RGBA").convert("RGBa")) for f in ImageSequence.Iterator(picture)])

    with zipfile.ZipFile(folder / "motion.zip") as archive:
        blobs = [archive.read(name) for name in sorted(archive.namelist())[:limit]]
    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(read, blobs)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prepare mini-ltx2's training data (CPU, needs npm).")
    parser.add_argument("folder", type=Path)
    prepare(parser.parse_args().folder)
