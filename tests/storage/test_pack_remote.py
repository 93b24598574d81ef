from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import s3_server
from helpers.shard_tools import jpeg

from data import pack
from data.index import load_index
from data.storage.client import StoreError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(10):
        path = tmp_path / "photos" / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    return tmp_path / "photos"


@pytest.fixture
def bucket() -> Iterator[str]:
    with s3_server.serve_s3():
        yield "s3://bucket/packed"


def run_pack(photos: Path, out: object, *options: str) -> int:
    return pack.main([str(photos), str(out), "--samples-per-shard", "3", "--num-workers", "1", *options])


def test_store_receives_the_same_files_as_a_folder(photos: Path, bucket: str, tmp_path: Path) -> None:
    assert run_pack(photos, tmp_path / "here") == 0
    assert run_pack(photos, bucket) == 0
    local, remote = load_index(tmp_path / "here"), load_index(bucket)
    assert remote.fingerprint == local.fingerprint
    assert remote.classes == ("class0", "class1")
    written = {f"packed/{path.name}" for path in (tmp_path / "here").iterdir()}
    assert set(s3_server.names("packed")) == written
    assert run_pack(photos, bucket) == 0  # already complete
    assert not list(pack.upload_folder(pack.parse_location(bucket)).rglob("*.tar"))


def test_packing_continues_after_a_failed_upload(
    photos: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent = []

    def fail_once(source: Path, remote: object, send: object = pack.upload) -> None:
        sent.append(source.name)
        if len(sent) == 3:
            raise StoreError("gone")
        send(source, remote)

    monkeypatch.setattr("data.shard_writer.upload", fail_once)
    assert run_pack(photos, bucket) == 1
    assert s3_server.names("packed") == ["packed/train-000000.tar", "packed/train-000001.tar"]
    with pytest.raises(ValueError, match="no index of these shards"):
        load_index(bucket)
    assert run_pack(photos, bucket) == 0
    assert sent == [f"train-{number:06d}.tar" for number in (0, 1, 2, 2, 3)]
    assert run_pack(photos, tmp_path / "here") == 0
    assert load_index(bucket).fingerprint == load_index(tmp_path / "here").fingerprint


def test_occupied_and_read_only_stores_are_rejected(
    photos: Path, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    s3_server.client().put_object(Bucket="bucket", Key="packed/x.tar", Body=b"x")
    assert run_pack(photos, bucket) == 1
    assert "s3://bucket/packed: already holds other shards" in capsys.readouterr().err
    assert run_pack(photos, "hf://datasets/user/name/train") == 1
    assert "hf:// is read-only" in capsys.readouterr().err
