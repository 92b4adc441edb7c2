"""Boxes that a text names: drawn on the picture, and their phrases in the same colours."""

from __future__ import annotations

import html
import re

from PIL import Image, ImageDraw, ImageFont

from minivlm.datasets.boxes import parse_boxes

COLOURS = ("#dc2626", "#2563eb", "#15803d", "#9333ea", "#c2410c", "#0e7490", "#be185d", "#4d7c0f", "#57534e", "#7c2d12")
"""All dark enough for white letters."""
_SIDE, _LINE, _FONT, _LETTERS = 640, 5, 25, 40
_PHRASE = re.compile(r"&lt;p&gt;(.*?)&lt;/p&gt;\s*((?:(?:\{(?:&lt;\d+&gt;){4}\}|&lt;delim&gt;)\s*)*)", re.DOTALL)


def preview(image: Image.Image) -> Image.Image:
    """The picture at the size on which boxes are drawn: the longer side has 640 pixels."""
    scale = _SIDE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def draw_boxes(image: Image.Image, text: str) -> Image.Image | None:
    """A copy of the picture with the boxes of a text and their labels, or None if the text has no box."""
    groups = parse_boxes(text)
    if not groups:
        return None
    drawn = image.copy()
    pen = ImageDraw.Draw(drawn)
    colours = _colours(text)
    labels = []
    for label, boxes in groups:
        for box in boxes:
            left, right = sorted(_pixel(value, image.width) for value in box[::2])
            top, bottom = sorted(_pixel(value, image.height) for value in box[1::2])
            pen.rectangle((left, top, right, bottom), outline="white", width=_LINE + 2)  # shows on its own colour, too
            pen.rectangle((left, top, right, bottom), outline=colours[label], width=_LINE)
            labels.append((label, left, top))
    for label, left, top in labels:  # last, so that no frame crosses a label
        _write_label(pen, image, label, left, top, colours[label])
    return drawn


def coloured(text: str) -> str:
    """The text as HTML, letter by letter; a phrase with boxes gets their colour and stands for them."""
    colours = _colours(text)

    def phrase(found: re.Match[str]) -> str:
        label = found[1].strip()
        colour = colours.get(html.unescape(label))
        if colour is None:  # not grounded, or with nothing but impossible boxes
            return found[0]
        return f'<b style="color: {colour}">{label}</b>' + (" " if found[0][-1:].isspace() else "")

    return _PHRASE.sub(phrase, html.escape(text, quote=False))


def _colours(text: str) -> dict[str, str]:
    """A colour for every label, in the order of the text."""
    labels = dict.fromkeys(label for label, _ in parse_boxes(text))
    return {label: COLOURS[number % len(COLOURS)] for number, label in enumerate(labels)}


def _pixel(value: int, length: int) -> int:
    return round(min(max(value, 0), 100) / 100 * (length - 1))


def _write_label(pen: ImageDraw.ImageDraw, image: Image.Image, label: str, left: int, top: int, colour: str) -> None:
    """The label on its colour, above the corner of the box or, at the upper edge, inside of it."""
    label = " ".join(label.split())
    if not label:
        return
    label = label if len(label) <= _LETTERS else label[: _LETTERS - 1] + "…"
    font = ImageFont.load_default(_FONT)
    width, height = round(pen.textlength(label, font=font)) + 10, _FONT + 8
    left = max(0, min(left, image.width - width))
    top = top - height + _LINE if top >= height else top
    pen.rectangle((left, top, left + width, top + height), fill=colour)
    pen.text((left + 5, top + height / 2), label, fill="white", font=font, anchor="lm")
