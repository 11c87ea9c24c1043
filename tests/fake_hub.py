"""A small hub on loopback: the few addresses of the hub that fetching a model asks for, counted, and cut on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves repos of files from memory.

    Args:
        repos: name -> file name -> content. Names in `private` answer 401, in `gated` 403.
    Attributes:
        sent: bytes of content that left, by file name.
        ranges: (file name, Range header) of each content request that had one.
        cut: file name -> after how many bytes the connection breaks, once.
        stall: file name -> after how many bytes nothing more comes; `stalled` is set then.
    """

    def __init__(self, repos: dict[str, dict[str, bytes]], private: tuple[str, ...] = (), gated: tuple[str, ...] = ()):
        self.repos, self.private, self.gated = repos, private, gated
        self.sent: Counter[str] = Counter()
        self.ranges: list[tuple[str, str]] = []
        self.cut: dict[str, int] = {}
        self.stall: dict[str, int] = {}
        self.stalled, self._over = threading.Event(), threading.Event()
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()


def etag(name: str, content: bytes) -> str:
    """sha256 of a large file, git's sha1 of a small one."""
    if name.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(revision|tree)/([\w.-]+)", path):
            name, kind, revision = found.groups()
            if files := self.files(name, revision):
                if kind == "revision":
                    siblings = [{"rfilename": file} for file in files]
                    self.json({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings})
                else:
                    self.json([entry(file, content) for file, content in files.items()])
        elif found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/([\w.-]+)", path):
            name, revision, file = found.groups()
            if files := self.files(name, revision):
                if file in files:
                    self.file(file, files[file], body)
                else:
                    self.refuse(404, "EntryNotFound")
        else:
            self.refuse(404, "")

    def files(self, name: str, revision: str) -> dict[str, bytes] | None:
        hub = self.hub
        if name in hub.gated:
            self.refuse(403, "GatedRepo")
        elif name in hub.private or name not in hub.repos:
            self.refuse(401, "RepoNotFound")
        elif revision not in ("main", COMMIT):
            self.refuse(404, "RevisionNotFound")
        else:
            return hub.repos[name]
        return None

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def json(self, value: object) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def file(self, name: str, content: bytes, body: bool) -> None:
        hub, start = self.hub, 0
        asked = self.headers.get("Range")
        if asked and body:
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            with hub.lock:
                hub.ranges.append((name, asked))
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{etag(name, content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not body:
            return
        with hub.lock:
            end = hub.cut.pop(name, hub.stall.get(name, len(content)))
            part = content[start:end]
            hub.sent[name] += len(part)  # before the client has it, so that no one looks too early
        self.wfile.write(part)
        self.wfile.flush()
        if name in hub.stall:
            hub.stalled.set()
            hub._over.wait()
        if end < len(content):
            self.close_connection = True
            self.connection.close()


def entry(name: str, content: bytes) -> dict[str, object]:
    found: dict[str, object] = {"type": "file", "path": name, "size": len(content), "oid": etag(name, content)[:40]}
    if name.endswith(".safetensors"):
        found["lfs"] = {"oid": etag(name, content), "size": len(content), "pointerSize": 134}
    return found
