"""A request as the query of the page's address, and back: a link that restores every control.

The names are the page's, shorter than the request's. What others add to an address (`__theme`, a tracker's marks) is
ignored. Knows no HTML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from urllib.parse import quote, urlencode

from engine import catalog
from engine.errors import RequestError, shown
from engine.formats import REFERENCE
from engine.request import CompareRequest

NUMBERS = {
    "seed": "seed",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "frames": "num_frames",
    "batch": "batch_size",
}
"""Name in the address -> field of the request."""
RECORDED = "recorded"
"""Name in the address of a recorded comparison to be opened."""
MADE = "made"
"""Name in the address of what was made here for the rest of it, by its folder on the shelf, while that is kept."""
NAMES = ("prompt", "model", "precisions", "size", "recipe", *NUMBERS)


def query(request: CompareRequest) -> str:
    """The request as `?prompt=...&model=...`."""
    others = [p for p in request.precisions if p != REFERENCE]
    values = {
        "prompt": request.prompt,
        "model": request.model,
        "precisions": ",".join(others or [REFERENCE]),
        "size": f"{request.width}x{request.height}",
        "recipe": request.recipe,
        **{name: getattr(request, field) for name, field in NUMBERS.items()},
    }
    return "?" + urlencode(values, quote_via=quote, safe=",@")


def read(values: Mapping[str, str], models: Sequence[str]) -> CompareRequest | None:
    """The request of an address's query; None if it asks for nothing.

    What it leaves out is the model's default, for the prompt the first example, and for the model the first of
    `models`, the ids of those that are offered.

    Raises:
        RequestError: the first value that is wrong, in one sentence.
    """
    given = {name: values[name] for name in NAMES if name in values}
    if not given:
        return None
    spec = catalog.model(given.get("model", models[0]))
    if spec.id not in models:
        raise RequestError(f"{spec.name} is not offered here: choose {' or '.join(models)}.")
    fields: dict[str, object] = {field: _number(given[name]) for name, field in NUMBERS.items() if name in given}
    if "size" in given:
        sides = re.fullmatch(r"(\d{1,6})x(\d{1,6})", given["size"])
        if not sides:
            raise RequestError(f"size is {shown(given['size'])}: write it as width x height, such as 256x256.")
        fields["width"], fields["height"] = map(int, sides.groups())
    prompt = given.get("prompt", spec.examples[0] if spec.examples else "")
    return CompareRequest.create(
        prompt, model=spec.id, precisions=given.get("precisions"), recipe=given.get("recipe"), **fields
    )


def _number(text: str) -> object:
    """A number, or the text as it stands, for the request to complain about."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
