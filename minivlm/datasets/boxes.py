"""Boxes as MiniGPT-v2 writes them: integers from 0 to 100 of the picture's width and height.

``{<x0><y0><x1><y1>}`` is a box from its upper left to its lower right corner, ``<p>phrase</p> {...}`` a
phrase with its box; several boxes of a phrase are joined by ``<delim>``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in hundredths of the picture."""

DELIMITER = "<delim>"
_BOX = r"\{<\d{1,3}><\d{1,3}><\d{1,3}><\d{1,3}>\}"
_GROUP = re.compile(rf"(?:<p>([^<]*)</p>\s*)?({_BOX}(?:\s*{DELIMITER}\s*{_BOX})*)")


def scale_box(box: Sequence[float], width: float, height: float) -> Box:
    """A box in units of which a picture is ``width`` wide and ``height`` high, in hundredths of it.

    Cut off like the original's, not rounded; what reaches over the edge ends there. Raises ValueError for
    a box without area or outside of the picture.
    """
    x0, y0, x1, y1 = box
    if not (x0 < x1 and y0 < y1 and x0 < width and y0 < height and x1 > 0 and y1 > 0):
        raise ValueError(f"the box {list(box)} is no [left, top, right, bottom] inside of {width:g} x {height:g}")
    left, right = (int(min(max(x, 0), width) * 100 / width) for x in (x0, x1))
    top, bottom = (int(min(max(y, 0), height) * 100 / height) for y in (y0, y1))
    return left, top, right, bottom


def write_boxes(boxes: Iterable[Box]) -> str:
    """``{<x0><y0><x1><y1>}``, joined by ``<delim>``."""
    return DELIMITER.join("{" + "".join(f"<{value}>" for value in box) + "}" for box in boxes)


def write_phrase(phrase: str, boxes: Iterable[Box]) -> str:
    """``<p>phrase</p> {<x0><y0><x1><y1>}``."""
    return f"<p>{phrase}</p> {write_boxes(boxes)}"


def parse_boxes(text: str) -> list[tuple[str, list[Box]]]:
    """``(label, boxes)`` of every phrase with boxes, in the order of the text; a box without phrase has label "".

    What is malformed, inside out or outside of 0..100 is left out. A thing thinner than a hundredth of the
    picture has a box without width or height.
    """
    found = []
    for label, group in _GROUP.findall(text):
        boxes = [tuple(map(int, re.findall(r"\d+", box))) for box in re.findall(_BOX, group)]
        good = [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes if 0 <= x0 <= x1 <= 100 and 0 <= y0 <= y1 <= 100]
        if good:
            found.append((label.strip(), good))
    return found


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes, from 0 to 1; a box without area overlaps its like alone."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    both = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - shared
    return shared / both if both > 0 else float(tuple(a) == tuple(b))


def box_iou(prediction: str, answers: Sequence[str]) -> float:
    """Metric: 1.0 if the first box of the prediction overlaps one of the answers' by half (IoU >= 0.5), else 0.0."""
    said = [box for _, boxes in parse_boxes(prediction) for box in boxes][:1]
    right = [box for answer in answers for _, boxes in parse_boxes(answer) for box in boxes]
    return float(any(overlap(a, b) >= 0.5 for a in said for b in right))
