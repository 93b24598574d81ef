"""Nothing that is loaded runs code: no call in the project could, and files made to do so are refused.

Files of each kind have tests of their own, which docs/security.md lists.
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
# Calls that can run what a file or a text says.
UNSAFE = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path", "runpy.run_module"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load", "marshal.loads", "shelve.open"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.load", "torch.jit.load", "torch.export.load", "torch.hub.load"),
    *("importlib.import_module", "import_modules_from_strings", "Config.fromfile", "torch.load", "np.load"),
    *("tarfile.open", "shutil.unpack_archive"),
}
# What each does instead, or why it is safe.
SAFE = {
    "data/handover.py": {"pickle.loads"},  # what a data worker of this process has sent through its pipe
    "data/shard_writer.py": {"tarfile.open"},  # which writes
    "pretrain/trainer/values.py": {"yaml.load"},  # by a loader that is a SafeLoader
    "pretrain/methods/__init__.py": {"importlib.import_module"},  # method.module, on the command line alone
    "downstream/checkpoints/export_programs.py": {"torch.jit.load", "torch.export.load"},  # what it has just written
    "downstream/dense/entry.py": {"importlib.import_module"},  # modules of this project
    "downstream/dense/data_checks.py": {"importlib.import_module"},  # mmcv's
    # Of configurations of mmengine, which are programs.
    "downstream/dense/drawing.py": {"import_modules_from_strings"},
    "downstream/dense/mmengine/config_file.py": {"Config.fromfile"},
    "downstream/dense/mmengine/known_keys.py": {"import_modules_from_strings"},
    "downstream/dense/mmengine/runner.py": {"import_modules_from_strings"},
    "downstream/segment/check_masks.py": {"import_modules_from_strings"},
}


def calls(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Every call in a file, by its dotted name, with its keywords."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg or "**": ast.unparse(word.value) for word in node.keywords}


def is_unsafe(name: str, keywords: dict[str, str]) -> bool:
    if name == "torch.load":
        return keywords.get("weights_only") != "True"
    if name == "np.load":
        return keywords.get("allow_pickle", "False") != "False"
    return name in UNSAFE or name.endswith((".extractall", ".extract")) or keywords.get("shell", "False") != "False"


def test_no_call_could_run_what_a_file_says():
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
def test_unsafe_calls_are_seen(code: str, unsafe: bool, tmp_path: Path):
    (tmp_path / "a.py").write_text(code)
    assert [is_unsafe(*call) for call in calls(tmp_path / "a.py")] == [unsafe]


def test_a_checkpoint_of_a_run_that_would_run_code_does_not(tmp_path: Path):
    """DeepSpeed's own reader unpickles anything; a run reads by this one."""
    torch.save({"module": {}, "lomar": Bomb(tmp_path / "ran")}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match="which could run code: it is refused"):
        load_deepspeed_file(str(tmp_path / "mp_rank_00_model_states.pt"))
    assert not (tmp_path / "ran").exists()


def test_a_moving_average_is_no_pickle(tmp_path: Path):
    torch.save({"weight": Bomb(tmp_path / "ran")}, tmp_path / EMA_FILE)
    with pytest.raises(SafetensorError):
        EMA(torch.nn.Linear(2, 2), [], 0.5, 1, torch.device("cpu")).load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/name:os.system", "!!python/module:this"])
def test_a_recipe_cannot_name_what_python_has(tag: str, tmp_path: Path):
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


def test_an_index_holds_no_objects(tmp_path: Path):
    write_tar(tmp_path / "a.tar", [("a.jpg", jpeg(0))])
    np.savez(tmp_path / "index.npz", format=np.array([Bomb(tmp_path / "ran")], dtype=object))
    with pytest.raises(ValueError, match="not a readable index"):
        load_index(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_names_of_classes_and_labels_are_text_alone(tmp_path: Path):
    names = ("__import__('os').mkdir('ran')", "!!python/name:os.system")
    (tmp_path / "classes.txt").write_text("\n".join(names))
    assert read_classes(tmp_path / "classes.txt") == names
    write_tar(tmp_path / "a.tar", [("a.jpg", jpeg(0)), ("a.json", b'{"label": "!!python/name:os.system"}')])
    assert load_index(tmp_path).keys[0] == "a"
