"""Ports are at the address that is given, and not at all addresses of the node."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.trainer.meeting import free_port, listen

ROOT = Path(__file__).parents[2]
# Meets, makes a process group as DeepSpeed does, and prints where it listens at the store's port.
_RANK = """
import os, psutil, torch.distributed as dist
from pretrain.trainer import meeting
meeting._Meeting.store = meeting._host_store()
dist.init_process_group("gloo")
port = int(os.environ["MASTER_PORT"])
print({c.laddr.ip for c in psutil.Process().net_connections("inet") if c.laddr.port == port and c.status == "LISTEN"})
os._exit(0)
"""


def test_the_store_listens_at_the_address_that_is_given() -> None:
    address = "127.0.0.5"
    rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": address, "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", _RANK]
    said = subprocess.run(command, cwd=ROOT, env={**os.environ, **rank}, capture_output=True, text=True, check=True)
    assert said.stdout == f"{{'{address}'}}\n", said.stderr


def test_where_the_address_would_not_do_torch_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert listen("192.0.2.7", free_port()) is None  # nobody's: RFC 5737
    own = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: own)
    assert listen("node17", 0) is None


def test_a_port_that_is_taken_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(OSError, match="Address already in use"):
        listen("127.0.0.1", other.getsockname()[1])
