"""Fixtures: a tiny data set in ADE20K's layout and a tiny segmentor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_ade import make_ade
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import downstream.dense.mmengine.config_file  # noqa: F401 - tells mmengine what mmseg's package is called
from downstream.segment.segmentor_keys import propagate_keys

CONFIG = Path(__file__).parents[1] / "helpers" / "tiny_upernet.py"


@pytest.fixture(scope="module")
def ade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two training and three validation images."""
    return make_ade(tmp_path_factory.mktemp("ade") / "set", train=2, val=3)


@pytest.fixture(scope="module")
def cfg(ade: Path) -> Config:
    cfg = Config.fromfile(CONFIG)
    cfg.data_root = str(ade)
    propagate_keys(cfg)
    return cfg


@pytest.fixture(scope="module")
def model(cfg: Config) -> Any:
    """A model whose running statistics and classifier differ from those of a new one."""
    init_default_scope("mmseg")
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            tensor.add_(0.5 * torch.rand(tensor.shape))
    model.decode_head.conv_seg.weight.data.normal_()
    return model.eval()
