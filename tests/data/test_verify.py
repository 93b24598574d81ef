import os
from pathlib import Path

import pytest
from helpers.shard_tools import flip, jpeg, write_tar

from data.index import Index, load_index
from data.index import main as make_index
from data.verify import main


def test_intact_shards(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(shards), "--decode", "--num-workers", "2"]) == 0
    output = capsys.readouterr().out
    assert "53 samples in 3 shards" in output
    assert "labels 0 to 2, 0 without" in output
    assert output.endswith("ok\n")


def test_output_says_when_images_were_not_read(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(shards), "--num-workers", "1"]) == 0
    assert capsys.readouterr().out.endswith("ok; the images were not read: --decode reads them\n")


def test_undecodable_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "x.tar", [("good.jpg", jpeg(0)), ("bad.jpg", jpeg(0, 300, 200)[:2000])])
    assert main([str(tmp_path), "--num-workers", "1"]) == 0
    assert main([str(tmp_path), "--num-workers", "1", "--decode"]) == 1
    offset = load_index(tmp_path).offset[1]
    assert f"x.tar: 'bad' at byte {offset} cannot be decoded" in capsys.readouterr().err


def test_every_changed_shard_is_named(shards: Path, index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(shards / "train-000000.tar", 5000)
    write_tar(shards / "train-000002.tar", [("other.jpg", jpeg(1))])
    assert main([str(shards), "--num-workers", "1"]) == 1
    output = capsys.readouterr()
    assert "train-000000.tar: truncated" in output.err
    assert "train-000002.tar: 1 samples, the index says 7" in output.err
    assert "of sample 0 is ('other', 512," in output.err
    assert "train-000001.tar" not in output.err


def test_changed_content_of_the_same_size_is_detected(
    shards: Path, index: Index, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shards / "train-000002.tar"
    data = path.read_bytes()
    end = int(index.offset[-1]) - 512  # the last sample's header
    path.write_bytes(data[:end] + data[end:].replace(b"img052", b"img250"))
    assert main([str(shards), "--num-workers", "1"]) == 1
    assert "img250" in capsys.readouterr().err
    assert main([str(shards), "--num-workers", "1", "--reindex"]) == 0
    assert load_index(shards).keys[52].endswith("img250")


def test_image_with_changed_bytes_is_named(shards: Path, index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    assert index.checksum is None
    assert make_index([str(shards)]) == 0  # replaces the index without checksums
    flip(shards / index.shards[1], int(index.offset[30]) + 300)
    assert main([str(shards), "--num-workers", "1", "--decode"]) == 1
    stderr = capsys.readouterr().err
    assert f"train-000001.tar: '{index.keys[30]}' at byte {index.offset[30]}: its bytes differ from those" in stderr
    assert main([str(shards), "--num-workers", "1", "--decode", "--reindex"]) == 0
    assert load_index(shards).checksum is not None


def test_user_errors_are_one_line(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    load_index(shards)
    (shards / "train-000001.tar").unlink()
    assert main([str(shards)]) == 1
    assert "train-000001.tar: the shard is missing, but is in the index" in capsys.readouterr().err
