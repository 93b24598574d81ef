"""The keys of samples."""

from collections.abc import Sequence

import numpy as np


class Keys(Sequence[str]):
    """The keys of all samples as one block of UTF-8: millions of Python strings would take gigabytes."""

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        self.text = text  # uint8 (bytes of all keys,)
        self.ends = ends  # int64 (samples,), where in `text` each key ends

    @classmethod
    def of(cls, keys: Sequence[str]) -> "Keys":
        """Packs strings."""
        encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
        return cls(np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([len(key) for key in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, sample: int) -> str:  # type: ignore[override]  # slices are not supported
        sample = range(len(self))[sample]
        start = int(self.ends[sample - 1]) if sample else 0
        return self.text[start : int(self.ends[sample])].tobytes().decode("utf-8", "surrogateescape")
