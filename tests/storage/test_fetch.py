import logging
import time
from pathlib import Path

import pytest
from helpers.file_server import FileServer

from data.storage import client, fetch
from data.storage.client import Object, StoreError
from data.storage.fetch import RemoteFile, download
from data.storage.files import look_up
from data.storage.location import Remote, parse_url


@pytest.fixture(autouse=True)
def short_pauses_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(client, "CHUNK", 1000)


@pytest.fixture
def remote(server: FileServer) -> Remote:
    return parse_url(f"{server.url}/shards/t-0.tar")


@pytest.fixture
def content(shards: Path) -> bytes:
    return (shards / "t-0.tar").read_bytes()


def read(remote: Remote, expected: Object | None = None, timeout: float = 10.0) -> bytes:
    return b"".join(download(remote, expected, timeout))


@pytest.mark.parametrize("faults", [[503], [500, 429, 503], ["reset"], ["truncate"], ["truncate", 503, "truncate"]])
@pytest.mark.parametrize("ranges", [True, False])
def test_transient_failures_are_retried(
    server: FileServer, remote: Remote, content: bytes, faults: list[int | str], ranges: bool
) -> None:
    expected_file, server.faults["t-0.tar"], server.ranges = look_up(remote), list(faults), ranges
    assert read(remote, expected_file) == content
    assert server.gets["t-0.tar"] > len(faults)


def test_broken_download_resumes_where_it_stopped(server: FileServer, remote: Remote, content: bytes) -> None:
    server.faults["t-0.tar"] = ["truncate"]
    assert read(remote) == content
    first, second = (headers.get("range") for _, _, headers in server.requests)
    assert first is None
    assert second
    assert len(content) // 4 < int(second.removeprefix("bytes=").removesuffix("-")) <= len(content) // 2


@pytest.mark.parametrize(
    ("status", "advice"), [(403, "denies access"), (401, "denies access"), (404, "not found in the store")]
)
def test_permanent_errors_are_not_retried(server: FileServer, remote: Remote, status: int, advice: str) -> None:
    server.faults["t-0.tar"] = [status] * 3
    with pytest.raises(StoreError, match=advice) as caught:
        read(remote)
    assert str(remote) in str(caught.value)
    assert server.gets["t-0.tar"] == 1


def test_timeout_error_names_the_shard_and_the_last_error(server: FileServer, remote: Remote) -> None:
    server.faults["t-0.tar"] = [503] * 1000
    start = time.monotonic()
    with pytest.raises(StoreError, match=r"t-0.tar: no data for \d seconds, in \d+ attempts; .*503.*fetch_timeout=2"):
        read(remote, timeout=1.0)
    assert time.monotonic() - start < 5


def test_stall_is_logged_while_it_lasts(
    server: FileServer,
    remote: Remote,
    content: bytes,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetch, "STALLED", 0.2)
    server.faults["t-0.tar"], server.stall = ["stall"], 1.0
    with caplog.at_level(logging.WARNING):
        assert read(remote) == content
    warnings = [record.message for record in caplog.records if "no data for" in record.message]
    assert warnings
    assert all(message.startswith(f"{remote}: no data for ") for message in warnings)


def test_stalled_connection_is_abandoned_and_retried(server: FileServer, remote: Remote, content: bytes) -> None:
    server.faults["t-0.tar"], server.stall = ["stall"], 20.0
    start = time.monotonic()
    assert read(remote, timeout=2.0) == content
    assert time.monotonic() - start < 10


def test_changed_shard_is_rejected(server: FileServer, remote: Remote, shards: Path) -> None:
    expected_file, path = look_up(remote), shards / "t-0.tar"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(StoreError, match=r"t-0.tar: has changed in the store since its index was made \(ETag"):
        read(remote, expected_file)
    path.write_bytes(content + bytes(512))
    with pytest.raises(StoreError, match=f"{len(content) + 512} bytes instead of {len(content)}"):
        read(remote, expected_file)
    path.write_bytes(content)
    server.faults["t-0.tar"] = ["truncate", "short"]  # rewritten in the middle of a download
    with pytest.raises(StoreError, match="bytes instead of"):
        read(remote)


def test_remote_file_reads_like_a_local_file(server: FileServer, remote: Remote, content: bytes) -> None:
    with RemoteFile(remote, look_up(remote)) as file:
        assert file.seek(0, 2) == len(content)
        for start, size in [(0, 512), (512, 10), (2000, 3000), (1500, 100), (len(content) - 5, 50), (0, 20)]:
            file.seek(start)
            assert file.read(size) == content[start : start + size]
        file.seek(0)
        assert file.read() == content
    assert server.gets["t-0.tar"] == 1


def test_user_and_password_come_from_netrc(server: FileServer, remote: Remote, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hunter2\n")
    (tmp_path / "netrc").chmod(0o600)
    assert read(remote) == content
    assert server.requests[-1][2]["authorization"] == "Basic bWU6aHVudGVyMg=="
