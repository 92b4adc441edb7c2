"""A Hugging Face hub on loopback: revisions of models, gates, and files that it does not give."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse


class FakeHub:
    """``models`` maps ids to revisions (commits, or names with the same content) to files."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.broken: set[str] = set()
        self.fetched: list[str] = []
        self.url = ""

    def commit(self, model: str, revision: str) -> str:
        """The commit of a revision, which is a hash of its content."""
        files = self.models[model][revision]
        return hashlib.sha1(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()

    def files(self, model: str, revision: str) -> dict[str, bytes] | None:
        """What a revision or commit holds."""
        known = self.models[model]
        named = {self.commit(model, name): name for name in known}
        return known.get(named.get(revision, revision))


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Answer as ``hub`` says until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def error(self, code: int, kind: str) -> None:
            self.answer(code, b"{}", {"X-Error-Code": kind, "X-Error-Message": kind})

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path).strip("/").removeprefix("api/models/").split("/")
            model, rest = "/".join(path[:2]), "/".join(path[4:])
            verb, revision = path[2:4] or ("revision", "main")
            if model not in hub.models:
                return self.error(404, "RepoNotFound")
            files = hub.files(model, revision)
            if files is None:
                return self.error(404, "RevisionNotFound")
            name = next(n for n in hub.models[model] if hub.models[model][n] is files)
            commit = hub.commit(model, name)
            if verb in ("revision", "tree"):
                return self.listing(model, verb, commit, files)
            if model in hub.gated:
                return self.error(403, "GatedRepo")
            if rest in hub.broken:
                return self.error(403, "Broken")
            content = files[rest]
            if self.command == "GET":
                hub.fetched.append(rest)
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self.answer(200, content, {"ETag": etag, "X-Repo-Commit": commit})

        do_HEAD = do_GET

        def listing(self, model: str, verb: str, commit: str, files: dict[str, bytes]) -> None:
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            said = tree if verb == "tree" else {"id": model, "sha": commit, "siblings": siblings}
            self.answer(200, json.dumps(said).encode(), {"Content-Type": "application/json"})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
