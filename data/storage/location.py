"""Locations: local paths, or URLs without credentials. No I/O."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

SCHEMES = ("https", "http", "s3", "gs", "hf")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/{1,2}(.*)", re.DOTALL)
# Environment variables whose values appear in no message: AWS_ACCESS_KEY_ID, HF_TOKEN, WANDB_API_KEY and the like.
_SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|KEY|KEY_ID)$", re.IGNORECASE)
_REPOSITORY = "hf://datasets/USER/NAME/FOLDER, or hf://datasets/USER/NAME@REVISION/FOLDER"


@dataclass(frozen=True, order=True)
class Remote:
    """A folder or file in a store, by its URL; used like a ``Path``.

    Attributes:
        scheme: one of `SCHEMES`.
        authority: host and port, the bucket, or for hf:// the repository with its revision.
        path: below that, without slashes at its ends.
    """

    scheme: str
    authority: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{f'/{self.path}' if self.path else ''}"

    def __truediv__(self, name: str) -> "Remote":
        return Remote(self.scheme, self.authority, f"{self.path}/{name}".strip("/"))

    @property
    def name(self) -> str:
        """The part after the last slash."""
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> "Remote":
        """The folder that it is in."""
        return Remote(self.scheme, self.authority, self.path.rpartition("/")[0])


Location = Path | Remote


def is_url(text: str | Path | Remote) -> bool:
    """Whether this is a URL, of whatever scheme; also if it was made a ``Path``, which loses a slash."""
    return isinstance(text, Remote) or bool(_URL.match(str(text)))


def parse_location(text: str | Path | Remote) -> Location:
    """Returns a path with ``~`` expanded, or what `parse_url` makes of a URL."""
    if isinstance(text, Remote):
        return text
    return parse_url(str(text)) if is_url(text) else Path(text).expanduser()


def parse_url(url: str) -> Remote:
    """Parses a URL.

    Raises:
        ValueError: an unsupported scheme, or credentials in it, which the message does not repeat.
    """
    match = _URL.match(url)
    assert match is not None
    scheme, rest = match.group(1).lower(), match.group(2)
    scheme = {"s3a": "s3", "gcs": "gs"}.get(scheme, scheme)
    if scheme not in SCHEMES:
        raise ValueError(
            f"{without_secrets(url)}: {scheme}:// is not supported; shards must be in a folder, or at {_listed()}"
        )
    authority, _, path = rest.partition("/")
    if "@" in authority:
        host = authority.rpartition("@")[2]
        raise ValueError(
            f"{scheme}://...@{host}: a URL is written into logs and recipes, so it must not contain a user name and "
            f"password: {'put them into ~/.netrc' if scheme.startswith('http') else credentials_advice(scheme)}"
        )
    if "?" in url or "#" in url:
        raise ValueError(
            f"{re.split('[?#]', url)[0]}: a URL is written into logs and recipes, so it must not contain ? or #, "
            f"after which presigned URLs have their credentials: {credentials_advice(scheme)}"
        )
    if not authority:
        raise ValueError(f"{url}: no host or bucket in it: write it as in s3://bucket/folder")
    if scheme == "hf":
        authority, path = _repository(url, authority, path)
    return Remote(scheme, authority, unquote(path).strip("/") if scheme.startswith("http") else path.strip("/"))


def credentials_advice(scheme: str) -> str:
    """Where a store's client looks for credentials."""
    return {
        "s3": "credentials are taken from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the machine's role or ~/.aws; "
        "AWS_REGION and AWS_ENDPOINT_URL set region and endpoint, and AWS_SKIP_SIGNATURE=true reads public buckets",
        "gs": "credentials are taken from GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login` or "
        "the machine's role; GOOGLE_SKIP_SIGNATURE=true reads public buckets",
        "hf": "the token is taken from `hf auth login` or HF_TOKEN",
    }.get(scheme, "user name and password are taken from ~/.netrc")


def without_secrets(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """A message without the query strings, users and passwords of URLs, and without keys from the environment.

    A URL that was made a ``Path`` has only one slash after its scheme.
    """
    text = re.sub(r"(:/{1,2})[^\s?#/]*@", r"\1...@", text)
    text = re.sub(r"(:/{1,2}[^\s?\"')]*)[?][^\s\"')]*", r"\1?...", text)
    for name, value in environment.items():
        if _SECRET.search(name) and len(value) >= 8:
            text = text.replace(value, "...")
    return text


def _listed() -> str:
    return ", ".join(f"{scheme}://" for scheme in SCHEMES if scheme != "http")


def _repository(url: str, kind: str, path: str) -> tuple[str, str]:
    """The repository, as `datasets/USER/NAME@REVISION`, and the path in it."""
    parts = path.strip("/").split("/")
    if kind != "datasets" or len(parts) < 2 or not all(parts[:2]):
        raise ValueError(f"{url}: data sets are at {_REPOSITORY}")
    return f"datasets/{parts[0]}/{parts[1]}", "/".join(parts[2:])
