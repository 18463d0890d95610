"""Malformed and hostile requests to every route the app has: types, sizes, unicode, paths, URLs, templates, replays.

What it is told to find: no answer of 5xx, no traceback, no word of a file outside. Each request follows from its
number alone, so that one can be sent again.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr
import httpx
from gradio.routes import App as Routes

SECRET = "canary-5f1d9c"
"""What stands in a file outside that no answer may repeat."""
ANSWER_SECONDS = 30.0
"""How long an answer may take to begin."""
READ_SECONDS, READ_BYTES = 1.0, 1 << 16
"""How much of an answer is read; a stream of events has no end."""
TEXTS = (
    "",
    " ",
    "a cat",
    "\0",
    "\ud800".encode("utf-8", "surrogatepass").decode("utf-8", "replace"),
    "\u202egnp.exe",
    "𝕬" * 50,
    "é" * 5000,
    "x" * 100_000,
    "${process.exit()}",
    "{{7*7}}{% debug %}",
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "'; DROP TABLE jobs; --",
    "../../../../etc/passwd",
    "/etc/passwd",
    "file:///etc/passwd",
    "http://127.0.0.1:1/",
    "https://169.254.169.254/latest/meta-data/",
    "data:text/html,<script>1</script>",
    "%00%2e%2e%2f",
    "__proto__",
    "constructor",
    "null",
    "NaN",
    "compare",
    "run",
    "lambda",
)
NUMBERS = (0, -1, 1, 7, 1e308, -1e308, 2**31, 2**63, 10**400, 0.1, float("nan"), float("inf"), True)
NAMES = re.compile(r"{(\w+)(?::\w+)?}")


def routes() -> list[tuple[str, str]]:
    """Every (method, path) that Gradio's server has, and ours."""
    with gr.Blocks() as nothing:
        pass
    nothing.queue(api_open=False)
    flat = [
        inner
        for route in Routes.create_app(nothing).routes
        for inner in (route.original_router.routes if hasattr(route, "original_router") else [route])
    ]
    found = {(method, route.path) for route in flat for method in getattr(route, "methods", None) or ()}
    ours = {("GET", path) for path in ("/health", "/warming", "/metrics", "/gradio_api/mcp/")}
    ours.add(("POST", "/gradio_api/call/compare"))
    return sorted(found | ours)


@dataclass
class Findings:
    """What came back."""

    calls: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    """By kind of status, or the transport's error."""
    failures: list[str] = field(default_factory=list)

    def note(self, method: str, path: str, status: int | str, body: str) -> None:
        self.calls += 1
        full = path == "/health" and status == 503 and body.startswith('{"status": ')  # says so by design
        self.answers[f"{status // 100}xx" if isinstance(status, int) else status] += 1
        for wrong, holds in (
            (f"answered {status}", not full and (not isinstance(status, int) or status >= 500)),
            ("a traceback", "Traceback (most recent" in body),
            ("a file outside", SECRET in body or "root:x:0" in body),
        ):
            if holds:
                self.failures.append(f"{method} {path[:200]}: {wrong}")


class Hostile:
    """Makes requests. `canary` is a file outside that holds the secret."""

    def __init__(self, canary: Path):
        self._texts = (*TEXTS, str(canary), f"../../../../../../..{canary}", f"file://{canary}", f"{canary}%00.png")
        self._routes = routes()

    def request(self, number: int) -> tuple[str, str, dict]:
        """Method, path and the further arguments of `httpx.Client.build_request`."""
        chance = random.Random(number)
        method, path = self._routes[number % len(self._routes)]
        where = NAMES.sub(lambda m: self._quoted(chance), path)
        if chance.random() < 0.15:
            method = chance.choice(("GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "HEAD"))
        more: dict = {"headers": self._headers(chance)}
        if chance.random() < 0.4:
            more["params"] = {
                chance.choice(("session_hash", "fn_index", "url", "path", "x")): self._text(chance)[:2000]
            }
        if method in ("POST", "PUT", "PATCH"):
            body = self._body(chance, path)
            more["headers"] |= body.pop("headers", {})
            more |= body
        return method, where, more

    def _text(self, chance: random.Random) -> str:
        return chance.choice(self._texts)

    def _quoted(self, chance: random.Random) -> str:
        text = self._text(chance)[:500]
        return chance.choice((httpx.QueryParams({"": text}).__str__()[1:], text.replace("/", "%2f"), text)) or "x"

    def _headers(self, chance: random.Random) -> dict[str, str]:
        def plain() -> str:
            return self._text(chance)[:300].encode("ascii", "ignore").decode().replace("\0", "")

        kinds = ("x-forwarded-for", "cookie", "range", "if-none-match", "authorization", "origin", "accept-language")
        return {chance.choice(kinds): plain() for _ in range(chance.randrange(3))}

    def _value(self, chance: random.Random, depth: int = 0) -> object:
        kind = chance.randrange(8 if depth < 3 else 5)
        if kind < 3:
            return self._text(chance)
        if kind == 3:
            return chance.choice(NUMBERS)
        if kind == 4:
            return None
        if kind == 5:
            return [self._value(chance, depth + 1) for _ in range(chance.randrange(5))]
        if kind == 6:
            return {self._text(chance)[:50]: self._value(chance, depth + 1) for _ in range(chance.randrange(4))}
        return {
            "path": self._text(chance)[:2000],
            "url": self._text(chance)[:2000],
            "meta": {"_type": "gradio.FileData"},
        }

    def _body(self, chance: random.Random, path: str) -> dict:
        form = chance.random()
        if form < 0.08:
            return {"content": chance.choice((b"", b"{", b"\xff\xfe\x00", b"[" * 20_000, b"x" * 1_200_000))}
        if form < 0.14:
            return {"files": {"files": ("../../evil.py", b"x" * 100, "text/html")}}
        if form < 0.2:
            return {"data": {"username": self._text(chance)[:2000], "password": self._text(chance)[:2000]}}
        if "compare" in path or "{api_name}" in path or form < 0.5:
            body: object = self._asked(chance)
        else:
            body = self._value(chance)
        return {"content": json.dumps(body).encode("utf-8", "replace"), "headers": {"content-type": "application/json"}}

    def _asked(self, chance: random.Random) -> dict:
        """What looks like a comparison, one step in bf16 where nothing is wrong with it."""
        data: list = [self._text(chance), None, ["bf16"], 7, 1, 1.0, None, None, None, None, None, None]
        for _ in range(chance.randrange(3)):
            data[chance.randrange(len(data))] = self._value(chance)
        data[4] = data[4] if data[4] not in (None, True) else 1
        if chance.random() < 0.1:
            data = data[: chance.randrange(12)]
        body: dict = {"data": data}
        for key in ("session_hash", "fn_index", "trigger_id", "event_id", "event_data", "request"):
            if chance.random() < 0.3:
                body[key] = chance.choice(("replayed", 0, 1, 5, 999, -1, self._value(chance)))
        return body


def send(url: str, hostile: Hostile, numbers: Iterable[int]) -> Findings:
    """Send the requests of these numbers one after the other, and look at what comes back."""
    findings = Findings()
    with httpx.Client(base_url=url, timeout=ANSWER_SECONDS) as client:
        for number in numbers:
            method, path, more = hostile.request(number)
            try:
                response = client.send(client.build_request(method, path, **more), stream=True)
            except (httpx.InvalidURL, httpx.LocalProtocolError, UnicodeError, ValueError):
                continue  # the client itself refuses to send it
            except httpx.TransportError as error:
                findings.note(method, path, type(error).__name__, "")
                continue
            response.request.extensions["timeout"]["read"] = READ_SECONDS
            body = bytearray()
            with closing(response), suppress(httpx.TransportError):  # a stream of events goes on for ever
                for part in response.iter_raw():
                    body += part
                    if len(body) > READ_BYTES:
                        break
            findings.note(method, path, response.status_code, body.decode("utf-8", "replace"))
    return findings
