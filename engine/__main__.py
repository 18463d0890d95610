"""The command line, `python -m engine COMMAND`: models, doctor, inspect, compare, bench, evaluate, reproduce, record,
quantize and more.

A user's mistake exits 2 with one sentence on stderr, a fault of ours 1 (engine/leaving.py). With `--json`, stdout holds
one JSON object and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import catalog, files, logs
from engine.benchmark import methods
from engine.columns import FP8_ATTENTION, Column
from engine.environment import leave_cores_to_others, local_rank
from engine.errors import FaultError, LoadError, OutputError, RequestError, TwinframeError, UnsupportedError
from engine.formats import DEFAULTS, PRECISIONS, REFERENCE
from engine.leaving import leave
from engine.reproduction.tables import TABLES
from engine.request import CompareRequest
from engine.results import SCORES, Comparison, Metrics
from engine.serving.command_line import Parser, add_engine, add_source, with_loras
from engine.serving.command_line import model as own_model
from engine.weights import torchao_layout
from engine.weights.source import Source

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

    from engine.serving.worker import Job


COLUMNS = (
    f"of {', '.join(PRECISIONS)}; {DEFAULTS[-1]}@tuned is by a recipe of its own, and {DEFAULTS[-1]}@DIR or "
    f"{DEFAULTS[-1]}@OWNER/NAME[@REVISION] as a folder or a repository on the hub stores it; "
    f"{DEFAULTS[-1]}{FP8_ATTENTION} attends in FP8 too, which is lossy"
)
RECIPE = "of those that name none (default: the model's first)"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m engine", description="Compare bf16 and quantized diffusion models.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    models = commands.add_parser("models", help="what is here, and its state on this machine")
    models.set_defaults(run=_models)

    doctor = commands.add_parser(
        "doctor", help="what this machine is and runs, and what to do about what does not work"
    )
    doctor.set_defaults(run=_doctor)
    doctor.add_argument("--offline", action="store_true", help="do not ask the Hugging Face hub")
    doctor.add_argument("--device", help="torch device name (default: cuda where there is one, else cpu)")

    inspect = commands.add_parser("inspect", help="which layers a recipe quantizes, and why, without loading weights")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("--model", required=True)
    inspect.add_argument("--precision", required=True, metavar="COLUMN", help=COLUMNS)
    inspect.add_argument("--recipe", help=RECIPE)

    compare = commands.add_parser("compare", help="make one picture in several precisions and measure them")
    compare.set_defaults(run=_compare)
    compare.add_argument("--prompt", required=True)
    _add_request(compare)
    compare.add_argument("--out", required=True, type=Path, help="folder for the pictures and comparison.json")

    bench = commands.add_parser("bench", help="measure speed and memory, without looking at what is made")
    bench.set_defaults(run=_bench)
    bench.add_argument("--model", default=catalog.DEFAULT)
    bench.add_argument("--precision", nargs="+", metavar="COLUMN", default=[REFERENCE], help=COLUMNS)
    bench.add_argument("--batch-size", nargs="+", type=int, metavar="B", default=[1])
    bench.add_argument("--methods", nargs="+", metavar="M", default=["engine"], help=f"of {', '.join(methods.METHODS)}")
    bench.add_argument("--repeats", type=int, default=5)
    bench.add_argument("--recipe", help=RECIPE)
    for name in ("--steps", "--height", "--width", "--frames"):
        bench.add_argument(name, type=int)
    bench.add_argument("--profile", action="store_true", help="also take a denoising step apart, kernel by kernel")
    bench.add_argument("--time-limit", type=float, metavar="SECONDS", help="begin nothing new after that")
    result = bench.add_mutually_exclusive_group(required=True)
    result.add_argument("--out", type=Path, help="JSON file, written anew after every call")
    result.add_argument(
        "--table", nargs="+", type=Path, metavar="FILE", help="measure nothing: print these results' table"
    )
    bench.add_argument("--plots", type=Path, metavar="DIR", help="draw it there too: SVG and Markdown, named as --out")

    evaluate = commands.add_parser("evaluate", help="how far precisions and recipes are from bf16, over many prompts")
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("--model", default=catalog.DEFAULT)
    evaluate.add_argument(
        "--precision",
        nargs="+",
        metavar="COLUMN",
        default=[p for p in DEFAULTS if p != REFERENCE],
        help=COLUMNS,
    )
    evaluate.add_argument("--recipe", nargs="+", metavar="R", help=RECIPE)
    evaluate.add_argument("--prompts", required=True, metavar="FILE", help="drawbench, or a text, CSV or JSON file")
    evaluate.add_argument("--limit", type=int, metavar="N", help="the first N prompts")
    evaluate.add_argument("--skip-refused", action="store_true", help="leave out prompts that the model does not take")
    for name in ("--seed", "--steps", "--height", "--width", "--frames"):
        evaluate.add_argument(name, type=int)
    evaluate.add_argument("--guidance", type=float)
    evaluate.add_argument(
        "--out", required=True, type=Path, help="folder for scores, report and pictures; the same again goes on with it"
    )

    reproduce = commands.add_parser("reproduce", help="measure the post's tables here, and put them beside the post's")
    reproduce.set_defaults(run=_reproduce)
    reproduce.add_argument("--table", nargs="+", metavar="NAME", help=f"of {', '.join(TABLES)} (default: all)")
    reproduce.add_argument("--batch-size", nargs="+", type=int, metavar="B", help="of 1, 4 and 8 (default: all)")
    reproduce.add_argument(
        "--rehearse", action="store_true", help="with the miniatures, or --random-weights, and few steps: minutes"
    )
    reproduce.add_argument("--plan", action="store_true", help="say what would run and how long it takes, and no more")
    reproduce.add_argument("--time-limit", type=float, metavar="SECONDS", help="begin nothing new after that")
    reproduce.add_argument(
        "--out",
        required=True,
        type=Path,
        help="folder for JSON, report and all results; the same again goes on with it",
    )

    recordings = commands.add_parser("record", help="keep comparisons for the page's gallery and stage, a folder each")
    recordings.set_defaults(run=_record)
    what = recordings.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", type=Path, metavar="FILE", help="JSON: a request for each name; its folder's name")
    what.add_argument("--prompt", help="a single one, with the arguments of compare")
    recordings.add_argument("--only", nargs="+", metavar="NAME", help="of the list")
    recordings.add_argument("--name", help="of the single one (default: from the prompt)")
    _add_request(recordings)
    recordings.add_argument("--out", required=True, type=Path, help="folder of recordings, such as assets/recorded")

    measure = commands.add_parser("sensitivity", help="which layers NVFP4 hurts most, by role and depth")
    measure.set_defaults(run=_sensitivity)
    measure.add_argument("--lpips-prompts", type=int, default=2, metavar="N", help="for LPIPS of each group; 0: none")
    tune = commands.add_parser("tune", help="search a better NVFP4 recipe, and measure it and its parts")
    tune.set_defaults(run=_tune)
    tune.add_argument(
        "--budget", type=float, default=8.0, metavar="PERCENT", help="more bytes than by the post's recipe"
    )
    tune.add_argument("--recipe", required=True, type=Path, metavar="FILE", help="recipe file, written anew")
    for command in (measure, tune):
        command.add_argument("--model", default=catalog.DEFAULT)
        command.add_argument("--prompts", required=True, metavar="FILE", help="one half chooses, the other reports")
        command.add_argument("--probes", type=int, default=4, metavar="N", help="prompts for the denoiser's error")
        command.add_argument("--probe-steps", type=int, default=5, metavar="N", help="steps of them")
        command.add_argument(
            "--out", required=True, type=Path, help="JSON file, written after every score; the same again goes on"
        )

    quantize = commands.add_parser("quantize", help="write a quantized checkpoint that plain diffusers loads")
    quantize.set_defaults(run=_quantize)
    quantize.add_argument("--model", default=catalog.DEFAULT)
    quantize.add_argument("--column", required=True, help=f"a format, or one by a recipe, such as {DEFAULTS[-1]}@tuned")
    quantize.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder, which must not be there yet")

    add_source(models)
    for command in (compare, bench, evaluate, reproduce, recordings, measure, tune, quantize):
        add_engine(command)
    for command in (
        *(models, doctor, inspect, compare, bench, evaluate, reproduce, recordings, measure, tune, quantize),
    ):
        command.add_argument("--json", action="store_true", help="print one JSON object on stdout, and nothing else")
    return parser


def _add_request(parser: argparse.ArgumentParser) -> None:
    """The arguments that `_request` reads, besides the prompt."""
    parser.add_argument("--model", default=catalog.DEFAULT)
    parser.add_argument("--precision", nargs="+", metavar="COLUMN", help=COLUMNS)
    parser.add_argument("--recipe", help=RECIPE)
    for name in ("--seed", "--steps", "--height", "--width", "--frames", "--batch-size"):
        parser.add_argument(name, type=int)
    parser.add_argument("--guidance", type=float)


def _request(args: argparse.Namespace) -> CompareRequest:
    return CompareRequest.create(
        args.prompt,
        model=args.model,
        precisions=args.precision,
        seed=args.seed,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        height=args.height,
        width=args.width,
        num_frames=args.frames,
        batch_size=args.batch_size,
        recipe=args.recipe,
    )


def _with_folders(written: list[str] | str | None, offline: bool) -> list[str] | str | None:
    """Columns as they were typed, in which a folder or a repository after an @ has given way to a name.

    Raises:
        LoadError: it is no quantized checkpoint, or cannot be had.
    """
    if isinstance(written, list):
        return [_with_folder(column, offline) for column in written]
    return None if written is None else _with_folder(written, offline)


def _with_folder(written: str, offline: bool) -> str:
    form, by, place = written.partition("@")
    if not by or not (Path(place).is_dir() or set(place) & {"/", os.sep}):
        return written
    return f"{form}@{torchao_layout.give(place, offline=offline).name}"


def _source(args: argparse.Namespace, *models: str) -> Source:
    """Where the weights of these models come from; asked before anything heavy is imported, so that a mistake is told
    at once."""
    return Source.create(args.weights, args.random_weights, args.offline, models)


def _models(args: argparse.Namespace) -> None:
    source = _source(args, *catalog.MODELS)
    import torch

    from engine.quantization import capability

    device = torch.device(_default_device())
    machine = capability.detect(device)
    supports = [capability.support(name, machine) for name in PRECISIONS]
    rows = []
    for spec in catalog.MODELS.values():
        memory = spec.memory_gb
        rows.append(
            {
                "id": spec.id,
                "name": spec.name,
                "summary": spec.summary,
                "modality": spec.modality,
                "licence": spec.licence,
                "licence_note": spec.licence_note,
                "source": spec.source if spec.bundled or spec.place is not None else spec.url,
                "revision": spec.revision,
                "recipes": list(spec.recipes),
                "state": _state(spec, source, device),
                "memory_gb": None
                if memory is None
                else {"device": memory.transformer + memory.shared + memory.one_run, "host": memory.host},
                "precisions": {s.precision: {"execution": s.execution, "reason": s.reason} for s in supports},
            }
        )
    if args.json:
        print(json.dumps({"device": machine.name, "note": machine.note, "models": rows}, indent=1))
        return
    print(machine.name)
    if machine.note:
        print(f"  {machine.note}")
    for support in supports:
        print(f"  {support.precision:6} {support.execution:12} {support.reason}")
    for row in rows:
        print(f"{row['id']}: {row['name']} ({row['modality']}, {row['licence']})")
        print(*(f"  {row[said]}" for said in ("summary", "licence_note", "state") if row[said]), sep="\n")


def _doctor(args: argparse.Namespace) -> int:
    from engine.serving import doctor
    from engine.serving.process import Process

    with closing(Process(args.device)) as device:
        found = doctor.examine(device, args.offline)
    print(json.dumps(found, indent=1) if args.json else "\n".join(doctor.lines(found["findings"])))
    return found["status"]


def _state(spec: catalog.ModelSpec, source: Source, device: torch.device) -> str:
    """ "ready", or in one sentence what stands in the way here: memory, access or the download."""
    from engine.weights import hub, loading, residency

    try:
        if spec.memory_gb is not None:
            residency.require(spec, REFERENCE, spec.memory_gb.transformer, device)
        loading.check(spec, source)
    except UnsupportedError as error:
        return str(error)
    except LoadError as error:
        if spec.bundled or spec.place is not None or source.folder is not None:
            return str(error)
        if source.offline:
            return hub.no_copy(spec)
        if spec.gated and not hub.has_token():
            return hub.gated(spec)
        return f"Its first use downloads {spec.download}."
    return "ready"


def _inspect(args: argparse.Namespace) -> None:
    from engine.quantization.inspection import inspect

    found = inspect(args.model, args.precision, args.recipe)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for layer in found["layers"]:
        shape = f"{layer['in']} x {layer['out']}"
        print(f"{layer['name']:52} {shape:>14}  {layer['precision']:6} {layer['reason']}")
    for pattern in found["unmatched"]:
        print(f"The recipe's pattern {pattern} matches no Linear layer.")
    stored = found["bytes"]
    print(
        f"{found['quantized']} of {found['linears']} Linear layers in {found['column']}; "
        f"denoiser {stored[REFERENCE] / 1e6:.1f} -> {stored['quantized'] / 1e6:.1f} MB"
    )


def _compare(args: argparse.Namespace) -> None:
    request = _request(args)
    source = _source(args, request.model)
    from engine.runtime.device import Device
    from engine.serving.worker import Worker

    files.writable(args.out)
    worker = Worker((request.model,), Device(args.device, source))
    try:
        # Made beside the target and moved when everything is there, so that a failed run leaves nothing behind.
        with tempfile.TemporaryDirectory(prefix=".twinframe-", dir=args.out) as folder:
            comparison = _moved(_finish(worker.submit(request, Path(folder))), Path(folder), args.out)
    finally:
        worker.close()
    if args.json:
        print(json.dumps(comparison.to_json(), indent=1))
    else:
        _print(comparison)


def _record(args: argparse.Namespace) -> None:
    from engine.outputs import recordings

    if args.list:
        wanted = recordings.read_list(args.list)
        if unknown := set(args.only or ()) - set(wanted):
            raise RequestError(f"{args.list} has no {', '.join(sorted(unknown))}: it has {', '.join(wanted)}.")
        wanted = {name: request for name, request in wanted.items() if name in (args.only or wanted)}
    else:
        wanted = {args.name or recordings.name_for(args.prompt): _request(args)}
    for name in wanted:
        recordings.check_name(name)
    models = tuple(dict.fromkeys(request.model for request in wanted.values()))
    source = _source(args, *models)
    from engine.runtime.device import Device
    from engine.serving.worker import Worker

    files.writable(args.out)
    worker, made = Worker(models, Device(args.device, source)), []
    try:
        for bundle in recordings.record(wanted, args.out, lambda *asked: _finish(worker.submit(*asked))):
            made.append(bundle)
            print(f"{bundle.name}: {recordings.size(bundle) / 1e3:.0f} kB", file=sys.stderr, flush=True)
    finally:
        worker.close()
    if args.json:
        print(json.dumps({"recorded": [{"name": b.name} | b.comparison.to_json() for b in made]}, indent=1))
    else:
        for bundle in made:
            _print(bundle.comparison)


def _bench(args: argparse.Namespace) -> None:
    if args.table:
        _bench_table(args.table)
        return
    spec, source, device = catalog.model(args.model), _source(args, args.model), _one_device(args)
    if args.plots:
        files.check_target(args.plots / f"{args.out.stem}.md")
    from engine.benchmark import bench, plots

    settings = bench.Settings(
        precisions=tuple(dict.fromkeys(args.precision)),
        batch_sizes=tuple(dict.fromkeys(args.batch_size)),
        methods=tuple(dict.fromkeys(map(methods.named, args.methods))),
        repeats=args.repeats,
        recipe=args.recipe,
        steps=args.steps,
        height=args.height,
        width=args.width,
        num_frames=args.frames,
        time_limit=args.time_limit,
        profile=args.profile,
    )
    result = bench.run(
        spec,
        settings,
        device,
        source,
        args.out,
        say=_say,
    )
    if args.plots:
        plots.write(result, args.plots, args.out.stem)
    if failed := sum(row["error"] is not None for row in result["rows"]):
        print(f"{failed} of {len(result['rows'])} rows failed: {logs.file()} says more.", file=sys.stderr)
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print("\n".join([f"{spec.id} on {result['device']}", bench.HEADER, *map(bench.line, result["rows"])]))


def _bench_table(given: Sequence[Path]) -> None:
    from engine.benchmark import plots

    results = []
    for file in given:
        try:
            results += methods.read_all(file)
            plots.section(results)
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"{file} is no result of a benchmark: give what bench --out wrote.") from error
    print(plots.section(results), end="")


def _quantize(args: argparse.Namespace) -> None:
    spec = catalog.model(args.model)
    column = Column.parse(args.column, spec, spec.recipes[0])
    source, device = _source(args, args.model), _one_device(args)
    from engine.outputs.export import write
    from engine.quantization import capability

    written = write(spec, column, capability.device_named(device), source, args.out)
    if args.json:
        print(json.dumps(written.to_json(), indent=1))
        return
    said = written.provenance
    print(f"{args.out}: {said['linears']['quantized']} layers of {spec.id} in {said['column']}")
    for note in written.notes:
        print(note)


def _sensitivity(args: argparse.Namespace) -> None:
    from engine.quality import sensitivity
    from engine.runtime.multi_device import driving

    bench, quality = _lab(args)
    with driving(bench.device):
        sensitivity.run(bench, quality, args.probes, args.probe_steps, args.lpips_prompts)
    found = quality["sensitivity"]
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for cell in sorted(found["cells"], key=lambda cell: -cell["drift"]):
        role, score = found["role_names"][cell["role"]], cell["lpips"]
        lpips = "" if score is None else f"  LPIPS {score:.4f}"
        print(f"{role:20} {cell['depth']:>8}  drift {cell['drift']:.4f}  output {cell['denoiser_error']:.4f}{lpips}")
    if agreement := sensitivity.agreement(found):
        print("rank correlation with LPIPS: " + ", ".join(f"{name} {value:.2f}" for name, value in agreement.items()))


def _tune(args: argparse.Namespace) -> None:
    from engine.quality import tune
    from engine.runtime.multi_device import driving

    bench, quality = _lab(args)
    with driving(bench.device):
        found = tune.run(bench, quality, args.budget, args.recipe, args.probes, args.probe_steps)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    print(tune.table(found))


def _lab(args: argparse.Namespace) -> tuple[Any, ...]:
    """The bench and the file that `sensitivity` and `tune` work on."""
    spec, source = catalog.model(args.model), _source(args, args.model)
    from engine.quality import lab, prompts

    if args.probes < 1 or args.probe_steps < 1 or getattr(args, "lpips_prompts", 0) < 0:
        raise RequestError("Take at least one prompt and one step: --probes and --probe-steps begin at 1.")
    chosen = prompts.read(args.prompts)
    device = _one_device(args)
    files.check_target(args.out)
    if args.command == "tune":
        files.check_target(args.recipe)
    bench = lab.Bench(spec, device, source, say=_say)
    return bench, lab.Quality(args.out, bench, chosen)


def _evaluate(args: argparse.Namespace) -> None:
    from engine.quality import prompts

    spec, source = catalog.model(args.model), _source(args, args.model)
    chosen = prompts.read(args.prompts, args.limit)
    from engine.quality import evaluate

    settings = evaluate.Settings(
        precisions=tuple(args.precision),
        recipes=None if args.recipe is None else tuple(args.recipe),
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
        height=args.height,
        width=args.width,
        num_frames=args.frames,
        skip_refused=args.skip_refused,
    )
    summary = evaluate.run(
        spec,
        settings,
        chosen,
        _own_device(args),
        source,
        args.out,
        say=_say,
    )
    if os.environ.get("RANK", "0") != "0":  # the first of those that a launcher started says it for all
        return
    if args.json:
        print(json.dumps(summary, indent=1))
        return
    print("\n".join([evaluate.heading(summary), evaluate.HEADER, *map(evaluate.line, summary["results"])]))
    print(f"{evaluate.ruler(summary)}\n{args.out / 'report.html'}")


def _reproduce(args: argparse.Namespace) -> int:
    from engine.reproduction import run, tables

    asked = tables.scale(args.rehearse, args.random_weights, args.batch_size)
    if asked.models and args.weights:
        raise RequestError("A rehearsal takes the bundled miniatures, or --random-weights: leave out --weights.")
    filled = tables.chosen(args.table, asked)
    if not asked.models:
        _source(args, *dict.fromkeys(tables.model_of(name) for name in filled))
    device = [f"--device={_one_device(args)}"] if args.device else []
    device += ["--offline"] * args.offline
    more = [*([f"--weights={args.weights}"] if args.weights else []), *device]
    reproduction = run.Reproduction(filled, asked, more, device, args.out, _say)
    if args.plan:
        print("\n".join(reproduction.plan()))
        return 0
    run.end_at_sigterm()
    _say("\n".join(reproduction.plan()))
    result = reproduction.run(args.time_limit)
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print("\n".join([reproduction.heading, *run.summary(result), str(args.out / run.PAGE)]))
    return run.status(result)


def _say(text: str) -> None:
    """Progress, a line each. What is being loaded only where somebody watches: elsewhere it would stand before the one
    sentence with which loading fails."""
    if sys.stderr.isatty() or not text.startswith("loading "):
        print(text, file=sys.stderr, flush=True)


def _finish(job: Job) -> Comparison:
    """The job's comparison; progress goes to stderr while somebody watches it there."""
    from tqdm import tqdm

    # None: unless it is a terminal. There is nothing to count before the first step.
    with tqdm(disable=None, leave=False, file=sys.stderr, bar_format="starting", total=1) as bar:
        return _watched(job, bar)


def _watched(job: Job, bar: tqdm) -> Comparison:
    from engine import events

    def say(text: str) -> None:
        if not bar.disable:
            bar.write(text, file=sys.stderr)

    def at(what: str, done: float, total: float, unit: str) -> None:
        if bar.disable:
            return
        if (bar.desc, bar.total) != (f"{what}: ", total):
            bar.bar_format, bar.unit = None, unit
            bar.reset(total)
            bar.set_description(what, refresh=False)
        bar.update(done - bar.n)

    for event in job.events():
        match event:
            case events.Completed(comparison):
                return comparison
            case events.Failed(reason):
                raise FaultError(reason, kind=job.fault) if job.fault else TwinframeError(reason)
            case events.Cancelled():
                raise TwinframeError("The comparison was cancelled.")
            case events.Loading(what):
                say(f"loading {what}")
            case events.Downloading(what, done, total):
                at(f"downloading {what}", round(done / 1e9, 1), round(total / 1e9, 1), " GB")
            case events.Step(column, index, total, _):
                at(column, index, total, " steps")
            case events.Finished(column, generation):
                say(f"{column}: {generation.latency.total:.2f} s")
            case events.Measuring(index, total):
                at("measuring the ruler", index, total, " pictures")
    raise FaultError("The engine stopped before the comparison was finished: please retry.")


def _moved(comparison: Comparison, source: Path, target: Path) -> Comparison:
    try:
        for file in source.iterdir():
            shutil.move(file, target / file.name)
    except OSError as error:
        raise OutputError(f"Cannot write into {target}: {error.strerror or error}.") from error
    results = [g.with_files(lambda file: str(target / Path(file).name)) for g in comparison.results]
    return replace(comparison, results=tuple(results))


def _print(comparison: Comparison) -> None:
    print(f"{comparison.request.model} on {comparison.device}: {comparison.request.prompt!r}")
    print(f"  weights: {comparison.results[0].ran['Weights']}")
    wide = max(6, *(len(g.column) for g in comparison.results))
    for g in comparison.results:
        untimed = "emulated" if g.execution == "emulated" else "streamed" if g.is_streamed else "not timed"
        speed = f"{g.latency.total:6.2f} s" if g.latency_comparable else untimed
        distance = _distance(g.metrics) if g.metrics else "no reference" if comparison.lacks else "reference"
        beside = f"  at once with {' and '.join(g.at_once)}" if g.at_once else ""
        beside += "  nothing quantized" if g.is_unquantized else ""
        beside += "  shared card, not to quote" if g.shared_card and g.latency_comparable else ""
        scores = "".join(f"  {SCORES[name]} {g.mean_score(name):.0%}" for name in g.scores)
        files_made = ", ".join(g.files)
        print(f"  {g.column:{wide}} {speed:>9}  {g.memory.peak:7.3f} GB  {distance}{scores}  {files_made}{beside}")
    if comparison.lacks:
        print(f"  no reference, so no LPIPS, saving or speedup: {comparison.lacks}")
    if comparison.ruler:
        print(f"  ruler: floor {comparison.ruler.floor:.4f}, ceiling {comparison.ruler.ceiling:.4f}")


def _tentative(args: argparse.Namespace) -> AbstractContextManager[None]:
    """What a command that fails leaves at `--out`: nothing, but for what is whole and the next run goes on with."""
    out = getattr(args, "out", None)
    if out is None:
        return nullcontext()
    if args.run is _evaluate:
        from engine.quality import claims

        def worth_keeping() -> bool:
            return any(out.glob("pictures/*/*.json")) or claims.at_work(out / ".claims")

        return files.tentative(out, "manifest.json", "pictures", ".claims", worth_keeping=worth_keeping)
    return files.tentative(out if args.run in (_compare, _record, _reproduce) else out.parent)


def _distance(metrics: Metrics) -> str:
    """The score in words, and how many have none."""
    score = [] if metrics.mean_lpips is None else [f"LPIPS {metrics.mean_lpips:.4f}"]
    return ", ".join(score + ([metrics.damage] if metrics.damage else []))


def _one_device(args: argparse.Namespace) -> str:
    """Of a command that runs on a single one, since others at work would share its host; `bench` takes several that
    work on one picture for one.

    Raises:
        RequestError: several were named.
    """
    if "," in (args.device or "") or ("+" in (args.device or "") and args.command != "bench"):
        raise RequestError(f"{args.command} runs on one device, not on {args.device}: name one with --device.")
    return args.device or _default_device()


def _own_device(args: argparse.Namespace) -> str:
    """Of a command that any number of processes carry out together, the device of this one, as a launcher has numbered
    those of this machine.

    Raises:
        RequestError: several are named and no launcher counts processes, or fewer than there are.
    """
    named, rank = (args.device or _default_device()).split(","), local_rank(os.environ)
    if rank is None:
        if len(named) > 1:
            raise RequestError(
                f"{args.command} has one device a process: start it once for each of {', '.join(named)}, with the same "
                f"--out, or all at once by accelerate launch --num_processes {len(named)} -m engine {args.command} ..."
            )
        return named[0]
    if len(named) > 1:
        if rank >= len(named):
            raise RequestError(f"This is process {rank + 1} on this machine, and --devices names {len(named)} devices.")
        return named[rank]
    if named != ["cuda"]:
        return named[0]
    import torch

    return named[0] if torch.cuda.device_count() == 1 else f"cuda:{rank}"  # some launchers show each its own alone


def _default_device() -> str:
    from engine.quantization import capability

    return capability.default_device()


def main() -> None:
    leave(_run, logs.plain)


def _run() -> int | None:
    leave_cores_to_others(os.environ)
    args = _parser().parse_args()
    if hasattr(args, "model"):
        args.model = own_model(args.model, getattr(args, "offline", False))
    if hasattr(args, "precision"):  # after the model, whose denoiser a folder may hold
        args.precision = _with_folders(args.precision, getattr(args, "offline", False))
    if getattr(args, "lora", None):
        args.model = with_loras(args, args.model)
    with _tentative(args):
        return args.run(args)


if __name__ == "__main__":
    main()
