"""The one public endpoint, `/compare`: a request's fields in, the command line's JSON out, files to fetch in it.

With `--mcp` Gradio offers it to MCP clients as a tool, by asking it like any other client: same queue, same door, where
all of them together count as one visitor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from engine import events
from engine.errors import TwinframeError
from engine.formats import DEFAULTS, PRECISIONS
from engine.request import CompareRequest
from engine.results import Comparison
from engine.serving.contracts import Worker
from ui import words
from ui.web import middleware
from ui.web.served_files import Shelf


def endpoint(worker: Worker, shelf: Shelf) -> Callable[..., Iterator[dict[str, Any]]]:
    """The function behind `/compare`.

    A generator, because that is what Gradio can end when a client goes away: it yields `{"status": ...}` while the
    worker is at it, and the result last, which is what `predict` returns.
    """

    def compare(
        prompt: str,
        model: str | None = None,
        precisions: list[str] | None = None,
        seed: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        batch_size: int | None = None,
        recipe: str | None = None,
        fresh: bool | None = None,
        http: gr.Request | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Make a picture or clip in bf16 and as each other column from the same noise; measure what differs.

        Args:
            prompt: what to draw.
            model: the model's id; by default the bundled miniature.
            precisions: of {precisions}; bf16 always takes part. A recipe of its own is named after an @, as in
                {example}.
            seed: of the noise; picture i of a batch uses seed + i.
            num_inference_steps: denoising steps.
            guidance_scale: how strongly the prompt is followed.
            height: pixels.
            width: pixels.
            num_frames: of a clip.
            batch_size: pictures or clips per precision.
            recipe: which layers are quantized, such as post or full, in those precisions that name none.
            fresh: run it even if this app made the same before; without it, such a result comes back with
                "recorded": true and the date when it was made.
        """
        try:
            asked = CompareRequest.create(
                prompt,
                model=model,
                precisions=precisions,
                seed=seed,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                height=height,
                width=width,
                num_frames=num_frames,
                batch_size=batch_size,
                recipe=recipe,
            )
            if not fresh and (earlier := worker.earlier(asked)):
                yield answer(earlier[0], recorded=True)
                return
            with shelf.offer() as folder:
                job = worker.submit(asked, folder, middleware.visitor(http))
        except TwinframeError as error:
            raise _said(str(error)) from error
        try:
            for event in job.events():
                match event:
                    case events.Completed(comparison):
                        yield answer(comparison)
                        return
                    case events.Failed(reason):
                        raise _said(reason)
                    case events.Cancelled():
                        raise _said(words.run.STOPPED)
                    case events.Step(column, index, total, _):
                        yield {"status": f"{column}: step {index} of {total}"}
                    case events.Queued(position, seconds):
                        yield {"status": words.run.waiting(position, seconds)}
                    case events.Downloading(what, done, total):
                        yield {"status": f"downloading {words.run.downloading(what, done, total)}"}
                    case _:
                        yield {"status": type(event).__name__.lower()}
            raise _said(words.run.API_BROKEN)
        finally:
            job.cancel()

    # Clients read it, and MCP's a tool by it, so it names what there is.
    said = (compare.__doc__ or "").replace("{precisions}", ", ".join(PRECISIONS))
    compare.__doc__ = said.replace("{example}", f"{DEFAULTS[-1]}@tuned")
    return compare


def answer(comparison: Comparison, *, recorded: bool = False) -> dict[str, Any]:
    """The comparison as JSON with every file as Gradio file data, which its clients download by themselves."""
    said = comparison.to_json() | ({"recorded": True} if recorded else {})
    for result in said["results"]:
        result["files"] = [gr.FileData(path=file).model_dump() for file in result["files"]]
        for found in filter(None, result["lpips_maps"]):  # what has no score has no map
            found["file"] = gr.FileData(path=found["file"]).model_dump()
    return said


def _said(sentence: str) -> gr.Error:
    """An error whose text reaches the client whatever `show_error` is; no traceback in the log for a user's mistake."""
    return gr.Error(sentence, print_exception=False)
