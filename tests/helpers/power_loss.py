"""Simulates what a power loss leaves of a folder: calls that change it are recorded and replayed up to any point.

A file has the bytes of its last `fsync` or its current ones, since a disk may write earlier than it must. A folder has
the names of its last `fsync`, plus any subset of later changes, in any order. Renames are atomic.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

Step = tuple[str, ...]  # a recorded call and its paths, and for a write its bytes as Latin-1
Tree = dict[str, bytes]  # path -> content; empty folders are left out


class Recorder:
    """Records in `steps` what functions of `os` do below `root`."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        self.steps: list[Step] = []
        self._root, self._paths = root, {}
        for name in ("open", "close", "write", "fsync", "replace", "mkdir", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self._recorded(name, getattr(os, name)))

    def _recorded(self, name: str, call: Any) -> Any:
        def recorded(*arguments: Any, **keys: Any) -> Any:
            result = call(*arguments, **keys)
            getattr(self, f"_{name}", self._changed)(name, result, *arguments, **keys)
            return result

        return recorded

    def _below(self, path: Any, dir_fd: int | None = None) -> str | None:
        whole = Path(self._paths.get(dir_fd, "/") if dir_fd is not None else os.getcwd()) / os.fsdecode(path)
        return str(whole.relative_to(self._root)) if whole.is_relative_to(self._root) else None

    def _open(self, _: str, result: int, path: Any, flags: int, mode: int = 0, *, dir_fd: int | None = None) -> None:
        if (below := self._below(path, dir_fd)) is not None:
            self._paths[result] = self._root / below
            if flags & (os.O_CREAT | os.O_TRUNC):
                self.steps.append(("create", below))

    def _close(self, _: str, result: None, descriptor: int) -> None:
        self._paths.pop(descriptor, None)

    def _write(self, _: str, result: int, descriptor: int, data: Any) -> None:
        if descriptor in self._paths:
            path = str(self._paths[descriptor].relative_to(self._root))
            self.steps.append(("write", path, bytes(data[:result]).decode("latin-1")))

    def _fsync(self, _: str, result: None, descriptor: int) -> None:
        if descriptor in self._paths:
            kind = "sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync"
            self.steps.append((kind, str(self._paths[descriptor].relative_to(self._root))))

    def _replace(self, _: str, result: None, source: Any, target: Any) -> None:
        if (below := self._below(source)) is not None:
            self.steps.append(("rename", below, str(self._below(target))))

    def _changed(self, name: str, result: None, path: Any, *_: Any, dir_fd: int | None = None) -> None:
        if (below := self._below(path, dir_fd)) is not None:
            self.steps.append(("create folder" if name == "mkdir" else "remove", below))


@dataclass(eq=False)
class _File:
    now: bytes = b""
    synced: bytes = b""


@dataclass(eq=False)
class _Folder:
    now: dict[str, Any] = field(default_factory=dict)
    synced: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class _Change:
    """An unsynced change of names: each gets a node or is removed, and all of them change or none."""

    names: list[tuple[_Folder, str, Any]]

    def apply(self, entries: dict[int, dict[str, Any]]) -> None:
        for folder, name, node in self.names:
            here = entries.setdefault(id(folder), dict(folder.synced))
            if node is None:
                here.pop(name, None)
            else:
                here[name] = node


class Disk:
    """A file system to which recorded steps are applied."""

    def __init__(self) -> None:
        self._root, self._changes = _Folder(), list[_Change]()

    def do(self, step: Step) -> None:
        name, path, *more = step
        if name == "sync folder":
            folder = self._find(path)
            done = [change for change in self._changes if any(place[0] is folder for place in change.names)]
            self._changes = [change for change in self._changes if change not in done]
            entries: dict[int, dict[str, Any]] = {}
            touched = {id(place[0]): place[0] for change in done for place in change.names}
            for change in done:
                change.apply(entries)
            for key, names in entries.items():
                touched[key].synced = names
        elif name == "sync":
            self._find(path).synced = self._find(path).now
        elif name == "write":
            self._find(path).now += more[0].encode("latin-1")
        elif name == "create" and isinstance(old := self._parent(path).now.get(Path(path).name), _File):
            old.now = b""
        elif name == "rename":
            node = self._find(path)
            self._change((path, None), (more[0], node))
        else:
            node = {"create": _File, "create folder": _Folder, "remove": lambda: None}[name]()
            self._change((path, node))

    def after_power_loss(self) -> Iterator[Tree]:
        """Yield possible remains: none of the unsynced changes, all of them, each alone, and all but each."""
        every = self._changes
        chosen: list[Sequence[_Change]] = [[], every]
        for number in range(len(every)):
            chosen += [[every[number]], every[:number] + every[number + 1 :]]
        for changes in chosen:
            entries: dict[int, dict[str, Any]] = {}
            for change in changes:
                change.apply(entries)
            for quick in (False, True):
                yield dict(self._tree(self._root, "", entries, quick))

    def _tree(self, folder: _Folder, path: str, entries: Any, quick: bool) -> Iterator[tuple[str, bytes]]:
        for name, node in entries.get(id(folder), folder.synced).items():
            if isinstance(node, _Folder):
                yield from self._tree(node, f"{path}{name}/", entries, quick)
            else:
                yield path + name, node.now if quick else node.synced

    def _parent(self, path: str) -> _Folder:
        folder: Any = self._root
        for part in Path(path).parts[:-1]:
            folder = folder.now[part]
        return folder

    def _find(self, path: str) -> Any:
        return self._root if path == "." else self._parent(path).now[Path(path).name]

    def _change(self, *changes: tuple[str, Any]) -> None:
        places = [(self._parent(path), Path(path).name, node) for path, node in changes]
        for folder, name, node in places:
            if node is None:
                del folder.now[name]
            else:
                folder.now[name] = node
        self._changes.append(_Change(places))
