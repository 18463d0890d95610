"""The MCP server: off unless asked for, refused where it cannot be had, and then the same door as the API."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client

from engine.errors import RequestError
from engine.serving import command_line
from tests.support.fake_engine import FakeWorker
from ui.page import build_page


def check(monkeypatch, *arguments):
    import app

    monkeypatch.setattr("sys.argv", ["app.py", *arguments])
    command_line.check_app(app.arguments())


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_without_its_package_the_flag_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=re.escape('run pip install "gradio[mcp]"')):
        check(monkeypatch, "--mcp")
    check(monkeypatch)


def test_it_is_refused_behind_a_password(monkeypatch, installed):
    check(monkeypatch, "--mcp")
    monkeypatch.setenv("TWINFRAME_AUTH", "ann:secret")
    with pytest.raises(RequestError, match="leave one out") as refused:
        check(monkeypatch, "--mcp")
    assert "secret" not in str(refused.value)


def test_it_is_off_by_default_whatever_gradio_is_told(monkeypatch):
    monkeypatch.setenv("GRADIO_MCP_SERVER", "true")
    nowhere = Path("no such folder")
    with closing(build_page(FakeWorker(), recorded=nowhere, measured=nowhere)) as page:
        url = page.serve(quiet=True)
        ping = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
        assert httpx.post(f"{url}gradio_api/mcp/", json=ping).status_code in (404, 405)


def test_a_tool_call_goes_through_the_queue_and_its_mistakes_are_sentences():
    worker, nowhere = FakeWorker(step_seconds=0.01), Path("no such folder")

    async def talk(url):
        async with (
            streamable_http_client(f"{url}gradio_api/mcp/") as (incoming, outgoing, _),
            ClientSession(incoming, outgoing) as session,
        ):
            await session.initialize()
            tools = (await session.list_tools()).tools
            made = await session.call_tool("compare", {"prompt": "a cat", "precisions": ["nvfp4"], "seed": 3})
            wrong = await session.call_tool("compare", {"prompt": "  "})
            return tools, made, wrong

    with closing(build_page(worker, recorded=nowhere, measured=nowhere)) as page:
        talking = asyncio.wait_for(talk(page.serve(quiet=True, mcp=True)), 30)
        with ThreadPoolExecutor(1) as elsewhere:  # this thread may have a browser's loop
            tools, made, wrong = elsewhere.submit(asyncio.run, talking).result()
    assert [tool.name for tool in tools] == ["compare"]
    assert tools[0].inputSchema["required"] == ["prompt"]
    assert "what to draw" in json.dumps(tools[0].inputSchema)
    assert (worker.jobs[0].request.seed, worker.jobs[0].request.precisions) == (3, ("bf16", "nvfp4"))
    assert not made.isError and "nvfp4.png" in made.content[0].text
    assert wrong.isError and wrong.content[0].text.startswith("The prompt is empty")
    assert len(worker.jobs) == 1
