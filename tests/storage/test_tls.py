"""Untrusted certificates and servers without TLS are reported at once, without ten minutes of retries."""

import datetime
import http.server
import ssl
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from helpers.file_server import FileServer

from data.storage.client import StoreError, open_store
from data.storage.files import look_up
from data.storage.location import parse_url


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """A folder with `authority.pem`, a CA certificate, and `host.pem`, a host certificate signed by it, with key."""
    now, keys = (
        datetime.datetime.now(datetime.timezone.utc),
        [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)],
    )
    issuer, subject = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("a site's", "localhost"))
    certificates = []
    for name, key, names in ((issuer, keys[0], []), (subject, keys[1], [x509.DNSName("localhost")])):
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(issuer).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(1))
        builder = builder.not_valid_after(now + datetime.timedelta(1))
        builder = builder.add_extension(x509.BasicConstraints(not names, None), critical=True)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificates.append(builder.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    private = keys[1].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "authority.pem").write_bytes(certificates[0])
    (tmp_path / "host.pem").write_bytes(certificates[1] + private)
    return tmp_path


@pytest.fixture
def port(authority: Path, shards: Path) -> Iterator[int]:
    """Port of an HTTPS server that serves the shards with this certificate."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(authority / "host.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_certificate_of_an_unknown_authority_is_rejected(
    authority: Path, port: int, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = parse_url(f"https://localhost:{port}/t-0.tar")
    with pytest.raises(StoreError, match=r"certificate was rejected \(UnknownIssuer\): .* SSL_CERT_FILE"):
        look_up(remote)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority / "authority.pem"))
    open_store.cache_clear()
    assert look_up(remote).size == (shards / "t-0.tar").stat().st_size


def test_server_without_tls_is_reported(server: FileServer) -> None:
    with pytest.raises(StoreError, match="does not speak TLS: is its address http://"):
        look_up(parse_url(f"{server.url.replace('http:', 'https:')}/shards/t-0.tar"))
