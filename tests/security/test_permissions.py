"""Files are created with the permissions of the user's umask."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import originals
from helpers.shard_tools import jpeg

from data.index import load_index
from data.pack import pack
from data.sources import list_source
from downstream.checkpoints.export import export_encoder
from pretrain import fit_pca
from pretrain.trainer.checkpoint_layout import EMA_FILE
from pretrain.trainer.durable import write_durably
from pretrain.trainer.ema import EMA
from pretrain.trainer.run_folder import RunFolder
from pretrain.trainer.safetensors_file import save_state_dict

UMASK = 0o027


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(UMASK)
    yield
    os.umask(before)


def assert_follows_umask(folder: Path) -> None:
    for path in folder.rglob("*"):
        expected = (0o777 if path.is_dir() else 0o666) & ~UMASK
        assert path.stat().st_mode & 0o777 == expected, path


def test_shards_index_and_pca_components_follow_the_umask(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    for number in range(20):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(jpeg(number))
    pack(list_source(tmp_path / "photos"), tmp_path / "shards")
    load_index(tmp_path / "shards")
    out = tmp_path / "pca" / "pca.safetensors"
    arguments = ["--patch-size", "4", "--components", "4", "--images", "20", "--image-size", "16", "--num-workers", "0"]
    assert fit_pca.main([str(tmp_path / "shards"), str(out), *arguments]) == 0
    assert_follows_umask(tmp_path)


@pytest.mark.parametrize(("kind", "name"), [("timm", "a.safetensors"), ("mm", "a.pth"), ("hf", "a")])
def test_exports_follow_the_umask(kind: str, name: str, tmp_path: Path):
    encoder = originals.vit().state_dict()
    torch.save({"model": encoder}, tmp_path / "mae.pth")
    export_encoder(tmp_path / "mae.pth", tmp_path / "out" / name, kind)
    assert_follows_umask(tmp_path / "out")


def test_run_files_follow_the_umask(tmp_path: Path):
    """Files that need no engine. tests/engine/test_private_runs.py checks the folder of a whole run."""
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        folder.write_environment()
        write_durably(folder.root / "latest", "step_00000005")
        average = EMA(torch.nn.Linear(2, 2), [], 0.5, 1, torch.device("cpu"))
        save_state_dict(average.state_dict(), {}, folder.root / EMA_FILE)
    assert_follows_umask(tmp_path)
