"""The pictures that a command line names: files, or addresses, which are fetched only there."""

from __future__ import annotations

import http.client
import io
import urllib.request
from pathlib import Path

from PIL import Image

from minivlm.processors.image import open_image
from minivlm.serve.flags import ServeError

_SECONDS = 30


def read_pictures(text: str, max_mb: int) -> list[Image.Image]:
    """The pictures of a path or an http(s) address, or of several with commas between them.

    Raises :class:`ServeError` for what is not there, is no picture, or is an address of more than ``max_mb`` MB.
    """
    names = [text] if Path(text).expanduser().is_file() else [name.strip() for name in text.split(",")]
    if not any(names):
        raise ServeError(f"--image-file: '{text}' names no picture; leave it out to talk without one")
    return [_read(name, max_mb) for name in names if name]


def _read(name: str, max_mb: int) -> Image.Image:
    if not name.lower().startswith(("http://", "https://")):
        try:
            return open_image(Path(name).expanduser())
        except OSError as error:
            raise ServeError(f"--image-file: {error}") from error
    try:
        with urllib.request.urlopen(name, timeout=_SECONDS) as answer:
            content = answer.read(max_mb * 2**20 + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ServeError(f"--image-file: {name} cannot be fetched: {error}") from error
    if len(content) > max_mb * 2**20:
        raise ServeError(f"--image-file: {name} has more than {max_mb} MB (demo.max_upload_mb)")
    try:
        return open_image(io.BytesIO(content))
    except OSError as error:
        raise ServeError(f"--image-file: {name} is no picture that can be read") from error
