"""`method.module`: a custom method from a file outside the project, here the example in CONTRIBUTING.md."""

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from helpers.tiny import random_images, random_mask_indices
from test_contributing import code_block

from pretrain.build import build_method
from pretrain.config import load
from pretrain.methods import METHODS

ROOT = Path(__file__).parents[2]
KEYS = ["method.name=inpainting", "method.hole_size=2", "model.arch=vit_tiny", "data.image_size=64"]


@pytest.fixture
def module(tmp_path: Path) -> Iterator[Path]:
    """The example's file; the effects of importing it are undone afterwards."""
    file = tmp_path / "inpainting.py"
    file.write_text(code_block((ROOT / "CONTRIBUTING.md").read_text(), "pretrain/methods/inpainting.py", "python"))
    with patch.dict(METHODS), patch.dict(sys.modules), patch.object(sys, "path", [*sys.path]):
        yield file


def test_custom_method_is_validated_and_built_like_a_builtin(module: Path):
    config = load("quickstart", [f"method.module={module}", *KEYS])
    assert (config.method.name, config.method.hole_size, config.method.module) == ("inpainting", 2, str(module))
    method = build_method(config)
    loss = method(random_images(method), random_mask_indices(method))["loss"]
    assert loss.isfinite()
    assert pickle.loads(pickle.dumps(method.mask_sampler())).keywords["hole_size"] == 2, "workers may not be forked"
    with pytest.raises(ValueError, match=r"set method\.hole_size to at most 7"):
        load("quickstart", [f"method.module={module}", *KEYS, "method.hole_size=9"])
    with pytest.raises(ValueError, match=r"unknown key method\.hole: did you mean method\.hole_size\?"):
        load("quickstart", [f"method.module={module}", *KEYS, "method.hole=2"])


def test_unknown_method_error_mentions_method_module():
    with pytest.raises(
        ValueError, match=r"unknown method\.name=mine: valid: ae, .*; a method of your own needs method\.mod"
    ):
        load("quickstart", ["method.name=mine"])


def test_method_module_runs_only_if_given_on_the_command_line(module: Path, tmp_path: Path):
    """A recipe or a run's config.yaml may be somebody else's, so the module that it names is not imported."""
    bomb = tmp_path / "bomb.py"
    bomb.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    recipe = tmp_path / "config.yaml"
    recipe.write_text(yaml.safe_dump({"extends": "quickstart", "method": {"name": "lomar", "module": str(bomb)}}))
    with pytest.raises(ValueError, match=rf"if you trust it, also give method\.module={bomb} on the command line"):
        load(str(recipe), [])
    assert not (tmp_path / "ran").exists()
    config = load("quickstart", [f"method.module={module}", *KEYS])
    recipe.write_text(config.to_yaml())
    assert load(str(recipe), [f"method.module={module}"]).method == config.method


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "defines no Method with a Config"),
        ("from pretrain.methods.lomar import LoMaR\n", "defines no Method with a Config"),
        (
            "from pretrain.methods.mae import MAE, MAEConfig\n"
            "class Mine(MAE):\n    class Config(MAEConfig):\n        pass\n",
            r"write name: Literal.* in Mine\.Config",
        ),
        (
            "from pretrain.methods.mae import MAE\nclass Mine(MAE):\n    class Config(MAE.Config):\n        pass\n",
            "a method named mae already exists; give Mine another name",
        ),
    ],
    ids=["empty", "imported", "nameless", "taken"],
)
def test_module_without_a_new_method_is_rejected(source: str, message: str, module: Path, tmp_path: Path):
    (tmp_path / "mine_alone.py").write_text(source)
    with pytest.raises(ValueError, match=message):
        load("quickstart", [f"method.module={tmp_path / 'mine_alone.py'}"])


def test_missing_mismatched_or_broken_modules_are_rejected(module: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="there is no such file"):
        load("quickstart", [f"method.module={tmp_path}/nowhere.py"])
    with pytest.raises(ValueError, match="Python cannot find module nowhere"):
        load("quickstart", ["method.module=nowhere.mine"])
    with pytest.raises(ValueError, match=r"defines inpainting, not mae: give method\.name=inpainting"):
        load("quickstart", [f"method.module={module}"])
    (tmp_path / "yaml.py").touch()
    with pytest.raises(ValueError, match="is another module with that name: rename the file"):
        load("quickstart", [f"method.module={tmp_path / 'yaml.py'}"])
    (tmp_path / "half.py").write_text("import module_that_is_not_installed\n")
    with pytest.raises(ModuleNotFoundError, match="module_that_is_not_installed"):
        load("quickstart", [f"method.module={tmp_path / 'half.py'}"])
