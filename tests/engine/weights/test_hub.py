"""Downloads by the real huggingface_hub from a small hub on this machine, in processes of their own."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from engine.catalog import FLUX_DEV
from engine.weights import hub

ROOT = Path(__file__).resolve().parents[3]
FILES = {
    "model_index.json": b"{}",
    "transformer/weights.safetensors": bytes(range(256)) * 100_000,
    "flux1-dev.safetensors": b"the same once more",
}
WANTED = ["model_index.json", "transformer/*.safetensors"]
CHILD = f"""
import json
from engine.catalog import FLUX_DEV
from engine.errors import LoadError
from engine.weights import hub
told = []
try:
    before = hub.cached(FLUX_DEV, {WANTED})
    folder = hub.download(FLUX_DEV, {WANTED}, lambda done, total: told.append((done, total)))
    after = hub.cached(FLUX_DEV, {WANTED})
    print(json.dumps({{"before": before and str(before), "folder": str(folder), "told": told, "after": str(after)}}))
except LoadError as error:
    print(json.dumps({{"error": str(error)}}))
"""


class Hub(http.server.ThreadingHTTPServer):
    """Answers as the hub does for one repository, or refuses everything with `refuse`: (status, error code)."""

    def __init__(self, refuse=None, breaks=0):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.refuse, self.breaks, self.asked = refuse, breaks, []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        path = unquote(urlparse(self.path).path)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.server.asked.append((self.command, path, start))
        if self.server.refuse:
            return self._send(self.server.refuse[0], {"X-Error-Code": self.server.refuse[1]}, b"")
        if "/tree/" in path:
            rows = [{"type": "file", "path": n, "size": len(c), "oid": _sha(c)} for n, c in FILES.items()]
            return self._send(200, {}, json.dumps(rows).encode())
        content = FILES.get(path.partition(f"/resolve/{FLUX_DEV.revision}/")[2])
        if content is None:
            return self._send(404, {}, b"")
        headers = {"ETag": f'"{_sha(content)}"', "X-Repo-Commit": FLUX_DEV.revision}
        return self._send(206 if start else 200, headers, content[start:])

    do_GET = do_HEAD

    def _send(self, status, headers, body):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            if self.server.breaks and len(body) > 1_000_000:
                self.server.breaks -= 1
                body, self.close_connection = body[:21_000_000], True
            self.wfile.write(body)


def _sha(content):
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def fetch(tmp_path):
    """Download in a process that knows only this hub, with a cache of its own; gives what it printed."""

    def run(server, **variables):
        own = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, "-c", CHILD],
            cwd=ROOT,
            env=clean | own | variables,
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_a_download_is_whole_pinned_and_found_again(fetch):
    server = Hub()
    first = fetch(server)
    assert first["before"] is None and first["after"] == first["folder"]
    assert Path(first["folder"]).name == FLUX_DEV.revision
    for name in ("model_index.json", "transformer/weights.safetensors"):
        assert (Path(first["folder"]) / name).read_bytes() == FILES[name]
    total = sum(len(FILES[name]) for name in FILES if name != "flux1-dev.safetensors")
    assert first["told"][-1] == [total, total]
    assert not any("flux1-dev" in path for _, path, _ in server.asked)
    again = fetch(server)
    assert again["before"] == first["folder"]


def test_a_broken_download_goes_on_where_it_broke_off(fetch):
    server = Hub(breaks=1)
    done = fetch(server)
    assert (Path(done["folder"]) / "transformer/weights.safetensors").read_bytes() == FILES[
        "transformer/weights.safetensors"
    ]
    starts = [start for method, path, start in server.asked if method == "GET" and path.endswith("weights.safetensors")]
    assert starts[0] == 0 and starts[-1] > 0


@pytest.mark.parametrize(
    ("refuse", "token", "words"),
    [
        ((401, "GatedRepo"), {}, ["gated", FLUX_DEV.url, hub.TOKENS]),
        ((403, "GatedRepo"), {"HF_TOKEN": "hf_mine"}, ["has no access", FLUX_DEV.url]),
        ((401, ""), {"HF_TOKEN": "hf_wrong"}, ["does not know this HF_TOKEN", hub.TOKENS]),
    ],
    ids=["no token", "no access", "wrong token"],
)
def test_a_refusal_is_one_sentence(fetch, refuse, token, words):
    text = fetch(Hub(refuse=refuse), **token)["error"]
    assert len(text.splitlines()) == 1 and all(word in text for word in words), text
