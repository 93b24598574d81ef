"""Ports for ranks to meet at."""

import itertools
import os
import socket

# Below the ports that the kernel gives out to whatever connects, and those that `deepspeed` gets from us.
_FIRST, _COUNT = 10_000, 10_000
_places = itertools.count(os.getpid() * 101)  # test processes run beside each other


def free_port() -> int:
    """Each once."""
    for place in itertools.islice(_places, _COUNT):
        port = _FIRST + place % _COUNT
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise OSError(f"no port from {_FIRST} on is free")
