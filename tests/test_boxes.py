"""Boxes as text and back, and the share of boxes that hit."""

from __future__ import annotations

import pytest

from minivlm.datasets.boxes import box_iou, overlap, parse_boxes, scale_box, write_boxes, write_phrase

A, B = (10, 20, 30, 40), (0, 0, 100, 100)


def test_boxes_are_written_and_read_alike() -> None:
    assert write_boxes([A]) == "{<10><20><30><40>}"
    text = f"{write_phrase('a red boat', [A, B])} beside {write_phrase('a bridge', [B])} and {write_boxes([A])}"
    assert text.startswith("<p>a red boat</p> {<10><20><30><40>}<delim>{<0><0><100><100>} beside <p>a bridge")
    assert parse_boxes(text) == [("a red boat", [A, B]), ("a bridge", [B]), ("", [A])]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("a boat {10, 20, 30, 40}", []),
        ("{<10><20><30>}", []),
        ("{<30><20><10><40>}", []),
        ("{<10><20><30><140>}", []),
        ("{<10><20><30><40>} <delim> {<2><1><1><1>}", [("", [A])]),
        ("<p>a boat {<10><20><30><40>}", [("", [A])]),
        ("<p> a boat </p>{<10><20><30><40>}", [("a boat", [A])]),
    ],
)
def test_what_is_no_box_is_left_out(text: str, found: list) -> None:
    assert parse_boxes(text) == found


def test_pixels_become_hundredths() -> None:
    assert scale_box([64, 48, 320, 240], 640, 480) == (10, 10, 50, 50)
    assert scale_box([-5, 0, 700, 479], 640, 480) == (0, 0, 100, 99)
    assert all(scale_box([n, 0, 100, 100], 100, 100)[0] == n for n in range(100)), "hundredths stay what they are"
    for box in ([10, 10, 10, 20], [20, 10, 10, 20], [700, 10, 800, 20], [-9, 0, 0, 5]):
        with pytest.raises(ValueError, match="inside of 640 x 480"):
            scale_box(box, 640, 480)


def test_overlap_and_the_metric() -> None:
    assert overlap((0, 0, 10, 10), (0, 0, 10, 10)) == 1 and overlap((0, 0, 10, 10), (20, 20, 30, 30)) == 0
    assert overlap((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    right = [write_boxes([(0, 0, 10, 10)])]
    assert box_iou("{<0><0><10><5>}", right) == 1, "just half"
    assert box_iou("{<0><0><10><4>}", right) == 0
    assert box_iou("{<50><50><60><60>}<delim>{<0><0><10><10>}", right) == 0, "the first one counts"
    assert box_iou("no idea", right) == 0
    thin = write_boxes([scale_box([10, 10, 13, 40], 1000, 100)])
    assert box_iou(thin, [thin]) == 1 and box_iou("{<2><10><2><40>}", [thin]) == 0
