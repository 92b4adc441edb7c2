"""Text in pictures (OCR), which Mini-Gemini is given behind the question; the models lie in the wheel of rapidocr."""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from minivlm.serve.loading import ServeError
from minivlm.types import IMAGE_MARKER

log = logging.getLogger(__name__)

_INSTALL = 'reading the text in pictures needs rapidocr and onnxruntime; run pip install "minivlm[ocr]"'
_KEPT = 256
"""Pictures whose lines are remembered."""
_lock = threading.Lock()
"""Held while the engine is made and while it reads, since it keeps what it works on in itself."""


@dataclass(frozen=True)
class Line:
    """A line of text, how sure the reader is (0 to 1), and its corners (x, y) in pixels, clockwise from top left."""

    text: str
    confidence: float
    box: tuple[tuple[float, float], ...]


class OCR:
    """Reads the text in pictures, from the top to the bottom and from the left to the right.

    Lines of a confidence of ``min_confidence`` or less are left out. The engine is loaded with the first picture, once
    for the process; several threads may read. Raises :class:`ServeError` if its packages are not installed.
    """

    def __init__(self, min_confidence: float = 0.1):
        if not all(map(importlib.util.find_spec, ("rapidocr", "onnxruntime"))):
            raise ServeError(_INSTALL)
        self.min_confidence = min_confidence
        self._known: OrderedDict[str, list[Line]] = OrderedDict()

    def read(self, picture: Any) -> list[Line]:
        """The lines of a picture (path or PIL); one that was read before costs nothing.

        A picture that the engine cannot work on has none. Raises OSError for a file that is no picture, and
        :class:`ServeError` if the engine does not start.
        """
        from minivlm.processors.image import image_hash, open_image

        key = image_hash(picture)
        with _lock:
            if key not in self._known:
                self._known[key] = self._read(open_image(picture))
                if len(self._known) > _KEPT:
                    self._known.popitem(last=False)
            return self._known[key]

    def text(self, pictures: Sequence[Any]) -> str:
        """The lines of all pictures, with commas between them."""
        return ", ".join(line.text for picture in pictures for line in self.read(picture))

    def reference(self, pictures: Sequence[Any]) -> str:
        """What Mini-Gemini is given at the end of a question; nothing where the pictures hold no text."""
        # A picture of the marker is not to become one.
        text = self.text(pictures).replace(IMAGE_MARKER, IMAGE_MARKER.strip("<>"))
        return f"\nReference OCR Token: {text}\n" if text else ""

    def _read(self, picture: Any) -> list[Line]:
        engine = _engine(os.getpid())
        try:
            found = engine(picture)
        except Exception as error:  # pictures of a few pixels in one direction, for example
            log.warning("no text is read in a picture of %d x %d: %s", *picture.size, error or type(error).__name__)
            return []
        if found.txts is None:
            return []
        lines = [
            Line(text, float(confidence), tuple((float(x), float(y)) for x, y in box))
            for text, confidence, box in zip(found.txts, found.scores, found.boxes, strict=True)
        ]
        return [line for line in lines if line.confidence > self.min_confidence]


@lru_cache(maxsize=1)
def _engine(process: int) -> Any:
    """The engine of this process; one that was made before a fork would wait for threads that are not there."""
    import torch

    threads = torch.get_num_threads()  # as OMP_NUM_THREADS says; more than there are cores would wait for each other
    settings = {
        "Global.text_score": 0.0,
        "Global.log_level": "error",
        "EngineConfig.onnxruntime.intra_op_num_threads": threads,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
    try:
        from rapidocr import RapidOCR

        return RapidOCR(params=settings)
    except ImportError as error:  # one of its own packages, or a library of the system
        raise ServeError(f"{_INSTALL} ({error})") from error
