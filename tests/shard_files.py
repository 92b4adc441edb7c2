"""Tar shards that tests write, and a web server that offers them."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (230, 220, 40)}


def picture(colour: str, ending: str = "jpeg") -> bytes:
    """A small picture of one colour as a file in memory."""
    stream = io.BytesIO()
    Image.new("RGB", (24, 20), COLOURS[colour]).save(stream, ending)
    return stream.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """A tar file with these members."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pair(key: str, colour: str, caption: str | None = None) -> list[tuple[str, bytes]]:
    """The members of one sample, as img2dataset writes them."""
    record = {"caption": caption or f"A {colour.upper()} picture!", "url": "http://example.invalid/x"}
    return [
        (f"{key}.jpg", picture(colour)),
        (f"{key}.txt", b"not read"),
        (f"{key}.json", json.dumps(record).encode()),
    ]


def write_shards(folder: Path, shards: int, samples: int) -> str:
    """Shards with samples of several colours; returns the pattern of their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(COLOURS)
    for shard in range(shards):
        members = [
            member
            for number in range(samples)
            for member in pair(f"{shard:05d}{number:04d}", names[(shard + number) % len(names)])
        ]
        write_tar(folder / f"{shard:05d}.tar", members)
    return f"{folder}/{{00000..{shards - 1:05d}}}.tar"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a web server on loopback with the files of a folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
