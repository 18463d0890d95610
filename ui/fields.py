"""Fields whose bounds and choices change with the model.

The browser may still send what suited the model before: Gradio would refuse it, in words about components. Here it
passes, and whoever reads the form judges it by the model that the form names (`fitting`).
"""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Iterable, Mapping
from typing import Any

import gradio as gr

from engine.errors import RequestError
from engine.request import CompareRequest

FOLLOWING = ("num_inference_steps", "guidance_scale", "num_frames", "batch_size", "size", "recipe")
"""Fields of the Compare tab's form that are set anew when another model is chosen."""


def _unchecked(parent: type[gr.components.Component]) -> type[gr.components.Component]:
    """A component that is drawn as its parent, and whose value the server takes as it comes."""
    own = {"is_template": True, "preprocess": lambda self, payload: payload, "__module__": __name__}
    # Past Gradio's metaclass, which writes a file beside that of every class.
    return ABCMeta.__new__(type(parent), parent.__name__, (parent,), own)


Slider, Dropdown, Radio, CheckboxGroup = map(_unchecked, (gr.Slider, gr.Dropdown, gr.Radio, gr.CheckboxGroup))


def unchanged() -> dict[Any, Any]:
    """What a handler gives that changes nothing."""
    skipped: dict[Any, Any] = gr.skip()
    return skipped


def fitting(model: str, values: Mapping[str, object]) -> dict[str, object]:
    """Those of a form's values that a model takes, each looked at by itself, as arguments of a request. For what is
    left out the model's defaults stand in. `size` is "width x height" without spaces.

    Raises:
        RequestError: there is no such model.
    """
    CompareRequest.create("-", model=model)
    asked = [_sides(value) if name == "size" else {name: value} for name, value in values.items()]
    return {name: value for each in asked if _takes(model, each) for name, value in each.items()}


def columns_of(model: str, columns: Iterable[str]) -> list[str]:
    """Those of some columns that a model has: it may not have the recipe that one of the model before names."""
    return [column for column in columns if _takes(model, {"precisions": [column]})]


def _takes(model: str, asked: Mapping[str, object]) -> bool:
    try:
        CompareRequest.create("-", model=model, **asked)
    except RequestError:
        return False
    return True


def _sides(size: object) -> dict[str, int]:
    width, _, height = str(size).partition("x")
    return {"width": int(width), "height": int(height)} if width.isdecimal() and height.isdecimal() else {}
