"""An S3-compatible server in this process, with one bucket that is initially empty."""

import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENVIRONMENT = {  # set by a user of such a server
    "AWS_ACCESS_KEY_ID": "AKIATESTHUNTER22",
    "AWS_SECRET_ACCESS_KEY": "secrethunter22secrethunter22",
    "AWS_REGION": "us-east-1",
}
BUCKET = "bucket"


@contextmanager
def serve_s3() -> Iterator[dict[str, str]]:
    """Yield the environment variables with which ``s3://bucket`` is on that server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        urllib.request.urlopen(
            urllib.request.Request(f"{environment['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST")
        )
        client().create_bucket(Bucket=BUCKET)
        yield environment
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.stop()


def client() -> object:
    """Return a boto3 client, to inspect the bucket independently."""
    import boto3

    return boto3.client("s3", region_name="us-east-1")


def put_folder(folder: Path, prefix: str) -> None:
    """Upload the files directly in a folder."""
    for path in sorted(folder.iterdir()):
        client().put_object(Bucket=BUCKET, Key=f"{prefix}/{path.name}", Body=path.read_bytes())


def names(prefix: str) -> list[str]:
    """Return the keys with a prefix."""
    found = client().list_objects_v2(Bucket=BUCKET, Prefix=prefix)
    return sorted(entry["Key"] for entry in found.get("Contents", ()))
