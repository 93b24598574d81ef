"""Stores through obstore: single requests, and their errors in plain words. `fetch.py` repeats the requests.

A store must not be used in a forked process: obstore's threads do not survive a fork, and it would wait forever.
"""

import contextlib
import functools
import importlib.util
import netrc
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from data.storage.hub import HubRepository
from data.storage.location import Remote, credentials_advice, without_secrets

CONNECT_TIMEOUT = 10.0  # seconds
READ_TIMEOUT = 60.0  # seconds without a byte, after which a connection is given up
CHUNK = 1 << 20  # bytes of a chunk; what a broken connection brought after the last one is lost
_WITHOUT_ROLE = 4  # attempts to ask for a machine's role: most machines have none
_ANY = timedelta(days=30)  # in place of the client's limit of 30 seconds for a whole shard


class StoreError(ValueError):
    """An error that retrying does not fix; says what to do."""


class NotThereError(StoreError):
    """The store has nothing of this name."""


class TransientError(Exception):
    """A request that failed and may succeed when repeated, up to `attempts` times in all."""

    def __init__(self, message: str, attempts: int | None = None) -> None:
        super().__init__(message)
        self.attempts = attempts


class Object(NamedTuple):
    """A file in a store."""

    size: int  # bytes
    version: str  # its ETag, or when it was modified; '' if the store gives neither


class Store:
    """A bucket, host or repository; each method makes one request, or one per thousand files of a list.

    Raises:
        StoreError: from every method, for errors that retrying does not fix; `NotThereError` if nothing is there.
        TransientError: for errors that may go away.
    """

    def __init__(self, root: Remote, read_timeout: float) -> None:
        self._root = root
        self._hub = HubRepository(root.authority) if root.scheme == "hf" else None
        with _translated(root):
            self._client = _client(root, self._hub, read_timeout)

    def head(self, remote: Remote) -> Object:
        """Size and version of a file."""
        import obstore

        if self._hub:
            with _translated(remote):
                return Object(*self._hub.head(remote.path))
        with _translated(remote):
            return _object(obstore.head(self._client, self._key(remote)))

    def list(self, folder: Remote) -> dict[str, Object] | None:
        """The files directly in a folder, by name; None if the store cannot list them, as at https://."""
        import obstore

        if self._root.scheme in ("http", "https"):
            return None
        with _translated(folder):
            if self._hub:
                return {name: Object(*found) for name, found in self._hub.list(folder.path).items()}
            found = obstore.list_with_delimiter(self._client, folder.path or None)["objects"]
            return {meta["path"].rpartition("/")[2]: _object(meta) for meta in found}

    def read(self, remote: Remote, start: int = 0) -> tuple[Object, Iterator[bytes]]:
        """Reads a file from byte `start` on; returns its size and version, and its bytes as they come.

        Raises:
            NotImplementedError: the store cannot give parts of files, and `start` is not 0.
        """
        import obstore
        from obstore.exceptions import NotSupportedError

        with _translated(remote):
            try:
                options: Any = {"range": {"offset": start}} if start else {}
                found = obstore.get(self._client, self._key(remote), options=options)
            except NotSupportedError:
                raise NotImplementedError from None
            return _object(found.meta, self._hub is not None), self._chunks(remote, found)

    def write(self, remote: Remote, data: Path | bytes) -> None:
        """Writes a file whole, or not at all."""
        import obstore

        if self._hub:
            raise StoreError(f"{remote}: hf:// is read-only: write into a folder, and upload it with `hf upload`")
        with _translated(remote):
            obstore.put(self._client, self._key(remote), data)

    def _chunks(self, remote: Remote, found: Any) -> Iterator[bytes]:
        with _translated(remote):
            for chunk in found.stream(min_chunk_size=CHUNK):
                yield bytes(chunk)

    def _key(self, remote: Remote) -> str:
        return self._hub.resolved(remote.path) if self._hub else remote.path


@functools.cache
def open_store(scheme: str, authority: str, read_timeout: float = READ_TIMEOUT) -> Store:
    """Opens the store of a location's `scheme` and `authority`; raises StoreError if that is not possible."""
    if importlib.util.find_spec("obstore") is None:
        raise StoreError(
            f'{scheme}://{authority}: reading it needs obstore: pip install "lomar-deepspeed[remote]", or '
            f"pip install obstore"
        )
    return Store(Remote(scheme, authority), read_timeout)


def _client(root: Remote, hub: HubRepository | None, read_timeout: float) -> Any:
    from obstore.store import GCSStore, HTTPStore, S3Store

    retries: Any = {"max_retries": 0}
    options: Any = {"connect_timeout": timedelta(seconds=CONNECT_TIMEOUT), "timeout": _ANY}
    options |= {"read_timeout": timedelta(seconds=min(READ_TIMEOUT, read_timeout))}
    if root.scheme == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        settings: Any = {"endpoint": endpoint} if endpoint else {}
        options["allow_http"] = endpoint.startswith("http://")
        settings["credential_provider"] = _profile()
        return S3Store(root.authority, client_options=options, retry_config=retries, **settings)
    if root.scheme == "gs":
        endpoint = os.environ.get("STORAGE_EMULATOR_HOST") or ""  # as in Google's own clients
        endpoint = endpoint if not endpoint or "://" in endpoint else f"http://{endpoint}"
        settings = {"base_url": endpoint, "skip_signature": True} if endpoint else {}
        options["allow_http"] = endpoint.startswith("http://")
        return GCSStore(root.authority, config=settings, client_options=options, retry_config=retries)
    url = hub.url if hub else str(root)
    options["allow_http"] = url.startswith("http://")
    if headers := hub.headers() if hub else _netrc_header(root.authority):
        options["default_headers"] = headers
    return HTTPStore.from_url(url, client_options=options, retry_config=retries)


def _profile() -> Any:
    """boto3's credentials, if there are a profile in ~/.aws and boto3, and none in the environment."""
    chosen = any(name in os.environ for name in ("AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE"))
    file = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()
    if chosen or not (file.exists() or "AWS_PROFILE" in os.environ) or importlib.util.find_spec("boto3") is None:
        return None
    from obstore.auth.boto3 import Boto3CredentialProvider

    return Boto3CredentialProvider()


def _netrc_header(authority: str) -> dict[str, str]:
    """Basic authentication with the user and password that ~/.netrc, or the file in NETRC, has for a host."""
    file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    found = netrc.netrc(file).authenticators(authority.partition(":")[0]) if file.is_file() else None
    if found is None:
        return {}
    import base64

    return {"Authorization": f"Basic {base64.b64encode(f'{found[0]}:{found[2]}'.encode()).decode()}"}


def _object(meta: Any, is_hub: bool = False) -> Object:
    """Ignores the ETag of a hub's file: it comes from the host that the hub redirects to."""
    modified = meta["last_modified"].isoformat() if meta["last_modified"].timestamp() else ""
    return Object(meta["size"], "" if is_hub else meta["e_tag"] or modified)


@contextlib.contextmanager
def _translated(remote: Remote) -> Iterator[None]:
    """Raises the client's errors as ours, without the original errors, whose text may have credentials in it."""
    from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

    try:
        yield
    except FileNotFoundError:
        raise _not_there(remote) from None
    except (PermissionDeniedError, UnauthenticatedError) as error:
        status = 403 if isinstance(error, PermissionDeniedError) else 401
        raise StoreError(
            f"{remote}: the store denies access ({status}): check the address, and that the credentials give access "
            f"to it; {credentials_advice(remote.scheme)}"
        ) from None
    except BaseError as error:
        raise _error_of(str(error), remote) from None
    except (ConnectionError, TimeoutError) as error:
        raise TransientError(without_secrets(str(error) or type(error).__name__)) from None


def _not_there(remote: Remote) -> NotThereError:
    hidden = "; private or gated repositories look missing without a token" if remote.scheme == "hf" else ""
    return NotThereError(f"{remote}: not found in the store (404): is the address right?{hidden}")


def _error_of(text: str, remote: Remote) -> Exception:
    """Interprets a client's error; its first line says what failed, and the lines below why."""
    short = without_secrets(text.partition("\n")[0])
    for kind in ("TimedOut", "ConnectionReset", "ConnectionRefused", "IncompleteMessage", "UnexpectedEof"):
        if kind in text:
            short += f" ({kind})"
    if refused := re.search(r"InvalidCertificate\(\s*(\w+)", text):
        return StoreError(
            f"{remote}: the store's certificate was rejected ({refused[1]}): put the certificate of your site's own CA "
            f"into the file that SSL_CERT_FILE names"
        )
    if "InvalidContentType" in text:
        return StoreError(
            f"{remote}: the server there does not speak TLS: is its address http:// (for s3://, the one in "
            "AWS_ENDPOINT_URL)?"
        )
    status = re.search(r"status code: (\d+)", text)
    code = int(status.group(1)) if status else 0
    if "169.254.169.254" in text:
        return TransientError(f"no credentials were found; {credentials_advice(remote.scheme)}", _WITHOUT_ROLE)
    if code == 404:  # of a bucket
        return _not_there(remote)
    if "BareRedirect" in text:
        return StoreError(f"{remote}: the bucket is in another region: set AWS_REGION")
    if (400 <= code < 500 and code not in (408, 425, 429)) or code in (501, 505):
        return StoreError(f"{remote}: the store refuses this request ({short}); {credentials_advice(remote.scheme)}")
    return TransientError(short)
