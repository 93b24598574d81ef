"""File lists: the accepted forms of paths and labels, and the error messages for invalid lines."""

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from data.sources import list_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of the files that the lists name; their contents are never read."""
    for name in ("a.jpg", "b.jpg", "sub/c d.jpg", "tab\there.jpg", "-1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with open(os.fsencode(tmp_path) + b"/na\xefve.jpg", "wb") as file:
        file.write(b"x")
    return tmp_path


def read(folder: Path, content: str | bytes, *classes: str) -> dict[str, int]:
    """Reads a list with this content; returns name -> label."""
    (folder / "list.txt").write_bytes(content.encode() if isinstance(content, str) else content)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    source = list_source(folder / "list.txt", folder / "classes.txt" if classes else None)
    assert source.classes == classes
    return {file.name: file.label for file in source.files}


def test_accepted_forms(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(folder, "b.jpg\t2\n\na.jpg\nsub/c d.jpg\t 0 ") == {"a.jpg": -1, "b.jpg": 2, "sub/c d.jpg": 0}
    assert read(folder, "\ufeffa.jpg\t1\r\nb.jpg\t0\r\n") == {"a.jpg": 1, "b.jpg": 0}  # from Windows
    assert read(folder, "tab\there.jpg\t3\n-1.jpg\t4\n") == {"tab\there.jpg": 3, "-1.jpg": 4}
    assert read(folder, "tab\there.jpg\n") == {"tab\there.jpg": -1}
    assert read(folder, f"{folder}/a.jpg\t1\n") == {f"{folder}/a.jpg": 1}
    assert read(folder, "./a.jpg\t1\n") == {"a.jpg": 1}
    monkeypatch.setenv("HOME", str(folder))
    assert read(folder, "~/sub/c d.jpg\t1\n") == {f"{folder}/sub/c d.jpg": 1}
    assert read(folder, b"na\xefve.jpg\t1\n") == {"na\udcefve.jpg": 1}  # the bytes of the name in the file system


def test_label_names_are_numbered_by_the_class_list(folder: Path) -> None:
    assert read(folder, "a.jpg\tdog\nb.jpg\tcat\n-1.jpg\t1\n", "cat", "dog") == {"a.jpg": 1, "b.jpg": 0, "-1.jpg": 1}
    assert read(folder, "a.jpg\t10\nb.jpg\t2\n", "1", "10", "2") == {"a.jpg": 1, "b.jpg": 2}  # names come first


def test_labels_can_be_ignored(folder: Path) -> None:
    (folder / "list.txt").write_text("a.jpg\tcat\nb.jpg\t2\n")
    assert [file.label for file in list_source(folder / "list.txt", labels=False).files] == [-1, -1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg\n../gone.jpg\n", "1 of 2 lines are invalid; .*\n  line 2: '../gone.jpg': no such file in /"),
        ("/gone.jpg\n", "line 1: '/gone.jpg': no such file$"),
        (
            "a.jpg\tcat\n",
            "line 1: the label 'cat' is not a number from 0 on; to use names as labels, give --classes FILE",
        ),
        ("a.jpg\t-1\n", "the label '-1' is not a number from 0 on"),
        ("a.jpg\t1.0\n", "the label '1.0' is not a number"),
        ("a.jpg\t2147483648\n", "the label 2147483648 exceeds 2147483647"),
        ("path\tlabel\na.jpg\t1\n", "line 1: 'path': no such file in .*; if it is a header, delete the line"),
        ("filename,label\na.jpg,1\n", "line 2: 'a.jpg,1': no such file; a comma follows the path, where a tab"),
        ("a.jpg;1\n", "a semicolon follows the path"),
        ("sub/c d.jpg 1\n", "a space follows the path"),
        ("a.jpg\t1\t2\n", "a second tab follows the path"),
        ('"a.jpg"\t1\n', "write the path without quotes and spaces"),
        (" a.jpg\t1\n", "write the path without quotes and spaces"),
        ("sub\\c d.jpg\t1\n", r"write / instead of \\"),
        ("sub\t1\n", "'sub' is not a file"),
        ("a.jpg\nb.jpg\n./a.jpg\t1\n", "line 3: 'a.jpg' is already on line 1"),
        (b"na\xe8ve.jpg\n", r"line 1: 'na\\xe8ve.jpg': no such file; the line is not UTF-8"),
        ("a.jpg".encode("utf-16"), "is UTF-16: save the list as UTF-8"),
        (b"PAR1\0\0", "not a text file"),
    ],
)
def test_invalid_lines_are_quoted(folder: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read(folder, text)


@pytest.mark.parametrize(("label", "message"), [("bee", "'bee' is not in --classes"), ("2", "2 exceeds 1, the last")])
def test_labels_missing_from_the_class_list_are_rejected(folder: Path, label: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(folder, f"a.jpg\t{label}\n", "cat", "dog")


def test_paths_relative_to_another_folder_are_rejected(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "lists").mkdir()
    (folder / "lists" / "list.txt").write_text("a.jpg\n")
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=r"'a\.jpg': no such file; paths are relative to the list's folder"):
        list_source(folder / "lists" / "list.txt")


def test_only_the_first_invalid_lines_are_shown(folder: Path) -> None:
    with pytest.raises(ValueError, match="8 of 9 lines are invalid") as caught:
        read(folder, "a.jpg\n" + "".join(f"gone{number}.jpg\n" for number in range(8)))
    assert str(caught.value).count("gone") == 5
    assert "and 3 more" in str(caught.value)


def test_archives_and_single_images_are_rejected(folder: Path) -> None:
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        archive.writestr("a.jpg", b"x")
    with tarfile.open(folder / "photos.tgz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
    for name, message in (
        ("photos.zip", "is a zip: unpack it first"),
        ("photos.tgz", "is a tar: unpack it first"),
        ("a.jpg", "is an image: give its folder"),
    ):
        with pytest.raises(ValueError, match=message):
            list_source(folder / name)
