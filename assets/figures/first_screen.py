"""How soon a new visitor sees the first screen: pictures, prompt, verdict and numbers, as the compositor shows them.

python -m assets.figures.first_screen OUT [--times 20] [--size 1440x900] [--url URL]

Each visit has a browser context of its own, so no cache. Seconds count from when the browser asks for the page. What
counts as seen is a frame of the screen where a part looks as it does in the end: the pixels of its box that are on
the screen, of which at most `UNLIKE` may differ by more than `LEVELS`. So what is laid out and not drawn, or drawn
elsewhere, does not count. Frames are taken by the browser itself (Page.startScreencast), which costs some of the time.

Without --url the app is started here, on the CPU, and visited once it has warmed up. The CPU seconds of browser, app
and all else on the machine stand beside each time: on a busy machine the times say little.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from threading import Event, Thread
from urllib.request import urlopen

import numpy
import psutil
from PIL import Image
from playwright.sync_api import Browser, CDPSession, Page, sync_playwright

PICTURES = 3
"""Of the row that are waited for: bf16, the one that loses the picture, and the one that brings it back."""
LEVELS, UNLIKE = 40, 0.005
"""Of 255, and a share of a box's pixels: JPEG's noise is below, a missing word above."""
PARTS = """(pictures) => {
  const boxes = (selector, most) => [...document.querySelectorAll(selector)].slice(0, most).map((e) => {
    const { left, top, right, bottom } = e.getBoundingClientRect();
    return [left, top, Math.min(right, innerWidth), Math.min(bottom, innerHeight)].map(Math.round);
  }).filter(([left, top, right, bottom]) => right > left + 8 && bottom > top + 8);
  const slider = document.querySelector('#tf-results').dataset.view === 'slider';
  return {
    pictures: slider ? boxes('.tf-pair:not([hidden]) .tf-layers', 1) : boxes('#tf-stage img', pictures),
    prompt: boxes('#tf-prompt textarea', 1),
    numbers: slider ? boxes('.tf-pair:not([hidden]) .tf-lpips', 1) : boxes('.tf-verdict, #tf-stage .tf-stats', 4),
  };
}"""
READY = """() => document.querySelector('#tf-seed input') && document.querySelector('#tf-precisions label')
  && document.querySelector('#tf-go')?.checkVisibility() && document.querySelector('#tf-views input')
  && [...document.querySelectorAll('#tf-stage img')].every((image) => image.complete && image.naturalWidth)"""
MARKED = """() => {
  const [mark] = performance.getEntriesByName('twinframe-first-screen');
  return mark && (performance.timeOrigin + mark.startTime) / 1000;
}"""
"""When the first screen's own script had its pictures decoded and a frame for them (ui/static/cover.js)."""
SAMPLE_SECONDS = 0.1
SETTLED_MS = 1500
"""After which the page looks as it does in the end."""


class Screen:
    """The frames of a page as it comes up: seconds since the epoch, and JPEG.

    The browser leaves out a frame while too many wait for an answer, so nothing else is done in between.
    """

    def __init__(self, cdp: CDPSession):
        self.frames: list[tuple[float, str]] = []
        self.asked: float | None = None
        self._over = False
        self._cdp = cdp
        cdp.on("Network.requestWillBeSent", self._ask)
        cdp.on("Page.screencastFrame", self._keep)
        cdp.send("Network.enable")
        cdp.send("Page.startScreencast", {"format": "jpeg", "quality": 90, "everyNthFrame": 1})

    def _ask(self, event: dict) -> None:
        if event.get("type") == "Document" and self.asked is None:
            self.asked = event["wallTime"]

    def end(self) -> None:
        """Take no more frames: those on their way would meet a browser that closes."""
        self._over = True
        self._cdp.send("Page.stopScreencast")

    def _keep(self, event: dict) -> None:
        if self._over:
            return
        self._cdp.send("Page.screencastFrameAck", {"sessionId": event["sessionId"]})
        self.frames.append((event["metadata"]["timestamp"], event["data"]))


class Spent:
    """CPU seconds of browser and app, sampled beside."""

    def __init__(self, families: list[psutil.Process]):
        self.samples: list[tuple[float, list[float]]] = []
        self._families, self._over = families, Event()
        self._thread = Thread(target=self._sample)
        self._thread.start()

    def _sample(self) -> None:
        while not self._over.is_set():
            self.samples.append((time.time(), [cpu(family) for family in self._families]))
            self._over.wait(SAMPLE_SECONDS)

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def until(self, moment: float) -> list[float]:
        """From the first sample to the last before a moment."""
        last = max((sample for sample in self.samples if sample[0] <= moment), default=self.samples[0])
        return [now - then for now, then in zip(last[1], self.samples[0][1], strict=True)]


def device() -> str:
    names = [line.partition(":")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return f"{names[0].strip()}, {len(names)} cores"


def cpu(process: psutil.Process) -> float:
    """CPU seconds of a process and its children."""
    seconds = 0.0
    for one in (process, *process.children(recursive=True)):
        try:
            spent = one.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds += spent.user + spent.system
    return seconds


def busy() -> float:
    """CPU seconds of everything on the machine since it started."""
    spent = psutil.cpu_times()
    return spent.user + spent.system + spent.nice


def pixels(frame: str) -> numpy.ndarray:
    return numpy.asarray(Image.open(io.BytesIO(base64.b64decode(frame))).convert("RGB")).astype(int)


def unlike(a: numpy.ndarray, b: numpy.ndarray, box: list[int]) -> float:
    """The share of a box's pixels that differ."""
    left, top, right, bottom = box
    apart = abs(a[top:bottom, left:right] - b[top:bottom, left:right]).max(axis=2)
    return float((apart > LEVELS).mean())


def visit(browser: Browser, url: str, size: tuple[int, int], families: list[psutil.Process]) -> dict:
    """Open the page once as somebody new does, and say when each part of it was seen."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    page = context.new_page()
    screen = Screen(context.new_cdp_session(page))
    spending, all_before = Spent(families), busy()
    page.goto(url, wait_until="commit")
    page.wait_for_function(READY, timeout=60_000)
    usable = time.time()
    page.wait_for_timeout(SETTLED_MS)
    boxes = _parts(page)
    drawn_at = page.evaluate(MARKED)
    screen.end()
    spending.end()
    context.close()
    assert screen.asked is not None
    spent = sum(spending.until(time.time()))
    found = {"usable_s": usable - screen.asked, "cpu_s": spent, "cpu_others_s": busy() - all_before - spent}
    if drawn_at:
        found["marked_s"] = drawn_at - screen.asked
    last = pixels(screen.frames[-1][1])
    height, width, _ = last.shape
    missing = set(boxes)
    for at, frame in screen.frames:
        drawn = pixels(frame)
        if drawn.shape != last.shape:
            continue
        seen = {part for part in missing if all(unlike(drawn, last, box) <= UNLIKE for box in boxes[part])}
        found |= {f"{part}_s": at - screen.asked for part in seen}
        missing -= seen
        if not missing:
            whole = unlike(drawn, last, [0, 0, width, height])
            found |= {
                "seen_s": at - screen.asked,
                "cpu_until_seen_s": dict(zip(("browser", "app"), spending.until(at), strict=False)),
                "differs_from_the_end": whole,
            }
            break
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}


def _parts(page: Page) -> dict[str, list[list[int]]]:
    boxes: dict[str, list[list[int]]] = page.evaluate(PARTS, PICTURES)
    assert all(boxes.values()), f"not on the screen: {boxes}"
    return boxes


@contextmanager
def app() -> Iterator[tuple[str, psutil.Process]]:
    """The app on a free port, warmed up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "app.py", "--port", str(port), "--offline"], env=environment, stdout=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}/"
    try:
        while True:
            assert process.poll() is None, "the app has ended"
            try:
                with urlopen(f"{url}warming") as told:
                    if not json.load(told)["again"]:
                        break
            except OSError:
                pass
            time.sleep(1)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--size", default="1440x900")
    parser.add_argument("--url", help="of an app that runs already; its CPU seconds are counted with the others'")
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    if args.url:
        measure(args.out, args.times, (width, height), args.url, None)
        return
    with app() as (url, process):
        measure(args.out, args.times, (width, height), url, process)


def measure(out: Path, times: int, size: tuple[int, int], url: str, app: psutil.Process | None) -> None:
    with sync_playwright() as playwright:
        mine = {child.pid for child in psutil.Process().children(recursive=True)}
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        started = [child for child in psutil.Process().children(recursive=True) if child.pid not in mine]
        root = next(child for child in started if child.ppid() not in {one.pid for one in started})
        families = [root, *([app] if app else [])]
        result = {
            "device": device(),
            "versions": {
                "python": platform.python_version(),
                "gradio": version("gradio"),
                "playwright": version("playwright"),
                "chromium": browser.version,
            },
            "size": "x".join(map(str, size)),
            "load": os.getloadavg()[0],
            "visits": [],
        }
        visit(browser, url, size, families)  # the browser's own first
        for _ in range(times):
            result["visits"].append(visit(browser, url, size, families))
            print(result["visits"][-1], flush=True)
        seen = [one.get("seen_s") for one in result["visits"]]
        assert all(seen), "in some visit a part was never seen"
        result |= {"load_after": os.getloadavg()[0], "seen_s": {"median": median(seen), "most": max(seen)}}
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(result["seen_s"])
        browser.close()


if __name__ == "__main__":
    main()
