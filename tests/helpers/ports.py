"""Free ports for rendezvous of ranks."""

import itertools
import os
import socket

# Below the kernel's ephemeral ports and those that we give to `deepspeed`.
_FIRST, _COUNT = 10_000, 10_000
_places = itertools.count(os.getpid() * 101)  # test processes run in parallel


def free_port() -> int:
    """Return a free port that was not returned before."""
    for place in itertools.islice(_places, _COUNT):
        port = _FIRST + place % _COUNT
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise OSError(f"no port from {_FIRST} on is free")
