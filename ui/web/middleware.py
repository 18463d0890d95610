"""What stands between the web and Gradio: security headers, closed routes, clean answers, health and metrics.

One ASGI middleware, given to Gradio's app. The queue's door is elsewhere, in the engine, where nothing gets past it.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import json
import logging
import re
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import SimpleNamespace

import gradio as gr
from anyio import to_thread
from gradio.exceptions import ComponentProcessingError, InvalidPathError
from gradio.route_utils import FnIndexInferError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine import catalog, vocabulary
from engine.errors import RequestError
from engine.serving.admission import Visitor
from engine.serving.contracts import Worker
from ui import style, words
from ui.html.cover import Cover
from ui.web import bodies

log = logging.getLogger(__name__)

SPACE_FRAMES = ("https://huggingface.co", "https://*.hf.space")
"""Who may show a Space in a frame: the hub's own pages."""
CLOSED = re.compile(
    r"/gradio_api/(upload|upload_progress|proxy=|stream/|component_server|process_recording|vibe-|vibe-code"
    r"|custom_component/|profiling/|runs|run-history|deep_link|dev/)|/monitoring|/openapi\.json"
)
"""Gradio's routes that this app has no use for: uploads, proxies, streams, editors, statistics."""
WARMING = "/warming"
VOCABULARY = "/vocabulary"
PREVIEW = catalog.ASSETS / "screenshots" / "first-1440-dark.png"
GRADIOS = re.compile(rb'<meta\s+(property="og:|name="twitter:)[^>]*>')
"""What Gradio's own page says of itself elsewhere."""
ENTRY = re.compile(rb'<script type="module" crossorigin src="([\w./-]+)"></script>')
"""Gradio's own script."""
LOGIN = b'"auth_required":true'
"""In a page that asks for user and password."""
SCRIPT = re.compile(r"/assets/[\w.-]+\.js")
LEARN_SECONDS = 6.0
"""After the first page was asked for: what it needs at first."""
MOST = 100
"""Scripts that are named, at most."""
HOST = re.compile(r"[\w.-]+(:\d+)?|\[[\da-fA-F:.]+\](:\d+)?")
GONE = re.compile(r"/gone/(\w{1,64})")
"""Where a page that goes says which run it leaves."""
"""Where the page asks how far the preload is: apart from Gradio, whose events take places in its queue."""
JSON = re.compile(r"/gradio_api/(?!mcp)")
"""Routes that take JSON of ours; MCP's messages are checked by its own server."""
LARGEST_BODY = 1_000_000
"""Bytes; a request of ours is a few hundred, and recorded settings travel along."""
LONGEST_NAME = 255
"""Bytes of one part of a path, beyond which asking a file system is an error."""
THEIRS = (ComponentProcessingError, InvalidPathError)
"""What Gradio raises when a component is sent what it cannot hold: the page does not, so somebody else did."""
_their_mistake: ContextVar[bool] = ContextVar("their_mistake", default=False)
"""The request that is being answered failed by what it held."""


@dataclass(frozen=True, kw_only=True)
class Doors:
    """How this app is open to the web."""

    auth: tuple[str, str] | None = None
    """User and password; None lets everybody in."""
    space: bool = False
    """It runs in a Hugging Face Space, which shows it in a frame."""
    metrics: bool = False
    """/metrics is there."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Doors:
        """TWINFRAME_AUTH=user:password, TWINFRAME_METRICS=1, and SPACE_ID, which a Space sets.

        Raises:
            RequestError: TWINFRAME_AUTH is not of that form; the sentence does not repeat it.
        """
        user, colon, password = environment.get("TWINFRAME_AUTH", "").partition(":")
        if (user or colon) and not (user and password):
            raise RequestError("TWINFRAME_AUTH must be a user and a password with a colon between: user:password.")
        return cls(
            auth=(user, password) if user else None,
            space=bool(environment.get("SPACE_ID")),
            metrics=environment.get("TWINFRAME_METRICS") == "1",
        )

    def headers(self) -> dict[str, str]:
        """Security headers of every answer.

        Gradio builds its page with inline scripts and compiles its templates, hence 'unsafe-inline' and
        'unsafe-eval': what the policy achieves is that nothing is fetched from or sent to another host.
        """
        frames = " ".join(("'self'", *(SPACE_FRAMES if self.space else ())))
        policy = {
            "default-src": "'self'",
            "script-src": "'self' 'unsafe-inline' 'unsafe-eval'",
            "style-src": "'self' 'unsafe-inline'",
            "img-src": "'self' data: blob:",
            "media-src": "'self' data: blob:",
            "font-src": "'self' data:",
            "connect-src": "'self'",
            "worker-src": "'self' blob:",
            "object-src": "'none'",
            "base-uri": "'self'",
            "form-action": "'self'",
            "frame-ancestors": frames,
        }
        said = {
            "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
            "x-content-type-options": "nosniff",
            "referrer-policy": "same-origin",
            "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
        }
        return said if self.space else said | {"x-frame-options": "SAMEORIGIN"}

    def middleware(
        self,
        worker: Worker,
        gone: Callable[[str], None] = lambda name: None,
        covered: Callable[[str], Cover | None] = lambda query: None,
    ) -> Middleware:
        """For `launch(app_kwargs={"middleware": [...]})`; `worker` tells its health and metrics, `gone` hears the name
        of a run whose page goes, and `covered` gives the first screen of a page that is opened by a query."""
        # Gradio prints the traceback of a handler that failed; our log is one JSON object a line.
        gr.queueing.traceback = gr.routes.traceback = SimpleNamespace(print_exc=_log_failure)
        return Middleware(_Gate, doors=self, worker=worker, gone=gone, covered=covered)

    def lets_in(self, authorization: str) -> bool:
        """Whether an Authorization header holds the user and password; true where there are none."""
        if self.auth is None:
            return True
        scheme, _, said = authorization.partition(" ")
        try:
            given = base64.b64decode(said, validate=True)
        except (binascii.Error, ValueError):
            return False
        return scheme.lower() == "basic" and secrets.compare_digest(given, ":".join(self.auth).encode())


def visitor(http: gr.Request) -> Visitor:
    """Who asks, for the engine's door."""
    return Visitor(session=http.session_hash, address=http.client.host if http.client else "")


class _Gate:
    """The middleware itself."""

    def __init__(
        self,
        app: ASGIApp,
        doors: Doors,
        worker: Worker,
        gone: Callable[[str], None],
        covered: Callable[[str], Cover | None],
    ):
        self._covered = covered
        self._scripts: dict[str, None] = {}
        """In the order in which the first page asked for them."""
        self._learnt_until: float | None = None
        self._app, self._doors, self._worker, self._gone = app, doors, worker, gone
        self._headers = [(name.encode(), value.encode()) for name, value in doors.headers().items()]
        self._own: dict[str, Callable[[Scope], tuple[int, str, bytes]]] = {
            "/health": self._health,
            WARMING: self._warming,
        }
        self._own |= {"/preview.png": _preview}
        self._own |= {f"{VOCABULARY}/{model}": _vocabulary for model in catalog.BUNDLED}
        if doors.metrics:
            self._own["/metrics"] = self._metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, started = scope["path"].rstrip("/") or "/", False
        _their_mistake.set(False)

        async def guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if message["status"] == 500 and _their_mistake.get():
                    message = {**message, "status": 422}
                ours = {name for name, _ in self._headers}
                kept = [_unnamed(pair) for pair in message["headers"] if pair[0].lower() not in ours]
                message = {**message, "headers": [*kept, *self._headers]}
            await send(message)

        content = await _body(receive)
        page = path == "/" and scope["method"] == "GET"
        sent: Send = guarded
        if page:
            cover = await to_thread.run_sync(self._covered, scope["query_string"].decode("latin-1"))
            sent = _headed(scope, guarded, cover, tuple(self._scripts))
        self._learn(path, page)
        if own := self._own.get(path):
            await _answer(guarded, *await to_thread.run_sync(own, scope))
        elif scope["method"] == "POST" and (named := GONE.fullmatch(path)):
            await to_thread.run_sync(self._gone, named[1])
            await _answer(guarded, 204, "text/plain", b"")
        elif CLOSED.match(path) or any(len(name.encode()) > LONGEST_NAME or "\0" in name for name in path.split("/")):
            await _refuse(guarded, 404, "There is nothing here.")
        elif content is None:
            await _refuse(guarded, 413, "The request is too large.")
        elif scope["method"] == "POST" and JSON.match(path) and (said := bodies.wrong(content)):
            await _refuse(guarded, 422, said)
        else:
            try:
                await self._app(scope, _replayed(content, receive), sent)
            except Exception as error:
                if not started and (refusal := _refusal(error, path)):
                    await _refuse(guarded, *refusal)
                    return
                if isinstance(error.__cause__, HTTPException):  # refused by a route that had begun to answer
                    log.info("refused: %s", error.__cause__.detail, extra={"path": path})
                else:
                    log.exception("request failed", extra={"path": path, "method": scope["method"]})
                if started:
                    await send({"type": "http.response.body", "body": b""})
                else:
                    await _refuse(guarded, 500, "The app failed on this request: its log says more.")

    def _learn(self, path: str, page: bool) -> None:
        """Which scripts a page loads one after another: those after the first name them, so that they come at once.
        Their names are Gradio's and change with its version."""
        now = time.monotonic()
        if page and self._learnt_until is None:
            self._learnt_until = now + LEARN_SECONDS
        elif self._learnt_until and now < self._learnt_until and SCRIPT.fullmatch(path) and len(self._scripts) < MOST:
            self._scripts[path.lstrip("/")] = None

    def _health(self, scope: Scope) -> tuple[int, str, bytes]:
        health = self._worker.health()
        body = json.dumps({"status": health.status, "queue": health.queue})
        return 200 if health.accepting else 503, "application/json", body.encode()

    def _warming(self, scope: Scope) -> tuple[int, str, bytes]:
        """What ui/static/warming.js shows: like the health open to everybody, so it says nothing of why something
        failed."""
        status, preloads = self._worker.health().status, self._worker.preloads()
        said = words.warming.said(status, preloads)
        going_on = status == "restarting" or any(preload.status != "failed" for preload in preloads)
        body = json.dumps({"said": said[0], "detail": said[1], "again": going_on})
        return 200, "application/json", body.encode()

    def _metrics(self, scope: Scope) -> tuple[int, str, bytes]:
        if not self._doors.lets_in(_header(scope, b"authorization")):
            return 401, "application/json", b'{"detail": "User and password, please."}'
        return 200, "text/plain; version=0.0.4; charset=utf-8", self._worker.metrics().encode()


def _preview(scope: Scope) -> tuple[int, str, bytes]:
    """What a link to the page shows elsewhere."""
    return 200, "image/png", PREVIEW.read_bytes()


def _headed(scope: Scope, send: Send, cover: Cover | None, scripts: Sequence[str]) -> Send:
    """Sends the page with what its head holds before any script, and its first screen if it has one, compressed where
    the browser takes that."""
    host = _header(scope, b"host")
    scheme = _header(scope, b"x-forwarded-proto").partition(",")[0].strip() or scope["scheme"]
    known = HOST.fullmatch(host) and scheme in ("http", "https")
    origin = f"{scheme}://{host}{scope.get('root_path', '').rstrip('/')}" if known else ""
    packs = "gzip" in _header(scope, b"accept-encoding")
    began: Message = {}
    parts: list[bytes] = []

    async def whole(message: Message) -> None:
        nonlocal began
        if message["type"] == "http.response.start":
            began = message
            return
        parts.append(message.get("body", b""))
        if message.get("more_body"):
            return
        body = GRADIOS.sub(b"", b"".join(parts))
        shown = None if LOGIN in body else cover
        meta = style.meta(origin, shown.pictures if shown else (), scripts)
        body = body.replace(b"<head>", b"<head>" + meta.encode(), 1)
        if shown:
            body = _covered(body, shown)
        kept = [(name, value) for name, value in began["headers"] if name.lower() != b"content-length"]
        if packs and body:
            body = gzip.compress(body, 5)
            kept += [(b"content-encoding", b"gzip"), (b"vary", b"accept-encoding")]
        await send({**began, "headers": [*kept, (b"content-length", str(len(body)).encode())]})
        await send({"type": "http.response.body", "body": body})

    return whole


def _covered(body: bytes, cover: Cover) -> bytes:
    """The page with its first screen, which Gradio's own script waits for."""
    html, begins = cover.html.encode(), ENTRY.search(body)
    if begins:
        entry = begins[1]
        body = body.replace(begins[0], b'<link rel="modulepreload" crossorigin href="' + entry + b'">', 1)
        html = html.replace(b"<twinframe-cover", b'<twinframe-cover data-entry="' + entry + b'"', 1)
    return body.replace(b"<gradio-app", html + b"<gradio-app", 1)


def _vocabulary(scope: Scope) -> tuple[int, str, bytes]:
    """What ui/static/prompt.js completes from."""
    known = vocabulary.of(scope["path"].rstrip("/").rpartition("/")[2])
    return 200, "application/json", json.dumps(known.to_json() if known else None).encode()


def _refusal(error: Exception, path: str) -> tuple[int, str] | None:
    """What to answer where Gradio raises instead: that there is no such endpoint, event, function or parameter."""
    calls = path.startswith(("/gradio_api/call/", "/gradio_api/queue/", "/gradio_api/run/", "/gradio_api/api/"))
    if isinstance(error, FnIndexInferError) or (isinstance(error, KeyError) and calls):
        return 404, "There is no such endpoint: the public one is /compare."
    if isinstance(error, TypeError) and path.startswith("/gradio_api/call/v2/"):
        return 422, "The endpoint has no such parameters: they are listed at /gradio_api/info."
    return None


def _log_failure() -> None:
    """In the place of `traceback.print_exc`, where Gradio handles what a handler or a component raised."""
    error = sys.exc_info()[1]
    # A function that runs in the browser has nothing to call here, which an IndexError says.
    if isinstance(error, THEIRS) or (isinstance(error, IndexError) and "no backend method" in str(error)):
        _their_mistake.set(True)
        log.info("refused: %s", type(error).__name__)
    else:
        log.exception("a handler failed")


async def _body(receive: Receive) -> bytes | None:
    """The whole body of a request; None if it is too large."""
    content: bytes = b""
    while True:
        message = await receive()
        content += message.get("body", b"")
        if len(content) > LARGEST_BODY:
            return None
        if not message.get("more_body", False):
            return content


def _replayed(content: bytes, receive: Receive) -> Receive:
    """`receive` for whoever comes next: the body that was read, then whatever follows."""
    waiting = [{"type": "http.request", "body": content, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


def _unnamed(header: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    """Without the file's name in a Content-Disposition: a browser takes it before the telling one that a link gives."""
    name, value = header
    return (name, value.partition(b";")[0]) if name.lower() == b"content-disposition" else header


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


async def _refuse(send: Send, status: int, sentence: str) -> None:
    await _answer(send, status, "application/json", json.dumps({"detail": sentence}).encode())


async def _answer(send: Send, status: int, kind: str, body: bytes) -> None:
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    headers.append((b"cache-control", b"no-store"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
