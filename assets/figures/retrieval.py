"""What each miniature has learnt, as the README's table, from the figures that its training script's `evaluate` gave.

python -m assets.figures.retrieval

Knows the figures alone; how each is measured, assets/training says.
"""

from __future__ import annotations

import json
from pathlib import Path

FIGURES = Path(__file__).parent
ROWS = {
    "top1": "what was asked for is nearest",
    "top5": "it is among the five nearest",
    "background": "background is the colour that was asked for",
    "moving": "moves as asked for: nearer to the right clip than to that clip frozen",
    "sound_top1": "its sound is the right one of all it learnt",
    "reconstruction_lpips": "LPIPS of the VAE's reconstructions",
}


def table(folder: Path = FIGURES) -> str:
    """Markdown: a column for each `*-retrieval.json` in `folder`, shares in percent."""
    models = {
        file.stem.removesuffix("-retrieval"): json.loads(file.read_text())["results"][0]
        for file in sorted(folder.glob("*-retrieval.json"))
    }
    lines = [["", *models], ["---"] * (len(models) + 1)]
    lines += [[said, *(_cell(key, figures.get(key)) for figures in models.values())] for key, said in ROWS.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if key == "reconstruction_lpips" else f"{100 * value:.3g}%"


if __name__ == "__main__":
    print(table())
