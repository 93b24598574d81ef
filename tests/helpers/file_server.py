"""An HTTP server of a folder's files, with ranges and ETags, that fails on request."""

import hashlib
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class FileServer:
    """The state of the server: what it serves, its faults, and the requests it got.

    Attributes:
        folder: the files.
        faults: file name (or `*`) -> what happens to its next requests, one each: a status such as 503, `reset`,
            `truncate` (half of the body), `stall` (half of the body, then nothing for a long time), or `short` (a
            complete file that is shorter than before).
        stall, delay: seconds that a stall lasts, and seconds before each file is sent.
        ranges, tags: whether range requests and ETags are supported.
        gets: number of GET requests for each file.
        requests: method, path and headers of each request.
    """

    folder: Path
    faults: dict[str, list[int | str]] = field(default_factory=dict)
    stall: float = 30.0
    delay: float = 0.0
    ranges: bool = True
    tags: bool = True
    gets: Counter[str] = field(default_factory=Counter)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_fault(self, name: str) -> int | str | None:
        """Remove and return the next fault of a file."""
        with self.lock:
            faults = self.faults.get(name) or self.faults.get("*")
            return faults.pop(0) if faults else None


@contextmanager
def serve(folder: Path) -> Iterator[FileServer]:
    """Serve a folder at `url`; PUT requests write into it."""
    state = FileServer(folder)
    handler = type("Handler", (_Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FileServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_PUT(self) -> None:
        self.state.requests.append(("PUT", self.path, dict(self.headers)))
        content = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.state.folder / self.path.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        self._status(201)

    def _answer(self, with_body: bool) -> None:
        state, name = self.state, self.path.rpartition("/")[2]
        with state.lock:
            state.requests.append((self.command, self.path, dict(self.headers)))
            state.gets[name] += with_body
        fault = state.next_fault(name)
        if isinstance(fault, int):
            self._status(fault)
            return
        if fault == "reset":
            self._reset()
            return
        path = state.folder / self.path.lstrip("/")
        if not path.is_file():
            self._status(404)
            return
        time.sleep(state.delay)
        self._send(path.read_bytes(), fault, with_body)

    def _send(self, content: bytes, fault: str | None, with_body: bool) -> None:
        if fault == "short":
            content = content[:-512]
        body, asked = content, self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked and self.state.ranges else 0
        self.send_response(206 if asked and self.state.ranges else 200)
        if asked and self.state.ranges:
            body = content[start:]
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.state.tags:
            self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not with_body:
            return
        if fault in ("truncate", "stall"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "stall":
                time.sleep(self.state.stall)
            self._reset()
            return
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _status(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _reset(self) -> None:
        """Reset the connection instead of closing it in the regular way."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
