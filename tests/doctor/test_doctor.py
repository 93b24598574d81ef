"""The doctor on broken installations, simulated by fake packages on PYTHONPATH; its child processes are real."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.waiting import SECONDS

from downstream import doctor
from downstream.doctor import Finding

ROOT = Path(__file__).parents[2]
NO_GPU = "class cuda:\n    is_available = lambda: False\n    device_count = lambda: 0\n"
TORCH = f"""
import types
__version__, version = "2.11.0", types.SimpleNamespace(cuda="13.0")
{NO_GPU}
ones = lambda n: types.SimpleNamespace(numpy=lambda: types.SimpleNamespace(dtype="float32"))
tensor = lambda values: values
"""
MMCV = {
    "mmcv/__init__.py": "__version__ = '2.3.6'",
    "mmcv/ops/__init__.py": "from importlib import import_module\nimport_module('mmcv._ext')",
}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], Path]:
    """Writes fake packages that the child processes import instead of the real ones."""

    def write(files: dict[str, str]) -> Path:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return tmp_path

    return write


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_driver_cuda", lambda: "")


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


@pytest.mark.mm
def test_working_mmcv_is_ok():
    finding = only(list(doctor.check_mmcv()))
    assert (finding.status, finding.fix) == ("ok", "")
    assert "tested on cpu" in finding.message


UNDEFINED = "raise ImportError('/env/mmcv/_ext.so: undefined symbol: _ZN2at4_ops5zeros4callE')"
ON_GPU = "def nms(*a):\n    raise RuntimeError('nms_impl: implementation for device cuda:0 not found.')"
NONSENSE = "import types\ndef nms(*a):\n    return 0, types.SimpleNamespace(tolist=lambda: [0])"
BROKEN_MMCV = {
    "no operators": ({}, "built without its operators, because torch was missing then"),
    "another torch": ({"mmcv/_ext.py": UNDEFINED}, "for another torch or CUDA (ImportError: /env/mmcv/_ext.so: undef"),
    "another CUDA": ({"mmcv/_ext.py": "raise ImportError('libcudart.so.12: cannot')"}, "for another torch or CUDA"),
    "no CUDA": ({"mmcv/ops/__init__.py": ON_GPU}, "were not built for this GPU"),
    "nonsense": ({"mmcv/ops/__init__.py": NONSENSE}, "give wrong results: [[0]]"),
    "not there": ({"mmcv/__init__.py": "raise ModuleNotFoundError(\"No module named 'mmcv'\")"}, "not installed"),
    "cut off": ({"mmcv/__init__.py": "def"}, "SyntaxError"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_MMCV)
def test_broken_mmcv_is_a_problem_with_a_fix(fake: Callable[[dict[str, str]], Path], name: str):
    files, message = BROKEN_MMCV[name]
    tensor = "class T(list):\n    to = lambda s, d: s\ntensor = T\n"
    fake({"torch.py": f"{NO_GPU}{tensor}", **MMCV, **files})
    finding = only(list(doctor.check_mmcv()))
    assert finding.status == "problem"
    assert message in finding.message
    assert "MMCV_WITH_OPS=1" in finding.fix
    assert "--no-build-isolation" in finding.fix
    assert ("--force-reinstall" in finding.fix) == (name != "not there")


def test_incompatible_mmcv_version_is_a_problem(fake: Callable[[dict[str, str]], Path]):
    fake({"mmdet/__init__.py": "raise AssertionError('MMCV==2.3.6 is used but incompatible.')"})
    finding = only(list(doctor.check_mmdet()))
    assert finding.status == "problem"
    assert "MMCV==2.3.6 is used but incompatible" in finding.message


def test_conflicting_packages_give_a_warning(fake: Callable[[dict[str, str]], Path], monkeypatch: pytest.MonkeyPatch):
    root = fake(
        {
            "mmsegmentation-1.2.2.dist-info/METADATA": "Name: mmsegmentation\nVersion: 1.2.2\n",
            "onedl_mmsegmentation-1.4.2.dist-info/METADATA": "Name: onedl-mmsegmentation\nVersion: 1.4.2\n",
            "mmseg.py": "__version__ = '1.2.2'",
        }
    )
    monkeypatch.syspath_prepend(root)
    warning, imported = doctor.check_mmseg()
    assert (warning.status, imported.status) == ("warning", "ok")
    assert "onedl-mmsegmentation 1.4.2 and mmsegmentation 1.2.2" in warning.message
    assert warning.fix.startswith("pip uninstall -y onedl-mmsegmentation mmsegmentation;")


@pytest.mark.parametrize(
    ("version", "status"), [("0.19.2", "problem"), ("0.19.3", "ok"), ("0.20.0+cu1", "ok"), ("0.9.9", "problem")]
)
def test_old_deepspeed_is_a_problem(fake: Callable[[dict[str, str]], Path], version: str, status: str):
    fake({"deepspeed.py": f"__version__ = {version!r}"})
    finding = only(list(doctor.check_deepspeed()))
    assert finding.status == status
    assert version in finding.message


def test_deepspeed_without_cuda_home_suggests_setting_it(fake: Callable[[dict[str, str]], Path]):
    fake({"deepspeed.py": "raise OSError('CUDA_HOME environment variable is not set.')"})
    assert "export CUDA_HOME=" in only(list(doctor.check_deepspeed())).fix


@pytest.mark.parametrize(
    ("driver", "built", "status", "message"),
    [
        ("12.4", "'13.0'", "problem", "built for CUDA 13.0, which the driver (CUDA 12.4) does not support"),
        ("12.4", "None", "problem", "built for CPU, but this machine has a GPU"),
        ("", "'13.0'", "ok", "no GPU on this machine"),
    ],
)
def test_torch_must_match_the_driver(
    fake: Callable[[dict[str, str]], Path],
    monkeypatch: pytest.MonkeyPatch,
    driver: str,
    built: str,
    status: str,
    message: str,
):
    fake({"torch.py": TORCH.replace("'13.0'", built).replace('"13.0"', built)})
    monkeypatch.setattr(doctor, "_driver_cuda", lambda: driver)
    finding = only(list(doctor.check_torch()))
    assert finding.status == status
    assert message in finding.message
    assert bool(finding.fix) == (status == "problem")


def test_driver_cuda_version_is_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '| NVIDIA-SMI 550.54  Driver Version: 550.54   CUDA Version: 12.4     |'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert doctor._driver_cuda() == "12.4"


def test_torchvision_crash_is_a_problem(fake: Callable[[dict[str, str]], Path]):
    fake({"torch.py": TORCH, "torchvision.py": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"})
    finding = only(list(doctor.check_torchvision()))
    assert finding.status == "problem"
    assert "crashed with signal 11" in finding.message
    assert "it requires torch (==2." in finding.message


def test_build_tools_give_warnings(monkeypatch: pytest.MonkeyPatch):
    versions = {"ninja": "1", "psutil": "1", "packaging": "1", "wheel": "1", "setuptools": "82.0.1"}
    monkeypatch.setattr(doctor, "installed", lambda *names: [f"{n} {versions[n]}" for n in names if n in versions])
    finding = only(list(doctor.check_build()))
    assert (finding.status, finding.name) == ("warning", "setuptools")
    del versions["ninja"]
    versions["setuptools"] = "80.9"
    assert [(one.status, one.name) for one in doctor.check_build()] == [("warning", "ninja"), ("ok", "setuptools")]


def test_command_reports_all_packages_that_fail_to_import(fake: Callable[[dict[str, str]], Path]):
    """Prints a line for every package, without a traceback, and exits with code 1."""
    broken = "raise OSError('libcudart.so.12: cannot open shared object file')"
    root = fake(
        {f"{name}.py": broken for name in ("torch", "torchvision", "deepspeed", "mmengine", "mmcv", "mmdet", "mmseg")}
    )
    run = subprocess.run(
        [sys.executable, "-m", "downstream.doctor"], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (1, "")
    lines = run.stdout.splitlines()
    for name in ("torch", "torchvision", "deepspeed", "mmengine", "mmcv", "mmdet", "mmseg"):
        assert sum(line.split()[:2] == ["problem", name] for line in lines) == 1, run.stdout
    assert sum("fix:" in line for line in lines) >= 7
    assert lines[-1] == "7 problems"
    assert "Traceback" not in run.stdout
