"""Several models, the same questions and pictures: answers side by side, and how many name what is to be seen.

matplotlib and PIL are imported when a picture is drawn.
"""

from __future__ import annotations

import base64
import html
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minivlm.evaluation.report import CSS, RIGHT, WRONG, percent, thumbnail, wrap
from minivlm.types import IMAGE_MARKER

PICTURE_SIDE = 256
MOST_ROWS = 12
"""Pictures in the PNG, spread evenly over the folder; the page has all."""
_CJK_FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei", "SimHei")
_WIDE = "\u2e80"
"""First of the signs that are written without blanks and take the room of two letters."""


@dataclass(frozen=True)
class Asked:
    """A question about a picture (path, file or PIL image) and the words of which one must stand in a right answer."""

    name: str
    picture: Any
    question: str
    words: Sequence[str] = ()

    @property
    def text(self) -> str:
        """The question without the place of its picture."""
        return self.question.replace(IMAGE_MARKER, "").strip()


@dataclass
class Comparison:
    """What was asked and answered; ``title`` is the question, or says whose the questions are.

    ``answers`` holds for every model a line for every question: ``{answer, tokens, seconds}`` or ``{error}``.
    """

    title: str
    asked: Sequence[Asked]
    models: list[str]
    answers: Sequence[Sequence[Mapping[str, Any]]]

    @property
    def counted(self) -> str:
        """What there are several of: pictures of one question, or questions."""
        return "pictures" if all(asked.question == self.title for asked in self.asked) else "questions"

    def caption(self, number: int) -> str:
        """What stands below a picture: its name or, where every picture has its own, question and answer."""
        asked = self.asked[number]
        if asked.question == self.title:
            return asked.name
        return f"{asked.text} ({' / '.join(asked.words)})" if asked.words else asked.text or asked.name

    def verdict(self, model: int, number: int) -> bool | None:
        """Whether the answer holds a word of its question; None without words or answer."""
        words, answer = self.asked[number].words, self.answers[model][number].get("answer")
        return None if not words or answer is None else bool(re.search(pattern(words), answer))

    def scores(self) -> list[dict[str, Any]]:
        """For every model: questions answered and failed, ``hits`` of those ``scored``, tokens per second."""
        found = []
        for model, name in enumerate(self.models):
            lines = [line for line in self.answers[model] if "answer" in line]
            verdicts = [v for n in range(len(self.asked)) if (v := self.verdict(model, n)) is not None]
            seconds = sum(line["seconds"] for line in lines)
            score = {"model": name, "answered": len(lines), "failed": len(self.asked) - len(lines)}
            score |= {"scored": len(verdicts), "hits": sum(verdicts)}
            score["share"] = sum(verdicts) / len(verdicts) if verdicts else None
            score["tokens_per_second"] = sum(line["tokens"] for line in lines) / seconds if seconds else None
            found.append(score)
        return found


def pattern(words: Sequence[str]) -> str:
    """Finds any of the words, in any case: as whole words, or anywhere in scripts without blanks between words."""
    letter = rf"[^\W{_WIDE}-\U0010ffff]"
    ends = [rf"(?<!{letter}){re.escape(word)}(?!{letter})" if max(word) < _WIDE else re.escape(word) for word in words]
    return f"(?i:{'|'.join(ends)})"


def render_html(found: Comparison, title: str) -> str:
    """One self-contained page; every text is escaped, no request leaves it."""
    heading = "".join(f"<th>{html.escape(name)}</th>" for name in found.models)
    scores = "".join(f"<tr>{_score_cells(score)}</tr>" for score in found.scores())
    rows = "".join(_html_row(found, number) for number in range(len(found.asked)))
    name, question = html.escape(title), html.escape(found.title)
    columns = "".join(f"<th>{text}</th>" for text in ("model", "right", "answers", "failed", "tokens/s"))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{name}</title><style>{CSS}{_OWN_CSS}</style></head><body><main>
<h1>{name}</h1>
<p class="lead">{question}</p>
<div class="wide"><table class="scores"><thead><tr>{columns}</tr></thead><tbody>{scores}</tbody></table></div>
<p class="soft">Right: of the {found.counted} with words to expect, those whose answer holds one of them.</p>
<div class="wide"><table class="answers" style="min-width: {16 + 14 * len(found.models)}rem">
<thead><tr><th>picture</th>{heading}</tr></thead>
<tbody>{rows}</tbody></table></div>
</main></body></html>
"""


def _score_cells(score: Mapping[str, Any]) -> str:
    right = f"{score['hits']} of {score['scored']} ({percent(score['share'])})" if score["scored"] else "–"
    cells = (score["model"], right, score["answered"], score["failed"], speed(score["tokens_per_second"]))
    return "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells)


def _html_row(found: Comparison, number: int) -> str:
    name = html.escape(found.caption(number))
    cells = "".join(_html_cell(found, model, number) for model in range(len(found.models)))
    return f"<tr><td>{_html_picture(found.asked[number].picture, name)}<br>{name}</td>{cells}</tr>\n"


def _html_picture(source: Any, alt: str) -> str:
    picture = thumbnail(source, PICTURE_SIDE)
    if picture is None:
        return '<span class="soft">no picture</span>'
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=90)
    return f'<img alt="{alt}" src="data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode("ascii")}">'


def _html_cell(found: Comparison, model: int, number: int) -> str:
    line, verdict = found.answers[model][number], found.verdict(model, number)
    if "answer" not in line:
        return f'<td class="soft">{html.escape(line.get("error", ""))}</td>'
    text = html.escape(line["answer"]) or '<span class="soft">(no answer)</span>'
    if verdict:
        pieces = re.split(f"({pattern(found.asked[number].words)})", line["answer"])
        text = "".join(f"<mark>{html.escape(p)}</mark>" if n % 2 else html.escape(p) for n, p in enumerate(pieces))
    kind = {True: "right", False: "wrong", None: ""}[verdict]
    sign = {True: "✓ ", False: "✗ ", None: ""}[verdict]
    return f'<td class="{kind}">{sign}{text}</td>'


def speed(value: float | None) -> str:
    """Tokens per second for people."""
    return "–" if value is None else f"{value:.1f}"


def speed_of(tokens: int, seconds: float) -> str:
    """What a program says of the speed of its answers; nothing without an answer."""
    return f"{tokens} tokens, {speed(tokens / seconds)} tokens/s" if tokens and seconds else ""


def draw_comparison(found: Comparison, path: Path) -> bool:
    """Draw pictures and answers as a PNG; False if no font here has the signs of the answers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = min(len(found.asked), MOST_ROWS)
    chosen = [number * len(found.asked) // count for number in range(count)]
    lines = max(_shown(found, model, number).count("\n") + 1 for number in chosen for model in range(len(found.models)))
    row, gap = max(0.9, 0.14 + 0.16 * lines), 0.36  # inches, as all sizes
    width, height = 2.2 + 3.2 * len(found.models), 0.75 + (row + gap) * count
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    ratios = [2.0, *[3.2] * len(found.models)]
    grid = figure.subplots(count, len(ratios), squeeze=False, width_ratios=ratios)
    for place, number in enumerate(chosen):
        _draw_row(grid[place], found, number)
    font = _font()
    for axis, score in zip(grid[0][1:], found.scores(), strict=True):
        right = f": {score['hits']} of {score['scored']}" if score["scored"] else ""
        axis.set_title(wrap(score["model"] + right, 42, 2), fontsize=10, parse_math=False, fontfamily=font)
    rest = f" ({count} of {len(found.asked)} {found.counted})" if count < len(found.asked) else ""
    question = wrap(found.title + rest, int(width * 9), 2)
    figure.suptitle(question, y=1 - 0.12 / height, fontsize=11, va="top", parse_math=False, fontfamily=font)
    figure.subplots_adjust(0.02, gap / height, 0.98, 1 - 0.75 / height, wspace=0.06, hspace=gap / row)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        figure.savefig(path, format="png")
    return not any("Glyph" in str(each.message) for each in said)


def _draw_row(axes: Sequence[Any], found: Comparison, number: int) -> None:
    picture = thumbnail(found.asked[number].picture, PICTURE_SIDE)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    if picture is None:
        axes[0].text(0.5, 0.5, "no picture", ha="center", va="center", color="#777777")
    else:
        axes[0].imshow(picture, interpolation="nearest" if max(picture.size) < 200 else "antialiased")
    font = _font()
    axes[0].set_xlabel(wrap(found.caption(number), 34, 2), fontsize=8, parse_math=False, fontfamily=font)
    for spine in axes[0].spines.values():
        spine.set_visible(False)
    for model, axis in enumerate(axes[1:]):
        verdict = found.verdict(model, number)
        colour = {True: RIGHT, False: WRONG, None: "#59636e"}[verdict]
        for spine in axis.spines.values():
            spine.set(color=colour, linewidth=2 if verdict is not None else 0.8)
        place = {"x": 0.03, "y": 0.95, "va": "top", "fontsize": 8.5, "color": "#222222", "clip_on": True}
        axis.text(s=_shown(found, model, number), transform=axis.transAxes, parse_math=False, fontfamily=font, **place)


def _shown(found: Comparison, model: int, number: int) -> str:
    """An answer in lines, at most ten, behind the sign of its verdict."""
    line = found.answers[model][number]
    sign = {True: "✓ ", False: "✗ ", None: ""}[found.verdict(model, number)]
    text = sign + (line.get("answer", line.get("error")) or "(no answer)")
    return _hang(wrap(re.sub(r"[\x00-\x1f\x7f]", " ", text), 22 if _is_wide(text) else 44, 10))


def _hang(text: str) -> str:
    """Lines with the punctuation of Chinese at their end, since none begins with it."""
    return re.sub(r"\n([，。！？、；：）》”]+)", r"\1\n", text)


def _is_wide(text: str) -> bool:
    return sum(sign >= _WIDE for sign in text) > len(text) / 4


def _font() -> list[str]:
    """The families to look for a sign in, of those that are here."""
    from matplotlib import font_manager

    names = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in _CJK_FONTS if name in names)]


_OWN_CSS = """
main { max-width: 90rem; } .wide { overflow-x: auto; }
table.scores { width: auto; } table.scores td:nth-child(3) { font-weight: normal; }
table.scores td:nth-child(2) { font-weight: 600; }
table.answers { margin-top: 1rem; table-layout: fixed; }
table.answers td, table.answers th { text-align: left; vertical-align: top; font-weight: normal; }
table.answers th { font-weight: 600; }
table.answers th:first-child { width: 15rem; }
table.answers td { overflow-wrap: anywhere; } table.answers td:first-child { font-size: 0.85rem; }
table.answers td:not(:first-child) { white-space: pre-wrap; }
td.right { box-shadow: inset 4px 0 #1a7f37; } td.wrong { box-shadow: inset 4px 0 #cf222e; }
mark { background: #1a7f3740; color: inherit; border-radius: 3px; }
"""
