"""A stand-in for `engine.serving.worker.Worker`, so that the page and the API can be tested without torch.

It draws small pictures with Pillow, films them with PyAV and makes up plausible numbers; nothing here measures
anything. Failures, delays and what the "machine" can run are arguments.
"""

from __future__ import annotations

import io
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageChops, ImageDraw

from engine import catalog, events
from engine.columns import format_of
from engine.errors import UnsupportedError
from engine.formats import PRECISIONS, REFERENCE
from engine.machine import FINE, LIMIT, Finding, Machine
from engine.request import CompareRequest
from engine.results import Comparison, Generation, Latency, LayerCounts, LpipsMap, Memory, Metrics, Ruler
from engine.serving.admission import Visitor
from engine.serving.telemetry import Health, Preload

COLOURS = {
    "blue": (92, 148, 230),
    "red": (222, 92, 84),
    "teal": (60, 160, 158),
    "yellow": (240, 204, 92),
    "green": (110, 178, 104),
}
SPREAD = {"bf16": 0, "fp8": 1, "mxfp8": 1, "nvfp4": 7, "int8": 2}
SPEED = {"bf16": 1.0, "fp8": 1.30, "mxfp8": 1.26, "nvfp4": 1.50, "int8": 1.40}
WEIGHTS_GB = {"bf16": 0.0632, "fp8": 0.0431, "mxfp8": 0.0437, "nvfp4": 0.0339, "int8": 0.0431}
KEPT = {"tuned": 0.2}
"""Of the damage that a format does by the post's recipe, by other recipes; all of it where none is named."""
LPIPS = {"fp8": 0.006, "mxfp8": 0.0071, "nvfp4": 0.058, "int8": 0.011}
PSNR_DB = {"fp8": 39.0, "mxfp8": 38.2, "nvfp4": 27.4, "int8": 36.5}
STORED = {"bf16": "bf16", "quantized": "stored"}
"""Bytes of a whole plan -> bytes of its layers."""
RULER = Ruler(floor=0.0021, ceiling=0.304, note="Mean over 4 prompts, bf16, on a machine that does not exist.")


@dataclass(frozen=True)
class Support:
    precision: str
    execution: str
    reason: str
    gemm: str
    disproved: bool = False


LAPTOP = {
    "bf16": Support("bf16", "native", "every device multiplies bf16", "aten::mm"),
    "fp8": Support("fp8", "native", "through torch._scaled_mm on the CPU", "torch._scaled_mm"),
    "mxfp8": Support("mxfp8", "emulated", "needs Blackwell tensor cores", "dequantize, then aten::mm"),
    "nvfp4": Support("nvfp4", "emulated", "needs Blackwell tensor cores", "dequantize, then aten::mm"),
    "int8": Support("int8", "native", "the CPU has VNNI", "torch._int_mm"),
}
BLACKWELL = {p: Support(p, "native", "tensor cores", "torch._scaled_mm") for p in PRECISIONS}
NO_FP8 = LAPTOP | {"fp8": Support("fp8", "unavailable", "FP8 needs an RTX 40 or H100 class device.", "")}


@dataclass
class FakeJob:
    """One comparison; `events()` makes it up while it is read."""

    worker: FakeWorker
    request: CompareRequest
    out: Path
    steps: int = 0
    """Denoising steps done so far, of all precisions."""
    outcome: str = "unfinished"
    """"completed", "failed" or "cancelled" in the end; cancelling a job that ended changes nothing."""

    def cancel(self) -> None:
        if self.outcome == "unfinished":
            self.outcome = "cancelled"

    def events(self) -> Iterator[events.Event]:
        while not self.worker.turn.acquire(timeout=0.02):
            if self.outcome == "cancelled":
                yield events.Cancelled()
                return
        self.worker.busy += 1
        self.worker.most_at_once = max(self.worker.most_at_once, self.worker.busy)
        try:
            for event in self._stream():
                if self.outcome == "cancelled":
                    yield events.Cancelled()
                    return
                if isinstance(event, events.TERMINAL):
                    self.outcome = type(event).__name__.lower()
                yield event
        finally:
            self.worker.busy -= 1
            self.worker.turn.release()

    def _stream(self) -> Iterator[events.Event]:
        asked, worker, results = self.request, self.worker, []
        yield events.Queued(0)
        yield events.Loading("the text encoders and the VAE")
        for column in asked.precisions:
            precision = format_of(column)
            yield events.Warming(column)
            for step in range(1, asked.num_inference_steps + 1):
                time.sleep(worker.step_seconds)
                while worker.stands_at == column and step == asked.num_inference_steps and self.outcome == "unfinished":
                    time.sleep(0.01)
                self.steps = self.steps + 1
                left = (asked.num_inference_steps - step) * max(worker.step_seconds, 0.05)
                shows = asked.previews and 1 < step < asked.num_inference_steps
                seen = preview(asked, precision, step) if shows else None
                yield events.Step(column, step, asked.num_inference_steps, left, seen)
                if worker.fail_at == column:
                    yield events.Failed(worker.failure)
                    return
            made = generation(asked, column, worker.support, self.out)
            yield events.Finished(column, made)
            if precision != REFERENCE:
                noise = random.Random(asked.seed)
                lost = LPIPS[precision] * KEPT.get(asked.column(column).recipe, 1.0)
                scores = tuple(lost * noise.uniform(0.8, 1.2) for _ in range(asked.batch_size))
                metrics = Metrics(
                    lpips=scores,
                    psnr_db=(PSNR_DB[precision],) * asked.batch_size,
                    lpips_frames=tuple(course(score, asked.num_frames) for score in scores)
                    if asked.num_frames > 1
                    else None,
                )
                found = tuple(lpips_map(asked, score, file) for score, file in zip(scores, made.files, strict=True))
                made = replace(made, metrics=metrics, lpips_maps=found)
                yield events.Compared(column, metrics)
            results.append(made)
        for index in range(1, worker.ruler_runs + 1):
            time.sleep(worker.step_seconds)
            yield events.Measuring(index, worker.ruler_runs)
        yield events.RulerReady(RULER)
        comparison = Comparison(
            request=asked,
            device=worker.machine.name,
            versions={"torch": "0.0", "diffusers": "0.0"},
            results=tuple(results),
            ruler=RULER,
            created=datetime.now(UTC).isoformat(),
        )
        comparison.save(self.out)
        yield events.Completed(comparison)


class FakeWorker:
    """The interface of `engine.serving.worker.Worker`; `jobs` keeps every job for tests to look at."""

    def __init__(
        self,
        *,
        support: Mapping[str, Support] = LAPTOP,
        device: str = "Fake laptop CPU",
        step_seconds: float = 0.0,
        fail_at: str | None = None,
        failure: str = "The checkpoint shard transformer-00002.safetensors is cut short: fetch it again.",
        ruler_runs: int = 0,
        share: bool = False,
    ):
        self.machine = Machine(name=device, kind="cpu")
        self.support = dict(support)
        self.step_seconds = step_seconds
        self.stands_at: str | None = None
        """Before the last step of this column a run stands still, until this is another or the run is cancelled: what
        is looked at meanwhile is there however busy the machine is."""
        self.fail_at = fail_at
        self.failure = failure
        self.ruler_runs = ruler_runs
        self.share = share
        self.jobs: list[FakeJob] = []
        self.busy = self.most_at_once = 0
        self.turn = threading.Lock()
        """Held by the comparison that runs: the others wait for it, as in the worker's queue."""
        self.preloaded: list[str] = []
        self.under_way: tuple[Preload, ...] = ()
        """What `preloads` tells."""
        self.closed = False

    def submit(self, request: CompareRequest, out: Path, visitor: Visitor | None = None) -> FakeJob:
        for column in request.columns:
            support = self.support[column.format]
            if support.execution == "unavailable":
                raise UnsupportedError(f"This machine cannot run {column.format}: {support.reason}")
        out.mkdir(parents=True, exist_ok=True)
        job = FakeJob(self, request, out)
        self.jobs.append(job)
        return job

    def earlier(self, request: CompareRequest) -> tuple[Comparison, Path] | None:
        made = [job for job in self.jobs if job.request == request and job.outcome == "completed"]
        return (Comparison.load(made[0].out), made[0].out) if self.share and made else None

    def examine(self) -> tuple[Finding, ...]:
        formats = [
            Finding(topic=name, severity=FINE if found.execution == "native" else LIMIT, said=f"{found.reason}.")
            for name, found in self.support.items()
        ]
        return (Finding(topic="Device", severity=FINE, said=f"{self.machine.name}."), *formats)

    def about_weights(self, model: str) -> str:
        return "" if catalog.model(model).bundled else f"The weights of {model} are not here."

    def recipes(self, model: str) -> dict[str, str]:
        return {name: f"What {name} takes of {model}." for name in catalog.model(model).recipes}

    def plan(self, model: str, precision: str, recipe: str) -> dict:
        return plan(model, precision, recipe)

    def code(self, request: CompareRequest, column: str, execution: str) -> str:
        return f"# {column}, {execution}\nprompt = {request.prompt!r}\n"

    def preload(self, model: str) -> None:
        self.preloaded.append(model)

    def preloads(self) -> tuple[Preload, ...]:
        return self.under_way

    def health(self) -> Health:
        return Health(status="busy" if self.busy else "ready", queue=0, accepting=True)

    def metrics(self) -> str:
        return "# fake\n"

    def close(self, grace: float = 0) -> None:
        self.closed = True


def plan(model: str, precision: str, recipe: str, blocks: int = 3) -> dict:
    """A made-up plan: a projection that stays bf16 unless everything is quantized, and blocks of two layers."""

    def layer(name: str, wide: int, quantized: bool) -> dict:
        return {
            "name": name,
            "in": 320,
            "out": wide,
            "quantized": quantized,
            "precision": precision if quantized else "bf16",
            "bytes": {"bf16": 640 * wide, "stored": (180 if quantized else 640) * wide},
            "reason": "No rule keeps it in bf16." if quantized else "Its name contains embed.",
        }

    layers = [layer("x_embedder", 64, recipe == "full")]
    for block in range(blocks):
        layers += [layer(f"blocks.{block}.attn.to_q", 320, True), layer(f"blocks.{block}.ff.net.0.proj", 1280, True)]
    quantized = sum(each["quantized"] for each in layers)
    return {
        "model": model,
        "precision": precision,
        "recipe": recipe,
        "linears": len(layers),
        "quantized": quantized,
        "skipped": len(layers) - quantized,
        "left": 0,
        "unmatched": ["txt_mlp"],
        "bytes": {kind: 1000 + sum(each["bytes"][name] for each in layers) for kind, name in STORED.items()},
        "layers": layers,
    }


def generation(asked: CompareRequest, column: str, support: Mapping[str, Support], out: Path) -> Generation:
    """A made-up result whose pictures or clips are really written to `out`."""
    files, precision = [], format_of(column)
    spread = round(SPREAD[precision] * KEPT.get(asked.column(column).recipe, 1.0))
    kind = "png" if asked.num_frames == 1 else "mp4"
    for index in range(asked.batch_size):
        file = out / (f"{column}.{kind}" if asked.batch_size == 1 else f"{column}-{index + 1}.{kind}")
        picture = drawing(asked.prompt, asked.seed + index, spread, asked.width, asked.height)
        if kind == "png":
            picture.save(file)
        else:
            film(picture, asked.num_frames, catalog.model(asked.model).defaults.frame_rate, file)
        files.append(str(file))
    native = support[precision].execution == "native"
    denoise = 1.94 * asked.batch_size / (SPEED[precision] if native else 0.4)
    latency = Latency(text=0.021, denoise=denoise, decode=0.139, total=denoise + 0.16)
    weights = WEIGHTS_GB[precision]
    quantized = 0 if precision == REFERENCE else 96
    return Generation(
        column=column,
        execution=support[precision].execution,
        files=tuple(files),
        latency=latency,
        latency_comparable=native and not asked.previews,
        memory=Memory(weights=weights, transformer=weights - 0.0211, peak=weights + 0.0174 * asked.batch_size),
        layers=LayerCounts(quantized=quantized, skipped=14 if quantized else 0, left=0),
        ran={
            "Device": "Fake laptop CPU",
            "GEMM": support[precision].gemm,
            "Attention": "scaled_dot_product_attention, native",
            "Compile": "blocks compiled, dynamic=False",
            "Warm-up": "1 step of the same shape",
        },
    )


def drawing(prompt: str, seed: int, spread: int, width: int, height: int) -> Image.Image:
    """A rocket over a gradient of the prompt's colour; `spread` moves its outline by that many quarter pixels."""
    noise = random.Random(f"{prompt}{seed}")
    shake = random.Random(f"{prompt}{seed}{spread}")
    base = next((rgb for word, rgb in COLOURS.items() if word in prompt), (150, 150, 160))
    scale = 4
    w, h = width * scale, height * scale
    picture = Image.new("RGB", (1, h))
    picture.putdata([tuple(min(255, int(c * (1.14 - 0.3 * y / h))) for c in base) for y in range(h)])
    picture = picture.resize((w, h))
    brush = ImageDraw.Draw(picture)

    def at(x: float, y: float) -> tuple[float, float]:
        angle = math.radians(noise_angle)
        x, y = x - 0.5, y - 0.5
        return (
            w * (0.5 + x * math.cos(angle) - y * math.sin(angle)) + shake.uniform(-spread, spread),
            h * (0.5 + x * math.sin(angle) + y * math.cos(angle)) + shake.uniform(-spread, spread),
        )

    noise_angle = noise.uniform(18, 48)
    body = [(0.5, 0.12), (0.6, 0.27), (0.63, 0.45), (0.61, 0.68), (0.39, 0.68), (0.37, 0.45), (0.4, 0.27)]
    for points, fill in (
        ([(0.37, 0.5), (0.24, 0.74), (0.4, 0.68)], (196, 52, 60)),
        ([(0.63, 0.5), (0.76, 0.74), (0.6, 0.68)], (166, 40, 52)),
        ([(0.43, 0.68), (0.5, 0.93), (0.57, 0.68)], (255, 176, 46)),
        ([(0.46, 0.68), (0.5, 0.82), (0.54, 0.68)], (255, 236, 150)),
        (body, (238, 240, 244)),
        ([(0.5, 0.12), (0.6, 0.27), (0.4, 0.27)], (214, 60, 66)),
        ([(0.52, 0.27), (0.6, 0.27), (0.63, 0.45), (0.61, 0.68), (0.54, 0.68)], (206, 212, 222)),
    ):
        brush.polygon([at(*p) for p in points], fill=fill)
    x, y = at(0.5, 0.42)
    for radius, fill in ((0.07, (96, 108, 128)), (0.05, (90, 190, 240))):
        r = radius * w
        brush.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    return picture.resize((width, height), Image.LANCZOS)


def film(picture: Image.Image, frames: int, frame_rate: float, file: Path) -> None:
    """A clip, H.264 and AAC, in which the picture drifts sideways while a tone of 440 Hz sounds."""
    rate = 48_000
    tone = 0.2 * np.sin(2 * np.pi * 440 * np.arange(round(rate * frames / frame_rate)) / rate)
    with av.open(str(file), "w", options={"movflags": "+faststart"}) as clip:
        video = clip.add_stream("libx264", rate=round(frame_rate))
        video.width, video.height, video.pix_fmt = picture.width, picture.height, "yuv420p"
        video.options = {"preset": "ultrafast", "threads": "1"}
        sound = clip.add_stream("aac", rate=rate, layout="mono")
        for index in range(frames):
            moved = ImageChops.offset(picture, 4 * index, 0)
            clip.mux(video.encode(av.VideoFrame.from_image(moved)))
        clip.mux(video.encode())
        samples = av.AudioFrame.from_ndarray(tone.astype(np.float32)[None], format="fltp", layout="mono")
        samples.sample_rate = rate
        clip.mux(sound.encode(samples))
        clip.mux(sound.encode())


def course(mean: float, frames: int) -> tuple[float, ...]:
    """A score for every frame, with this mean."""
    waves = [1 + 0.5 * math.sin(0.3 * frame) for frame in range(frames)]
    return tuple(mean * wave * frames / sum(waves) for wave in waves)


def preview(asked: CompareRequest, precision: str, step: int) -> bytes:
    """The picture, the paler the fewer steps are done."""
    picture = drawing(asked.prompt, asked.seed, SPREAD[precision], 64, 64)
    share = step / asked.num_inference_steps
    written = io.BytesIO()
    Image.blend(Image.new("RGB", picture.size, "white"), picture, share).save(written, "JPEG")
    return written.getvalue()


def lpips_map(asked: CompareRequest, score: float, picture: str) -> LpipsMap:
    """A map beside the picture, four times the score in the left upper quarter and nothing elsewhere."""
    width, height = asked.width // 4, asked.height // 4
    each = Image.new("L", (width, height))
    each.paste(255, (0, 0, width // 2, height // 2))
    below = Image.new("L", (width, height * asked.num_frames))
    for frame in range(asked.num_frames):
        below.paste(each, (0, frame * height))
    file = Path(picture).with_name(f"{Path(picture).stem}-lpips.png")
    below.save(file)
    return LpipsMap(file=str(file), top=4 * score)


@contextmanager
def served(
    worker: FakeWorker,
    recorded: Path = Path("no such folder"),
    *,
    models: tuple[str, ...] = ("mini-flux",),
    measured: Path = Path("no such folder"),
    scored: Path = Path("no such folder"),
    unseen: Path = Path("no such folder"),
    doors: object = None,
) -> Iterator[str]:
    """The app around a worker, on a free port; gives its address, without a slash at the end."""
    from ui.page import build_page

    folders = {"recorded": recorded, "measured": measured, "scored": scored, "unseen": unseen}
    with closing(build_page(worker, models=models, **folders)) as page:
        url = page.serve(quiet=True, doors=doors).rstrip("/")
        try:
            yield url
        finally:
            for visit in [visit for visit in VISITS if visit.url.startswith(url)]:
                leave(visit)


VISITS: list = []
"""Pages that are open in the browser. Those of an app are closed before it is: what they still ask for would fail."""


def leave(page: object) -> None:
    """Close a page of the browser, which may be closed already."""
    VISITS.remove(page)
    if not page.is_closed():
        page.unroute_all(behavior="ignoreErrors")  # nobody is left to hear of what a handler has not come to
        page.close()


def until(holds: Callable[[], object], seconds: float = 60) -> bool:
    """Wait until something holds; False if it does not come to that."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.02)
    return False


def open_tab(page: object, name: str) -> None:
    """Choose a tab of the page in the browser, on a narrow screen from the menu of those that have no room."""
    if not page.get_by_role("tab", name=name, exact=True).is_visible():
        page.get_by_role("button", name="More tabs").click()
        page.locator(".overflow-dropdown").get_by_role("button", name=name, exact=True).click()
    page.get_by_role("tab", name=name, exact=True).click()


def record(folder: Path, prompt: str = "a rocket on a blue background", **changes: object) -> Comparison:
    """Save a comparison as a recorded one, and give it back."""
    worker = FakeWorker(device="Fake recorder 9000")
    job = worker.submit(CompareRequest.create(prompt, **changes), folder)
    *_, done = job.events()
    return done.comparison
