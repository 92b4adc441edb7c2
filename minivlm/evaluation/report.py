"""What is left of a VQA evaluation to look at: a table, a grid of pictures, one HTML file.

matplotlib and PIL are imported when a picture is drawn.
"""

from __future__ import annotations

import base64
import html
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivlm.evaluation.vqa import Prediction
from minivlm.types import Sample

if TYPE_CHECKING:
    from rich.table import Table

RIGHT, WRONG = "#1a7f37", "#cf222e"
COLUMNS = {"model": "model", "majority": "majority answer", "shuffled": "shuffled pictures"}
"""Keys of the results and their headings: the model and the two baselines."""
NOTES = {
    "majority": "Majority answer: the most frequent training answer to the same question; it never looks.",
    "shuffled": "Shuffled pictures: the same model, shown the picture of another sample.",
}


def table_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the score table: a row a question type, then the mean and the whole."""
    columns = [name for name in COLUMNS if name in results]
    heading = ["question type", "questions", *(COLUMNS[name] for name in columns)]
    types = results["model"]["by_type"]
    rows = []
    if len(types) > 1:
        for kind, part in types.items():
            cells = [percent(results[name]["by_type"].get(kind, {}).get("accuracy")) for name in columns]
            rows.append([kind, f"{part['count']:,}", *cells])
        rows.append(["mean of the types", "", *(percent(results[name]["balanced"]) for name in columns)])
    cells = [percent(results[name]["accuracy"]) for name in columns]
    return heading, [*rows, ["all", f"{results['model']['count']:,}", *cells]]


def remarks(results: dict[str, Any]) -> list[str]:
    """What must be known to read the table, a sentence each."""
    found = [note for name, note in NOTES.items() if name in results]
    shuffled = results.get("shuffled")
    if shuffled and shuffled["count"] < results["model"]["count"]:
        same = percent(shuffled["model_on_same_samples"]["accuracy"])
        found.append(
            f"The shuffled pictures were tried on {shuffled['count']:,} samples, spread evenly; with the "
            f"right pictures the model scores {same} on these."
        )
    skipped = results.get("skipped", {})
    if skipped.get("count"):
        found.append(f"{skipped['count']:,} samples could not be used; the first: {skipped['first'][0]}.")
    return found


def render_table(results: dict[str, Any]) -> Table:
    """The score table for the terminal; ``results`` as in ``results.json``."""
    from rich.table import Table

    heading, rows = table_rows(results)
    table = Table(title="accuracy", caption="\n".join(remarks(results)) or None, caption_justify="left")
    for number, name in enumerate(heading):
        table.add_column(name, justify="right" if number else "left", style="bold" if name == "model" else "")
    for row in rows:
        if row is rows[-1]:
            table.add_section()
        table.add_row(*row)
    return table


def write_report(
    folder: Path,
    results: dict[str, Any],
    predictions: Sequence[Prediction],
    samples: Sequence[Sample],
    title: str = "",
) -> None:
    """Write ``grid.png`` and ``report.html``; ``samples`` are those of the predictions, in order.

    A file ``loss_curve.png`` beside the folder is shown as well. Raises ImportError without matplotlib.
    """
    chosen = choose_for_grid(predictions)
    cells = [(predictions[number], samples[number]) for number in chosen]
    draw_grid(cells, folder / "grid.png")
    curve = folder.parent / "loss_curve.png"
    page = render_html(
        results,
        title=title,
        grid=(folder / "grid.png").read_bytes(),
        curve=curve.read_bytes() if curve.is_file() else None,
        shown=len(cells),
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def choose_for_grid(predictions: Sequence[Prediction], cells: int = 16) -> list[int]:
    """Numbers of samples to show: equally many of each type, about half of them wrong if there are any.

    Samples are spread evenly over the split; where a type has too few, others fill its place.
    """
    by_type: dict[str, dict[bool, list[int]]] = defaultdict(lambda: {True: [], False: []})
    for number, record in enumerate(predictions):
        by_type[record.question_type][record.is_right].append(number)
    chosen: list[int] = []
    for place, kind in enumerate(sorted(by_type)):
        quota = cells // len(by_type) + (place < cells % len(by_type))
        right, wrong = by_type[kind][True], by_type[kind][False]
        num_wrong = min(len(wrong), max(quota // 2, quota - len(right)))
        # Types ask about the same pictures: each group starts at a place of its own to show others.
        phase = (place + 0.25) / len(by_type)
        chosen += _spread(wrong, num_wrong, phase)
        chosen += _spread(right, min(len(right), quota - num_wrong), phase + 0.5 / len(by_type))
    rest = sorted(set(range(len(predictions))) - set(chosen))
    chosen += _spread(rest, min(len(rest), cells - len(chosen)), 0.5)
    return sorted(chosen, key=lambda number: (predictions[number].question_type, number))


def _spread(group: Sequence[int], count: int, phase: float) -> list[int]:
    return [group[int((number + phase) * len(group) / count)] for number in range(count)]


def draw_grid(cells: Sequence[tuple[Prediction, Sample]], path: Path, columns: int = 4) -> None:
    """Draw pictures with question, answer and a green or red frame; wrong ones say what was expected."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = max(1, -(-len(cells) // columns))
    width, height = 2.9 * columns, 3.35 * rows  # inches
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    for axis, (record, sample) in zip(axes, cells, strict=False):
        _draw_cell(axis, record, sample)
    # Room for three lines of question above a picture and for four of answers below it.
    figure.subplots_adjust(0.03, 0.75 / height, 0.97, 1 - 0.6 / height, wspace=0.25, hspace=0.6)
    figure.savefig(path)


def _draw_cell(axis: Any, record: Prediction, sample: Sample) -> None:
    colour = RIGHT if record.is_right else WRONG
    axis.set_axis_on()
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=4)
    picture = thumbnail(sample.images[0]) if sample.images else None
    if picture is None:
        axis.text(0.5, 0.5, "no picture", ha="center", va="center", color="#777777", transform=axis.transAxes)
        axis.set_box_aspect(1)
    else:
        axis.imshow(picture, interpolation="nearest" if max(picture.size) < 200 else "antialiased")
    # Text of data is not TeX: a dollar sign must stay one.
    axis.set_title(wrap(record.question, 34, 3), fontsize=9.5, color="#222222", parse_math=False)
    answer = wrap(f"{'✓' if record.is_right else '✗'} {record.prediction or '(no answer)'}", 30, 2)
    if not record.is_right:
        answer += "\n" + wrap(f"expected: {' / '.join(record.answers)}", 30, 2)
    axis.set_xlabel(answer, fontsize=9.5, color=colour, fontweight="bold", parse_math=False)


def thumbnail(source: Any, side: int = 512) -> Any:
    """A picture as RGB on white, at most ``side`` pixels wide; None if it cannot be read."""
    from PIL import Image

    try:
        if isinstance(source, Image.Image):
            picture = source.convert("RGBA")
        else:
            with Image.open(source) as file:
                picture = file.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    picture.thumbnail((side, side))
    ground = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(ground, picture).convert("RGB")


def render_html(results: dict[str, Any], *, title: str, grid: bytes, curve: bytes | None, shown: int) -> str:
    """One self-contained page; every text of the data is escaped, no request leaves it."""
    heading, rows = table_rows(results)
    name = html.escape(title or "VQA evaluation")
    score = results["model"]
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heading)
    body = "".join(_html_row(row, last=row is rows[-1]) for row in rows)
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in remarks(results))
    loss = f"<h2>Training loss</h2>{_inline(curve, 'loss curve')}" if curve else ""
    settings = ", ".join(f"{key} {value}" for key, value in results.get("settings", {}).items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{name}</title><style>{CSS}</style></head><body><main>
<h1>{name}</h1>
<p class="lead"><strong>{percent(score["accuracy"])}</strong> of {score["count"]:,} questions right
<span class="soft">(metric {html.escape(results["metric"])}; {html.escape(settings)})</span></p>
<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>
<ul class="soft">{notes}</ul>
<h2>Samples</h2>
<p class="soft">{shown} of {score["count"]:,} samples, chosen to show each question type and wrong answers
as well as right ones; their shares here are not the score.</p>
{_inline(grid, "pictures with questions and answers")}
{loss}
</main></body></html>
"""


def _html_row(cells: Iterable[str], last: bool) -> str:
    inner = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
    return f'<tr class="all">{inner}</tr>' if last else f"<tr>{inner}</tr>"


def _inline(png: bytes, alt: str) -> str:
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'


def percent(value: float | None) -> str:
    """A share for people; a dash for none."""
    return "–" if value is None else f"{100 * value:.1f} %"


def wrap(text: str, width: int, lines: int) -> str:
    """Text in at most so many lines, in the end with dots for what is left out."""
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …")) or text.strip()


CSS = """
:root { color-scheme: light dark;
  --ground: #fff; --text: #1f2328; --soft: #59636e; --line: #d1d9e0; --mark: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #0d1117; --text: #e6edf3; --soft: #9198a1; --line: #3d444d; --mark: #161b22; }
}
body { margin: 0; background: var(--ground); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.lead strong { font-size: 1.6rem; } .soft { color: var(--soft); font-size: 0.9rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.7rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { background: var(--mark); }
td:nth-child(3), tr.all td { font-weight: 600; }
img { max-width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 8px; }
"""
