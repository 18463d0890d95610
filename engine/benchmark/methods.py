"""The benchmark's methods: what the engine is measured against, and how older files named it.

`engine` is what a comparison does, and `bare` the same pipeline called without the engine around it. `post` is the
post's method as it was published for that model and batch size: at batch 1 of FLUX.1-dev and Qwen-Image each block is
compiled with mode="reduce-overhead", which replays it from a CUDA graph of its own, and its outputs are cloned;
everywhere else it is `compile_repeated_blocks(fullgraph=True)`. `post-default` is the latter everywhere. Knows nothing
of how a method is carried out (engine/benchmark/bench.py), and imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine import catalog
from engine.columns import recipe_named

ENGINE, POST, POST_DEFAULT, BARE = METHODS = ("engine", "post", "post-default", "bare")
POSTS = (POST, POST_DEFAULT)
"""Of the post's method, as published and by the default mode alone."""

_OLD_NAMES = {"seed": POST}
"""Names of methods that the command line still takes."""
_BLOCK_GRAPHS = ("flux.1-dev", "mini-flux", "qwen-image", "mini-qwen")
"""Families whose blocks the post replays from CUDA graphs at batch 1; the miniatures as their large models."""


def named(method: str) -> str:
    """A method by its name of today."""
    return _OLD_NAMES.get(method, method)


def block_graphs(model: str, batch_size: int) -> bool:
    """`post` replays each block from a CUDA graph; where it does not, `post-default` is the same method."""
    return batch_size == 1 and (catalog.MODELS[model].family if model in catalog.MODELS else model) in _BLOCK_GRAPHS


def column_of(row: Mapping[str, Any]) -> str:
    """The column of a benchmark's row; files of before name its format alone."""
    return row.get("column", row["precision"])


def stands_for(row: Mapping[str, Any], method: str) -> bool:
    """A benchmark's row is that method's: a row names other methods that were the same there in `also`."""
    return method == row["method"] or method in row.get("also", ())


def read(file: Path) -> dict[str, Any]:
    """A benchmark's result with today's names, of the recipe too, whenever it was written.

    Files of before know one method of the post, `seed`, which compiled with the default mode everywhere: it is
    `post-default`, and where the post did just that, `post` as well.

    Raises:
        OSError: the file cannot be read.
        ValueError, KeyError, TypeError, AttributeError: it is no result of a benchmark.
    """
    return _with_names_of_today(json.loads(file.read_text(encoding="utf-8")))


def read_all(file: Path) -> list[dict[str, Any]]:
    """The results in a file that a benchmark wrote, or `python -m engine reproduce`, each as `read` gives it.

    Raises:
        OSError: the file cannot be read.
        ValueError, KeyError, TypeError, AttributeError: it is neither, or a rehearsal's, whose figures are none.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    if "reproduction" not in content:
        return [_with_names_of_today(content)]
    if content["rehearsal"]:
        raise ValueError(f"{file} is a rehearsal")
    return [_with_names_of_today(result) for result in content["results"]]


def _with_names_of_today(result: dict[str, Any]) -> dict[str, Any]:
    settings = result["settings"] | {"recipe": recipe_named(result["settings"]["recipe"])}
    return result | {"settings": settings, "rows": [_current(row, result["model"]) for row in result["rows"]]}


def _current(row: Mapping[str, Any], model: str) -> dict[str, Any]:
    renamed = {("from_post" if name == "from_seed" else name): value for name, value in row.items()}
    if row["method"] == "seed":
        graphs = block_graphs(model, row["batch_size"])
        renamed |= {"method": POST_DEFAULT} if graphs else {"method": POST, "also": [POST_DEFAULT]}
    return renamed
