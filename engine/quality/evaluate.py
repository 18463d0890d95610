"""How far precisions and recipes are from bf16 over a set of prompts, with intervals, rulers and a report.

Every prompt is made in bf16 once, again by a second legitimate bf16 path (the floor) and from another seed (the
ceiling), and then by each precision with each recipe from the noise of the first. A picture and its row are written
whole, one after the other, into a folder for the prompt, so that a run that is killed at any moment goes on where it
stopped: at most the pictures that were in the making are made again. Tables and report are built from the rows in the
end. `manifest.json` says what the folder holds and all that shaped it; a run with anything else in mind leaves it
alone. Any number of processes, on any number of machines that see the folder, take prompts from it (claims.py), and
come and go as they like; the last to be done writes the tables, which are byte for byte those of one. Processes of one
machine hinder each other's clocks, so no latency is kept of what is made beside another.

What would count twice, or should not count at all, is left out of every mean and interval, and it is said: prompts of
which a model reads the same tokens, which would give the same picture, and pairs of which either side has values that
are not numbers, which have no score.

Knows nothing of how pictures are made: that is engine/runtime/studio.py's `Studio`.
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file, save

from engine import events
from engine.catalog import ModelSpec
from engine.columns import EXACT, Column, ordered, recipe_of
from engine.environment import versions
from engine.errors import OutputError, RequestError, UnsupportedError
from engine.files import writable, write_whole
from engine.formats import QUANTIZED, REFERENCE
from engine.metrics import distances
from engine.metrics.statistics import CONFIDENCE, RESAMPLES, estimate, spread
from engine.quality import claims, report
from engine.quality.claims import Claims
from engine.quality.prompts import Prompt, PromptSet
from engine.quantization import recipes
from engine.request import CompareRequest
from engine.results import NO_SCORE, SCORES
from engine.runtime.multi_device import driving, studio_on
from engine.runtime.pipeline import Made, seed_of, token_ids
from engine.runtime.residents import Rendition
from engine.runtime.studio import Studio
from engine.weights import fingerprint, loading

FLOOR, CEILING = "floor", "ceiling"
FORMAT = 3
"""Of the folder; it changes when rows of one version could not be read by another."""
AT_ONCE = 16
"""Prompts that a process makes of a large model in one precision before it loads the next; their references wait on
disk. Towards the end fewer, so that all processes end at about the same time: what nobody has taken, divided by their
number, which is guided self-scheduling (Polychronopoulos and Kuck, IEEE Transactions on Computers 36, 1987)."""
EXTREMES = 4
"""Worst and best pairs that are shown, at most."""
SAME_SAID = 5
"""Prompts that are named as equal to others, at most; summary.json has them all."""
_REFERENCE_FILE = "reference.safetensors"
_CLAIMS = ".claims"
_MANIFEST, _TABLES = "manifest", "tables"
"""What is claimed besides prompts."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to evaluate; None means the model's default.

    Raises:
        RequestError: nothing but bf16, with which there is nothing to compare.
    """

    precisions: tuple[str, ...]
    """Columns, as somebody wrote them."""
    recipes: tuple[str, ...] | None = None
    """Of those that name none: each by each."""
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    skip_refused: bool = False
    """Leave out prompts that the model does not take, instead of refusing them all."""

    def __post_init__(self) -> None:
        if all(column == REFERENCE for column in self.precisions):
            raise RequestError(f"There is nothing to compare with bf16: choose a precision of {', '.join(QUANTIZED)}.")


def run(
    spec: ModelSpec,
    settings: Settings,
    prompts: PromptSet,
    device: str,
    source: loading.Source,
    out: Path,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Evaluate, or go on with the evaluation that `out` holds, beside whatever other processes are at it; when all is
    made, one of them writes tables, summary and report.

    Args:
        device: a torch device name, or several of one kind with + between, which work on each picture together.

    Returns:
        What `out/summary.json` holds.

    Raises:
        RequestError: a setting or prompt that the model does not take, before anything is loaded.
        OutputError: `out` cannot be written, or holds something else.
        UnsupportedError, LoadError: in one sentence.
    """
    asked = _request(spec, settings, spec.examples[0])
    lanes = _lanes(spec, settings)
    prompts, refused = _taken(spec, settings, prompts, say)
    writable(out)
    studio = studio_on(device, source)
    with driving(studio.device):
        for lane in (EXACT, *lanes):
            if studio.support[lane.format].execution == "unavailable":
                raise UnsupportedError(studio.support[lane.format].reason)
        wanted = _manifest(spec, asked, lanes, prompts, studio)
        held = _held(out, wanted)
        with Claims(out / _CLAIMS) as ours:
            manifest = held or _begun(
                out, wanted, ours, same=_same(spec, asked, prompts, studio, say), threads=_threads(studio)
            )
            given, same = len(prompts.prompts), manifest["same"]
            prompts = replace(prompts, prompts=tuple(p for p in prompts.prompts if str(p.id) not in same))
            if same:
                say(same_in_words(same, spec.name))
            with _with_threads(manifest["threads"]):
                _Evaluation(spec, asked, lanes, prompts.prompts, studio, out, ours, say).make()
            while not ours.over:
                if ours.take(_TABLES):
                    summary = _summary(spec, manifest, lanes, prompts, given, refused, studio, out)
                    _write(out, summary, lanes, prompts.prompts, spec)
                    ours.end()
                    return summary
                time.sleep(claims.LOOK_SECONDS)
                ours.look()
    return _written(out)


def _write(
    out: Path, summary: dict[str, Any], lanes: Sequence[Column], prompts: Sequence[Prompt], spec: ModelSpec
) -> None:
    """Tables, summary and report of rows that are all there; what killed processes were writing goes."""
    _write_table(out / "scores.csv", _scores(lanes, prompts, out), spec)
    _write_table(out / "rulers.csv", _rulers(prompts, out), spec)
    _write_json(out / "summary.json", summary)
    write_whole(out / "report.html", report.page(summary, out).encode())
    for partial in out.rglob(".*.part"):
        partial.unlink(missing_ok=True)


def _written(out: Path) -> dict[str, Any]:
    """The summary that another process wrote."""
    try:
        summary: dict[str, Any] = json.loads((out / "summary.json").read_bytes())
    except (OSError, ValueError) as error:
        raise OutputError(f"{out} was changed or removed by somebody else: run the same again.") from error
    return summary


def _threads(studio: Studio) -> int | None:
    """PyTorch's threads, where they decide how sums are split and so the last bits of a picture: on a CPU."""
    return torch.get_num_threads() if studio.device.type == "cpu" else None


@contextmanager
def _with_threads(count: int | None) -> Iterator[None]:
    """As many as the evaluation was begun with, whatever a launcher has set for this process."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Evaluation:
    """This process's part in the making of all pictures that are not there yet."""

    def __init__(
        self,
        spec: ModelSpec,
        asked: CompareRequest,
        lanes: Sequence[Column],
        prompts: Sequence[Prompt],
        studio: Studio,
        out: Path,
        ours: Claims,
        say: Callable[[str], None],
    ):
        self.spec, self.asked, self.lanes, self.prompts = spec, asked, lanes, prompts
        self.studio, self.out, self.claims, self.say = studio, out, ours, say
        self._names = (REFERENCE, FLOOR, CEILING, *map(_stem, lanes))
        self._made: set[int] = set()
        """Ids of prompts of which nothing is missing."""
        self._left: dict[str, int] = {}
        """How many of each are not there, of all prompts."""
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._others = 0
        """Processes at work besides this one."""

    def make(self) -> None:
        """Make what is missing, a few prompts in each precision after the other where loading one takes long, until
        nothing is: what others have taken is waited for, and taken over if they are gone."""
        waited = False
        while True:
            some = self._some()
            if some:
                self._work(some)
            elif len(self._made) == len(self.prompts):
                return
            else:
                if not waited:
                    self.say("nothing is left but what other processes have taken: waiting for them")
                waited = True
                time.sleep(claims.LOOK_SECONDS)

    def _some(self) -> Sequence[Prompt]:
        """Prompts of which something is missing, taken; first those that nobody had yet."""
        self.claims.look()
        self._others = self.claims.others()
        self._count()
        left = [prompt for prompt in self.prompts if prompt.id not in self._made]
        fresh: list[Prompt] = []
        taken: list[Prompt] = []
        for prompt in left:
            (taken if self.claims.is_taken(str(prompt.id)) else fresh).append(prompt)
        most = 1 if self.spec.memory_gb is None else min(AT_ONCE, math.ceil(len(fresh) / (1 + self._others)) or 1)
        some: list[Prompt] = []
        for prompt in (*fresh, *taken):
            if all(_is_done(self.out, prompt, name) for name in self._names):
                self._made.add(prompt.id)
            elif self.claims.take(str(prompt.id)):
                some.append(prompt)
                if len(some) == most:
                    break
        return some

    def _count(self) -> None:
        """How far all is, by the names of files: others may have made some."""
        if self._left and not self._others:
            return
        there = {name: 0 for name in self._names}
        for prompt in self.prompts:
            rows = self._names if prompt.id in self._made else _rows_there(_folder(self.out, prompt))
            for name in rows:
                if name in there:
                    there[name] += 1
        self._left = {name: len(self.prompts) - count for name, count in there.items()}

    def _work(self, some: Sequence[Prompt]) -> None:
        for name in (REFERENCE, FLOOR, CEILING):
            for prompt in some:
                self._row(prompt, name, EXACT)
        for lane in self.lanes:
            for prompt in some:
                self._row(prompt, _stem(lane), lane)
        for prompt in some:
            if self.claims.holds(str(prompt.id)):
                (_folder(self.out, prompt) / _REFERENCE_FILE).unlink(missing_ok=True)

    def _row(self, prompt: Prompt, name: str, lane: Column) -> None:
        folder = _folder(self.out, prompt)
        missing = [n for n in self._names if not _is_done(self.out, prompt, n)]
        # The reference as tensors is needed as long as anything has still to be compared with it.
        lost = name == REFERENCE and missing and not (folder / _REFERENCE_FILE).is_file()
        if (name not in missing and not lost) or not self.claims.holds(str(prompt.id)):
            return
        folder.mkdir(parents=True, exist_ok=True)
        rendition = self.studio.rendition(self.spec, lane, self._told)
        began = time.monotonic()
        request = replace(self.asked, prompt=prompt.text, recipe=lane.rules or self.asked.recipe)
        try:
            row = self._make(folder, name, rendition, request)
        except _Gone:
            return
        _write_json(folder / f"{name}.json", row)
        score = "" if row["lpips"] is None else f", LPIPS {row['lpips']:.4f}"
        if row["unscored"] or row["not_numbers"]:
            score = f", {NO_SCORE}"
        self._seconds[name].append(time.monotonic() - began)
        self._left[name] = max(0, self._left[name] - 1)
        total = len(self._names) * len(self.prompts)
        done = total - sum(self._left.values())
        self.say(f"{done} of {total}: prompt {prompt.id} {name}{score}{self._time_left()}")

    def _make(self, folder: Path, name: str, rendition: Rendition, request: CompareRequest) -> dict[str, Any]:
        """One picture or clip, written, and its row.

        Raises:
            _Gone: another process has taken the prompt over, and is done with it.
        """
        spec, studio, alone = self.spec, self.studio, not self.claims.beside()
        row: dict[str, Any] = {
            "prompt": request.prompt,
            "execution": rendition.support.execution,
            "lpips": None,
            "psnr_db": None,
            "lpips_frames": None,
            "temporal_lpips": None,
            "unscored": False,
            "scores": {},
            "latency_s": None,
            "memory_gb": None,
        }
        if name in (FLOOR, CEILING):
            if name == CEILING:
                request = replace(request, seed=seed_of(request.seed, 1))
            made = studio.retake(rendition, spec, request, _never, second_path=name == FLOOR)
            ran = {"path": studio.paths(spec, request)} if name == FLOOR else {}
            files = studio.keep(made, EXACT, spec, request, folder, name, ruler=name, **ran)
        else:
            generation, made = studio.generate(rendition, spec, request, folder, self._told, _never, stem=name)
            files, ran = generation.files, dict(generation.ran)
            row["scores"] = {name: values[0] for name, values in generation.scores.items()}
            row |= {"memory_gb": asdict(generation.memory), "layers": asdict(generation.layers)}
            if not alone or self.claims.beside():
                ran["Timing"] = "not timed: several processes of one host were at work at once"
            elif generation.latency_comparable:
                row["latency_s"] = asdict(generation.latency)
        row |= {"file": Path(files[0]).name, "not_numbers": sum(made.not_numbers), "ran": ran}
        reference = folder / _REFERENCE_FILE
        if name == REFERENCE:
            write_whole(reference, save({"pixels": made.pixels.cpu().contiguous()}))
        else:
            try:
                pixels = load_file(reference)["pixels"]
            except FileNotFoundError as error:
                raise _Gone from error
            lost = _row(folder, REFERENCE)["not_numbers"]
            row |= self._distances(made, Made(pixels=pixels.to(made.pixels.device), not_numbers=(lost,)))
        return row

    def _distances(self, made: Made, reference: Made) -> dict[str, Any]:
        found, _ = self.studio.distance(made, reference)
        if found.unscored:
            return {"unscored": True}
        row: dict[str, Any] = {"lpips": found.lpips[0], "psnr_db": _finite(found.psnr_db[0])}
        if found.lpips_frames is not None:
            one, other = made.pixels[0] * 2 - 1, reference.pixels[0] * 2 - 1
            row["lpips_frames"] = found.lpips_frames[0] and list(found.lpips_frames[0])
            row["temporal_lpips"] = distances.temporal_distance(one, other, self.studio.device).item()
        return row

    def _told(self, event: events.Event) -> None:
        if isinstance(event, events.Loading):
            self.say(f"loading {event.what}")

    def _time_left(self) -> str:
        # The first of each includes its warm-up.
        usual = {name: fmean(seconds[1:] or seconds) for name, seconds in self._seconds.items()}
        left = sum(count * usual.get(name, fmean(usual.values())) for name, count in self._left.items())
        return f"; about {_spoken(left / (1 + self._others))} left" if left else ""


class _Gone(Exception):
    """What a picture was to be compared with is not there any more."""


def _never() -> bool:
    """Nothing stops an evaluation but the end of its process."""
    return False


def temporal(spec: ModelSpec) -> bool:
    """Whether a model's outputs change in time, so that flicker counts."""
    return spec.modality == "video"


# What is asked for


def _request(spec: ModelSpec, settings: Settings, prompt: str) -> CompareRequest:
    return CompareRequest.create(
        prompt,
        model=spec.id,
        precisions=settings.precisions,
        seed=settings.seed,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        height=settings.height,
        width=settings.width,
        num_frames=settings.num_frames,
        batch_size=1,
        recipe=settings.recipes[0] if settings.recipes else None,
    )


def _lanes(spec: ModelSpec, settings: Settings) -> list[Column]:
    """The columns to score, each once, in one order: those that name no recipe by each that was chosen."""
    recipes = [recipe_of(spec, recipe) for recipe in settings.recipes or spec.recipes[:1]]
    found = [Column.parse(text, spec, recipe) for text in settings.precisions for recipe in recipes]
    return [lane for lane in ordered(found, spec) if lane != EXACT]


def _stem(lane: Column) -> str:
    """Of its files."""
    return f"{lane.format}-{lane.recipe}"


def _said(lane: Column) -> dict[str, str]:
    """In tables and JSON."""
    return {"precision": lane.format, "recipe": lane.recipe}


def _taken(
    spec: ModelSpec, settings: Settings, prompts: PromptSet, say: Callable[[str], None]
) -> tuple[PromptSet, list[int]]:
    """The prompts that the model takes, and the ids of those it does not."""
    if prompts.repeated:
        say(f"{prompts.repeated} prompts of {prompts.name} came before: each is taken once")
    taken, refused = [], []
    for prompt in prompts.prompts:
        try:
            _request(spec, settings, prompt.text)
            taken.append(prompt)
        except RequestError as error:
            if not settings.skip_refused:
                raise RequestError(
                    f"{prompts.place(prompt)}: {str(error).rstrip('.')}; correct it, or leave such prompts out with "
                    "--skip-refused."
                ) from error
            refused.append(prompt.id)
    if not taken:
        raise RequestError(f"{spec.name} takes none of the prompts of {prompts.name}: choose others.")
    if refused:
        say(f"{len(refused)} prompts that {spec.name} does not take are left out")
    return replace(prompts, prompts=tuple(taken)), refused


# The folder


def _folder(out: Path, prompt: Prompt) -> Path:
    return out / "pictures" / f"{prompt.id:05}"


def _row(folder: Path, name: str) -> dict[str, Any]:
    """A row that was written before."""
    row: dict[str, Any] = json.loads((folder / f"{name}.json").read_bytes())
    return row


def _read_row(folder: Path, name: str) -> dict[str, Any] | None:
    """A finished row of a prompt's folder; None if it or its picture is not there, or not whole."""
    try:
        row = _row(folder, name)
        return row if (folder / row["file"]).is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _rows_there(folder: Path) -> list[str]:
    """The rows of a prompt's folder by the names of its files, whether whole or not."""
    return [file.stem for file in folder.glob("[!.]*.json")]


def _is_done(out: Path, prompt: Prompt, name: str) -> bool:
    return _read_row(_folder(out, prompt), name) is not None


def _manifest(
    spec: ModelSpec, asked: CompareRequest, lanes: Sequence[Column], prompts: PromptSet, studio: Studio
) -> dict[str, Any]:
    request = asked.to_json()
    for name in ("prompt", "precisions", "recipe", "model", "previews"):
        del request[name]
    return {
        "format": FORMAT,
        "model": spec.id,
        "weights": loading.fingerprint(spec, studio.source),
        "device": studio.machine.label,
        "versions": versions(),
        "settings": request,
        "lanes": list(map(_said, lanes)),
        "recipes": {
            name: fingerprint.of_recipe(recipes.recipe(spec.family, name))
            for name in dict.fromkeys(lane.rules or spec.recipes[0] for lane in lanes)
        },
        "prompts": {"source": prompts.name, "taken": [asdict(prompt) for prompt in prompts.prompts]},
    }


def _held(out: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The folder's own manifest if it is of the same evaluation; None if the folder is empty.

    Raises:
        OutputError: the folder holds something else, which stays as it is.
    """
    file = out / "manifest.json"
    if not file.exists():
        others = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith("."))
        if others:
            raise OutputError(f"{out} holds {others[0]} but no evaluation: choose an empty folder.")
        return None
    damaged = f"{file} is damaged: restore it, or choose another folder; nothing was changed."
    try:
        manifest = json.loads(file.read_bytes())
        if manifest["format"] != FORMAT:
            raise OutputError(f"{out} holds an evaluation of another version of Twinframe: choose another folder.")
        held = {name: manifest[name] for name in (*wanted, "created", "same")}
        held["threads"] = manifest.get("threads")  # older ones do not say
    except OutputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(damaged) from error
    differs = _difference({name: held[name] for name in wanted}, wanted)
    if differs:
        raise OutputError(f"{out} holds another evaluation ({differs}): choose another folder, or ask for the same.")
    return held


def _begun(out: Path, wanted: dict[str, Any], ours: Claims, **found: object) -> dict[str, Any]:
    """The manifest of a new evaluation, which the first of all processes writes, with what it has found."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    while (held := _held(out, wanted)) is None:
        if ours.take(_MANIFEST):
            _write_json(out / "manifest.json", {**wanted, **found, "created": created})
        else:
            time.sleep(claims.LOOK_SECONDS)
            ours.look()
    return held


def _same(
    spec: ModelSpec, asked: CompareRequest, prompts: PromptSet, studio: Studio, say: Callable[[str], None]
) -> dict[str, int]:
    """Id of a prompt, as JSON has it -> id of the one before it of which the model reads the same tokens."""
    told = lambda event: say(f"loading {event.what}") if isinstance(event, events.Loading) else None  # noqa: E731
    pipeline = studio.rendition(spec, EXACT, told).pipeline
    first: dict[tuple[Any, ...], int] = {}
    found = {
        prompt.id: first.setdefault(token_ids(pipeline, spec, prompt.text), prompt.id) for prompt in prompts.prompts
    }
    return {str(prompt): other for prompt, other in found.items() if prompt != other}


def same_in_words(same: Mapping[str, int], name: str) -> str:
    """Which prompts a model cannot tell from others, in one sentence."""
    said = [f"{prompt} is {other} to it" for prompt, other in same.items()]
    further = f" and {len(said) - SAME_SAID} more" if len(said) > SAME_SAID else ""
    left = "prompt that" if len(said) == 1 else "prompts that"
    return f"{len(said)} {left} {name} cannot tell from another left out: {', '.join(said[:SAME_SAID])}{further}"


def _difference(held: Any, wanted: Any, name: str = "") -> str | None:
    """The first value in which two manifests differ, in words."""
    if held == wanted:
        return None
    if name == "recipes" and isinstance(held, dict):
        changed = [key for key in dict.fromkeys((*held, *wanted)) if held.get(key) != wanted.get(key)]
        return f"by a recipe that has changed since: {', '.join(changed)}"
    if isinstance(held, dict) and isinstance(wanted, dict):
        return next(
            found
            for key in dict.fromkeys((*held, *wanted))
            if (found := _difference(held.get(key), wanted.get(key), key)) is not None
        )
    if name == "lanes":
        held, wanted = (", ".join(f"{lane['precision']} {lane['recipe']}" for lane in side) for side in (held, wanted))
        return f"of {held}, not of {wanted}"
    if name == "taken":
        return "over other prompts"
    if name == "weights" and isinstance(held, str):
        return f"of a checkpoint that has changed since: {fingerprint.changed(held, wanted)}"
    return f"{name} {held}, not {wanted}"


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_whole(file, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


# Tables


def _scores(lanes: Sequence[Column], prompts: Sequence[Prompt], out: Path) -> Iterable[dict[str, Any]]:
    for prompt in prompts:
        for lane in lanes:
            yield _line(prompt, _said(lane), _row(_folder(out, prompt), _stem(lane)))


def _rulers(prompts: Sequence[Prompt], out: Path) -> Iterable[dict[str, Any]]:
    for prompt in prompts:
        for name in (FLOOR, CEILING):
            yield _line(prompt, {"ruler": name}, _row(_folder(out, prompt), name))


def _line(prompt: Prompt, what: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """A line of a table; what has no score has none in words either, and equal pictures have infinite decibels."""
    decibels = math.inf if row["psnr_db"] is None and not row["unscored"] else row["psnr_db"]
    return {
        "prompt_id": prompt.id,
        "category": prompt.category,
        "prompt": prompt.text,
        **what,
        "lpips": row["lpips"],
        "psnr_db": decibels,
        "temporal_lpips": row["temporal_lpips"],
        **row.get("scores", {}),  # absent from rows made before there were any
    }


def _write_table(file: Path, lines: Iterable[dict[str, Any]], spec: ModelSpec) -> None:
    """A CSV with a line a score; pictures have no temporal one."""
    lines = list(lines)
    heads = [head for head in dict.fromkeys(chain(*lines)) if head != "temporal_lpips" or temporal(spec)]
    text = io.StringIO()
    table = csv.DictWriter(text, heads, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(lines)
    write_whole(file, text.getvalue().encode())


def _summary(
    spec: ModelSpec,
    manifest: Mapping[str, Any],
    lanes: Sequence[Column],
    prompts: PromptSet,
    given: int,
    refused: Sequence[int],
    studio: Studio,
    out: Path,
) -> dict[str, Any]:
    categories = sorted({prompt.category for prompt in prompts.prompts} - {""})

    def rows(name: str) -> list[tuple[Prompt, dict[str, Any]]]:
        return [(prompt, _row(_folder(out, prompt), name)) for prompt in prompts.prompts]

    found = {name: rows(name) for name in (REFERENCE, FLOOR, CEILING)}
    path = found[FLOOR][0][1]["ran"]["path"]
    seed = manifest["settings"]["seed"]
    return {
        "model": spec.id,
        "name": spec.name,
        "device": manifest["device"],
        "versions": manifest["versions"],
        "created": manifest["created"],
        "weights": {"from": loading.described(spec, studio.source), "fingerprint": manifest["weights"]},
        "settings": manifest["settings"],
        "threads": manifest["threads"],
        "prompts": {
            "source": prompts.name,
            "given": given,
            "count": len(prompts.prompts),
            "same": manifest["same"],
            "repeated": prompts.repeated,
            "refused": list(refused),
        },
        "interval": {
            "method": "percentile bootstrap of the mean over prompts",
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            "seed": 0,
        },
        "reference": _costs(found[REFERENCE]) | _ran(found[REFERENCE]),
        "ruler": {
            FLOOR: _scored(found[FLOOR], categories),
            CEILING: _scored(found[CEILING], categories),
            "note": (
                f"bf16 against bf16 over the same prompts. Floor: {path}, same noise. "
                f"Ceiling: seed {seed} against seed {seed_of(seed, 1)}."
            ),
        },
        "results": [
            _said(lane)
            | {"column": lane.written(spec.recipes[0])}
            | (_scored(made, categories) | _costs(made) | _ran(made) | _extremes(made, out, _stem(lane)))
            | _prompted(made, found[REFERENCE])
            for lane, made in ((lane, rows(_stem(lane))) for lane in lanes)
        ],
    }


Rows = Sequence[tuple[Prompt, dict[str, Any]]]


def _scored(rows: Rows, categories: Sequence[str]) -> dict[str, Any]:
    """Scores over all prompts and in each category, of pairs that have one; PSNR over those that differ, as equal ones
    have an infinite one."""

    def scores(every: Rows) -> dict[str, Any]:
        some = [(prompt, row) for prompt, row in every if not row["unscored"]]
        return {
            "unscored": len(every) - len(some),
            "lpips": estimate([row["lpips"] for _, row in some]),
            "psnr_db": estimate([row["psnr_db"] for _, row in some if row["psnr_db"] is not None]),
            "equal": sum(row["psnr_db"] is None for _, row in some),
            "temporal_lpips": estimate([r["temporal_lpips"] for _, r in some if r["temporal_lpips"] is not None]),
        }

    each = {c: scores([(prompt, row) for prompt, row in rows if prompt.category == c]) for c in categories}
    return scores(rows) | {"categories": each}


def _prompted(rows: Rows, reference: Rows) -> dict[str, Any]:
    """Scores that know the prompt, over those prompts that ask for one, and bf16's of the same; `more` is what this one
    has more than bf16, prompt by prompt."""
    pairs = [
        (row.get("scores", {}), exact.get("scores", {})) for (_, row), (_, exact) in zip(rows, reference, strict=True)
    ]
    found = {}
    for name in SCORES:
        both = [(own[name], exact[name]) for own, exact in pairs if name in own and name in exact]
        if both:
            found[name] = {
                "own": estimate([own for own, _ in both]),
                "reference": estimate([exact for _, exact in both]),
                "more": estimate([own - exact for own, exact in both]),
            }
    return {"scores": found} if found else {}


def _costs(rows: Rows) -> dict[str, Any]:
    """Latency, of native precisions alone, and memory: the largest peak of all prompts."""
    totals = [row["latency_s"]["total"] for _, row in rows if row["latency_s"] is not None]
    return {
        "execution": rows[0][1]["execution"],
        "latency_s": spread(totals) | {"n": len(totals)} if totals else None,
        "memory_gb": {key: _largest(row["memory_gb"][key] for _, row in rows) for key in rows[0][1]["memory_gb"]},
        "layers": rows[0][1]["layers"],
        "not_numbers": sum(row["not_numbers"] > 0 for _, row in rows),
    }


def _largest(values: Iterable[float | None]) -> float | None:
    """Of those that are there: only what is streamed has its own room on the device."""
    return max((value for value in values if value is not None), default=None)


def _ran(rows: Rows) -> dict[str, Any]:
    """What really ran, as far as it is the same for every prompt."""
    first, *others = (row["ran"] for _, row in rows)
    return {"ran": {label: said for label, said in first.items() if all(ran.get(label) == said for ran in others)}}


def _extremes(rows: Rows, out: Path, name: str) -> dict[str, Any]:
    """The pairs that differ most and least; no pair is in both."""
    scored = [each for each in rows if not each[1]["unscored"]]
    ordered = sorted(scored, key=lambda each: -each[1]["lpips"])
    count = min(EXTREMES, math.ceil(len(ordered) / 2))

    def pair(prompt: Prompt, row: dict[str, Any]) -> dict[str, Any]:
        folder = _folder(out, prompt)
        reference = _row(folder, REFERENCE)["file"]
        return {
            "prompt_id": prompt.id,
            "category": prompt.category,
            "prompt": prompt.text,
            "lpips": row["lpips"],
            "psnr_db": row["psnr_db"],
            "files": [str((folder / file).relative_to(out)) for file in (reference, row["file"])],
        }

    worst = ordered[:count]
    best = ordered[count:][-EXTREMES:][::-1]
    return {"worst": [pair(*each) for each in worst], "best": [pair(*each) for each in best]}


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isinf(value) else value


def _spoken(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{math.ceil(seconds)} s"


HEADER = f"{'precision':9} {'recipe':14} {'LPIPS':>7} {'95% interval':>17} {'PSNR dB':>8} {'seconds':>8} {'peak GB':>8}"


def line(row: Mapping[str, Any]) -> str:
    """A result as one line of a table below `HEADER`; behind it, how many prompts have no score."""
    score, psnr, latency = row["lpips"], row["psnr_db"], row["latency_s"]
    ends = "-" if score is None or score["low"] is None else f"{score['low']:.4f} - {score['high']:.4f}"
    mean = f"{score['mean']:.4f}" if score else "-"
    lost = unscored(row)
    decibels = f"{psnr['mean']:.1f}" if psnr else "-"
    seconds = f"{latency['median']:.3f}" if latency else "-"
    return (
        f"{row['precision']:9} {row['recipe']:14} {mean:>7} {ends:>17} {decibels:>8} {seconds:>8} "
        f"{row['memory_gb']['peak']:8.2f}{f'  {lost}' if lost else ''}"
    )


def unscored(scores: Mapping[str, Any]) -> str:
    """How many prompts of a result or an end of the ruler have no score, in words; empty if all have."""
    count, scored = scores["unscored"], scores["lpips"]["n"] if scores["lpips"] else 0
    return f"{count} of {count + scored} prompts: {NO_SCORE}" if count else ""


def heading(summary: Mapping[str, Any]) -> str:
    """What was evaluated, as the line above `HEADER`."""
    prompts = summary["prompts"]
    said = f"{summary['model']} on {summary['device']}, {prompts['count']} prompts of {prompts['source']}"
    same = prompts["same"]
    return said + (f" ({prompts['given']} given; {same_in_words(same, summary['name'])})" if same else "")


def ruler(summary: Mapping[str, Any]) -> str:
    """Floor and ceiling in a line."""
    said = []
    for name in (FLOOR, CEILING):
        scores = summary["ruler"][name]
        mean = f"{scores['lpips']['mean']:.4f}" if scores["lpips"] else "-"
        said.append(" ".join(filter(None, (name, mean, unscored(scores) and f"({unscored(scores)})"))))
    return f"ruler: {', '.join(said)}"
