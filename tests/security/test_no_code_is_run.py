"""Loading never runs code: no call in the project could do so, and files crafted to run code are rejected.

docs/security.md lists more tests for each kind of file.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.originals import Bomb
from helpers.shard_tools import jpeg, write_tar
from safetensors import SafetensorError

from data.class_list import read_classes
from data.index import load_index
from pretrain.config import load
from pretrain.trainer.checkpoint_layout import EMA_FILE, load_deepspeed_file
from pretrain.trainer.ema import EMA
from pretrain.trainer.values import read_yaml

ROOT = Path(__file__).parents[2]
PACKAGES = ("data", "pretrain", "downstream")
# Calls that can run code from a file or a string.
UNSAFE = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path", "runpy.run_module"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load", "marshal.loads", "shelve.open"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.load", "torch.jit.load", "torch.export.load", "torch.hub.load"),
    *("importlib.import_module", "import_modules_from_strings", "Config.fromfile", "torch.load", "np.load"),
    *("tarfile.open", "shutil.unpack_archive"),
}
# The exceptions, and why each of them is safe.
SAFE = {
    "data/handover.py": {"pickle.loads"},  # sent by a data worker of this process through its pipe
    "data/shard_writer.py": {"tarfile.open"},  # only writes
    "pretrain/trainer/values.py": {"yaml.load"},  # with a subclass of SafeLoader
    "pretrain/methods/__init__.py": {"importlib.import_module"},  # method.module, only on the command line
    "downstream/checkpoints/export_programs.py": {"torch.jit.load", "torch.export.load"},  # files it has just written
    "downstream/dense/entry.py": {"importlib.import_module"},  # modules of this project
    "downstream/dense/data_checks.py": {"importlib.import_module"},  # modules of mmcv
    # mmengine's configurations, which are programs.
    "downstream/dense/drawing.py": {"import_modules_from_strings"},
    "downstream/dense/mmengine/config_file.py": {"Config.fromfile"},
    "downstream/dense/mmengine/known_keys.py": {"import_modules_from_strings"},
    "downstream/dense/mmengine/runner.py": {"import_modules_from_strings"},
    "downstream/segment/check_masks.py": {"import_modules_from_strings"},
}


def calls(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Every call in a file: its dotted name and its keyword arguments."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg or "**": ast.unparse(word.value) for word in node.keywords}


def is_unsafe(name: str, keywords: dict[str, str]) -> bool:
    if name == "torch.load":
        return keywords.get("weights_only") != "True"
    if name == "np.load":
        return keywords.get("allow_pickle", "False") != "False"
    return name in UNSAFE or name.endswith((".extractall", ".extract")) or keywords.get("shell", "False") != "False"


def test_all_unsafe_calls_are_known_exceptions():
    found: dict[str, set[str]] = {}
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for name, keywords in calls(path):
            if is_unsafe(name, keywords):
                found.setdefault(str(path.relative_to(ROOT)), set()).add(name)
    assert found == SAFE


@pytest.mark.parametrize(
    ("code", "unsafe"),
    [
        ("torch.load(x)", True),
        ("torch.load(x, weights_only=False)", True),
        ("torch.load(x, weights_only=True)", False),
        ("np.load(x, allow_pickle=True)", True),
        ("np.load(x, mmap_mode='r')", False),
        ("pickle.loads(x)", True),
        ("archive.extractall(folder)", True),
        ("subprocess.run(x, shell=True)", True),
        ("model.eval()", False),
    ],
)
def test_unsafe_calls_are_detected(code: str, unsafe: bool, tmp_path: Path):
    (tmp_path / "a.py").write_text(code)
    assert [is_unsafe(*call) for call in calls(tmp_path / "a.py")] == [unsafe]


def test_checkpoint_cannot_run_code(tmp_path: Path):
    """DeepSpeed's own reader unpickles anything. A run uses this one instead."""
    torch.save({"module": {}, "lomar": Bomb(tmp_path / "ran")}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match="which could run code: it is refused"):
        load_deepspeed_file(str(tmp_path / "mp_rank_00_model_states.pt"))
    assert not (tmp_path / "ran").exists()


def test_moving_average_is_not_unpickled(tmp_path: Path):
    torch.save({"weight": Bomb(tmp_path / "ran")}, tmp_path / EMA_FILE)
    with pytest.raises(SafetensorError):
        EMA(torch.nn.Linear(2, 2), [], 0.5, 1, torch.device("cpu")).load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/name:os.system", "!!python/module:this"])
def test_recipe_cannot_use_python_tags(tag: str, tmp_path: Path):
    text = f"{tag} [{tmp_path / 'ran'}]" if "apply" in tag else f"{tag} ''"
    with pytest.raises(yaml.YAMLError, match="could not determine a constructor"):
        read_yaml(f"a: {text}")
    recipe = tmp_path / "evil.yaml"
    recipe.write_text(f"extends: quickstart\nname: {text}\n")
    with pytest.raises(ValueError, match=r"evil\.yaml"):
        load(str(recipe), ["data.shards=/nowhere"])
    with pytest.raises(ValueError, match=r"optim\.betas"):
        load("quickstart", ["data.shards=/nowhere", f"optim.betas=[{text}, 0.9]"])
    assert not (tmp_path / "ran").exists()


def test_index_with_python_objects_is_rejected(tmp_path: Path):
    write_tar(tmp_path / "a.tar", [("a.jpg", jpeg(0))])
    np.savez(tmp_path / "index.npz", format=np.array([Bomb(tmp_path / "ran")], dtype=object))
    with pytest.raises(ValueError, match="not a readable index"):
        load_index(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_class_names_and_labels_are_only_text(tmp_path: Path):
    names = ("__import__('os').mkdir('ran')", "!!python/name:os.system")
    (tmp_path / "classes.txt").write_text("\n".join(names))
    assert read_classes(tmp_path / "classes.txt") == names
    write_tar(tmp_path / "a.tar", [("a.jpg", jpeg(0)), ("a.json", b'{"label": "!!python/name:os.system"}')])
    assert load_index(tmp_path).keys[0] == "a"
