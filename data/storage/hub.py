"""Repositories of the Hugging Face hub: names and addresses of their files; the bytes are read as from any host."""

from typing import Any

from data.storage.location import without_secrets


class HubRepository:
    """A data set's repository at one revision."""

    def __init__(self, authority: str) -> None:
        """Makes no request.

        Args:
            authority: ``datasets/USER/NAME``, or ``datasets/USER/NAME@REVISION``.
        """
        from huggingface_hub import constants

        self._name, _, revision = authority.removeprefix("datasets/").partition("@")
        self._revision = revision or constants.DEFAULT_REVISION
        self.url = f"{constants.ENDPOINT}/datasets/{self._name}"

    def resolved(self, path: str) -> str:
        """The path below `url` of a file's bytes."""
        return f"resolve/{self._revision}/{path}"

    def headers(self) -> dict[str, str]:
        """A header with the user's token, if there is one."""
        from huggingface_hub import get_token

        token = get_token()
        return {"Authorization": f"Bearer {token}"} if token else {}

    def head(self, path: str) -> tuple[int, str]:
        """Size and digest of a file; raises like `list`."""
        folder, _, name = path.rpartition("/")
        files = self.list(folder)
        if name not in files:
            raise FileNotFoundError(path)
        return files[name]

    def list(self, folder: str) -> dict[str, tuple[int, str]]:
        """Sizes and digests of the files directly in a folder, by name.

        Raises:
            FileNotFoundError: there is no such folder, or the token may not see it.
            ConnectionError: the hub did not answer.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        try:
            found = HfApi().list_repo_tree(
                self._name, folder or None, repo_type="dataset", revision=self._revision, recursive=False
            )
            files = [file for file in found if isinstance(file, RepoFile)]
        except Exception as error:  # from several HTTP libraries
            message = without_secrets(f"{type(error).__name__}: {error}".partition("\n")[0])
            if getattr(getattr(error, "response", None), "status_code", None) in (401, 403, 404):
                raise FileNotFoundError(message) from None
            raise ConnectionError(message) from None
        return {file.path.rpartition("/")[2]: (file.size, _digest(file)) for file in files}


def _digest(file: Any) -> str:
    return str(file.lfs.sha256 if file.lfs else file.blob_id)
