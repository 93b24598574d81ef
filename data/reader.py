"""Reads the bytes of one sample directly from its shard."""

import errno
import os
import time
import zlib
from collections import OrderedDict

from data.image_file import check_length
from data.index_file import HOW_TO_REINDEX, Index
from data.storage.cache import POLL, ShardCache, unpin
from data.tar_members import HEADER, header_problem

MAX_OPEN_SHARDS = 256  # well under the usual limit of 1024 descriptors per process
RETRY_AFTER = (0.1, 1.0, 5.0)  # seconds
# Errors of a network file system whose server restarts or whose cached handle is stale; a retry often succeeds.
TRANSIENT = frozenset({errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN})


class ShardReader:
    """Reads samples by ``os.pread``, which has no file position: a forked worker may share its parent's descriptors.

    Descriptors are opened when first needed, kept in a small LRU, and not pickled with the reader. Shards of a store
    are read from this node's cache; `Prefetcher` fetches them in the main process.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor, the least recently used first
        self._cache, self._process = ShardCache(index.cache), os.getpid()

    def read(self, sample: int) -> bytes:
        """Reads the bytes of a sample's image file.

        Raises:
            BadImage: it is empty, or larger than any image.
            ValueError: the shard does not match the index; nothing after this point could be trusted, so it does not
                count as a bad image.
            OSError: the file system failed, repeatedly if the error is transient.
        """
        index = self.index
        shard, offset, length = index.shard_of(sample), int(index.offset[sample]), int(index.length[sample])
        check_length(length)
        # One read gets the image and the tar header before it, which costs nothing and shows that the index is right.
        block = self._pread(shard, offset - HEADER, HEADER + length)
        if len(block) != HEADER + length or header_problem(block[:HEADER], length):
            raise ValueError(
                f"{index.root / index.shards[shard]}: the index does not match this shard at byte {offset} (sample "
                f"'{index.keys[sample]}'): {HOW_TO_REINDEX}"
            )
        image = block[HEADER:]  # its checksum takes a fiftieth of the time to decode it
        if index.checksum is not None and zlib.crc32(image) != index.checksum[sample]:
            raise ValueError(
                f"{index.root / index.shards[shard]}: the bytes of sample '{index.keys[sample]}' at byte {offset} "
                f"differ from those indexed: copy the shard again, or {HOW_TO_REINDEX}"
            )
        return image

    def close(self) -> None:
        """Closes every descriptor; the reader can still be used."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _pread(self, shard: int, offset: int, count: int) -> bytes:
        for pause in (*RETRY_AFTER, None):
            try:
                return os.pread(self._descriptor(shard), count, offset)
            except FileNotFoundError as error:
                raise ValueError(
                    f"{error.filename}: the shard has disappeared since the run began: put it back"
                ) from error
            except OSError as error:
                if pause is None or error.errno not in TRANSIENT:
                    raise OSError(error.errno, f"{error.strerror} at byte {offset}", self._path(shard)) from error
                self._forget(shard)  # a stale handle stays stale: open the file again
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        if self.index.is_remote:
            for opened in [number for number, file in self._open.items() if not os.fstat(file).st_nlink]:
                self._forget(opened)  # deleted by the cache, and its room is free only when nobody has it open
        self._open[shard] = descriptor = self._open_cached(shard) if self.index.is_remote else self._open_file(shard)
        return descriptor

    def _open_file(self, shard: int) -> int:
        return os.open(self._path(shard), os.O_RDONLY | os.O_CLOEXEC)

    def _open_cached(self, shard: int) -> int:
        """Opens a cached shard; the process that made this reader fetches it, and a worker waits for it."""
        remote, what = self.index.stored(shard)
        while True:
            try:
                return os.open(self._cache.path(remote, what), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                if os.getpid() != self._process:
                    time.sleep(POLL)
                elif (descriptor := self._cache.pin(remote, what)) is not None:
                    unpin(descriptor)

    def _forget(self, shard: int) -> None:
        descriptor = self._open.pop(shard, None)
        if descriptor is not None:
            os.close(descriptor)

    def _path(self, shard: int) -> str:
        return str(self.index.root / self.index.shards[shard])

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_open": OrderedDict()}
