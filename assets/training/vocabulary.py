"""What the miniatures have learnt to draw, as words: written once from the data that they were trained on.

    python -m assets.training.vocabulary DATA

fetches the names below DATA (npm; nothing of it is committed) and writes `assets/models/vocabulary.json`, which
engine/vocabulary.py reads. `mini-flux` and `mini-qwen` know the everyday emoji of fluent_emoji.py, `mini-ltx2` those of
fluent_motion.py and its motions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from assets.training import fluent_emoji, fluent_motion

OUT = Path(__file__).resolve().parents[1] / "models" / "vocabulary.json"


def pictures(folder: Path) -> dict:
    """Names and tags of the everyday emoji."""
    emoji = fluent_emoji.select(*fluent_emoji.download(folder), common=True)
    return {
        "things": [e["name"] for e in emoji],
        "also": sorted({tag.lower() for e in emoji for tag in e["tags"]}),
        "motions": {},
    }


def clips() -> dict:
    """Names and motions of the animated emoji."""
    verbs = {motion: list(said) for motion, said in fluent_motion.VERBS.items() if said}
    things = [name for members in fluent_motion.VOICES.values() for name in members]
    return {"things": things, "also": [], "motions": verbs}


def frames() -> list[str]:
    """Words of the captions around things, colours and motions."""
    said = [frame for frame, _ in (*fluent_emoji.FRAMES, *fluent_emoji.BARE_FRAMES)]
    words = " ".join(said).replace(",", " ").split()
    return sorted({word for word in words if not word.startswith("{")} | {"a", "an", "the"})


def main() -> None:
    parser = argparse.ArgumentParser(description="Write what the miniatures have learnt as words (CPU, needs npm).")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        "colours": {colour: list(fluent_emoji.SYNONYMS.get(colour, ())) for colour in fluent_emoji.COLOURS},
        "around": frames(),
        "learnt": {"everyday": pictures(folder), "animated": clips()},
        "models": {"mini-flux": "everyday", "mini-qwen": "everyday", "mini-ltx2": "animated"},
    }
    OUT.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print({name: len(known["things"]) for name, known in found["learnt"].items()})


if __name__ == "__main__":
    main()
