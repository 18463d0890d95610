"""Sets of prompts to evaluate over: DrawBench, which is bundled, or a file as such files are published.

A text file has one prompt a line. A table (CSV, TSV) names its columns in the first line: `prompt`, and `category` or
`tag` if it has one. JSON is a list of strings, or of objects with those fields; JSON lines has one of them a line. The
case of the names does not matter. What could be read in two ways, or would draw what is no prompt, is refused by its
line. Knows nothing of models: whether one takes a prompt is decided by engine/request.py.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.catalog import ASSETS
from engine.errors import RequestError

DRAWBENCH = "drawbench"
_DRAWBENCH_FILE = ASSETS / "prompts" / "drawbench.json"
_PROMPT, _CATEGORY = ("prompt", "prompts"), ("category", "tag")
"""Names of a column or field; the first that is there counts. GenEval calls its categories tags."""
_SEPARATORS = (",", ";", "\t")
_SEP_LINE = re.compile(r'"?sep=(?P<separator>[^\w\s"]|\t)"?\Z', re.IGNORECASE)
"""How Excel is told the separator: a line before the heading."""
_WANTED = "write a list of strings, or of objects with the fields prompt and category"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt of a set."""

    id: int
    """The line on which it begins, or its place in a JSON list, counted from 1."""
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
    """The first `limit` prompts of DrawBench or of a file in UTF-8, or in UTF-16 as Excel saves it.

    Raises:
        RequestError: the file is missing, empty or not what its name says, in one sentence.
    """
    if limit is not None and limit < 1:
        raise RequestError(f"limit is {limit}: take at least one prompt.")
    file = _DRAWBENCH_FILE if source == DRAWBENCH else Path(source)
    name = DRAWBENCH if source == DRAWBENCH else file.name
    text = _text(file)
    reader = _reader(text, file)
    found: dict[str, Prompt] = {}
    repeated = 0
    for place, category, words in reader(text, file):
        words = words.strip()
        if limit is not None and len(found) == limit:
            break
        if words in found:
            repeated += 1
        elif words:
            found[words] = Prompt(id=place, category=" ".join(category.split()), text=words)
    if not found:
        raise RequestError(f"{file} has no prompts: write one a line.")
    counted = "entry" if reader is _json else "line"
    return PromptSet(name=name, counted=counted, prompts=tuple(found.values()), repeated=repeated)


def _text(file: Path) -> str:
    """What a file says, every end of a line as one line feed, as editors count them."""
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise RequestError(f"There is no file {file}: give --prompts drawbench or a file of prompts.") from error
    except OSError as error:
        raise RequestError(f"Cannot read {file}: {error.strerror or error}. Give a file of prompts.") from error
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{file} is not UTF-8 text (byte {error.start + 1}): save it as UTF-8.") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    before, nul, _ = text.partition("\0")
    if nul:
        line = before.count("\n") + 1
        raise RequestError(f"{file} is not text, as line {line} has a NUL character: save it as UTF-8.")
    return text


Found = Iterator[tuple[int, str, str]]
"""Place, category and text."""
Reader = Callable[[str, Path], Found]


def _reader(text: str, file: Path) -> Reader:
    """By the file's name, and by what it holds where people use one name for two things."""
    kind = file.suffix.lower()
    if kind in (".json", ".jsonl", ".ndjson"):
        is_lines = not text.lstrip().startswith("[") if kind != ".json" else _holds_json_lines(text)
        return _json_lines if is_lines else _json
    return _table if kind in (".csv", ".tsv") or _has_heading(text) else _lines


def _named(names: Sequence[str], wanted: Sequence[str]) -> int | None:
    """The place of the first of the wanted names that is there."""
    return next((names.index(name) for name in wanted if name in names), None)


# Text


def _lines(text: str, file: Path) -> Found:
    if _is_json(text):
        raise RequestError(
            f"{file} is JSON, not one prompt a line: name it .json, or .jsonl if each line is an object."
        )
    # Not splitlines(): it also breaks at form feeds and other characters that editors do not count as lines.
    for number, line in enumerate(text.split("\n"), start=1):
        if number == 1 and line.strip().lower() in _PROMPT:  # the heading of a single column
            continue
        if _is_json(line):
            raise RequestError(f"Line {number} of {file} is JSON, not a prompt: name the file .jsonl.")
        yield number, "", line


def _is_json(text: str) -> bool:
    """Whether it is an object or a list, which nobody wants drawn; a prompt in quotation marks is a prompt."""
    if not text.lstrip().startswith(("[", "{")):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


# Tables


def _heads(line: str, separator: str) -> list[str]:
    """The names of a heading's columns, in lower case; none if the line is nothing that a table begins with."""
    try:
        return [head.strip().lower() for head in next(csv.reader([line], delimiter=separator), [])]
    except csv.Error:
        return []


def _split_heading(text: str) -> tuple[int, str, str]:
    """The line number of a table's heading, the heading, and the separator that a line before it names, if one does."""
    first, _, rest = text.partition("\n")
    if sep := _SEP_LINE.match(first.strip(" ")):
        return 2, rest.partition("\n")[0], sep["separator"]
    return 1, first, ""


def _has_heading(text: str) -> bool:
    """Whether a .txt file holds a table, such as what Excel saves as Unicode text."""
    _, heading, named = _split_heading(text)
    found = [_heads(heading, separator) for separator in ([named] if named else _SEPARATORS)]
    return any(
        (len(heads) > 1 or named) and _named(heads, _PROMPT) is not None and all(map(_is_name, heads))
        for heads in found
    )


def _is_name(head: str) -> bool:
    return re.fullmatch(r"[\w-]{0,30}", head) is not None


def _table(text: str, file: Path) -> Found:
    begin, heading, separator = _split_heading(text)
    usual = "\t" if file.suffix.lower() == ".tsv" else ","
    tried = [separator] if separator else sorted(_SEPARATORS, key=lambda each: each != usual)
    known = [each for each in tried if _named(_heads(heading, each), _PROMPT) is not None]
    if not known:
        raise RequestError(f"{file} has no column named prompt: name its columns in line {begin}.")
    heads = _heads(heading, known[0])
    for name in (*_PROMPT, *_CATEGORY):
        if heads.count(name) > 1:
            raise RequestError(f"{file} has {heads.count(name)} columns named {name}: name each of them differently.")
    prompt, category = _named(heads, _PROMPT) or 0, _named(heads, _CATEGORY)
    body = "\n".join(text.split("\n")[begin:])
    for line, row in _rows(body, known[0], begin + 1, file):
        if not any(field.strip() for field in row):
            continue
        if len(row) > len(heads):
            raise RequestError(
                f"Line {line} of {file} has {len(row)} fields, its heading {len(heads)}: put quotation marks around a "
                "field that contains the separator."
            )
        if len(row) <= prompt:
            raise RequestError(f"Line {line} of {file} has no prompt: it has {len(row)} fields only.")
        if not row[prompt].strip():
            raise RequestError(f"Line {line} of {file} has no prompt: write one, or remove the line.")
        yield line, row[category] if category is not None and len(row) > category else "", row[prompt]


def _rows(body: str, separator: str, first: int, file: Path) -> Iterator[tuple[int, list[str]]]:
    """Each row and the line on which it begins."""
    if separator == "\t" and not _is_quoted(body):
        for number, row in enumerate(body.split("\n"), start=first):
            yield number, row.split("\t")
        return
    rows = csv.reader(io.StringIO(body), delimiter=separator, strict=True)
    while True:
        line = first + rows.line_num
        try:
            yield line, next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            said = f"Line {line} of {file} cannot be read: {error}. Save it as CSV again."
            raise RequestError(said) from error


def _is_quoted(body: str) -> bool:
    """Whether the quotation marks of a tab-separated table are a writer's around its fields, and not the text's own, as
    in PartiPrompts, where nothing is quoted: every one that begins a field has to have an end that ends it, with no
    further row between them."""
    try:
        rows = list(csv.reader(io.StringIO(body), delimiter="\t", strict=True))
    except csv.Error:
        return False
    return not any("\t" in field and "\n" in field for row in rows for field in row)


# JSON


class _Fields(tuple[tuple[str, Any], ...]):
    """An object's names and values, those with the same name too."""


def _json(text: str, file: Path) -> Found:
    try:
        entries = json.loads(text, object_pairs_hook=_Fields) if text.strip() else []
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{file} is not valid JSON: {error}. Correct it, or write one prompt a line.") from error
    if not isinstance(entries, list):
        raise RequestError(f"{file} is not a list of prompts: {_WANTED}.")
    for number, entry in enumerate(entries, start=1):
        yield number, *_entry(entry, f"entry {number} of {file}")


def _json_lines(text: str, file: Path) -> Found:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"line {number} of {file}"
        try:
            entry = json.loads(line, object_pairs_hook=_Fields)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{_begun(place)} is not valid JSON: {error}. Write one object a line.") from error
        yield number, *_entry(entry, place)


def _holds_json_lines(text: str) -> bool:
    """Whether a file is an object a line: several values, of which the first is an object by itself."""
    first, _, rest = text.lstrip().partition("\n")
    return first.startswith("{") and _is_json(first) and bool(rest.strip())


def _entry(entry: object, place: str) -> tuple[str, str]:
    """Category and text."""
    fields = _Fields([("prompt", entry)]) if isinstance(entry, str) else entry
    if not isinstance(fields, _Fields):
        raise RequestError(f"{_begun(place)} is not a prompt: {_WANTED}.")
    names, values = [name.strip().lower() for name, _ in fields], [value for _, value in fields]
    for name in (*_PROMPT, *_CATEGORY):
        if names.count(name) > 1:
            raise RequestError(f"{_begun(place)} has {names.count(name)} fields named {name}: leave one.")
    prompt, named = _named(names, _PROMPT), _named(names, _CATEGORY)
    if prompt is None or not isinstance(values[prompt], str):
        raise RequestError(f"{_begun(place)} is not a prompt: {_WANTED}.")
    if not values[prompt].strip():
        raise RequestError(f"{_begun(place)} has no prompt: write one, or remove it.")
    category = None if named is None else values[named]
    if category is not None and not (isinstance(category, str) and _is_text(category)):
        raise RequestError(f"The category of {place} is not text: {_WANTED}.")
    return category or "", values[prompt]


def _is_text(value: str) -> bool:
    """Not so with half a surrogate pair, which JSON can hold and no file."""
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)


def _begun(place: str) -> str:
    return place[:1].upper() + place[1:]
