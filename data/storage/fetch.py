"""Requests to stores, repeated with backoff up to a deadline; a stall is reported while it lasts."""

import io
import logging
import random
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TypeVar

from data.storage.client import CHUNK, Object, Store, StoreError, TransientError, open_store
from data.storage.location import Remote

DEFAULT_TIMEOUT = 600.0  # seconds; less than the data workers' own
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two attempts
_CONNECTIONS = 4  # silent ones that fit into the timeout, at least
STALLED = 30.0  # seconds without a byte before a warning; the next one comes at twice as many, and so on

Result = TypeVar("Result")
_log = logging.getLogger(__name__)


def request(remote: Remote, what: Callable[[Store], Result], timeout: float = DEFAULT_TIMEOUT) -> Result:
    """Calls ``what(store)`` with the location's store, and repeats it if that may help.

    Args:
        remote: the location, also for messages.
        timeout: seconds.

    Raises:
        StoreError: retrying does not help, or time is up; names the location and the last error.
    """
    with _Attempts(remote, timeout) as attempts:
        while True:
            try:
                return what(open_store(remote.scheme, remote.authority, timeout / _CONNECTIONS))
            except TransientError as error:
                attempts.pause(error)


def download(
    remote: Remote, expected: Object | None = None, timeout: float = DEFAULT_TIMEOUT, start: int = 0
) -> Generator[bytes, None, None]:
    """Yields the bytes of a file from `start` on; continues where a connection broke.

    Args:
        remote: the file.
        expected: its size and version; a file with others is refused.
        timeout: seconds without new bytes.

    Raises:
        StoreError: as in `request`, or the file is not the expected one.
    """
    position, seen = start, expected
    with _Attempts(remote, timeout) as attempts:
        while True:
            try:
                store = open_store(remote.scheme, remote.authority, timeout / _CONNECTIONS)
                begin = position
                try:
                    found, chunks = store.read(remote, begin)
                except NotImplementedError:  # the store only gives whole files
                    begin = 0
                    found, chunks = store.read(remote)
                seen = _same(remote, seen, found)
                for chunk in chunks:
                    new = chunk[max(position - begin, 0) :]  # without what a broken connection had brought already
                    begin += len(chunk)
                    if new:
                        position += len(new)
                        attempts.waits = False  # the consumer may take long
                        yield new
                        attempts.progress()
                if position == seen.size:
                    return
                raise TransientError(f"the connection ended after {position} of {seen.size} bytes")
            except TransientError as error:
                attempts.pause(error)


def _same(remote: Remote, expected: Object | None, found: Object) -> Object:
    """Returns the file's size and version; raises StoreError if they are not the expected ones."""
    if expected is None:
        return found
    if found.size != expected.size:
        raise StoreError(f"{remote}: has changed in the store, {found.size} bytes instead of {expected.size}")
    if expected.version and found.version and found.version != expected.version:
        raise StoreError(
            f"{remote}: has changed in the store since its index was made (ETag {found.version} instead of "
            f"{expected.version})"
        )
    return expected


@dataclass(eq=False)
class _Attempts:
    """One request in progress, with all its repetitions."""

    remote: Remote
    timeout: float
    count: int = 1
    last: str = ""  # what went wrong
    since: float = field(default_factory=time.monotonic)  # when bytes last came
    waits: bool = True  # for the store

    def __enter__(self) -> "_Attempts":
        _watch.add(self)
        return self

    def __exit__(self, *error: object) -> None:
        _watch.remove(self)

    def progress(self) -> None:
        """Notes that bytes have come."""
        self.since, self.count, self.waits = time.monotonic(), 1, True

    def pause(self, error: TransientError) -> None:
        """Waits for the next attempt; raises StoreError if there is none."""
        self.last = str(error)
        waited = time.monotonic() - self.since
        if error.attempts and self.count >= error.attempts:
            raise StoreError(f"{self.remote}: {self.last}") from None
        pause = min(FIRST_PAUSE * 2 ** (self.count - 1), LONGEST_PAUSE) * random.uniform(0.5, 1.0)
        if waited + pause > self.timeout:
            raise StoreError(
                f"{self.remote}: no data for {waited:.0f} seconds, in {self.count} attempts; the last error: "
                f"{self.last}; to wait longer, set data.fetch_timeout={max(2 * self.timeout, 1):.0f}"
            ) from None
        self.count += 1
        time.sleep(pause)


class _Watch:
    """Warns of stalled requests, from a thread that lives while there are requests."""

    def __init__(self) -> None:
        self._lock, self._active, self._thread = threading.Lock(), set[_Attempts](), threading.Thread()

    def add(self, attempts: _Attempts) -> None:
        with self._lock:
            self._active.add(attempts)
            if not self._thread.is_alive():
                self._thread = threading.Thread(target=self._look, daemon=True, name="stalled requests")
                self._thread.start()

    def remove(self, attempts: _Attempts) -> None:
        with self._lock:
            self._active.discard(attempts)

    def _look(self) -> None:
        said: dict[_Attempts, tuple[float, float]] = {}  # a stall's begin, and its length when last reported
        idle = 0
        while idle < 10:
            time.sleep(min(STALLED / 4, 1.0))
            with self._lock:
                active = {attempts for attempts in self._active if attempts.waits}
                idle = 0 if self._active else idle + 1
                if idle == 10:
                    self._thread = threading.Thread()
                    return
            said = {attempts: value for attempts, value in said.items() if attempts in active}
            for attempts in active:
                waited, (begin, last) = time.monotonic() - attempts.since, said.get(attempts, (0.0, 0.0))
                if waited >= (max(2 * last, STALLED) if begin == attempts.since else STALLED):
                    said[attempts] = attempts.since, waited
                    why = f" (attempt {attempts.count}; the last error: {attempts.last})" if attempts.last else ""
                    _log.warning("%s: no data for %.0f seconds%s", attempts.remote, waited, why)


_watch = _Watch()


class RemoteFile(io.RawIOBase):
    """A file in a store, read from start to end over one connection; large jumps cost another one."""

    def __init__(self, remote: Remote, expected: Object, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Makes no request; see `download`."""
        self._remote, self._expected, self._timeout = remote, expected, timeout
        self._position = 0
        self._window, self._begin = bytearray(), 0  # the last bytes that came, and their position
        self._chunks: Generator[bytes, None, None] | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._expected.size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readall(self) -> bytes:
        return self.read(self._expected.size)

    def read(self, size: int = -1) -> bytes:
        """Like a file's `read`; raises StoreError."""
        stop = self._expected.size if size < 0 else min(self._position + size, self._expected.size)
        if stop <= self._position:
            return b""
        end = self._begin + len(self._window)
        if self._chunks is None or self._position < self._begin or self._position > end + 64 * CHUNK:
            self._restart(self._position)
        while self._begin + len(self._window) < stop:
            assert self._chunks is not None
            self._window += next(self._chunks)
            old = min(self._position - CHUNK - self._begin, len(self._window))
            if old > CHUNK:  # keeps a chunk before what is read now
                del self._window[:old]
                self._begin += old
        found = bytes(self._window[self._position - self._begin : stop - self._begin])
        self._position = stop
        return found

    def close(self) -> None:
        if self._chunks is not None:
            self._chunks.close()
        super().close()

    def _restart(self, position: int) -> None:
        if self._chunks is not None:
            self._chunks.close()
        self._chunks = download(self._remote, self._expected, self._timeout, position)
        self._window, self._begin = bytearray(), position
