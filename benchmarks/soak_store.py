"""A local S3-compatible store that fails like real ones, for `soak.py`."""

import http.client
import logging
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

BUCKET = "soak"
FAULTS = {"503": 0.1, "reset": 0.05, "truncated": 0.05, "stalled": 0.05}  # shares of the requests for shard bytes
STALL = 3.0  # seconds
_PASSED_ON = {"content-length", "content-type", "content-range", "accept-ranges", "etag", "last-modified"}


@contextmanager
def failing_store(folder: Path, seed: int) -> Iterator[tuple[str, Counter[str]]]:
    """Puts a folder's files into a bucket; sets the environment for it, and yields its URL and counts of faults.

    Raises:
        ImportError: moto or boto3 is not installed.
    """
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # otherwise it prints every request
    store = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    store.start()
    host, port = store.get_host_and_port()
    faults: Counter[str] = Counter()
    members = {"store": (host, port), "faults": faults, "rng": random.Random(seed), "lock": threading.Lock()}
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), type("Proxy", (_Proxy,), members))
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    keys = {"AWS_ACCESS_KEY_ID": "soak", "AWS_SECRET_ACCESS_KEY": "soaksoaksoak", "AWS_REGION": "us-east-1"}
    before = dict(os.environ)
    os.environ.update(keys, AWS_ENDPOINT_URL=f"http://127.0.0.1:{proxy.server_port}")
    try:
        client = boto3.client("s3", region_name="us-east-1", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket=BUCKET)
        for path in sorted(folder.iterdir()):
            client.upload_file(str(path), BUCKET, path.name)
        yield f"s3://{BUCKET}", faults
    finally:
        os.environ.clear()
        os.environ.update(before)
        proxy.shutdown()
        store.stop()


class _Proxy(BaseHTTPRequestHandler):
    """Forwards requests to the store; reads of shards fail now and then."""

    protocol_version = "HTTP/1.1"
    store: tuple[str, int]
    faults: Counter[str]
    rng: random.Random
    lock: threading.Lock

    def _answer(self) -> None:
        fault = self._draw()
        if fault == "503":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        status, headers, body = self._asked()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(body) // 2
        self.wfile.write(body[:half])
        self.wfile.flush()
        if fault == "truncated":
            self.close_connection = True
            return
        if fault == "stalled":
            time.sleep(STALL)
        self.wfile.write(body[half:])

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815

    def _draw(self) -> str | None:
        if self.command != "GET" or not urlsplit(self.path).path.endswith(".tar"):
            return None
        with self.lock:
            self.faults["requests"] += 1
            (fault,) = self.rng.choices([*FAULTS, None], [*FAULTS.values(), 1 - sum(FAULTS.values())])
            if fault:
                self.faults[fault] += 1
        return fault

    def _asked(self) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.store, timeout=60)
        length = int(self.headers.get("Content-Length") or 0)
        connection.request(self.command, self.path, self.rfile.read(length) if length else None, dict(self.headers))
        answer = connection.getresponse()
        body = answer.read()
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() in _PASSED_ON]
        connection.close()
        return answer.status, headers, body

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing, because requests are counted."""
