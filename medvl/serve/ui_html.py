"""HTML of what the service answers. `tag` escapes every text that is put into it: a model's answer is never HTML."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NOTICE = "Research use only, not for diagnosis."
_STATUS = {  # of a value: colour, meaning
    "verified": ("#15803d", "stands on the page, with its name"),
    "same": ("#4d7c0f", "stands on the page, with its name, in another spelling"),
    "elsewhere": ("#b45309", "stands on the page, not with this name"),
    "similar": ("#1d4ed8", "only letters that look alike"),
    "missing": ("#b91c1c", "on no page"),
    "printed": ("#0f766e", "stands on the page; a schema of your own does not say what it is of"),
}
_UNKNOWN = ("#57534e", "pages were not read")
_ROWS = 200  # of a table of results that are shown

CSS = """
.gradio-container {max-width: 1500px !important}
footer {display: none !important}
.mv table, .mv tr {border: 0 !important}
.mv table {border-collapse: collapse; width: 100%; font-size: 13px; margin: 4px 0 10px}
.mv th, .mv td {text-align: left; padding: 3px 8px; border: 0; border-bottom: 1px solid #d6d3d1; vertical-align: top;
  overflow-wrap: break-word; max-width: 420px}
.mv .scroll th, .mv .scroll td {padding: 3px 5px}
.mv .scroll td:nth-child(4) {overflow-wrap: anywhere; min-width: 110px}
.mv th {font-weight: 600}
.mv pre {white-space: pre-wrap; overflow-wrap: anywhere; max-height: 480px; overflow: auto; font-size: 12px;
  background: #f5f5f4; color: #1c1917; padding: 8px; border-radius: 6px}
.mv p {margin: 4px 0}
.mv h3 {margin: 12px 0 4px}
.mv .notice {background: #fef3c7; color: #78350f; padding: 6px 12px; border-radius: 6px; font-weight: 600}
.mv .fault {background: #fee2e2; color: #7f1d1d; padding: 8px 12px; border-radius: 6px}
.mv .scroll {max-height: 860px; overflow: auto; border: 1px solid #d6d3d1; border-radius: 6px}
.mv .page {position: relative; margin: 6px}
.mv .page img, .mv .page svg {display: block; width: 100%}
.mv .page svg {position: absolute; top: 0; left: 0; height: 100%}
.mv .bar {background: #e7e5e4; height: 12px; min-width: 220px; border-radius: 3px; position: relative}
.mv .bar i {display: block; height: 100%; background: #0f766e; border-radius: 3px}
.mv .bar b {position: absolute; top: -2px; height: 16px; width: 2px; background: #b91c1c}
.mv .mark {display: inline-block; padding: 0 6px; border-radius: 4px; color: white}
.mv .pictures {display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 6px}
.mv .pictures img {width: 100%}
.mv .turn {border-left: 3px solid #0f766e; padding: 2px 10px; margin: 8px 0; white-space: pre-wrap}
.mv .user {border-color: #a8a29e; font-weight: 600}
.mv .turn img {max-width: 420px; display: block}
"""


class Html(str):
    """Text that is HTML already."""


def tag(name: str, *parts: Any, **attributes: Any) -> Html:
    """An element. Whatever is not `Html` is escaped; `stroke_width=1` is the attribute stroke-width, `kind` the class."""
    attributes["class"] = attributes.pop("kind", "")
    given = "".join(
        f' {key.replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value != ""
    )
    return Html(f"<{name}{given}>{''.join(map(_text, parts))}</{name}>")


def _text(value: Any) -> str:
    if isinstance(value, Html):
        return value
    if isinstance(value, float):
        value = f"{value:.4g}"
    elif isinstance(value, dict | list):
        value = json.dumps(value, ensure_ascii=False)
    return html.escape("" if value is None else str(value))


def block(*parts: Any) -> Html:
    """Elements as the whole of what a component shows."""
    return tag("div", *parts, kind="mv")


def fault(message: str) -> Html:
    return block(tag("p", message, kind="fault"))


def code(content: Any) -> Html:
    """JSON, or a text with its line breaks."""
    is_text = isinstance(content, str)
    return tag("pre", content if is_text else json.dumps(content, indent=1, ensure_ascii=False))


def fold(title: str, content: Html) -> Html:
    """Something that is shown on a click."""
    return tag("details", tag("summary", title), content)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Html:
    lines = [tag("tr", *(tag("td", value) for value in row)) for row in rows]
    return tag("table", tag("tr", *(tag("th", name) for name in head)), *lines)


def records(rows: Sequence[Any]) -> Html:
    """A table of JSON objects, with a column for each of their keys."""
    shown = [row if isinstance(row, dict) else {"value": row} for row in rows[:_ROWS]]
    keys = list(dict.fromkeys(key for row in shown for key, value in row.items() if value not in (None, "")))
    more = f"{len(rows) - _ROWS} more rows are not shown" if len(rows) > _ROWS else ""
    return Html(table(keys, [[row.get(key) for key in keys] for row in shown]) + tag("p", more))


def bars(head: Sequence[str], rows: Iterable[tuple[str, float, float | None]]) -> Html:
    """Numbers from 0 to 1 as bars, of (name, number, threshold or None)."""
    lines = []
    for name, number, threshold in rows:
        parts = [tag("i", style=f"width:{100 * min(max(number, 0), 1):.1f}%")]
        if threshold is not None:
            parts.append(tag("b", style=f"left:{100 * threshold:.1f}%"))
        lines.append((name, f"{number:.3f}", tag("div", *parts, kind="bar")))
    return table((*head, ""), lines)


def picture(address: str) -> Html:
    """A picture as the service gives it: a PNG as a data: address, and nothing else."""
    return tag("img", src=address) if address.startswith("data:image/png;base64,") else Html()


def pictures(addresses: Iterable[str]) -> Html:
    """Pictures side by side."""
    return tag("div", *map(picture, addresses), kind="pictures")


def seconds(answer: Mapping[str, Any]) -> Html:
    """What an answer took, part by part."""
    return tag("p", "Seconds: " + ", ".join(f"{name} {s:.3f}" for name, s in answer["seconds"].items()))


def turns(history: Sequence[Mapping[str, Any]]) -> Html:
    """A conversation, the last turn first."""
    shown = []
    for turn in reversed(history):
        images = f" ({len(turn['images'])} image)" if turn["images"] else ""
        shown.append(tag("div", turn["question"] + images, kind="turn user"))
        shown.append(tag("div", turn["answer"], picture(turn["picture"]), kind="turn"))
    return block(*shown)


# Extract ----------------------------------------------------------------------------------------------------
def pages(answer: Mapping[str, Any]) -> Html:
    """The pages of an /extract answer with the boxes of its values, numbered as in `values`."""
    drawn = []
    for number, page in enumerate(answer["pages"]):
        boxes = [
            _box(place, value, max(page["width"], page["height"]) / 80)
            for place, value in enumerate(answer["values"], 1)
            if value["page"] == number and value["box"]
        ]
        over = tag("svg", *boxes, viewBox=f"0 0 {page['width']} {page['height']}")
        drawn.append(tag("div", picture(page["picture"]), over, kind="page"))
    return block(tag("div", *drawn, kind="scroll"))


def _box(place: int, value: Mapping[str, Any], size: float) -> Html:
    left, top, right, bottom = value["box"]
    colour, _ = _STATUS.get(value["status"], _UNKNOWN)
    stroke = {"stroke": colour, "stroke_width": 1.5, "vector_effect": "non-scaling-stroke"}
    area = {"x": left, "y": top, "width": right - left, "height": bottom - top}
    return tag(
        "g",
        tag("rect", fill=colour, fill_opacity=0.12, **stroke, **area),
        tag("text", place, x=right + 2, y=bottom, font_size=size, fill=colour),
        tag("title", f"{value['path']}: {value['text']} ({value['status']})"),
    )


def values(answer: Mapping[str, Any]) -> Html:
    """The values of an /extract answer with what the pages show of them, and what contradicts itself."""
    rows = []
    # What a person must look at comes first.
    for place, value in sorted(enumerate(answer["values"], 1), key=lambda one: one[1]["verified"]):
        page = "" if value["page"] is None else value["page"] + 1
        text = value["text"]
        if value["unshown"]:
            text += f" [not on the page: {', '.join(value['unshown'])}]"
        rows.append((place, _mark(value["status"]), value["path"], text, page))
    used = dict.fromkeys(value["status"] for value in answer["values"])
    legend = [(_mark(status), _STATUS.get(status, _UNKNOWN)[1]) for status in used]
    warnings = [(warning["path"], warning["kind"], warning["message"]) for warning in answer["warnings"]]
    left_out = [(_mark(one["status"]), one["path"]) for one in answer.get("left_out", ())]
    return block(
        tag("p", f"{len(rows)} values, {len(answer['unverified'])} of them not verified"),
        table((), legend),
        table(("Warning", "", ""), warnings) if warnings else "",
        table(("Left out", ""), left_out) if left_out else "",
        tag("div", table(("", "Status", "Field", "Value", "Page"), rows), kind="scroll"),
        seconds(answer),
    )


def _mark(status: str) -> Html:
    return tag("span", status, kind="mark", style=f"background:{_STATUS.get(status, _UNKNOWN)[0]}")
