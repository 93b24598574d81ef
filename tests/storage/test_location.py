from pathlib import Path

import pytest

from data.storage.cache import CacheSettings
from data.storage.client import StoreError, open_store
from data.storage.location import Remote, is_url, parse_location, parse_url, without_secrets


@pytest.mark.parametrize(
    ("url", "remote"),
    [
        ("s3://bucket/a/b/", Remote("s3", "bucket", "a/b")),
        ("s3a://bucket", Remote("s3", "bucket")),
        ("gcs://bucket/x.tar", Remote("gs", "bucket", "x.tar")),
        ("HTTPS://host:8443/a%20b/x.tar", Remote("https", "host:8443", "a b/x.tar")),
        ("hf://datasets/user/name/train/x.tar", Remote("hf", "datasets/user/name", "train/x.tar")),
        ("hf://datasets/user/name@v2/x.tar", Remote("hf", "datasets/user/name@v2", "x.tar")),
    ],
)
def test_urls_are_parsed(url: str, remote: Remote) -> None:
    assert parse_url(url) == remote
    assert is_url(url)
    assert is_url(Path(url))  # Path collapses the double slash
    assert parse_location(Path(url)) == remote
    assert parse_url(str(remote)) == remote


def test_local_paths_are_not_urls() -> None:
    for path in ("/data/x", "data/x:y", "~/x", "C", "."):
        assert not is_url(path)
    assert parse_location("/data/x") == Path("/data/x")


def test_join_name_and_parent() -> None:
    remote = parse_url("s3://bucket/a") / "b.tar"
    assert (str(remote), remote.name, str(remote.parent)) == ("s3://bucket/a/b.tar", "b.tar", "s3://bucket/a")
    assert str(remote.parent.parent) == "s3://bucket"


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("https://me:hunter2@host/x.tar", "netrc"),
        ("s3://AKIAhunter2:hunter2@bucket/x", "AWS_ACCESS_KEY_ID"),
        ("https://host/x.tar?X-Amz-Signature=hunter2", "presigned"),
        ("https://host/x.tar#hunter2", "presigned"),
        ("hf://me:hunter2@datasets/a/b", "HF_TOKEN"),
        ("ftp://me:hunter2@host/x", "ftp:// is not supported"),
    ],
)
def test_credentials_in_a_url_are_rejected_and_not_echoed(url: str, advice: str) -> None:
    with pytest.raises(ValueError, match=advice) as caught:
        parse_url(url)
    assert "hunter2" not in str(caught.value)


def test_secrets_are_removed_from_client_messages() -> None:
    text = "GET https://me:pw@host/x.tar?X-Amz-Credential=AKIA12345678/x&sig=1 failed (SECRET12345)"
    assert (
        without_secrets(text, {"AWS_SECRET_ACCESS_KEY": "SECRET12345"}) == "GET https://...@host/x.tar?... failed (...)"
    )


def test_incomplete_urls_are_rejected() -> None:
    for url in ("hf://user/name", "hf://datasets/user", "s3:///x"):
        with pytest.raises(ValueError, match=r"datasets/USER/NAME|no host or bucket"):
            parse_url(url)


def test_missing_client_error_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StoreError, match=r'pip install "lomar-deepspeed\[remote\]"'):
        open_store("https", "host")


def test_cache_folder_locations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert CacheSettings().path == tmp_path / "xdg" / "lomar-deepspeed" / "shards"
    monkeypatch.setenv("SLURM_TMPDIR", "/scratch/job")
    assert CacheSettings().path == Path("/scratch/job/lomar-deepspeed-shards")
    assert CacheSettings("~/x").path == tmp_path / "x"
