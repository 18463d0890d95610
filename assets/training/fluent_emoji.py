"""Training data of the miniatures: Fluent 3D emoji, their names, backgrounds and captions.

Sources, fetched once by `npm pack` and never committed:
- pictures: @lobehub/fluent-emoji-3d 1.1.0 (MIT; Microsoft's Fluent Emoji, MIT), 256x256 RGBA webp by code point;
- names and tags: emojibase-data 17.0.0 (MIT).

`python -m assets.training.fluent_emoji DIR` prepares everything that does not need a GPU: it writes
`DIR/emoji.zip` (the pictures that are used), `DIR/captions.npz` (tokenized captions) and `DIR/names.json`,
and trains both tokenizers from the captions.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import subprocess
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np

PACKAGES = ("@lobehub/fluent-emoji-3d@1.1.0", "emojibase-data@17.0.0")
COLOURS = {
    "white": (255, 255, 255),
    "black": (24, 24, 27),
    "grey": (150, 153, 160),
    "red": (214, 48, 49),
    "orange": (245, 140, 40),
    "yellow": (250, 214, 72),
    "green": (60, 160, 75),
    "teal": (0, 140, 140),
    "sky blue": (135, 200, 245),
    "blue": (40, 90, 215),
    "navy": (22, 34, 84),
    "purple": (125, 60, 175),
    "pink": (250, 160, 195),
    "brown": (120, 78, 48),
}
"""Background colours, sRGB."""
SYNONYMS = {
    "grey": ("gray",),
    "purple": ("violet",),
    "sky blue": ("light blue",),
    "navy": ("dark blue",),
    "pink": ("rose",),
}

TEXT_TOKENS = 32
"""Tokens a caption is padded to, for both text encoders."""
CAPTIONS_PER_PAIR = 12
"""Different captions drawn for every emoji on every colour."""
LEFT_OUT_SUBGROUPS = {"country-flag", "subdivision-flag", "keycap", "alphanum", "gender", "skin-tone", "hair-style"}
"""Near-identical signs and flags that would spend the miniature's few parameters on fine print."""
COMMON_GROUPS = {"animals-nature", "food-drink", "activities"}
COMMON_SUBGROUPS = {
    *("face-smiling", "face-affection", "face-tongue", "face-neutral-skeptical", "face-sleepy", "face-unwell"),
    *(
        "face-hat",
        "face-glasses",
        "face-concerned",
        "face-negative",
        "face-costume",
        "cat-face",
        "monkey-face",
        "emotion",
    ),
    *("place-building", "place-geographic", "transport-ground", "transport-water", "transport-air", "sky-weather"),
    *("musical-instrument", "computer", "phone", "light-video", "clothing", "science"),
}
"""What people type first: with a short training these alone come out sharper than everything together."""
DUO_GROUPS = {"animals-nature", "food-drink", "travel-places", "activities", "objects"}

FRAMES = (
    ("{a} on a {c} background", 8),
    ("{a} on {c}", 1),
    ("{n}, {c} background", 2),
    ("{c} background, {n}", 1),
    ("a {c} background with {a}", 1),
    ("{a} in front of a {c} background", 1),
    ("{a} against a {c} background", 1),
    ("a picture of {a} on a {c} background", 2),
    ("an emoji of {a} on a {c} background", 1),
    ("{n} on a {c} background", 2),
)
BARE_FRAMES = (("{a}", 3), ("{n}", 3), ("a picture of {a}", 1))
"""Without a colour the background is white."""
DUO_JOINS = ("{x} next to {y}", "{x} and {y}", "{x} beside {y}")


def download(folder: Path, packages: tuple[str, ...] = PACKAGES) -> list[Path]:
    """Fetch and unpack npm packages below `folder`; returns their folders, in the order of `packages`."""
    found = []
    for package in packages:
        target = folder / package.strip("@").replace("/", "-").replace("@", "-")
        if not target.exists():
            name = subprocess.run(["npm", "pack", package], cwd=folder, check=True, capture_output=True, text=True)
            with tarfile.open(folder / name.stdout.split()[-1]) as archive:
                archive.extractall(target, filter="data")
        found.append(target / "package")
    return found


def select(pictures: Path, names: Path, common: bool) -> list[dict]:
    """The emoji that are trained on: `{"name", "tags", "group", "file"}`, names unique."""
    data = json.loads((names / "en" / "data.json").read_text())
    messages = json.loads((names / "en" / "messages.json").read_text())
    group = {g["order"]: g["key"] for g in messages["groups"]}
    subgroup = {g["order"]: g["key"] for g in messages["subgroups"]}
    files = {f.stem.replace("-fe0f", ""): f for f in pictures.glob("assets/*.webp")}
    chosen, seen = [], set()
    for entry in data:
        file = files.get(entry["hexcode"].lower().replace("-fe0f", ""))
        if file is None or "group" not in entry or subgroup[entry["subgroup"]] in LEFT_OUT_SUBGROUPS:
            continue
        everyday = group[entry["group"]] in COMMON_GROUPS or subgroup[entry["subgroup"]] in COMMON_SUBGROUPS
        if common and not everyday:
            continue
        name = entry["label"].lower().replace(":", "").replace("“", "").replace("”", "").replace("’", "'")
        clock = subgroup[entry["subgroup"]] == "time" and ("o'clock" in name or "thirty" in name)
        if clock or name.startswith("family ") or name in seen:
            continue
        seen.add(name)
        chosen.append({"name": name, "tags": entry.get("tags", []), "group": group[entry["group"]], "file": str(file)})
    counts = Counter(tag for e in chosen for tag in set(e["tags"]))
    for e in chosen:  # a tag shared by many emoji says too little to be a caption
        e["tags"] = [t for t in e["tags"] if counts[t] <= 2 and t not in seen]
    return chosen


def article(name: str) -> str:
    """`name` with an indefinite article, unless it is a plural or has one."""
    if name.split()[0] in ("a", "an", "the") or (name.endswith("s") and not name.endswith("ss")):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _articles(text: str) -> str:
    return text.replace("a orange ", "an orange ")


def _weighted(rng: random.Random, frames: tuple) -> str:
    return rng.choices([f for f, _ in frames], [w for _, w in frames])[0]


def caption(rng: random.Random, emoji: dict, colour: str) -> str:
    """One caption of an emoji on a background, word order and synonyms varied."""
    name = rng.choice(emoji["tags"]) if emoji["tags"] and rng.random() < 0.12 else emoji["name"]
    shade = rng.choice((colour, *SYNONYMS.get(colour, ())))
    frame = _weighted(rng, BARE_FRAMES if colour == "white" and rng.random() < 0.5 else FRAMES)
    return _articles(frame.format(a=article(name), n=name, c=shade))


def canonical(name: str, colour: str) -> str:
    """The plain caption that the evaluation uses."""
    return _articles(f"{article(name)} on a {colour} background")


def duo_caption(rng: random.Random, left: dict, right: dict, colour: str) -> str:
    """One caption of two objects, the left one named first."""
    both = rng.choice(DUO_JOINS).format(x=article(left["name"]), y=article(right["name"]))
    shade = rng.choice((colour, *SYNONYMS.get(colour, ())))
    return both if colour == "white" and rng.random() < 0.5 else _articles(f"{both} on a {shade} background")


def train_tokenizers(captions: list[str], folder: Path) -> None:
    """A case-folding SentencePiece model for T5 and a byte-level BPE for CLIP, both from `captions`."""
    import sentencepiece
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        vocab_size=3000,
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer_2").mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer_2" / "spiece.model").write_bytes(model.getvalue())

    template = CLIPTokenizer()
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = template._tokenizer.normalizer, template._tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = CLIPTokenizer(
        vocab=trained["vocab"], merges=[tuple(m) for m in trained["merges"]], model_max_length=TEXT_TOKENS
    )
    tokenizer.save_pretrained(folder / "tokenizer")


def load_tokenizers(folder: Path) -> tuple:
    """(CLIP, T5) tokenizers as the pipeline loads them."""
    from transformers import CLIPTokenizer, T5Tokenizer

    clip = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    t5 = T5Tokenizer.from_pretrained(folder / "tokenizer_2", extra_ids=0, model_max_length=TEXT_TOKENS)
    return clip, t5


def tokenize(tokenizers: tuple, captions: list[str]) -> np.ndarray:
    """Token ids of both encoders, (N, 2, TEXT_TOKENS) int16: CLIP's first, then T5's."""
    out = [t(captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True)["input_ids"] for t in tokenizers]
    return np.stack([np.asarray(ids, dtype=np.int16) for ids in out], axis=1)


def prepare(folder: Path, common: bool, duo_count: int, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    emoji = select(*download(folder), common)
    colours = list(COLOURS)
    singles = [caption(rng, e, c) for e in emoji for c in colours for _ in range(CAPTIONS_PER_PAIR)]
    things = [i for i, e in enumerate(emoji) if e["group"] in DUO_GROUPS]
    duos = [(*rng.sample(things, 2), rng.randrange(len(colours))) for _ in range(duo_count)]
    duo_captions = [duo_caption(rng, emoji[a], emoji[b], colours[c]) for a, b, c in duos]
    train_tokenizers(rng.sample(singles, min(60_000, len(singles))) + duo_captions, folder)
    tokenizers = load_tokenizers(folder)
    np.savez_compressed(
        folder / "captions.npz",
        singles=tokenize(tokenizers, singles).reshape(len(emoji), len(colours), CAPTIONS_PER_PAIR, 2, TEXT_TOKENS),
        duos=np.asarray(duos, dtype=np.int32).reshape(-1, 3),
        duo_captions=tokenize(tokenizers, duo_captions or [""])[: len(duos)],
        empty=tokenize(tokenizers, [""]),
        canonical=tokenize(tokenizers, [canonical(e["name"], c) for e in emoji for c in colours]).reshape(
            len(emoji), len(colours), 2, TEXT_TOKENS
        ),
    )
    with zipfile.ZipFile(folder / "emoji.zip", "w", zipfile.ZIP_STORED) as archive:
        for i, e in enumerate(emoji):
            archive.write(e["file"], f"{i:04d}.webp")
    (folder / "names.json").write_text(json.dumps([{k: e[k] for k in ("name", "group")} for e in emoji], indent=0))
    print(f"{len(emoji)} emoji, {len(singles)} captions, {len(duos)} pictures of two")
    for text in rng.sample(singles, 12) + duo_captions[:6]:
        print("  ", text)


def read_pictures(folder: Path, side: int) -> np.ndarray:
    """All emoji as (N, side, side, 4) uint8, alpha premultiplied before resizing so that edges stay clean."""
    from concurrent.futures import ThreadPoolExecutor

    from PIL import Image

    def read(blob: bytes) -> np.ndarray:
        picture = Image.open(io.BytesIO(blob)).convert("RGBA")
        return np.asarray(picture.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS))

    with zipfile.ZipFile(folder / "emoji.zip") as archive:
        blobs = [archive.read(name) for name in sorted(archive.namelist())]
    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(read, blobs)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prepare the miniatures' training data (CPU, needs npm).")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--common", action="store_true", help="only the everyday emoji")
    parser.add_argument("--duos", type=int, default=24_000, help="pictures of two objects side by side")
    args = parser.parse_args()
    prepare(args.folder, args.common, args.duos)
