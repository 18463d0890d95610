"""HTML of the results: cards with pictures and numbers, the LPIPS ruler, pairs, the table, what really ran.

Pure functions from a `View` to a string. All text that did not originate in this repository is escaped here. The
strings are values of `gr.HTML` with its default template, which inserts a value as it stands; never put them into
an `html_template`, where `${...}` would run as JavaScript.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from itertools import combinations
from pathlib import Path
from urllib.parse import quote

from engine import catalog, reference
from engine.formats import REFERENCE
from engine.machine import FINE, Finding, Support
from engine.outputs.pool import Seen
from engine.request import CompareRequest
from engine.results import SCORES, Comparison, Generation, Ruler
from ui import link as links
from ui import words
from ui.view import Card, View

THEME_JS = """
const paint = (dark) => document.body.classList.toggle('dark', dark);
const kept = localStorage.getItem('twinframe-theme');
if (kept) paint(kept === 'dark');
element.addEventListener('click', (event) => {
  if (!event.target.closest('.tf-theme')) return;
  const dark = !document.body.classList.contains('dark');
  paint(dark);
  localStorage.setItem('twinframe-theme', dark ? 'dark' : 'light');
});
"""


def script(name: str) -> str:
    """The source of ui/<name>.js, which runs in the browser as a component's js_on_load."""
    return (Path(__file__).parents[1] / "static" / f"{name}.js").read_text(encoding="utf-8")


def link(file: str | Path) -> str:
    """Where the browser fetches a file that lies on the shelf (ui/web/served_files.py), relative to the page."""
    return f"gradio_api/file={quote(str(file), safe='/')}"


def header(machine: str, note: str = "", findings: Sequence[Finding] = ()) -> str:
    """
    Args:
        machine: the device, and what it does natively.
        note: what to know of it before anything else, empty if nothing.
        findings: all that was found out of it, which the device's name opens; without any it opens nothing.
    """
    said = f'<p class="tf-note" role="note">{escape(note)}</p>' if note else ""
    device = escape(machine)
    if findings:
        device = (
            f'<button type="button" popovertarget="tf-doctor" title="{words.compare.MACHINE_HINT}">{device}</button>'
            f'<span id="tf-doctor" popover role="group" aria-label="{words.compare.MACHINE}">'
            f"{''.join(map(_finding, findings))}</span>"
        )
    return (
        f'<header class="tf-header"><h1>{words.TITLE}</h1><p class="tf-tagline">{words.TAGLINE}</p>'
        f'<div class="tf-machine">{device}</div>'
        f'<button type="button" class="tf-theme" aria-label="{words.compare.THEME_TOGGLE}"'
        f' title="{words.compare.THEME_TOGGLE}">'
        f"</button>{said}</header>"
    )


def _finding(found: Finding) -> str:
    do = f" <em>{escape(found.do)}</em>" if found.do and found.severity != FINE else ""
    mark = words.compare.SEVERITIES[found.severity]
    return (
        f'<span class="tf-finding" data-severity="{found.severity}"><b>{escape(found.topic)}</b>'
        f'<span><i title="{mark}">{mark}</i> {escape(found.said)}{do}</span></span>'
    )


def purpose() -> str:
    """What the page is for, for whoever sees it for the first time."""
    return f'<p class="tf-purpose">{escape(words.explain.purpose())}</p>'


def known() -> str:
    """Below the prompt: what completes it, and what the model never learnt of it; ui/static/prompt.js fills both in."""
    said = {"never": words.prompt.NEVER, "nothing": words.prompt.NOTHING, "several": words.prompt.SEVERAL}
    told = "".join(f' data-{kind}="{escape(text)}"' for kind, text in said.items())
    models = escape(json.dumps({model: words.prompt.can(model) for model in catalog.BUNDLED}))
    return (
        f'<div class="tf-known" data-models="{models}" data-offered="{words.prompt.OFFERED}"{told}>'
        f'<div id="tf-offered" hidden><ul id="tf-words" role="listbox" aria-label="{words.prompt.LIST}"></ul></div>'
        f'<p class="tf-never" role="status"></p><span class="tf-unseen" role="status"></span></div>'
    )


def about(spec: catalog.ModelSpec) -> str:
    can = words.prompt.can(spec.id)
    said = f"{spec.summary} {can}".strip()
    return f'<p class="tf-small">{escape(said)} Licence: {_outside(spec.licence_url, spec.licence)}.</p>'


def _outside(address: str, text: str) -> str:
    return f'<a href="{escape(address)}" target="_blank" rel="noopener">{escape(text)}</a>'


def stage_keys() -> str:
    """The keys of the stage, and what they do; ui/static/stage.js answers them, and the list as well."""
    keys = "".join(
        f'<button type="button" data-key="{key}"><kbd>{key.upper()}</kbd>{said}</button>'
        for key, said in words.stage.ACTS.items()
    )
    return (
        f'<button type="button" class="tf-ask-keys" data-key="?" aria-label="{words.stage.KEYS}">?</button>'
        f'<div id="tf-keys" popover role="group" aria-label="{words.stage.KEYS}">{keys}</div>'
        f'<p id="tf-lost" role="status" data-said="{words.stage.LOST}"></p>'
    )


def hints(spec: catalog.ModelSpec, support: Mapping[str, Support], weights: str) -> str:
    """What to know before pressing Generate; empty if nothing.

    Args:
        support: how this machine runs each precision; those that it cannot are named with the reason.
        weights: what to know of the model's weights, empty if nothing.
    """
    said = [escape(words.compare.unavailable(p, s.reason)) for p, s in support.items() if s.execution == "unavailable"]
    if spec.licence_note:
        said.append(f"{escape(spec.licence_note)} {_outside(spec.licence_url, spec.licence)}")
    if weights:
        said.append(escape(weights).replace(escape(spec.url), _outside(spec.url, spec.url)))
    return "".join(f'<p class="tf-small">{line}</p>' for line in said)


def notice(text: str) -> str:
    """An error where the eye is; empty for none. The element stays, so that screen readers announce a change."""
    return f'<div role="alert" class="tf-notice">{escape(text)}</div>'


def warming() -> str:
    """The place for how far the preload is, on every tab; ui/static/warming.js asks and fills it in."""
    return (
        '<div class="tf-warming" hidden><span class="tf-pulse" aria-hidden="true"></span>'
        f'<p><span role="status"></span><span class="tf-detail"></span><small>{words.warming.HINT}</small></p>'
        f'<button type="button" aria-label="{words.warming.CLOSE}" title="{words.warming.CLOSE}">×</button></div>'
    )


def headline(view: View) -> str:
    """The verdict, or what is going on; `aria-live` leaves out the step counter, which changes too often."""
    busy = '<span class="tf-pulse" aria-hidden="true"></span>' if view.busy else ""
    detail = f'<span class="tf-detail">{escape(view.detail)}</span>' if view.detail else ""
    kind = "tf-headline" if view.request else "tf-headline tf-welcome"
    return (
        f'<div class="{kind}"{_asked_for(view)}{_made(view)}><p class="tf-verdict">{busy}'
        f'<span aria-live="polite">{_said(view)}</span>'
        f"{detail}</p>{_quotes(view)}{_origin(view)}</div>"
    )


def _said(view: View) -> str:
    """The headline; a verdict sentence by sentence, each with a mark of how far its column is from bf16."""
    if view.comparison is None or view.headline != words.verdict.verdict(view.comparison, view.seen):
        return escape(view.headline)
    return " ".join(
        f"<span{_way(part)}{_why('verdict')}>{escape(said)}</span>"
        for part, said in words.verdict.verdicts(view.comparison, view.seen)
    )


def _way(part: float | None) -> str:
    """Attributes of a sentence with a mark that is filled up to a part, as of a clock's face; of one without, none."""
    return "" if part is None else f' class="tf-way" style="--way:{min(1, part):.1%}"'


def _quotes(view: View) -> str:
    """What the post measured of those columns that are only emulated here."""
    if view.folder is None:
        return ""
    asked, emulated = view.asked, [g.column for g in view.finished if g.execution == "emulated"]
    found = {words.name(asked, column): reference.quote(asked, asked.column(column)) for column in emulated}
    said = "; ".join(words.verdict.quoted(name, row["speedup"], row["saving"]) for name, row in found.items() if row)
    if not said:
        return ""
    return (
        f'<p class="tf-small">{_badge("quoted", words.QUOTED_BADGE, "tf-quoted")} '
        f"{words.verdict.QUOTED_HERE} {said}.</p>"
    )


def home(address: str) -> str:
    """What tells ui/static/address.js how the page's address names what it shows at first."""
    return f'<span data-home="{escape(address)}" hidden></span>'


def stale() -> str:
    """The place where ui/static/address.js says that the pictures are of something else than the form asks for."""
    said = "".join(f' data-{kind}="{escape(text)}"' for kind, text in words.compare.STALE.items())
    return f'<p id="tf-stale" role="status"{said} hidden><b></b> <span></span></p>'


def _asked_for(view: View) -> str:
    """Attributes by which ui/static/address.js sees whether the form asks for what is shown, and what brings it
    back."""
    if view.request is None:
        return ""
    asked = escape(json.dumps(view.request.to_json()))
    flags = "".join(f" data-{name}" for name in ("busy", "foreign") if getattr(view, name))
    return f' data-asked="{asked}" data-address="{escape(view.address)}"{flags}'


def _made(view: View) -> str:
    """Attributes from which ui/static/history.js remembers a comparison that was made here."""
    if view.folder is None or view.recorded or (made := view.comparison) is None:
        return ""
    pair = (made.reference, farthest(made))
    files = json.dumps([link(g.files[0]) for g in pair])
    return (
        f' data-made="{escape(view.created)}" data-query="{escape(f"{links.query(view.asked)}&{view.address}")}"'
        f' data-words="{escape(words.gallery.tile(made))}" data-files="{escape(files)}"'
    )


def _origin(view: View) -> str:
    """Which request the pictures belong to, and whether they were made here or recorded earlier."""
    asked = view.request
    if asked is None:
        return ""
    model = catalog.model(asked.model).name
    badge = _badge("recorded", "recorded", "tf-recorded") if view.recorded else ""
    where = f"{escape(view.device)}, {words.when(view.created)}" if view.recorded else escape(view.device)
    download, name = "", words.post.file_name(asked)
    if view.folder is not None:
        download = f' · <a href="{link(view.folder / "comparison.json")}" download="{name}.json">comparison.json</a>'
    if view.folder is not None and view.comparison is not None:
        table = f"data:text/csv;charset=utf-8,{quote(view.comparison.to_csv())}"
        download += f' · <a href="{table}" download="{name}.csv">CSV</a>{_post(view)}'
    copy = (
        f' · <button type="button" class="tf-copy" data-copy="{escape(links.query(asked))}"'
        f' title="{words.compare.LINK_HINT}">{words.compare.LINK}</button>'
    )
    return (
        f'<p class="tf-origin">{badge}<q>{escape(asked.prompt)}</q>'
        f" {escape(words.compare.settings(asked, model))} · {where}"
        f'<span class="tf-links">{download}{copy}</span></p>'
    )


def _post(view: View) -> str:
    """The button that makes one file to post; ui/static/post.js draws it from what is told here. Empty until something
    is finished."""
    asked, made = view.asked, view.comparison
    if made is None:
        return ""
    told = {
        "prompt": asked.prompt,
        "verdict": view.headline,
        "columns": words.post.columns(made),
        "settings": words.compare.settings(asked, catalog.model(asked.model).name),
        "query": links.query(asked),
        "file": words.post.file_name(asked),
    }
    return (
        f' · <button type="button" class="tf-copy tf-post" data-post="{escape(json.dumps(told))}"'
        f' data-making="{words.post.MAKING}" data-failed="{words.post.FAILED}"'
        f' title="{words.post.POST_HINT}">{words.post.POST}</button>'
    )


def net(view: View, asked: CompareRequest) -> str:
    """A recorded run, ready in the browser for when the connection is lost in the middle of another one."""
    said = words.stage.lost(asked, view.asked)
    shown = "".join(_card(view, card) for card in view.cards)
    return (
        f'<p class="tf-verdict">{escape(said)}</p>{_origin(view)}'
        f'<div class="tf-stage" style="--n:{len(view.cards)};{_shape(view.asked)}">{shown}</div>'
    )


def views() -> str:
    """The switch between the views of the same results, of which ui/css shows the chosen one, and the zoom."""
    names = ("side", "slider", "flicker", "difference", "table")
    said = (
        words.compare.SIDE,
        words.compare.SLIDER,
        words.compare.FLICKER,
        words.compare.DIFFERENCE,
        words.compare.TABLE,
    )
    acts = (
        ("play", words.compare.PLAY_PAUSE, words.PLAYER_HINT),
        ("out", "−", words.compare.ZOOM_OUT),
        (
            "reset",
            f'<span class="tf-zoomed">1×</span><span class="tf-unseen"> {words.compare.ZOOM_RESET}</span>',
            words.compare.ZOOM_RESET,
        ),
        ("in", "+", words.compare.ZOOM_IN),
        ("worst", words.compare.TO_WORST, words.compare.TO_WORST_HINT),
    )
    return (
        f'<div class="tf-bar">{_choices("tf-view", words.compare.VIEW_LABEL, list(zip(names, said, strict=True)))}'
        f'<div class="tf-zoom" role="group" aria-label="{words.compare.ZOOM}" title="{words.compare.ZOOM_HINT}">'
        f"{''.join(_act(*act) for act in acts)}"
        f'<button type="button" class="tf-act" data-key="p" title="{words.stage.STAGE_HINT}">{words.stage.STAGE}'
        "</button></div></div>"
        f'<div id="tf-note" popover role="status" data-formats="{escape(json.dumps(words.explain.formats()))}"'
        f' data-recipes="{escape(json.dumps(words.explain.RECIPES))}"'
        f' data-options="{escape(json.dumps(words.explain.OPTIONS))}"></div>'
        f'<span id="tf-said" role="status" data-copied="{words.compare.COPIED}"'
        f' data-failed="{words.compare.NOT_COPIED}"></span>'
    )


def _act(act: str, shown: str, hint: str) -> str:
    """A button that ui/static/viewer.js answers."""
    label = f' aria-label="{hint}"' if len(shown) == 1 else ""  # a sign is no name
    return f'<button type="button" class="tf-act" data-act="{act}" title="{hint}"{label}>{shown}</button>'


def stage(view: View) -> str:
    """All cards side by side; those of clips with one player for all."""
    if not view.cards:
        return ""
    moving = _moving(view.asked)
    cards = "".join(_card(view, card) for card in view.cards)
    controls = _transport(view, view.finished, "side") if moving else ""
    grid = f'<div class="tf-stage" style="--n:{len(view.cards)};{_shape(view.asked)}">{cards}{controls}</div>'
    return _player(view.asked, grid) if moving else grid


def _shape(asked: CompareRequest) -> str:
    """Width over height, for what has to fit a screen."""
    return f"--shape:{asked.width / asked.height:.3f}"


def _card(view: View, card: Card) -> str:
    asked, made = view.asked, card.generation
    if made is None:
        title = _title(asked, card.column, None)
        return f'<figure class="tf-card">{_blank(asked, card)}<figcaption>{title}</figcaption></figure>'
    return (
        f'<figure class="tf-card">{_pictures(asked, made)}<figcaption>{_title(asked, made.column, made)}'
        f"{_numbers(view, made)}{_downloads(view, made)}</figcaption></figure>"
    )


def _title(asked: CompareRequest, column: str, made: Generation | None) -> str:
    role = '<span class="tf-role">the reference</span>' if column == REFERENCE else ""
    by = asked.column(column)
    why = words.WHY["fp8 attention"] if by.fp8_attention else made.disproof if made else ""
    badge = _badge(made.execution, made.execution, why=why) if made else ""
    if made and made.is_streamed:
        badge = _badge(made.execution, f"{made.execution}, streamed", why=why or words.WHY["streamed"])
    said = escape(words.explain.column(by))
    name = _asked(escape(words.name(asked, column)))
    return f'<div class="tf-title"><h2 data-why title="{said}">{name}</h2>{role}{badge}</div>'


def _badge(kind: str, text: str, style: str = "", why: str = "") -> str:
    """A badge that says what it means, or why it is there, where it is hovered, pressed or focused."""
    return (
        f'<button type="button" class="{f"tf-badge {style}".rstrip()}"'
        f' title="{escape(why or words.explain.BADGES[kind])}" data-why>{escape(text)}</button>'
    )


def _blank(asked: CompareRequest, card: Card) -> str:
    """The place of a picture that is not there yet."""
    bar, name = "", words.name(asked, card.column)
    if card.progress is not None:
        bar = f'<progress max="1" value="{card.progress:.3f}" aria-label="{escape(name)}"></progress>'
    shape, note = f"aspect-ratio:{asked.width}/{asked.height}", card.note or "waiting"
    preview = ""
    if card.preview is not None:
        packed = base64.b64encode(card.preview).decode()
        alt = escape(words.compare.preview_alt(name, note))
        preview = f'<img class="tf-preview" src="data:image/jpeg;base64,{packed}" alt="{alt}">'
    return f'<div class="tf-blank" style="{shape}">{preview}<span>{escape(note)}</span>{bar}</div>'


def _pictures(asked: CompareRequest, made: Generation) -> str:
    if _moving(asked):
        return f'<div class="tf-clips">{_frame(asked, made, _clips(asked, made))}{_corner(asked, made)}</div>'
    pictures = "".join(_frame(asked, made, _img(asked, made, index)) for index in range(len(made.files)))
    return f'<div class="tf-pictures{" tf-many" if len(made.files) > 1 else ""}">{pictures}</div>'


def _frame(asked: CompareRequest, made: Generation, content: str) -> str:
    """What ui/static/viewer.js zooms, together with all others."""
    label = escape(words.compare.frame_label(words.name(asked, made.column)))
    return (
        f'<div class="tf-frame" tabindex="0" role="group" aria-label="{label}">'
        f'<div class="tf-move">{content}</div></div>'
    )


def _img(asked: CompareRequest, made: Generation, index: int) -> str:
    return (
        f'<img src="{link(made.files[index])}" alt="{escape(words.compare.alt(made.column, asked, index))}"'
        f' width="{asked.width}" height="{asked.height}">'
    )


def _numbers(view: View, made: Generation) -> str:
    """Latency, memory and LPIPS of one column."""
    comparison = view.comparison
    is_reference = made.column == REFERENCE
    speedup = comparison.speedup(made) if comparison and not is_reference else None
    compared = None if is_reference else comparison
    weights = words.change(words.verdict.weights_saving(compared, made)) if compared else ""
    native = made.execution == "native"
    peak = words.change(compared.memory_saving(made)) if compared and native else ""
    if made.latency_comparable:
        took = (words.seconds(made.latency.total), "s")
        latency = _stat("Latency", "latency", took, words.factor(speedup) if speedup else "")
        stages = f'<p class="tf-stages" title="{words.WHY["stages"]}">{words.stages(made)}</p>'
    else:
        run = "previews" if view.asked.previews else "shared" if made.at_once else "compiled"
        why = "streamed" if made.is_streamed else run
        latency = _absent("Latency", why, words.NOT_TIMED_SHORT) if native else ""
        stages = f'<p class="tf-stages">{escape(words.compare.no_latency_note(made, view.asked))}</p>'
    if native:
        peak = _stat("Peak memory", "peak", words.size(made.memory.peak), peak)
    else:
        why = "disproved" if made.disproof else "emulated"
        why = "fp8 attention" if view.asked.column(made.column).fp8_attention else why
        peak = _absent("Latency, peak memory", why, words.NOT_COMPARABLE, wide=True)
    weights = _stat("Weights", "weights", words.size(made.memory.weights), weights)
    return f'<dl class="tf-stats">{latency}{peak}{weights}</dl>{stages}{_prompted(made)}{_lpips(view, made)}'


def _prompted(made: Generation) -> str:
    """Scores that know the prompt, of the reference too."""
    found = "".join(
        _stat(SCORES[name].capitalize(), name, (words.share(score), "%"), "")
        for name in made.scores
        if (score := made.mean_score(name)) is not None
    )
    return f'<dl class="tf-stats">{found}</dl>' if found else ""


def _stat(label: str, why: str, value: tuple[str, str], beside: str) -> str:
    number, unit = value
    note = f' <span class="tf-beside">{beside}</span>' if beside else ""
    return f"<div{_why(why)}><dt>{_asked(label)}</dt><dd>{number}<small>{unit}</small>{note}</dd></div>"


def _why(key: str) -> str:
    """Attributes of what is explained: in a tooltip, and by ui/static/toolbar.js where it is tapped or its label
    pressed."""
    return f' data-why title="{escape(words.WHY[key])}"'


def _asked(label: str) -> str:
    return f'<button type="button" class="tf-why">{label}</button>'


def _absent(label: str, why: str, said: str, *, wide: bool = False) -> str:
    """What stands in the place of a number, or if wide of two, that a run cannot give."""
    kind = ' class="tf-wide"' if wide else ""
    return f'<div{kind}{_why(why)}><dt>{_asked(label)}</dt><dd class="tf-absent">{said}</dd></div>'


def _lpips(view: View, made: Generation) -> str:
    asked = view.asked
    if made.column == REFERENCE:
        return f'<p class="tf-reference tf-small">{words.compare.reference_note(asked)}</p>'
    value, lost = words.verdict.mean_lpips(made), words.verdict.damage(made)
    if value is None:
        waiting = words.compare.MEASURING_LPIPS if view.folder is None else words.compare.NO_REFERENCE
        return f'<p class="tf-reference tf-small">{escape(lost.capitalize() or waiting)}</p>'
    unscored = made.metrics.unscored if made.metrics else 0
    several = f" of {len(made.files) - unscored}" if len(made.files) > 1 else ""
    mean = f" <small>mean{several}</small>" if several or _moving(asked) else ""
    beside = f'<p class="tf-reading">{escape(lost)}</p>' if lost else ""
    return (
        f'<div class="tf-lpips"><dl class="tf-stats"><div{_why("lpips")}><dt>{_asked("LPIPS")}</dt>'
        f"<dd>{words.score(value)}{mean}</dd></div></dl>"
        f"{_ruler(value, view.ruler, view.seen)}{beside}</div>"
    )


def _ruler(value: float, ruler: Ruler | None, seen: Seen) -> str:
    """A score between the noise floor and another seed; the scale ends a little beyond the larger of the two."""
    said = escape(words.verdict.on_the_ruler(value, ruler, seen))
    if ruler is None:
        return f'<p class="tf-reading">{said}</p>'
    end = 1.12 * max(ruler.ceiling, value, 1e-9)

    def at(x: float) -> str:
        return f"{100 * x / end:.2f}%"

    title = escape(f"Noise floor {words.score(ruler.floor)}, another seed {words.score(ruler.ceiling)}. {ruler.note}")
    return (
        f'<div class="tf-ruler" role="img" aria-label="LPIPS {words.score(value)}: {said}" title="{title}">'
        f'<span class="tf-scale"></span>'
        f'<span class="tf-tick" style="left:{at(ruler.floor)}"></span>'
        f'<span class="tf-tick" style="left:{at(ruler.ceiling)}"></span>'
        f'<span class="tf-dot" style="left:{at(value)}"></span>'
        f'<span class="tf-end tf-floor">bf16 noise {words.score(ruler.floor)}</span>'
        # Ends at its tick, but never so far left that it runs into the other label, nor beyond the scale.
        f'<span class="tf-end tf-ceiling" style="right:calc(100% - max({at(ruler.ceiling)}, min(225px, 100%)))">'
        f"another seed {words.score(ruler.ceiling)}</span></div>"
        f'<p class="tf-reading">{said}</p>'
    )


def _downloads(view: View, made: Generation) -> str:
    kind = Path(made.files[0]).suffix.lstrip(".").upper()
    labels = [kind] if len(made.files) == 1 else [f"{kind} {index + 1}" for index in range(len(made.files))]
    files = " ".join(
        f'<a href="{link(file)}" download="{words.post.file_name(view.asked, Path(file).stem)}{Path(file).suffix}">'
        f"{label}</a>"
        for label, file in zip(labels, made.files, strict=True)
    )
    code = ""
    if made.column in view.programs:
        target = f"tf-program-{made.column}"
        code = f' <button type="button" class="tf-copy" data-copy-from="{target}">{words.compare.CODE}</button>'
    return f'<p class="tf-downloads">Download {files}{code}</p>'


def farthest(made: Comparison) -> Generation:
    """The column that is farthest from the reference, or that itself if there is no other."""
    others = [g for g in made.results if g.column != REFERENCE]
    return max(others, key=lambda g: words.verdict.mean_lpips(g) or 0.0, default=made.results[0])


def pairs(view: View) -> str:
    """Any column under any later one: split where the visitor drags, one or the other, or where they differ. bf16 and
    what is farthest from it are shown first.

    A range input makes the split work by keyboard; ui/static/viewer.js does the rest.
    """
    made = view.finished
    if len(made) < 2 or view.comparison is None:
        return f'<p class="tf-empty">{words.compare.pair_empty(view.request)}</p>'
    asked = view.asked
    first = (view.comparison.reference, farthest(view.comparison))
    count = len(first[0].files)
    names = [(g.column, words.name(asked, g.column)) for g in made]
    below, above = words.compare.PAIR_LABELS
    choices = _choices("tf-below", below, names[:-1]) + _choices("tf-above", above, names[1:], first[1].column)
    if count > 1:
        choices += _choices("tf-picture", words.thing(asked).capitalize(), _numbered(count))
    if any(g.lpips_maps for g in made):
        kinds = _choices("tf-kind", words.compare.MAP_LABEL, list(words.compare.MAPS.items()))
        choices += f'<div data-for="difference">{kinds}</div>'
    figures = "".join(
        _pair(view, *pair, index, hidden=(pair, index) != (first, 0))
        for pair in combinations(made, 2)
        for index in range(count)
    )
    choices += _act("flip", words.compare.FLIP, words.compare.FLIP_HINT)
    shape = _shape(view.asked)
    return f'<div class="tf-overlay" style="{shape}"><div class="tf-choices">{choices}</div>{figures}</div>'


def _choices(name: str, label: str, choices: Sequence[tuple[str, str]], chosen: str | None = None) -> str:
    """Radio buttons; the first is chosen by default."""
    chosen = choices[0][0] if chosen is None else chosen
    radios = "".join(
        f'<label><input type="radio" name="{name}" value="{value}"{" checked" * (value == chosen)}>{text}</label>'
        for value, text in choices
    )
    return f'<fieldset class="tf-segments"><legend>{label}</legend>{radios}</fieldset>'


def _pair(view: View, below: Generation, above: Generation, index: int, *, hidden: bool) -> str:
    asked = view.asked
    one, other = (escape(words.name(asked, g.column)) for g in (below, above))
    numbers = "".join(f"{_title(asked, g.column, g)}{_numbers(view, g)}" for g in (below, above))
    draw = _clip if _moving(asked) else _img
    layers = (
        '<div class="tf-frame tf-layers" tabindex="0" role="group"'
        f' aria-label="{words.compare.frame_label(other)}">'
        f'<div class="tf-layer"><div class="tf-move">{draw(asked, below, index)}</div></div>'
        f'<div class="tf-layer tf-above"><div class="tf-move">{draw(asked, above, index)}</div></div>'
        f'<div class="tf-layer tf-heat"><div class="tf-move"><canvas class="tf-map" role="img"'
        f' width="{asked.width}" height="{asked.height}"{_lpips_map(above, index) if below.column == REFERENCE else ""}'
        f' aria-label="Difference between {one} and {other}"></canvas>'
        '<span class="tf-spot"></span></div></div>'
        f'{_corner(asked, below)}<span class="tf-corner tf-right">{other}</span>'
        '<input type="range" class="tf-split" min="0" max="100" value="50"'
        f' aria-label="Split between {one} and {other}">'
        "</div>"
    )
    hints = "".join(
        f'<p class="tf-small" data-for="{mode}">{hint}</p>' for mode, hint in words.compare.pair_hints(asked).items()
    ) + "".join(
        f'<p class="tf-small" data-for="difference" data-kind="{kind}">{hint}</p>'
        for kind, hint in words.compare.map_hints(asked).items()
    )
    if _moving(asked):
        controls = _transport(view, (below, above), f"{below.column}-{above.column}-{index}", index)
        layers = _player(asked, layers + controls, index)
    return (
        f'<figure class="tf-pair" data-pair="{below.column}/{above.column}/{index}"{" hidden" if hidden else ""}>'
        f"<div>{layers}{hints}</div><figcaption>{_closer(asked, one, other)}{numbers}</figcaption></figure>"
    )


def _lpips_map(made: Generation, index: int) -> str:
    """Attributes by which ui/static/viewer.js finds the LPIPS map of a picture or clip, and its score, a frame each."""
    found, metrics = made.lpips_maps[index] if made.lpips_maps else None, made.metrics
    if found is None or metrics is None:
        return ""
    scores = metrics.lpips_frames[index] if metrics.lpips_frames else (metrics.lpips[index],)
    said = ",".join(f"{score:.5f}" for score in scores or ())
    return f' data-lpips="{link(found.file)}" data-top="{found.top:.5f}" data-scores="[{said}]"'


def _closer(asked: CompareRequest, one: str, other: str) -> str:
    """The worst spot of two pictures side by side, magnified, and the colour scale of their difference."""
    crops = "".join(
        f'<div><canvas class="tf-crop" role="img" aria-label="{which}, the worst spot magnified"></canvas>'
        f'<span class="tf-corner">{which}</span></div>'
        for which in (one, other)
    )
    live = "off" if _moving(asked) else "polite"  # a clip that plays changes it all the time
    said = "".join(f' data-{kind}="{text}"' for kind, text in words.compare.worst(asked, one, other).items())
    legends = "".join(
        f'<p class="tf-colours" data-kind="{kind}"><span>0</span><i></i><span>{end}</span></p>'
        for kind, end in words.compare.MAP_ENDS.items()
    )
    return (
        f'<div class="tf-closer" data-for="difference"><div class="tf-crops">{crops}</div>'
        f'<p class="tf-small tf-worst" aria-live="{live}"{said}></p>{legends}</div>'
    )


def _corner(asked: CompareRequest, made: Generation) -> str:
    return f'<span class="tf-corner">{escape(words.name(asked, made.column))}</span>'


def _moving(asked: CompareRequest) -> bool:
    return asked.num_frames > 1


def _numbered(count: int) -> list[tuple[str, str]]:
    return [(str(index), str(index + 1)) for index in range(count)]


def _clips(asked: CompareRequest, made: Generation) -> str:
    return "".join(_clip(asked, made, index, hidden=index > 0) for index in range(len(made.files)))


def _clip(asked: CompareRequest, made: Generation, index: int, *, hidden: bool = False) -> str:
    """One clip, silent and still until ui/static/player.js plays it."""
    return (
        f'<video src="{link(made.files[index])}" aria-label="{escape(words.compare.alt(made.column, asked, index))}"'
        f' width="{asked.width}" height="{asked.height}" data-column="{made.column}" data-clip="{index}"'
        f' preload="none" muted playsinline{" hidden" if hidden else ""}></video>'
    )


def _player(asked: CompareRequest, content: str, clip: int = 0) -> str:
    """What ui/static/player.js plays together: clips and one transport. `clip` is the one of the batch that is shown
    first."""
    rate = catalog.model(asked.model).defaults.frame_rate
    return (
        f'<div class="tf-player" role="group" aria-label="{words.PLAYER}" data-frames="{asked.num_frames}"'
        f' data-rate="{rate:g}" data-clip="{clip}">{content}</div>'
    )


def _transport(view: View, made: Sequence[Generation], key: str, only: int | None = None) -> str:
    """The controls of a player: LPIPS over the frames, play, seek, which clip, whose sound.

    `key` keeps the radio buttons of several players apart; `only` is the clip of the batch that all of them show,
    None if it can be chosen.
    """
    if not made:
        return ""
    asked = view.asked
    spec = catalog.model(asked.model)
    names = [(g.column, words.name(asked, g.column)) for g in made]
    choices = ""
    if only is None and asked.batch_size > 1:
        clips = _choices(f"tf-clip-{key}", words.thing(asked).capitalize(), _numbered(asked.batch_size))
        choices += f'<div class="tf-clip">{clips}</div>'
    if spec.sound:
        sound = _choices(f"tf-sound-{key}", words.compare.SOUND_LABEL, [*names, ("off", words.compare.SILENCE)])
        choices += f'<div class="tf-sound">{sound}</div>'
    scored = [g for g in made if g.metrics and g.metrics.lpips_frames]
    curve = _curve(asked, scored, range(asked.batch_size), only)
    return (
        f'<div class="tf-transport">{curve}'
        f'<button type="button" class="tf-play" aria-label="{words.PLAY}" title="{words.PLAYER_HINT}"></button>'
        f'<input type="range" class="tf-seek" min="0" max="{asked.num_frames - 1}" value="0"'
        f' aria-label="{words.SEEK}"><output class="tf-time" aria-live="off"></output>'
        f'<div class="tf-choices">{choices}</div></div>'
    )


def _curve(asked: CompareRequest, made: Sequence[Generation], clips: Sequence[int], only: int | None) -> str:
    """LPIPS over the frames, a line a column, above the seek bar; ui/static/player.js fills in the values it points
    at."""
    if not made:
        return ""
    known = [values for g in made for values in _frames(g) if values is not None]
    if not known:
        return ""
    top = max(max(values) for values in known) or 1.0
    shown = clips if only is None else [only]
    plots = "".join(
        f'<svg data-clip="{index}" viewBox="0 0 {len(known[0]) - 1} 100"'
        f' preserveAspectRatio="none" aria-hidden="true"{" hidden" if index != shown[0] else ""}>'
        f"{''.join(_line(g, index, top) for g in made)}</svg>"
        for index in shown
    )
    values = "".join(
        f'<span class="tf-value"{_drawn_as(g)}>{escape(words.name(asked, g.column))} <b></b></span>' for g in made
    )
    return (
        f'<p class="tf-legend">{words.compare.CURVE} <span class="tf-told"></span>{values}</p>'
        f'<div class="tf-plot" role="img" aria-label="{words.compare.CURVE}">'
        f'<span class="tf-top">{words.score(top)}</span>{plots}</div>'
    )


def _drawn_as(made: Generation) -> str:
    """Attributes of a line: the format gives its colour, and a recipe that the column names dashes."""
    own = " data-own" if made.column != made.precision else ""
    return f' data-precision="{made.precision}" data-column="{made.column}"{own}'


def _frames(made: Generation) -> tuple[tuple[float, ...] | None, ...]:
    """LPIPS of each frame of each clip."""
    return (made.metrics and made.metrics.lpips_frames) or ()


def _line(made: Generation, index: int, top: float) -> str:
    values = _frames(made)[index]
    if values is None:
        return ""
    points = " ".join(f"{frame},{100 - 96 * value / top:.2f}" for frame, value in enumerate(values))
    return (
        f'<polyline{_drawn_as(made)} points="{points}" data-values="[{",".join(f"{value:.5f}" for value in values)}]"/>'
    )


def table(view: View) -> str:
    """Every number of the finished columns; the emulated ones' latency and peak are not among them."""
    if not view.finished:
        return f'<p class="tf-empty">{words.compare.table_empty(view.request)}</p>'
    named = [name for name in SCORES if any(name in made.scores for made in view.finished)]
    rows = "".join(_row(view, g, named) for g in view.finished)
    scores = (SCORES[name].capitalize() for name in named)
    heads = ("Text", "Denoise", "Decode", "Total", "Speedup", "Weights", "Peak", "LPIPS", "PSNR", *scores)
    units = ("s", "s", "s", "s", "", "", "", "", "dB", *("%" for _ in named))
    whys = ("stages", "stages", "stages", "latency", "speedup", "weights", "peak", "lpips", "psnr", *named)
    cells = "".join(
        f'<th scope="col"{_why(why)}>{_asked(h)}{f" <small>{u}</small>" if u else ""}</th>'
        for h, u, why in zip(heads, units, whys, strict=True)
    )
    return (
        '<div class="tf-scroll" tabindex="0" role="region" aria-label="Table of results"><table class="tf-table">'
        f'<thead><tr><th scope="col">Precision</th><th scope="col">Ran</th>{cells}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{_licence(view)}"
    )


def _licence(view: View) -> str:
    """Beside what was made: whoever takes it along has to know what its model's licence forbids."""
    spec = catalog.model(view.asked.model)
    if not spec.licence_note:
        return ""
    return f'<p class="tf-small">{escape(spec.licence_note)} {_outside(spec.licence_url, spec.licence)}</p>'


def _row(view: View, made: Generation, named: Sequence[str]) -> str:
    comparison = view.comparison
    t = made.latency
    if made.latency_comparable:
        speedup = comparison.speedup(made) if comparison and made.column != REFERENCE else None
        times = [words.seconds(v) for v in (t.text, t.denoise, t.decode, t.total)]
        times.append(words.factor(speedup) if speedup else "–")
        latency = "".join(f"<td>{v}</td>" for v in times)
    else:
        latency = f'<td colspan="5" class="tf-absent">{words.no_latency(made, view.asked)}</td>'
    peak = " ".join(words.size(made.memory.peak)) if made.execution == "native" else "–"
    lpips = words.verdict.mean_lpips(made)
    psnr = words.psnr(made.metrics.mean_psnr_db if made.metrics else None)
    lost = words.verdict.damage(made)
    said = "–" if lpips is None else words.score(lpips)
    score = f'<td title="{escape(lost)}">{said} <small>{escape(lost)}</small></td>' if lost else f"<td>{said}</td>"
    weights = " ".join(words.size(made.memory.weights))
    found = [made.mean_score(name) for name in named]
    prompted = "".join(f"<td>{'–' if share is None else words.share(share)}</td>" for share in found)
    cells = f"<td>{weights}</td><td>{peak}</td>{score}<td>{psnr}</td>{prompted}"
    name = escape(words.name(view.asked, made.column))
    return f'<tr><th scope="row">{name}</th><td class="tf-word">{escape(made.execution)}</td>{latency}{cells}</tr>'


def ran(view: View) -> str:
    """What really ran, side by side; what is the same for all is said once."""
    made = view.finished
    if not made:
        return ""
    facts = [_facts(g, view.asked) for g in made]
    labels = dict.fromkeys(label for each in facts for label in each)
    rows = "".join(_fact(label, [each.get(label, "–") for each in facts]) for label in labels)
    head = "".join(f'<th scope="col">{escape(words.name(view.asked, g.column))}</th>' for g in made)
    if view.versions:
        rows += _fact("Versions", [", ".join(f"{name} {v}" for name, v in view.versions.items())] * len(made))
    ruler = f'<p class="tf-small">LPIPS scale: {escape(view.ruler.note)}</p>' if view.ruler else ""
    return (
        f'<details class="tf-ran"><summary>{words.compare.RAN}</summary>'
        f'<div class="tf-scroll" tabindex="0" role="region" aria-label="{words.compare.RAN}"><table class="tf-facts">'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table></div>{ruler}</details>"
    )


def programs(view: View) -> str:
    """The code of the comparison, a program a column."""
    if not view.programs:
        return ""
    each = "".join(
        f'<section><h2>{escape(words.name(view.asked, column))} <button type="button" class="tf-copy"'
        f' data-copy-from="tf-program-{column}">{words.compare.CODE_COPY}</button></h2>'
        f'<pre id="tf-program-{column}" tabindex="0">{escape(program)}</pre></section>'
        for column, program in view.programs.items()
    )
    return (
        f'<details class="tf-ran tf-programs"><summary>{words.compare.CODE_SUMMARY}</summary>'
        f'<p class="tf-small">{words.compare.CODE_NOTE}</p>{each}</details>'
    )


def _facts(made: Generation, asked: CompareRequest) -> dict[str, str]:
    """Label -> words: the numbers first, then what the engine tells, which wins over ours of the same label."""
    ours = {
        "Execution": made.execution,
        "Linear layers": _layers(made),
        "Denoiser's weights": " ".join(words.size(made.memory.transformer)),
        "Measured time": _measured(made, asked),
        "Memory at the peak": _peak(made),
    }
    return ours | dict(made.ran)


def _fact(label: str, values: Sequence[str]) -> str:
    if len(set(values)) == 1:
        cells = f'<td colspan="{len(values)}">{escape(values[0])}</td>'
    else:
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
    return f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>'


def _layers(made: Generation) -> str:
    layers = made.layers
    if made.precision == REFERENCE:
        return "all in bf16"
    said = f"{layers.quantized} quantized, {layers.skipped} kept in bf16 by the recipe"
    return said + (f", {layers.left} left in bf16 because the format cannot take their shape" if layers.left else "")


def _measured(made: Generation, asked: CompareRequest) -> str:
    said = f"{words.seconds(made.latency.total)} s ({words.stages(made)})"
    return said if made.latency_comparable else f"{said}, {words.no_latency(made, asked)}"


def _peak(made: Generation) -> str:
    said = " ".join(words.size(made.memory.peak))
    return said if made.execution == "native" else f"{said}, {words.NOT_COMPARABLE}"
