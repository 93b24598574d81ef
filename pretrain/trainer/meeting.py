"""Where the ranks of a run meet as soon as they have started: torch's store, before there is a process group.

Waiting here reacts to signals and reports which ranks are missing. The process group later uses the same store.
"""

import contextlib
import errno
import hashlib
import ipaddress
import logging
import os
import queue
import socket
import sys
import threading
import time
from datetime import timedelta

import psutil
import torch.distributed as dist

from pretrain.trainer.phases import SLOW, report_if_slow
from pretrain.trainer.signals import stop_if_told

_TRY = timedelta(seconds=5)  # for one attempt to reach the store
_FOREIGN = 30.0  # seconds after which whatever listens at the port is taken for another program
_POLL = 0.1
_log = logging.getLogger(__name__)


class _Meeting:
    """This process's store; the launcher's variables do not change during its life."""

    server: dist.TCPStore | None = None  # on the main rank
    store: dist.Store | None = None


def meeting_store() -> dist.Store | None:
    """The store at which this rank has met the others; None before that, or without others."""
    return _Meeting.store


def connect(timeout: timedelta) -> dist.Store:
    """A new connection to that store, for a thread other than the main one."""
    return dist.PrefixStore(_token(), _connect(timeout))


def meet(rank: int, size: int) -> None:
    """Waits until all ranks have started; called after `find_world`.

    Raises:
        ValueError: the port is taken by another program or run; on all ranks.
        Stopped: a signal came.
    """
    hosts_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun has one
    if hosts_store and _Meeting.server is None:
        _Meeting.server = _host_store()
    if size == 1 or _Meeting.store is not None:
        return
    with report_if_slow(f"waiting for all {size} ranks to start"):
        store = _Meeting.server or _find_store()
        _introduce(store, rank)
        _Meeting.store = dist.PrefixStore(_token(), store)
        _wait_for_all(_Meeting.store, rank, size)


def _connect(timeout: timedelta) -> dist.TCPStore:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)


def _host_store() -> dist.TCPStore:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        # multi_tenant: torch's own store, for the process group, then uses the same server.
        return dist.TCPStore(
            host, port, is_master=True, wait_for_workers=False, multi_tenant=True, master_listen_fd=listen(host, port)
        )
    except OSError as error:  # torch's network errors are RuntimeErrors
        if error.errno != errno.EADDRINUSE:
            raise
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
    raise ValueError(_port_in_use(port))


def listen(host: str, port: int) -> int | None:
    """The descriptor of a socket at the host's address alone; torch would listen at all addresses of the node.

    None leaves it to torch: if the address does not belong to this node, as behind a load balancer, or if the host's
    name is a loopback address here (127.0.1.1 in Debian's /etc/hosts), which no other node could reach.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    if ipaddress.ip_address(address[0]).is_loopback and host not in ("localhost", address[0]):
        return None
    try:
        return socket.create_server(address[:2], family=family, backlog=2048).detach()
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
    return None


def _find_store() -> dist.TCPStore:
    """Connects to the store as soon as the main rank has made it."""
    tries: queue.Queue[dist.TCPStore | None] = queue.Queue()

    def attempt() -> None:
        found = None
        with contextlib.suppress(RuntimeError):  # torch's network errors: nothing listens yet
            found = _connect(_TRY)
        tries.put(found)

    while True:
        # In a thread: if something else listens there and does not answer, torch waits forever.
        threading.Thread(target=attempt, daemon=True).start()
        start = time.monotonic()
        while tries.empty():
            stop_if_told("the main rank to start")
            if time.monotonic() - start > _FOREIGN:
                raise ValueError(_foreign(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
            time.sleep(_POLL)
        if found := tries.get():
            return found


def _introduce(store: dist.TCPStore, rank: int) -> None:
    """Raises ValueError if the store belongs to another run, or to an earlier start of this one."""
    token, attempt = _token(), os.environ.get("TORCHELASTIC_RESTART_COUNT")
    run = f"lomar/run/{attempt or 0}"
    if rank == 0:
        store.set(run, token)
    start = time.monotonic()
    while not store.check([run]):
        stop_if_told("the main rank to start")
        if attempt is None and time.monotonic() - start > _FOREIGN:  # torchrun's store exists before the main rank
            raise ValueError(_foreign(store.host, store.port))
        time.sleep(_POLL)
    if store.get(run).decode() != token or store.add(f"{token}/here/{rank}", 1) != 1:
        raise ValueError(_foreign(store.host, store.port))


def _wait_for_all(store: dist.Store, rank: int, size: int) -> None:
    """The main rank checks who has arrived, and tells the others when all have."""
    start, mention, missing = time.monotonic(), SLOW, list(range(size)) if rank == 0 else []
    while not store.check(["all"]):
        missing = [other for other in missing if not store.check([f"here/{other}"])]
        if rank == 0 and not missing:
            store.set("all", "")
            return
        names = _ranks(missing) if rank == 0 else "other ranks"
        stop_if_told(f"{names} to start")
        if rank == 0 and time.monotonic() - start > mention:
            _log.warning("%s have not started: check the logs of their nodes", names)
            mention *= 3
        time.sleep(_POLL)


def _ranks(missing: list[int]) -> str:
    shown = ", ".join(map(str, missing[:16]))
    return f"ranks {shown}{' and others' if len(missing) > 16 else ''}"


def _token() -> str:
    """A token that is the same on all ranks of a start, and differs from other runs' as far as can be told."""
    env = os.environ
    facts = [env["WORLD_SIZE"], *(word for word in sys.argv[1:] if not word.startswith("--local_rank"))]
    names = (
        "SLURM_JOB_ID",
        "SLURM_STEP_ID",
        "SLURM_RESTART_COUNT",
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_RESTART_COUNT",
    )
    facts += [env.get(name, "") for name in names]
    if env.get("LOCAL_SIZE") == env["WORLD_SIZE"]:  # one DeepSpeed launcher has started all ranks
        facts.append(str(os.getppid()))
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


def _foreign(host: str, port: int) -> str:
    return (
        f"port {port} of {host} is used by another program or run, not by this run's main rank: "
        f"stop it, or choose another port: deepspeed (or torchrun) --master_port={free_port()} ..."
    )


def free_port() -> int:
    """A port that nobody on this machine is using."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _port_in_use(port: int) -> str:
    """Says who listens on a port, and what to do."""
    try:
        listening = {c.pid for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.pid}
        command = " ".join(psutil.Process(min(listening)).cmdline()) if listening else ""
    except (psutil.Error, OSError):  # other users' processes are not shown everywhere
        listening, command = set(), ""
    owner = f"process {min(listening)} ({command})" if command else "another process on this machine"
    return (
        f"port {port} is already in use by {owner}. If that is this same run, still running, "
        f"`kill {min(listening, default='PID')}` saves and stops it. To start another run beside it, choose another "
        f"port: deepspeed (or torchrun) --master_port={free_port()} ..."
    )
