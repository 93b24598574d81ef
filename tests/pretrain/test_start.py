"""Where a new run starts (`start.*`): valid keys, the checkpoint that is found, and early errors."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers.ports import free_port

from pretrain.config import PretrainConfig, load
from pretrain.run import pretrain
from pretrain.start import check_start, find_start, load_data
from pretrain.trainer.checkpoint import check_continues
from pretrain.trainer.checkpoint_layout import MANIFEST, TrainState, manifest_text
from pretrain.trainer.durable import DurableFile
from pretrain.trainer.launch import World
from pretrain.trainer.run_folder import RunFolder

WORLD = World(0, 1, 0)


def configure(folder: Path, *overrides: str) -> PretrainConfig:
    return load("quickstart", [f"runs={folder}/runs", "name=new", "data.shards=unused", *overrides])


def own_folder(config: PretrainConfig) -> RunFolder:
    return RunFolder(Path(config.runs) / config.name)


def write_checkpoint(run: Path, step: int) -> Path:
    checkpoint = run / "checkpoints" / f"step_{step:08d}"
    checkpoint.mkdir(parents=True)
    (run / "config.yaml").touch()
    with DurableFile(checkpoint / "weights.pt") as file:
        file.write(b"weights")
    (checkpoint / MANIFEST).write_text(manifest_text(TrainState(step=step), {"weights.pt": [file.size, file.crc]}))
    return checkpoint


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["start.checkpoint=a", "start.run=b"], "set one of them"),
        (["start.run=b", "start.weights=ema"], "start.weights chooses among the weights of start.checkpoint"),
        (["start.load=encoder"], "set start.checkpoint or start.run as well"),
        (["start.run=b", "start.load=decoder"], r"start\.load=decoder: must be all, fitting or encoder"),
        (["start.checkpoint=a", "start.optimizer=true"], "moments from start.run: set that"),
        (["start.checkpoints=a"], r"unknown key start\.checkpoints: did you mean start\.checkpoint\?"),
    ],
)
def test_contradictory_or_incomplete_start_keys_are_rejected(overrides: list[str], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        configure(tmp_path, *overrides)


def test_missing_start_is_reported_before_shards_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))

    def error_of(override: str) -> str:
        config = configure(tmp_path, override)
        with pytest.raises(ValueError, match=override.split("=")[0]) as error:
            load_data(config, own_folder(config))
        return str(error.value)

    assert "no such file or folder" in error_of(f"start.checkpoint={tmp_path}/mae.pth")
    assert "is not the folder of a run: it has no config.yaml" in error_of(f"start.run={tmp_path}")
    (tmp_path / "config.yaml").touch()
    assert "has no checkpoint yet: let it run until it saves one (checkpoint.every_steps)" in error_of(
        f"start.run={tmp_path}"
    )
    with pytest.raises(ValueError, match="no such file or folder"):
        pretrain(configure(tmp_path, f"start.checkpoint={tmp_path}/mae.pth"), WORLD)


def test_start_run_uses_the_newest_intact_checkpoint(process_group: None, tmp_path: Path):
    source = tmp_path / "runs" / "old"
    older, newer = (write_checkpoint(source, step) for step in (5, 10))
    config = configure(tmp_path, f"start.run={source}")
    check_start(config, own_folder(config))
    assert find_start(config, own_folder(config), WORLD) == newer
    (newer / MANIFEST).write_text("{")
    assert find_start(config, own_folder(config), WORLD) == older
    (older / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"all of its checkpoints are damaged; start from another run, or from the"):
        find_start(config, own_folder(config), WORLD)


def test_run_with_its_own_checkpoint_ignores_start(process_group: None, tmp_path: Path):
    config = configure(tmp_path, "start.checkpoint=gone.pth")
    folder = own_folder(config)
    write_checkpoint(folder.root, 5)
    check_start(config, folder)
    assert find_start(config, folder, WORLD) is None
    assert find_start(configure(tmp_path), RunFolder(tmp_path / "another"), WORLD) is None


def test_checkpoints_older_than_the_start_section_can_be_resumed(tmp_path: Path):
    signature = configure(tmp_path).resume_signature()
    before = TrainState(resume_signature={key: value for key, value in signature.items() if key != "start"})
    check_continues(before, TrainState(resume_signature=signature))
    started = configure(tmp_path, "start.run=runs/a").resume_signature()
    with pytest.raises(ValueError, match=r"start\.run was 'unset' and is 'runs/a'"):
        check_continues(before, TrainState(resume_signature=started))


def test_new_run_advice_suggests_start_run_and_another_name(tmp_path: Path):
    assert f"start.run={tmp_path}/runs/new and another name=" in configure(tmp_path).new_run_advice
