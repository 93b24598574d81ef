"""Image folders: which files are packed, which folders are classes, and what is reported about the others."""

import os
import socket
import unicodedata
from pathlib import Path

import pytest

from data import sources
from data.image_folder import list_folder
from data.sources import list_source, make_key


def touch(root: Path, *names: str | bytes) -> Path:
    """Creates files at these paths; their contents are never read."""
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(b"x")
    return root


def labels(source: sources.Source) -> dict[str, int]:
    return {file.name: file.label for file in source.files}


def test_keys_are_safe_and_collisions_name_both_files(tmp_path: Path) -> None:
    assert make_key("a b/c.d é.JPEG") == "a_b/c_d_é"
    assert make_key("__x__/y.jpg") == "_x__/y"  # WebDataset skips names that begin like __x__
    assert make_key(".hidden.jpg") == "_hidden"
    with pytest.raises(ValueError, match=r"'a.b.jpg' and 'a_b.png' would both get the key 'a_b'"):
        list_source(touch(tmp_path, "a.b.jpg", "a_b.png"))


def test_cycle_of_symlinks_ends(tmp_path: Path) -> None:
    touch(tmp_path, "cat/a.jpg")
    (tmp_path / "cat" / "again").symlink_to(tmp_path)
    assert [file.name for file in list_source(tmp_path).files] == ["cat/a.jpg"]


def test_hidden_and_system_files_are_neither_images_nor_classes(tmp_path: Path) -> None:
    touch(tmp_path, "cat/0.jpg", "dog/0.JPG", "cat/.ipynb_checkpoints/0-checkpoint.jpg", ".ipynb_checkpoints/0.jpg")
    touch(
        tmp_path, "__MACOSX/cat/._0.jpg", "@eaDir/0.jpg", "cat/._0.jpg", "cat/Thumbs.db", "dog/.DS_Store", "dog/README"
    )
    source = list_source(tmp_path)
    assert source.classes == ("cat", "dog")
    assert labels(source) == {"cat/0.jpg": 0, "dog/0.JPG": 1}
    assert source.ignored == {
        "folder .ipynb_checkpoints": 2,
        "folder __MACOSX": 1,
        "folder @eaDir": 1,
        "hidden .jpg": 1,
        ".db": 1,
        ".DS_Store": 1,
        "without suffix": 1,
    }
    assert list_folder(tmp_path).classes == ("cat", "dog")


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "jfif", "Png", "webp", "BMP", "tif", "TIFF", "gif", "jp2"])
def test_images_are_recognized_by_their_suffix(tmp_path: Path, suffix: str) -> None:
    assert len(list_source(touch(tmp_path, f"a.{suffix}", "b.jpg.bak")).files) == 1


def test_doubtful_class_folders_are_reported(tmp_path: Path) -> None:
    touch(tmp_path / "all", "train/cat/0.jpg", "train/dog/1.jpg", "empty/readme.txt")
    empty, nested, only = list_source(tmp_path / "all").remarks
    assert empty.startswith("folders without images are not classes: 'empty'; --classes FILE")
    assert "images in 'train/cat' have class 'train'" in nested
    assert nested.endswith(f"pack {tmp_path / 'all' / 'train'}")
    assert only.startswith("'train' is the only class; if it is not one, --no-labels")
    assert list_source(tmp_path / "all", labels=False).remarks == ()
    assert list_source(touch(tmp_path / "usual", "cat/0.jpg", "dog/0.jpg")).remarks == ()


def test_images_next_to_class_folders_leave_all_unlabeled(tmp_path: Path) -> None:
    source = list_source(touch(tmp_path, "0.jpg", "1.jpg", "cat/2.jpg"))
    assert (source.unsorted, source.classes, set(labels(source).values())) == (2, (), {-1})
    assert list_source(tmp_path, labels=False).unsorted == 0
    assert list_source(touch(tmp_path / "flat", "0.jpg", "notes/a.txt")).unsorted == 0
    with pytest.raises(ValueError, match=r"images \(1\) are not in a class folder"):
        list_source(tmp_path / "flat", classes_file(tmp_path / "c.txt", "cat"))


def classes_file(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_given_classes_keep_their_numbers(tmp_path: Path) -> None:
    touch(tmp_path / "val", "cow/0.jpg", "ant/0.jpg")
    (tmp_path / "val" / "bee").mkdir()
    source = list_source(tmp_path / "val", classes_file(tmp_path / "c.txt", "cow", "bee", "ant"))
    assert source.classes == ("cow", "bee", "ant")
    assert labels(source) == {"ant/0.jpg": 2, "cow/0.jpg": 0}
    touch(tmp_path / "val", "dog/0.jpg", "eel/0.jpg")
    with pytest.raises(ValueError, match="folders that are not in --classes: 'dog', 'eel'"):
        list_source(tmp_path / "val", tmp_path / "c.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat\ndog\ncat\n", "line 3: 'cat' is already on line 1"),
        (b"cat\n\ndog\n", "line 2: is empty"),
        (b"cat\ndog\n\n", "line 3: is empty"),
        (b"", "is empty"),
        (b"na\xefve\nthe\nna\xefve\n", r"line 3: 'na\\xefve' is already on line 1"),
    ],
)
def test_invalid_class_lists_are_rejected(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "c.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list_source(touch(tmp_path / "in", "cat/0.jpg"), tmp_path / "c.txt")
    with pytest.raises(ValueError, match="no such file"):
        list_source(tmp_path / "in", tmp_path / "other.txt")


def test_class_names_in_other_encodings(tmp_path: Path) -> None:
    """A Latin-1 folder name, a class list from Windows, and decomposed accents as on macOS."""
    touch(tmp_path / "in", b"na\xefve/x.jpg", unicodedata.normalize("NFD", "thé") + "/x.jpg")
    source = list_source(tmp_path / "in")
    assert source.classes == (r"na\xefve", unicodedata.normalize("NFD", "thé"))
    assert r"not UTF-8 are written like this: 'na\xefve'" in source.remarks[0]
    assert [file.key for file in source.files] == ["na_xefve/x", "the_/x"]
    (tmp_path / "c.txt").write_bytes("\ufeffthé\r\n".encode() + b"na\xefve\r\n")
    source = list_source(tmp_path / "in", tmp_path / "c.txt")
    assert source.classes == ("thé", r"na\xefve")
    assert [file.label for file in source.files] == [1, 0]
    with pytest.raises(ValueError, match="differ only in how accents are encoded: 'thé'"):
        list_source(touch(tmp_path / "twice", "thé/x.jpg", unicodedata.normalize("NFD", "thé") + "/y.jpg"))
    with pytest.raises(ValueError, match=r"line breaks: rename 'a\\nb'"):
        list_source(touch(tmp_path / "in", "a\nb/x.jpg"))


def test_unreadable_files_and_folders_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "cat/0.jpg", "cat/1.jpg", "dog/0.jpg")
    (tmp_path / "cat" / "2.jpg").symlink_to(tmp_path / "nowhere.jpg")
    scandir, access = os.scandir, os.access

    def closed(path: str) -> object:
        if path.endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(sources.os, "scandir", closed)  # root can read everything
    monkeypatch.setattr(sources.os, "access", lambda path, mode: "1.jpg" not in path and access(path, mode))
    with pytest.raises(ValueError, match=r"files or folders that cannot be read, .*'cat/1.jpg', 'cat/2.jpg', 'dog/'"):
        list_source(tmp_path)


def test_special_files_are_not_opened(tmp_path: Path) -> None:
    """Reading one would block forever or never end."""
    touch(tmp_path, "cat/1.jpg")
    os.mkfifo(tmp_path / "cat" / "2.jpg")
    (tmp_path / "cat" / "3.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "cat" / "4.jpg"))
        source = list_source(tmp_path)
    assert [file.name for file in source.files] == ["cat/1.jpg"]
    assert source.ignored == {"special file": 3}
    (tmp_path / "list.txt").write_text("cat/2.jpg\n")
    with pytest.raises(ValueError, match=r"'cat/2\.jpg' is not a file"):
        list_source(tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.tar", "1 .tar; shards .* need no packing"),
        ("photos.zip", "1 .zip; unpack archives first"),
        ("a.DNG", "1 .dng; convert other formats to JPEG or PNG first"),
        ("IMG_1", "1 without suffix"),
        (".cache/a.jpg", "1 folder .cache"),
    ],
)
def test_folder_without_images_reports_what_it_has(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"no images .* in it; found {message}"):
        list_source(touch(tmp_path, name))
