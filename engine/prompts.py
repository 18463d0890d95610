"""Sets of prompts to evaluate over: DrawBench, which is bundled, or a file.

A text file has one prompt a line; CSV and TSV need a column `prompt` and may have one named `category`; JSON is a list
of strings, or of objects with those fields. Knows nothing of models: whether one takes a prompt is decided by
engine/request.py.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.catalog import ASSETS
from engine.errors import RequestError

DRAWBENCH = "drawbench"
_DRAWBENCH_FILE = ASSETS / "prompts" / "drawbench.json"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt of a set."""

    id: int
    """Its line, or its place in a JSON list, counted from 1."""
    category: str
    """Empty where the set has none."""
    text: str


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Prompts in the order of their file, each text once."""

    name: str
    """"drawbench" or the file's name."""
    counted: str
    """What an id counts: "line" or "entry"."""
    prompts: tuple[Prompt, ...]
    repeated: int
    """Prompts left out because their text had come before: with the same noise they would give the same picture, and
    an interval over them would look narrower than it is."""

    def place(self, prompt: Prompt) -> str:
        """Where a prompt stands, as the beginning of a sentence."""
        return f"{self.counted.capitalize()} {prompt.id} of {self.name}"


def read(source: str, limit: int | None = None) -> PromptSet:
    """The first `limit` prompts of DrawBench or of a file in UTF-8.

    Raises:
        RequestError: the file is missing, empty or not what its name says, in one sentence.
    """
    if limit is not None and limit < 1:
        raise RequestError(f"limit is {limit}: take at least one prompt.")
    file = _DRAWBENCH_FILE if source == DRAWBENCH else Path(source)
    name = DRAWBENCH if source == DRAWBENCH else file.name
    text = _text(file)
    readers = {".json": _json, ".csv": _table, ".tsv": _table}
    reader = readers.get(file.suffix.lower(), _lines)
    found: dict[str, Prompt] = {}
    repeated = 0
    for place, category, words in reader(text, file):
        words = words.strip()
        if limit is not None and len(found) == limit:
            break
        if words in found:
            repeated += 1
        elif words:
            found[words] = Prompt(id=place, category=category.strip(), text=words)
    if not found:
        raise RequestError(f"{file} has no prompts: write one a line.")
    counted = "entry" if reader is _json else "line"
    return PromptSet(name=name, counted=counted, prompts=tuple(found.values()), repeated=repeated)


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{file} is not UTF-8 text (byte {error.start + 1}): save it as UTF-8.") from error
    except FileNotFoundError as error:
        raise RequestError(f"There is no file {file}: give --prompts drawbench or a file of prompts.") from error
    except OSError as error:
        raise RequestError(f"Cannot read {file}: {error.strerror or error}. Give a file of prompts.") from error


Found = Iterator[tuple[int, str, str]]
"""Place, category and text."""


def _lines(text: str, file: Path) -> Found:
    # Not splitlines(): it also breaks at form feeds and other characters that editors do not count as lines.
    for number, line in enumerate(io.StringIO(text), start=1):
        yield number, "", line


def _table(text: str, file: Path) -> Found:
    rows = csv.reader(io.StringIO(text), delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        heads = [head.strip().lower() for head in next(rows, [])]
        prompt = next((heads.index(head) for head in ("prompt", "prompts") if head in heads), None)
        if prompt is None:
            raise RequestError(f"{file} has no column named prompt: name its columns in the first line.")
        category = heads.index("category") if "category" in heads else None
        for row in rows:
            if len(row) > prompt:
                known = category is not None and len(row) > category
                yield rows.line_num, row[category] if known else "", row[prompt]
            elif any(row):
                raise RequestError(f"Line {rows.line_num} of {file} has no prompt: it has {len(row)} fields only.")
    except csv.Error as error:
        raise RequestError(f"Line {rows.line_num} of {file} cannot be read: {error}. Save it as CSV again.") from error


def _json(text: str, file: Path) -> Found:
    try:
        entries = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{file} is not valid JSON: {error}. Correct it, or write one prompt a line.") from error
    wanted = "write a list of strings, or of objects with the fields prompt and category"
    if not isinstance(entries, list):
        raise RequestError(f"{file} is not a list of prompts: {wanted}.")
    for number, entry in enumerate(entries, start=1):
        fields = {"prompt": entry} if isinstance(entry, str) else entry
        if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
            raise RequestError(f"Entry {number} of {file} is not a prompt: {wanted}.")
        category = fields.get("category")
        if category is not None and not isinstance(category, str):
            raise RequestError(f"The category of entry {number} of {file} is not text: {wanted}.")
        yield number, category or "", fields["prompt"]
