"""An evaluation as one HTML page that needs nothing else: figures, rulers, and the pairs that differ most and least.

Reads what engine/quality/evaluate.py summarised, and the pictures it names; knows nothing of models. Everything that is
not ours (prompts, names) is escaped, there is no script, and nothing is loaded from anywhere: small copies of the
pictures lie inside. Figures quoted from the post stand in a table of their own, with a badge."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from engine import reference
from engine.formats import LABELS, REFERENCE
from engine.results import NO_SCORE

SIDE = 320
"""Longer side of the embedded copies, in pixels."""
QUALITY = 82
"""WebP's; the copies are for looking, the scores come from tensors."""

STYLE = """
:root { color-scheme: light dark; --ink: #18181b; --soft: #62626c; --line: #dcdce1; --fill: #f4f4f5;
  --paper: #fff; --accent: #0f766e; }
@media (prefers-color-scheme: dark) { :root { --ink: #f0f0f2; --soft: #a3a3ad; --line: #34343a; --fill: #1b1b1f;
  --paper: #111113; --accent: #2dd4bf; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1100px; padding: 24px 16px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 1.15rem; margin: 40px 0 8px; }
h3 { font-size: 1rem; margin: 24px 0 8px; }
p { margin: 0 0 8px; }
small, .soft { color: var(--soft); }
.badge { display: inline-block; padding: 0 8px; border: 1px solid var(--line); border-radius: 99px;
  background: var(--fill); font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 6px 10px 6px 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
  vertical-align: top; }
th:first-child, th.word, td.word { text-align: left; }
thead th { color: var(--soft); font-weight: 500; }
tbody th { font-weight: 600; }
tr.ruler > * { color: var(--soft); font-weight: 400; }
td small { display: block; }
svg { display: block; width: 150px; height: 18px; overflow: visible; }
.pairs { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
figure { margin: 0; min-width: 0; }
figure div { display: grid; grid-template-columns: 1fr 1fr; gap: 4px; }
img { display: block; width: 100%; height: auto; border-radius: 4px; background: var(--fill); }
figcaption { margin-top: 4px; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: minmax(90px, auto) 1fr; gap: 2px 16px; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; margin: 8px 0; }
"""


def page(summary: Mapping[str, Any], folder: Path) -> str:
    """The report.

    Args:
        summary: what `evaluate.run` gives back.
        folder: what its file names are relative to.
    """
    prompts, interval = summary["prompts"], summary["interval"]
    title = f"{summary['name']}: {', '.join(dict.fromkeys(LABELS[row['precision']] for row in summary['results']))}"
    kept = f"{prompts['count']} prompt{'s' * (prompts['count'] != 1)} of {prompts['source']}"
    left = len(prompts["refused"])
    if left:
        kept += f", {left} that the model does not take left out"
    if prompts["repeated"]:
        kept += f", {prompts['repeated']} repeated ones left out"
    if prompts["same"]:
        which = ", ".join(f"{prompt} as {other}" for prompt, other in prompts["same"].items())
        kept += f"; {prompts['given']} were given, but the model reads the same tokens of some, counted once: {which}"
    note = (
        f"LPIPS (AlexNet) and PSNR are against bf16 from the same noise. In small print the "
        f"{interval['confidence']:.0%} interval of a mean: {interval['method']}, {interval['resamples']:,} resamples. "
        f"{summary['ruler']['note']}"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><header><h1>{escape(title)}</h1>"
        f'<p class="soft">{escape(kept)}</p>'
        f'<p><span class="badge">measured</span> {escape(summary["device"])}, {escape(summary["created"][:10])}</p>'
        f"</header><main><h2>Distance from bf16</h2><p class='soft'>{escape(note)}</p>{_table(summary)}"
        f"{_damage(summary)}{_quoted(summary)}{_categories(summary)}{_pairs(summary, folder)}{_facts(summary)}"
        "</main></body></html>\n"
    )


def _table(summary: Mapping[str, Any]) -> str:
    ruler, reference = summary["ruler"], summary["reference"]
    clips = any(scores["temporal_lpips"] is not None for scores in (ruler["floor"], *summary["results"]))
    top = max(
        value
        for scores in ({"lpips": {"mean": 0, "high": 0}}, ruler["ceiling"], *summary["results"])
        if scores["lpips"]
        for value in (scores["lpips"]["mean"], scores["lpips"]["high"] or 0)
    )
    heads = ["Precision", "Recipe", "LPIPS", "", "PSNR, dB", *(["Temporal LPIPS"] if clips else [])]
    heads += ["Latency, s", "Weights, GB", "Peak, GB", "Layers"]

    def row(
        first: str, second: str, scores: Mapping[str, Any] | None, costs: Mapping[str, Any] | None, kind: str = ""
    ) -> str:
        cells = [f'<th scope="row">{escape(first)}</th><td class="word">{escape(second)}</td>']
        if scores is None:
            cells.append("<td>reference</td><td></td><td></td>" + "<td></td>" * clips)
        else:
            cells.append(_estimate(scores["lpips"], 4, "no score"))
            cells.append(f"<td>{_bar(scores['lpips'], ruler, top) if scores['lpips'] else ''}</td>")
            cells.append(_estimate(scores["psnr_db"], 1, "equal" if scores["equal"] else "–"))
            cells.append(_estimate(scores["temporal_lpips"], 4) if clips else "")
        cells.append("<td></td>" * 4 if costs is None else _costs(costs))
        return f"<tr{kind}>{''.join(cells)}</tr>"

    body = row(LABELS[REFERENCE], "", None, reference)
    body += row("floor", "bf16, second path", ruler["floor"], None, ' class="ruler"')
    body += "".join(row(LABELS[found["precision"]], found["recipe"], found, found) for found in summary["results"])
    body += row("ceiling", "bf16, other seed", ruler["ceiling"], None, ' class="ruler"')
    return _framed(heads, body, "Distance from bf16")


def _costs(found: Mapping[str, Any]) -> str:
    latency, memory, layers = found["latency_s"], found["memory_gb"], found["layers"]
    if latency is None and found["execution"] == "native":
        seconds = "<td>not timed<small>several devices at once</small></td>"
    elif latency is None:
        seconds = "<td>emulated<small>not comparable</small></td>"
    else:
        seconds = f"<td>{latency['median']:.3f}<small>{latency['p10']:.3f} – {latency['p90']:.3f}</small></td>"
    linears = sum(layers.values())
    return (
        f"{seconds}<td>{memory['weights']:.3f}<small>denoiser {memory['transformer']:.3f}</small></td>"
        f"<td>{memory['peak']:.3f}</td><td>{layers['quantized']} of {linears}</td>"
    )


def _estimate(found: Mapping[str, Any] | None, digits: int, otherwise: str = "–") -> str:
    if found is None:
        return f"<td>{otherwise}</td>"
    ends = "" if found["low"] is None else f"<small>{found['low']:.{digits}f} – {found['high']:.{digits}f}</small>"
    return f"<td>{found['mean']:.{digits}f}{ends}</td>"


def _bar(found: Mapping[str, Any], ruler: Mapping[str, Any], top: float) -> str:
    """A mean and its interval on a line from 0 to `top`, with ticks at floor and ceiling."""
    scale = 150 / top if top else 0
    ticks = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="14" stroke="var(--soft)"><title>{name}</title></line>'
        for name in ("floor", "ceiling")
        if ruler[name]["lpips"]
        for x in [ruler[name]["lpips"]["mean"] * scale]
    )
    spread = ""
    if found["low"] is not None:
        spread = (
            f'<line x1="{found["low"] * scale:.1f}" x2="{found["high"] * scale:.1f}" y1="9" y2="9" '
            'stroke="var(--accent)" stroke-width="5" stroke-linecap="round" opacity=".35"/>'
        )
    return (
        '<svg viewBox="0 0 150 18" aria-hidden="true"><line x1="0" x2="150" y1="9" y2="9" stroke="var(--line)"/>'
        f'{ticks}{spread}<circle cx="{found["mean"] * scale:.1f}" cy="9" r="3.5" fill="var(--accent)"/></svg>'
    )


def _damage(summary: Mapping[str, Any]) -> str:
    """What has no score, and whose values are not numbers."""
    ends = [(f"bf16, {name}", summary["ruler"][name]) for name in ("floor", "ceiling")]
    rows = [(f"{LABELS[row['precision']]} {row['recipe']}", row) for row in summary["results"]]
    said = [
        f"{name}: {NO_SCORE}. This holds for {scores['unscored']} of {summary['prompts']['count']} prompts, which no "
        "mean or interval counts."
        for name, scores in (*rows, *ends)
        if scores["unscored"]
    ]
    said += [
        f"{name}: {row['not_numbers']} outputs have values that are not numbers, shown as 0; do not trust them."
        for name, row in ((LABELS[REFERENCE], summary["reference"]), *rows)
        if row["not_numbers"]
    ]
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in said)


def _quoted(summary: Mapping[str, Any]) -> str:
    """The post's own full-versus-selective table, beside an evaluation of both recipes."""
    if not {"full", "seed"} <= {row["recipe"] for row in summary["results"]}:
        return ""
    post = reference.read()
    body = "".join(
        f'<tr><th scope="row">{LABELS[row["precision"]]}</th><td class="word">'
        f"{'full' if row['quantization'] == 'full' else 'seed (selective)'}</td>"
        f"<td>{row['lpips']:.4f}</td><td>{row['latency_s']:.3f}</td><td>{row['memory_gb']:.2f}</td></tr>"
        for row in post["full_vs_selective_flux.1-dev"]
    )
    return (
        '<h2>Full against selective in the post</h2><p><span class="badge">quoted: NVIDIA B200, FLUX.1-dev</span></p>'
        f'<p class="soft">{escape(post["source"])} {escape(post["latency_note"])} {escape(post["lpips_note"])}</p>'
        + _framed(["Precision", "Recipe", "LPIPS", "Latency, s", "Peak, GB"], body, "Quoted from the post")
    )


def _categories(summary: Mapping[str, Any]) -> str:
    names = list(summary["ruler"]["floor"]["categories"])
    if not names:
        return ""
    columns = [
        ("floor", summary["ruler"]["floor"]),
        *((f"{LABELS[row['precision']]} {row['recipe']}", row) for row in summary["results"]),
        ("ceiling", summary["ruler"]["ceiling"]),
    ]
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{_prompts(columns[0][1]["categories"][name])}</td>'
        + "".join(_estimate(scores["categories"][name]["lpips"], 4) for _, scores in columns)
        + "</tr>"
        for name in names
    )
    heads = ["Category", "Prompts", *(label for label, _ in columns)]
    return "<h2>LPIPS by category</h2>" + _framed(heads, body, "LPIPS by category")


def _prompts(scores: Mapping[str, Any]) -> int:
    return scores["unscored"] + (scores["lpips"]["n"] if scores["lpips"] else 0)


def _pairs(summary: Mapping[str, Any], folder: Path) -> str:
    said = ["<h2>Worst and best pairs</h2><p class='soft'>Left bf16, right quantized, from the same noise.</p>"]
    for row in summary["results"]:
        for kind in ("worst", "best"):
            if row[kind]:
                heading = f"{LABELS[row['precision']]} {row['recipe']}, {kind}"
                figures = "".join(_pair(pair, LABELS[row["precision"]], folder) for pair in row[kind])
                said.append(f'<h3>{escape(heading)}</h3><div class="pairs">{figures}</div>')
    return "".join(said)


def _pair(pair: Mapping[str, Any], name: str, folder: Path) -> str:
    prompt = escape(pair["prompt"])
    sides = "".join(
        f'<img src="{_embedded(folder / file)}" alt="{label}: {prompt}">'
        for file, label in zip(pair["files"], (LABELS[REFERENCE], name), strict=True)
    )
    psnr = "equal" if pair["psnr_db"] is None else f"PSNR {pair['psnr_db']:.1f} dB"
    category = f", {escape(pair['category'])}" if pair["category"] else ""
    return (
        f"<figure><div>{sides}</div><figcaption>{prompt}<br><small>LPIPS {pair['lpips']:.4f}, {psnr}, "
        f"prompt {pair['prompt_id']}{category}</small></figcaption></figure>"
    )


def _embedded(file: Path) -> str:
    """A small copy of a picture, or of a clip's middle frame, as a data URI."""
    picture = _still(file)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    picture.save(encoded, format="WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def _still(file: Path) -> Image.Image:
    if file.suffix != ".mp4":
        with Image.open(file) as picture:
            return picture.convert("RGB")
    import av  # here, so that whoever makes no clips can do without

    with av.open(str(file)) as clip:
        frames = [frame.to_image() for frame in clip.decode(video=0)]
    return frames[len(frames) // 2]


def _facts(summary: Mapping[str, Any]) -> str:
    settings = {label.replace("_", " "): value for label, value in summary["settings"].items()}
    facts = {
        "device": summary["device"],
        "made": summary["created"],
        "weights": f"{summary['weights']['from']} ({summary['weights']['fingerprint']})",
        **settings,
        **summary["versions"],
    }
    ran = "".join(
        f"<details><summary>What really ran: {escape(label)}</summary>{_list(row['ran'])}</details>"
        for label, row in (
            (LABELS[REFERENCE], summary["reference"]),
            *((f"{LABELS[row['precision']]} {row['recipe']}", row) for row in summary["results"]),
        )
    )
    return f"<h2>Settings and versions</h2>{_list(facts)}{ran}"


def _list(facts: Mapping[str, Any]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>' for k, v in facts.items())}</dl>"


def _framed(heads: Sequence[str], body: str, label: str) -> str:
    words = ("Recipe",)
    cells = "".join(
        f'<th scope="col"{" class=word" if head in words else ""}>{escape(head)}</th>' if head else "<td></td>"
        for head in heads
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table><thead><tr>{cells}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )
