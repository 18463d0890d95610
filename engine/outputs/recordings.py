"""Recorded runs: comparisons kept as folders, for the gallery, the first screen, and a stage where nothing can be run.

A bundle is what a comparison writes, `comparison.json` beside its pictures or clips, in a folder of its own: request,
results, device, versions, media. So any machine can make one, and a page elsewhere can show it. Knows the worker's
jobs only as what `finish` is given; reading bundles needs no torch.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine import catalog
from engine.errors import OutputError, RequestError, UnsupportedError, shown
from engine.request import CompareRequest
from engine.results import Comparison

log = logging.getLogger(__name__)

FOLDER = catalog.ASSETS / "recorded"
LIST = FOLDER / "list.json"
"""What the bundles that come with the project were recorded from."""
FIRST = "raccoon-rescued"
"""What the page opens on, where it is there: a format that loses the picture, and a recipe that brings it back."""
NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,62}[a-z0-9])?")
"""Of a bundle: it becomes a folder, and a value in the page's address."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """One recorded comparison."""

    name: str
    """Its folder's."""
    folder: Path
    comparison: Comparison


def read(folder: Path) -> list[Bundle]:
    """The bundles in `folder`, by model in the catalog's order, then as they were recorded.

    One that cannot be read is left out, with a warning in the log.
    """
    found = []
    for file in sorted(folder.glob("[!.]*/comparison.json")):
        try:
            comparison = Comparison.load(file.parent)
            files = [f for g in comparison.results for f in (*g.files, *(m.file for m in g.lpips_maps if m))]
            missing = [f for f in files if not Path(f).is_file()]
            if missing:
                raise FileNotFoundError(f"{missing[0]} is missing")
            found.append(Bundle(name=file.parent.name, folder=file.parent, comparison=comparison))
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("Recorded comparison %s cannot be shown: %s", file, error)
    order = list(catalog.MODELS)
    return sorted(found, key=lambda b: (order.index(b.comparison.request.model), b.comparison.created))


def nearest(asked: CompareRequest, bundles: Iterable[Bundle]) -> Bundle | None:
    """The recorded run to show in place of `asked`: of the same request, or else the one most like it.

    The model counts most, then whether it makes the same kind of thing, then the prompt, by the words they share.
    """

    def likeness(bundle: Bundle) -> tuple[float, ...]:
        other = bundle.comparison.request
        mine, theirs = set(asked.prompt.lower().split()), set(other.prompt.lower().split())
        return (
            other == asked,
            other.model == asked.model,
            (other.num_frames > 1) == (asked.num_frames > 1),
            len(mine & theirs) / len(mine | theirs),
            len(set(asked.precisions) & set(other.precisions)),
            other.seed == asked.seed,
        )

    return max(bundles, key=likeness, default=None)


def read_list(file: Path) -> dict[str, CompareRequest]:
    """A list of requests: a JSON object, name -> fields of `CompareRequest`, of which only `prompt` is needed.

    Raises:
        RequestError: it cannot be read, or an entry of it is wrong.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RequestError(f"Cannot read {file}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{file} is not JSON: {error}.") from error
    if not isinstance(entries, dict) or not entries or not all(isinstance(e, dict) for e in entries.values()):
        raise RequestError(f'{file} must be an object of requests: {{"rocket": {{"prompt": "a rocket"}}, ...}}.')
    requests = {}
    for name, fields in entries.items():
        check_name(name)
        try:
            requests[name] = CompareRequest.from_json(fields)
        except RequestError as error:
            raise RequestError(f"{file}, {name}: {error}") from error
    return requests


def name_for(prompt: str) -> str:
    """A bundle's name made of a prompt's words."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:48].strip("-") or "recording"


def check_name(name: str) -> None:
    """See whether a bundle may be called so.

    Raises:
        RequestError: it may not.
    """
    if not NAME.fullmatch(name):
        raise RequestError(f"{shown(name)} is no name for a recording: use a-z, 0-9, full stops and hyphens.")


def record(
    wanted: Mapping[str, CompareRequest],
    folder: Path,
    compare: Callable[[CompareRequest, Path], Comparison],
) -> Iterator[Bundle]:
    """Make each request into a bundle below `folder`, in the place of one of the same name.

    Args:
        wanted: bundle's name -> request.
        compare: carries out a request, writing into a folder.

    Raises:
        OutputError: the folder cannot be written; bundles appear whole or not at all.
        UnsupportedError: the machine has not the memory for the reference, without which nothing is worth keeping.
        TwinframeError: what `compare` raises; bundles made before stay.
    """
    for name, request in wanted.items():
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as work:
            made, target = Path(work) / "new", folder / name
            made.mkdir()
            if lacks := compare(request, made).lacks:
                raise UnsupportedError(lacks)
            try:
                if target.exists():
                    target.rename(Path(work) / "old")
                made.rename(target)
            except OSError as error:
                raise OutputError(f"Cannot write {target}: {error.strerror or error}.") from error
        yield Bundle(name=name, folder=target, comparison=Comparison.load(target))


def size(bundle: Bundle) -> int:
    """Bytes of its files."""
    return sum(file.stat().st_size for file in bundle.folder.iterdir())
