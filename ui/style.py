"""Colours and type: one accent, one neutral scale, the system's own fonts, so that nothing is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path

import gradio as gr

from engine.formats import LABELS, REFERENCE, ROWS
from ui import words

PARTS = (
    *("frame", "form", "prompt", "verdict", "views", "numbers", "pairs", "tables", "clips", "benchmarks", "answers"),
    *("narrow", "gallery", "stage", "warming", "tabs", "recipe", "quality", "how", "scatter", "blind", "previews"),
)
"""The files in ui/css/, in the order in which their rules win over one another."""
COVER = ("cover", "frame", "form", "prompt", "verdict", "views", "numbers", "pairs", "tables", "narrow")
"""Those that the first screen needs before Gradio's own are there."""
SCOPE = ".gradio-container.gradio-container.gradio-container"
"""Thrice, so that our rules win over Gradio's own without `!important`."""
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def theme() -> gr.themes.Base:
    """Gradio's barest theme, with hairlines for boxes. The rest is in ui/css/."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.zinc,
        neutral_hue=gr.themes.colors.zinc,
        font=SANS,
        font_mono=MONO,
        radius_size=gr.themes.sizes.radius_sm,
    ).set(
        body_background_fill="#ffffff",
        body_background_fill_dark="#111113",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_border_width_dark="0px",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_shadow="none",
        block_shadow_dark="none",
        input_background_fill="#ffffff",
        input_background_fill_dark="#18181b",
        input_shadow="none",
        input_shadow_dark="none",
        slider_color="#0f766e",
        slider_color_dark="#2dd4bf",
        button_primary_background_fill="#0f766e",
        button_primary_background_fill_hover="#115e59",
        button_primary_background_fill_dark="#2dd4bf",
        button_primary_background_fill_hover_dark="#5eead4",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#042f2e",
    )


def meta(origin: str, pictures: Sequence[str], scripts: Sequence[str]) -> str:
    """What the page's head holds before any script: what a link to it shows elsewhere, and the scripts and pictures of
    the first screen, which so come all at once.

    Args:
        origin: the page's own address, without a slash at the end.
        pictures, scripts: addresses relative to the page.
    """
    told = {
        "title": words.TITLE,
        "description": words.post.DESCRIPTION,
        "type": "website",
        "image": f"{origin}/preview.png",
    }
    tags = "".join(f'<meta property="og:{name}" content="{escape(said)}">' for name, said in told.items())
    loads = "".join(f'<link rel="preload" as="image" fetchpriority="high" href="{escape(file)}">' for file in pictures)
    loads += "".join(f'<link rel="modulepreload" href="{escape(file)}">' for file in scripts)
    return f'{tags}<meta name="twitter:card" content="summary_large_image">{loads}'


def head() -> str:
    """The style sheet as an element of the page's head, nested in a selector for Gradio's outermost element: & is that.

    Not as `launch(css_paths=...)`: Gradio rewrites selectors there, splits `:is(a, b)` at the comma and moves what
    is inside `@media` below an element that it does not mean.
    """
    return f"<style>{_sheet(PARTS)}{SCOPE} {{\n{formats()}}}</style>"


@cache
def cover() -> str:
    """The rules of the first screen before Gradio's are there (ui/html/cover.py), for a shadow root."""
    own = theme()
    colours = {
        shade: f"--body-background-fill: {getattr(own, 'body_background_fill' + of)};"
        f" --tf-button: {getattr(own, 'button_primary_background_fill' + of)};"
        f" --tf-on-button: {getattr(own, 'button_primary_text_color' + of)};"
        f" --tf-input: {getattr(own, 'input_background_fill' + of)}; --tf-written: var({written});"
        for shade, of, written in (("light", "", "--col"), ("dark", "_dark", "--col-dark"))  # of Gradio's own page
    }
    fonts = ", ".join(f'"{font}"' if " " in font else font for font in SANS)
    return (
        f'{_sheet(COVER)}{SCOPE} {{ {colours["light"]} font-family: {fonts}; --tf-reference: "{LABELS[REFERENCE]}"; }}'
        f" .dark {SCOPE} {{ {colours['dark']} }}"
    )


def _sheet(parts: Sequence[str]) -> str:
    folder = Path(__file__).with_name("css")
    rules = "\n".join((folder / f"{part}.css").read_text(encoding="utf-8") for part in parts)
    return f"{SCOPE} {{\n{rules}}}\n"


def formats() -> str:
    """The rules that come from engine/formats.py: each format's colour, and the reference's name.

    The reference has no line of its own in a player, where the others are drawn against it.
    """
    rules = [f'& {{\n  --tf-reference: "{LABELS[REFERENCE]}";\n}}']
    for row in ROWS:
        where = ".tf-benchmarks, .tf-tab" if row.id == REFERENCE else ".tf-player, .tf-benchmarks, .tf-tab"
        chosen = f':is({where}) [data-precision="{row.id}"]'
        rules.append(f"{chosen} {{\n  --tf-line-colour: {row.colour.light};\n}}")
        rules.append(f".dark & {chosen} {{\n  --tf-line-colour: {row.colour.dark};\n}}")
    return "\n".join(rules) + "\n"
