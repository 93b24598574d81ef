"""The store listens on the given address only, not on all addresses of the node."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.trainer.meeting import free_port, listen

ROOT = Path(__file__).parents[2]
# Hosts the store, creates a process group as DeepSpeed does, and prints the addresses that it listens on.
_RANK = """
import os, psutil, torch.distributed as dist
from pretrain.trainer import meeting
meeting._Meeting.store = meeting._host_store()
dist.init_process_group("gloo")
port = int(os.environ["MASTER_PORT"])
print({c.laddr.ip for c in psutil.Process().net_connections("inet") if c.laddr.port == port and c.status == "LISTEN"})
os._exit(0)
"""


def test_store_listens_only_on_the_given_address() -> None:
    address = "127.0.0.5"
    rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": address, "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", _RANK]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **rank}, capture_output=True, text=True, check=True)
    assert done.stdout == f"{{'{address}'}}\n", done.stderr


def test_unusable_address_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert listen("192.0.2.7", free_port()) is None  # reserved for documentation by RFC 5737
    own = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: own)
    assert listen("node17", 0) is None


def test_port_in_use_raises() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(OSError, match="Address already in use"):
        listen("127.0.0.1", other.getsockname()[1])
