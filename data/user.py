"""A name and a home for libraries that want them: containers may run us as a user who has neither."""

import getpass
import os
import tempfile
from pathlib import Path

# Where libraries keep caches and settings below the home: torch's extensions and hub, matplotlib, Hugging Face; Triton.
_BELOW_HOME = {"XDG_CACHE_HOME": ".cache", "XDG_CONFIG_HOME": ".config", "TRITON_HOME": ""}


def ensure_user() -> None:
    """Sets USER if the user has no name, and variables that replace the home if it is missing or read-only.

    Torch asks for the name when its compiler is imported, and without a home `~` becomes a folder of that name in the
    working directory. The packages of this project call this on import, before they import torch. A usable home, and
    variables that are set already, are left alone.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # the latter since Python 3.13
        os.environ["USER"] = f"uid{os.getuid()}"
    home = Path(os.path.expanduser("~"))
    if home.is_absolute() and _can_write(home):
        return
    private = _private_folder()
    if not home.is_absolute():
        os.environ["HOME"] = str(private)
    for variable, name in _BELOW_HOME.items():
        os.environ.setdefault(variable, str(private / name))


def _can_write(folder: Path) -> bool:
    try:
        tempfile.TemporaryFile(dir=folder).close()  # permissions say nothing about read-only file systems
    except OSError:
        return False
    return True


def _private_folder() -> Path:
    """A folder that nobody else can write to, since libraries load code from it: the same for all ranks of a node."""
    folder = Path(tempfile.gettempdir()) / f"lomar-uid{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        is_ours = not folder.is_symlink() and folder.stat().st_uid == os.getuid() and not folder.stat().st_mode & 0o022
    except OSError:
        is_ours = False
    return folder if is_ours else Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
