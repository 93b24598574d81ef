"""The small-scale experiment: every compared variant can be configured, on a CPU and on a GPU."""

import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from pretrain.config import load
from pretrain.models.vit import ARCHS, Arch
from pretrain.trainer.launch import World

FOLDER = Path(__file__).parents[2] / "benchmarks" / "small_scale"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch):
    """The scripts import each other as top-level modules."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in ("variants", "trainings", "cpu", "gpu"):
        sys.modules.pop(name, None)


def test_every_variant_can_be_configured_on_a_cpu():
    from cpu import CPU, Job
    from variants import variants

    with patch.dict(ARCHS, vit_tiny=Arch(CPU.dim, CPU.depth, CPU.dim // 64)):
        for name, variant in variants(CPU).items():
            keys = ["data.shards=none", f"name={Job('test', name, 8).name}", *CPU.model, *variant.keys]
            config = load(str(FOLDER / "pretrain.yaml"), keys)
            assert config.grid == (14, 14)


def test_every_variant_can_be_configured_on_a_gpu(tmp_path: Path):
    import gpu

    with patch.object(gpu, "find_world", lambda: World(0, 1, 0)), patch.object(gpu, "run_pretraining") as run:
        evidence = gpu.Evidence(tmp_path, tmp_path, 1, gpu.GPU)
        for name in gpu.COMPARED:
            evidence.pretrain(gpu.label(name), name, 3)
            assert load(str(FOLDER / "pretrain.yaml"), run.call_args.args[1]).grid == (14, 14)
