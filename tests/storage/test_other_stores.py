"""gs:// and hf:// against a local mock server: the requests and how the responses are interpreted."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from data.storage.client import StoreError
from data.storage.fetch import download
from data.storage.files import list_files, look_up
from data.storage.location import parse_url

ANSWERS: dict[str, tuple[str, bytes]] = {}  # request path -> (content type, content)


SEEN: list[tuple[str, str | None]] = []  # path and authorization header of each request


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        SEEN.append((self.path, self.headers.get("authorization")))
        kind, content = ANSWERS.get(unquote(self.path.partition("?")[0]), ("", b""))
        self.send_response(200 if kind else 404)
        self.send_header("Content-Type", kind)
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("ETag", '"somewhere-elses"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.do_GET()


@pytest.fixture
def endpoint() -> Iterator[str]:
    ANSWERS.clear()
    SEEN.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", endpoint)
    monkeypatch.setenv("HF_TOKEN", "hf_hunter22hunter22")
    large = {"oid": "sha0", "size": 5, "pointerSize": 1}
    entries = [
        {"type": "file", "path": "train/t-0.tar", "size": 5, "oid": "b1", "lfs": large},
        {"type": "file", "path": "train/classes.txt", "size": 3, "oid": "b2"},
        {"type": "directory", "path": "train/more", "size": 0, "oid": "b3"},
    ]
    ANSWERS["/api/datasets/user/name/tree/v2/train"] = "application/json", json.dumps(entries).encode()
    ANSWERS["/datasets/user/name/resolve/v2/train/t-0.tar"] = "application/x-tar", b"bytes"
    return "hf://datasets/user/name@v2/train"


def test_hugging_face_hub(hub: str) -> None:
    folder = parse_url(hub)
    files = list_files(folder, 2.0)
    assert files == {"t-0.tar": (5, "sha0"), "classes.txt": (3, "b2")}
    info = look_up(folder / "t-0.tar", 2.0)
    assert info == (5, "sha0")
    assert b"".join(download(folder / "t-0.tar", info, 2.0)) == b"bytes"
    assert {token for path, token in SEEN if "user/name" in path} == {"Bearer hf_hunter22hunter22"}
    with pytest.raises(StoreError, match=r"t-1.tar: not found in the store .* without a token"):
        look_up(folder / "t-1.tar", 2.0)


def test_google_cloud_storage(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
    ANSWERS["/bucket/train/t-0.tar"] = "application/x-tar", b"bytes"
    remote = parse_url("gs://bucket/train/t-0.tar")
    assert look_up(remote, 2.0) == (5, '"somewhere-elses"')
    assert b"".join(download(remote, timeout=2.0)) == b"bytes"
    listing = (
        '<?xml version="1.0"?><ListBucketResult><Contents><Key>train/t-0.tar</Key><Size>5</Size>'
        '<LastModified>2026-01-01T00:00:00Z</LastModified><ETag>"x"</ETag></Contents></ListBucketResult>'
    )
    ANSWERS["/bucket"] = ANSWERS["/bucket/"] = "application/xml", listing.encode()
    assert list_files(remote.parent, 2.0) == {"t-0.tar": (5, '"x"')}
    with pytest.raises(StoreError, match=r"gs://bucket/train/t-1.tar: not found in the store"):
        look_up(parse_url("gs://bucket/train/t-1.tar"), 2.0)
