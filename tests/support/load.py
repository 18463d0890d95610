"""Load, abuse and hours of running against the real app, as figures: each command adds its own to a JSON file.

    python -m tests.support.load crowd --clients 60 --minutes 5 --out FILE
    python -m tests.support.load hostile --calls 3120 --out FILE  (some are too odd for the client to send)
    python -m tests.support.load cancels --times 200 --out FILE
    python -m tests.support.load faults --times 20 --out FILE
    python -m tests.support.load soak --minutes 60 --out FILE
    python -m tests.support.load table --out FILE          the table of tests/README.md, from the file

The app runs on this machine's CPU with the bundled miniature (faults: with tiny random models); the clients run there
too, so latencies are those of a machine that does both.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import linear_regression, median, quantiles

import httpx

from tests.support.hostile import SECRET, Hostile, send
from tests.support.running import App, running

FIGURES = Path(__file__).resolve().parents[2] / "assets" / "figures" / "load.json"
HUNG_SECONDS = 300.0
"""A request without an answer for so long hangs."""


def outcome(app: App, **fields: object) -> str:
    """How a comparison ended: "result", "queue full", "budget spent", or what was said."""
    try:
        kind, said = app.compare(timeout=HUNG_SECONDS, **fields)
    except httpx.TimeoutException:
        return "hung"
    except (httpx.TransportError, ValueError) as error:
        return type(error).__name__
    if kind == "complete":
        return "result"
    sentence = str(said)
    known = {"queue is full": "queue full", "is spent": "budget spent"}
    return next((name for words, name in known.items() if words in sentence), sentence[:120])


def crowd(app: App, args: argparse.Namespace) -> dict:
    """Clients that all ask at once, again and again, and one that only opens the page."""
    outcomes: Counter[str] = Counter()
    longest, page = [0.0], []
    end = time.monotonic() + args.minutes * 60

    def ask(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < end:
            began = time.monotonic()
            outcomes[outcome(app, seed=seed)] += 1
            longest[0] = max(longest[0], time.monotonic() - began)
            time.sleep(chance.uniform(1, 3))

    def look() -> None:
        while time.monotonic() < end:
            began = time.monotonic()
            app.client.get("/").raise_for_status()
            page.append(time.monotonic() - began)
            time.sleep(0.5)

    before = app.resources()
    _together([*(lambda seed=seed: ask(seed) for seed in range(args.clients)), look])
    return {
        "clients": args.clients,
        "minutes": args.minutes,
        "outcomes": dict(outcomes),
        "other_outcomes": sum(outcomes.values()) - sum(outcomes[k] for k in ("result", "queue full", "budget spent")),
        "longest_s": longest[0],
        "page_s": {"median": median(page), "p99": quantiles(page, n=100)[-1], "most": max(page)},
        "before": before,
        "after": app.resources(),
    }


def hostile(app: App, args: argparse.Namespace) -> dict:
    """Malformed and hostile requests to every route."""
    canary = app.log.parent / "canary"
    canary.write_text(SECRET)
    calls, warm = Hostile(canary), max(args.calls // 5, 50)
    assert outcome(app) == "result"
    first = send(app.url, calls, range(warm))
    before = _settled(app)
    findings = send(app.url, calls, range(warm, args.calls))
    after = _settled(app)
    return {
        "calls": first.calls + findings.calls,
        "answers": dict(first.answers + findings.answers),
        "failures": first.failures + findings.failures,
        "errors_in_log": sum(line["level"] == "error" for line in app.said()),
        "alive": outcome(app) == "result",
        "before": before,
        "after": after,
        "growth_percent": 100 * (_memory(after) / _memory(before) - 1),
    }


def cancels(app: App, args: argparse.Namespace) -> dict:
    """Clients that go away at random moments: while they wait, while the model loads, in mid-run."""
    chance = random.Random(args.times)
    assert outcome(app) == "result"
    before, waited, steps = _settled(app), [], []
    for number in range(args.times):
        streams = [app.call(num_inference_steps=50, seed=number) for _ in range(chance.choice((1, 1, 2)))]
        for waits, stream in enumerate(streams):
            last = None
            for kind, said in islice(stream, 1 if waits else chance.randrange(1, 12)):
                now = time.monotonic()
                if kind == "generating" and last is not None:
                    steps.append(now - last)
                last = now if "step" in str(said) else None
        began = time.monotonic()
        for stream in reversed(streams):
            stream.close()
        while app.health() != "ready":
            time.sleep(0.01)
            assert time.monotonic() - began < HUNG_SECONDS, "never free again"
        waited.append(time.monotonic() - began)
    freed = [line["freed"] for line in app.said() if "freed" in line]
    return {
        "times": args.times,
        "cancelled": len(freed),
        "outcomes": dict(Counter(line["outcome"] for line in app.said() if "outcome" in line)),
        "step_s": {"median": median(steps), "most": max(steps)},
        "freed_s": {"median": median(freed), "most": max(freed)},
        "client_gone_to_free_s": {"median": median(waited), "most": max(waited)},
        "next_request": outcome(app),
        "before": before,
        "after": _settled(app),
    }


def soak(app: App, args: argparse.Namespace) -> dict:
    """A mix of everything for a long time; what grows is told by a line through the samples after the first fifth."""
    canary = app.log.parent / "canary"
    canary.write_text(SECRET)
    calls, outcomes, failures = Hostile(canary), Counter(), []
    began = time.monotonic()
    end = began + args.minutes * 60

    def mixed(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < end:
            kind = chance.random()
            if kind < 0.5:
                outcomes[outcome(app, seed=seed)] += 1
            elif kind < 0.65:
                outcomes[outcome(app, seed=seed, precisions=["mxfp8", "nvfp4"], num_inference_steps=3)] += 1
            elif kind < 0.8:
                stream = app.call(num_inference_steps=50)
                for _ in range(chance.randrange(1, 8)):
                    next(stream, None)
                stream.close()
                outcomes["gone away"] += 1
            elif kind < 0.9:
                failures.extend(send(app.url, calls, [chance.randrange(10**6) for _ in range(5)]).failures)
                outcomes["hostile"] += 5
            else:
                app.client.get("/", timeout=60).raise_for_status()
                outcomes["page"] += 1
            time.sleep(chance.uniform(0.5, 2))

    samples: list[dict] = []

    def watch() -> None:
        while time.monotonic() < end:
            samples.append({"minute": (time.monotonic() - began) / 60} | app.resources())
            time.sleep(min(10, args.minutes * 60 / 30))

    _together([*(lambda seed=seed: mixed(seed) for seed in range(4)), watch])
    later = [sample for sample in samples if sample["minute"] >= args.minutes / 5]
    hours = [sample["minute"] / 60 for sample in later]
    return {
        "minutes": args.minutes,
        "outcomes": dict(outcomes),
        "failures": failures,
        "errors_in_log": sum(line["level"] == "error" for line in app.said()),
        "first": later[0],
        "last": later[-1],
        "per_hour": {
            key: linear_regression(hours, [s[key] for s in later]).slope for key in samples[0] if key != "minute"
        },
        "samples": samples[:: max(1, len(samples) // 60)],
    }


def faults(args: argparse.Namespace) -> dict:
    """Every fault, at random points, added to those of other seeds in the file; see tests/support/faults.py."""
    from tests.support import faults as injected

    kinds = tuple(args.kinds) if args.kinds else (*injected.FURTHEST, injected.APP_KILLED)
    with tempfile.TemporaryDirectory() as folder:
        found = injected.run(Path(folder), args.times, kinds, args.seed)
    figures = json.loads(args.out.read_text()) if args.out.exists() else {}
    before = figures.get("faults", {"kinds": {}, "said": {}, "engine_restarts": 0, "seeds": []})
    if args.seed in before["seeds"]:
        raise SystemExit(f"{args.out} has the faults of seed {args.seed} already: choose another --seed.")
    counts = {kind: dict(Counter(one) + Counter(before["kinds"].get(kind))) for kind, one in found["kinds"].items()}
    return {
        "kinds": before["kinds"]
        | {kind: {key: one.get(key, 0) for key in injected.COUNTS} for kind, one in counts.items()},
        "said": before["said"] | found["said"],
        "engine_restarts": before["engine_restarts"] + found["engine_restarts"],
        "seeds": [*before["seeds"], args.seed],
    }


def table(figures: dict) -> str:
    """The table of tests/README.md."""
    rows = []
    if found := figures.get("crowd"):
        ends = ", ".join(f"{n} {kind}" for kind, n in sorted(found["outcomes"].items(), key=lambda kv: -kv[1]))
        page = found["page_s"]
        rows.append(
            (
                f"{found['clients']} clients at once for {found['minutes']:g} minutes",
                f"{ends}; anything else or hung: {found['other_outcomes']}; the page answered within "
                f"{page['most']:.2f} s (median {page['median']:.3f} s)",
            )
        )
    if found := figures.get("hostile"):
        answers = ", ".join(f"{n} {kind}" for kind, n in sorted(found["answers"].items()))
        rows.append(
            (
                f"{found['calls']:,} malformed and hostile calls to every route",
                f"{answers}; {len(found['failures'])} of 5xx, with a traceback or a file outside; memory "
                f"{found['growth_percent']:+.1f}%",
            )
        )
    if found := figures.get("cancels"):
        freed = found["freed_s"]
        rows.append(
            (
                f"{found['times']} clients that went away at random moments",
                f"the worker was free after {freed['median']:.2f} s (at most {freed['most']:.2f} s; a denoising step "
                f"took up to {found['step_s']['most']:.2f} s); memory {_change(found):+.0f} MB; next request: "
                f"{found['next_request']}",
            )
        )
    if found := figures.get("faults"):
        for name, one in found["kinds"].items():
            rows.append(
                (
                    f"{name}, {one['times']} times",
                    f"{one['one_sentence']} ended in one sentence, {one['next_succeeded']} next requests succeeded, "
                    f"{one['broken_files']} broken files",
                )
            )
    if found := figures.get("soak"):
        grown = found["per_hour"]
        rows.append(
            (
                f"{found['minutes']:g} minutes of mixed load, {sum(found['outcomes'].values()):,} requests",
                f"app {grown['app_mb']:+.0f} MB an hour, engine {grown['engine_mb']:+.0f} MB, files "
                f"{grown['disk_mb']:+.0f} MB, threads {grown['threads']:+.1f}, open files {grown['files']:+.1f}",
            )
        )
    return "\n".join(["| | |", "|---|---|", *(f"| {what} | {came} |" for what, came in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("crowd", "hostile", "cancels", "faults", "soak", "table"))
    parser.add_argument("--out", type=Path, default=FIGURES)
    parser.add_argument("--clients", type=int, default=60)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the faults' order and points")
    parser.add_argument("--kinds", nargs="+", help="of faults; by default all")
    args = parser.parse_args()
    figures = json.loads(args.out.read_text()) if args.out.exists() else {}
    if args.command == "table":
        print(table(figures))
        return
    found = faults(args) if args.command == "faults" else _measured(globals()[args.command], args)
    stamp = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{_cpu()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "diffusers", "gradio")},
    }
    figures = json.loads(args.out.read_text()) if args.out.exists() else {}  # another command may have written
    args.out.write_text(json.dumps(figures | {args.command: stamp | found}, indent=1) + "\n")
    print(table({args.command: found}))


def _measured(command: Callable[[App, argparse.Namespace], dict], args: argparse.Namespace) -> dict:
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder), TWINFRAME_OUTPUTS_GB="0.02", TWINFRAME_CACHE=f"{folder}/cache") as app,
    ):
        outcome(app)  # loads, warms and measures the ruler
        return command(app, args)


def _together(work: list[Callable[[], None]]) -> None:
    """Run all of it at once; the first failure is raised."""
    failures: list[BaseException] = []

    def kept(one: Callable[[], None]) -> None:
        try:
            one()
        except BaseException as error:  # noqa: BLE001 - raised below, in the thread that waits
            failures.append(error)

    threads = [threading.Thread(target=kept, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _settled(app: App) -> dict[str, float]:
    """Resources once nothing runs."""
    with suppress(httpx.TransportError):
        while app.health() != "ready":
            time.sleep(0.1)
    return app.resources()


def _memory(resources: dict[str, float]) -> float:
    return resources["app_mb"] + resources["engine_mb"]


def _change(found: dict) -> float:
    return _memory(found["after"]) - _memory(found["before"])


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "CPU")


if __name__ == "__main__":
    main()
