"""Which parts of the installation are missing or do not fit, and how to fix them: `python -m downstream.doctor`.

Exit code 0 when detection and segmentation can train here, 1 when something is broken.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["ok", "warning", "problem"]
TIMEOUT_S = 120  # of one child; importing mmdet from a cold network file system takes a while
MIN_DEEPSPEED = (0, 19, 3)  # older: wrong gradients under accumulation, lost optimizer state
BUILD_TOOLS = 'pip install "setuptools>=80,<81" wheel ninja psutil packaging'
BUILD = 'pip install --no-build-isolation -c constraints.txt -e ".[mm]"'
REBUILD = (
    f"{BUILD_TOOLS} && MMCV_WITH_OPS=1 {{cuda}}pip install --no-build-isolation --no-cache-dir --force-reinstall "
    "--no-deps onedl-mmcv"
)
CUDA_HOME = "module load cuda, or export CUDA_HOME=/usr/local/cuda; its major version must match torch's"
# Packages with the same import name; all are supported, but only one at a time.
FORKS = {
    "mmengine": ("onedl-mmengine", "mmengine"),
    "mmcv": ("onedl-mmcv", "mmcv", "mmcv-full", "mmcv-lite"),
    "mmdet": ("onedl-mmdetection", "mmdet"),
    "mmseg": ("onedl-mmsegmentation", "mmsegmentation"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the output: a part of the installation, its state, and the command that fixes it, if it needs one."""

    status: Status
    name: str
    message: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.status:8} {self.name:12} {self.message}" + (f"\n{'':22}fix: {self.fix}" if self.fix else "")


# Run in child processes, because an import may crash the process. Each prints one JSON object as its last line.
TORCH = """
import torch
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "usable": torch.cuda.is_available(),
                  "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
                          if torch.cuda.is_available() else [],
                  "numpy": str(torch.ones(1).numpy().dtype)}))
"""
TORCHVISION = """
import torch, torchvision
kept = torchvision.ops.nms(torch.tensor([[0., 0, 4, 4], [0, 0, 4, 4]]), torch.tensor([0.2, 0.9]), 0.5)
print(json.dumps({"version": torchvision.__version__, "kept": kept.tolist()}))
"""
DEEPSPEED = """
import deepspeed
print(json.dumps({"version": deepspeed.__version__}))
"""
MMCV = """
import mmcv
from mmcv.ops import nms
import torch
boxes, scores = torch.tensor([[0., 0, 4, 4], [0, 0, 4, 4]]), torch.tensor([0.2, 0.9])
on = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
print(json.dumps({"version": mmcv.__version__, "on": on,
                  "kept": [nms(boxes.to(d), scores.to(d), 0.5)[1].tolist() for d in on]}))
"""
IMPORT = """
import {name}
print(json.dumps({{"version": {name}.__version__}}))
"""


def main() -> int:
    """Prints a line for each part. Returns the exit code."""
    parts: list[Callable[[], Iterator[Finding]]] = [
        check_python, check_torch, check_torchvision, check_deepspeed, check_mmengine, check_mmcv, check_mmdet,
        check_mmseg, check_build,
    ]  # fmt: skip
    with ThreadPoolExecutor(max_workers=4) as pool:  # they mostly wait for a child
        findings = [finding for found in pool.map(lambda part: list(_safely(part)), parts) for finding in found]
    for finding in findings:
        print(finding)
    problems = sum(finding.status == "problem" for finding in findings)
    print(f"{problems} problems" if problems else "everything needed for detection and segmentation is installed")
    return int(bool(problems))


def _safely(part: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from part()
    except Exception as error:
        yield Finding("problem", part.__name__.removeprefix("check_"), f"cannot be checked: {error!r}")


def in_child(code: str) -> tuple[dict[str, Any], str]:
    """Runs Python code: its last line of output, parsed as JSON, and ''; or {} and the last line of its error."""
    try:
        child = subprocess.run(
            [sys.executable, "-c", "import json" + code], capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return {}, f"timed out after {TIMEOUT_S} s"
    if child.returncode == 0:
        return json.loads(child.stdout.strip().splitlines()[-1]), ""
    errors = [line for line in child.stderr.strip().splitlines() if line.strip()]
    return {}, errors[-1] if errors and child.returncode > 0 else f"crashed with signal {-child.returncode}"


def installed(*distributions: str) -> list[str]:
    """'name version' of those that are installed."""
    versions = []
    for name in distributions:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def check_python() -> Iterator[Finding]:
    version = sys.version.split()[0]
    ok = sys.version_info >= (3, 10)
    yield Finding("ok" if ok else "problem", "python", version, "" if ok else "use Python 3.10 or newer")


def check_torch() -> Iterator[Finding]:
    facts, error = in_child(TORCH)
    if error:
        numpy = "numpy" in error.lower()
        fix = "pip install -c constraints.txt numpy" if numpy else "pip install -c constraints.txt torch torchvision"
        yield Finding("problem", "torch", error, fix)
        return
    build = f"CUDA {facts['cuda']}" if facts["cuda"] else "CPU"
    gpus, driver = bool(shutil.which("nvidia-smi")), _driver_cuda()
    torch_build = f"{facts['version']}, built for {build}"
    if facts["usable"]:
        yield Finding("ok", "torch", f"{torch_build}, sees {len(facts['gpus'])} x {facts['gpus'][0]}")
    elif driver and not facts["cuda"]:
        yield Finding("problem", "torch", f"{torch_build}, but this machine has a GPU", _other_torch(driver))
    elif driver:
        yield Finding(
            "problem",
            "torch",
            f"{torch_build}, which the driver (CUDA {driver}) does not support",
            _other_torch(driver),
        )
    elif gpus:
        yield Finding(
            "problem", "torch", f"{torch_build}; nvidia-smi finds no driver", "ask the administrator to install it"
        )
    else:
        yield Finding("ok", "torch", f"{torch_build}; no GPU on this machine")


def _driver_cuda() -> str:
    """The newest CUDA version that the driver supports, as nvidia-smi reports it, or ''."""
    if not shutil.which("nvidia-smi"):
        return ""
    smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=TIMEOUT_S)
    version = re.search(r"CUDA Version: *([\d.]+)", smi.stdout)
    return version[1] if smi.returncode == 0 and version else ""


def _other_torch(driver: str) -> str:
    return (
        f"install torch and torchvision built for CUDA {driver} or older (pytorch.org/get-started), then reinstall mmcv"
    )


def check_torchvision() -> Iterator[Finding]:
    facts, error = in_child(TORCHVISION)
    required = ""
    if installed("torchvision"):
        requirements = importlib.metadata.requires("torchvision") or []
        required = next((one for one in requirements if re.match(r"torch\W*==", one)), "")
    if error:
        hint = f" (it requires {required})" if required else ""
        yield Finding("problem", "torchvision", error + hint, "pip install -c constraints.txt torch torchvision")
    else:
        yield Finding("ok", "torchvision", f"{facts['version']}, matches torch")


def check_deepspeed() -> Iterator[Finding]:
    facts, error = in_child(DEEPSPEED)
    fix, oldest = "pip install -c constraints.txt deepspeed", ".".join(map(str, MIN_DEEPSPEED))
    if "CUDA_HOME" in error:
        yield Finding("problem", "deepspeed", error, CUDA_HOME)
    elif error:
        yield Finding("problem", "deepspeed", error, fix)
    elif tuple(map(int, re.findall(r"\d+", facts["version"])[:3])) < MIN_DEEPSPEED:
        yield Finding(
            "problem", "deepspeed", f"{facts['version']}: gradients and resuming are broken before {oldest}", fix
        )
    else:
        yield Finding("ok", "deepspeed", facts["version"])


def check_mmengine() -> Iterator[Finding]:
    yield from _check_import("mmengine")


def check_mmdet() -> Iterator[Finding]:
    yield from _check_import("mmdet")


def check_mmseg() -> Iterator[Finding]:
    yield from _check_import("mmseg")


def _check_import(name: str) -> Iterator[Finding]:
    """Importing one of these packages also runs its assertions on the versions of the others."""
    yield from _check_owner(name)
    facts, error = in_child(IMPORT.format(name=name))
    if error:
        yield Finding("problem", name, error, f"{BUILD_TOOLS} && {BUILD}")
    else:
        yield Finding("ok", name, f"{facts['version']} ({', '.join(installed(*FORKS[name])) or 'no package'})")


def _check_owner(name: str) -> Iterator[Finding]:
    owners = installed(*FORKS[name])
    if len(owners) > 1:
        names = " ".join(owner.split()[0] for owner in owners)
        yield Finding(
            "warning",
            name,
            f"{' and '.join(owners)} install into the same folder and overwrite each other",
            f"pip uninstall -y {names}; {BUILD}",
        )


def check_mmcv() -> Iterator[Finding]:
    yield from _check_owner("mmcv")
    facts, error = in_child(MMCV)
    if not error:
        if facts["kept"] == [[1]] * len(facts["on"]):
            yield Finding(
                "ok", "mmcv", f"{facts['version']} with compiled operators, tested on {', '.join(facts['on'])}"
            )
        else:
            yield Finding("problem", "mmcv", f"its operators give wrong results: {facts['kept']}", _rebuild())
    elif "No module named 'mmcv'" in error:
        yield Finding("problem", "mmcv", "not installed", f"{BUILD_TOOLS} && MMCV_WITH_OPS=1 {_cuda_flags()}{BUILD}")
    elif "mmcv._ext'" in error:
        yield Finding(
            "problem", "mmcv", f"built without its operators, because torch was missing then ({error})", _rebuild()
        )
    elif re.search(r"undefined symbol|_ext\.|lib(cudart|torch|c10)", error):
        yield Finding("problem", "mmcv", f"its operators were built for another torch or CUDA ({error})", _rebuild())
    elif re.search(r"for device cuda|no kernel image|CUDA error", error):
        yield Finding("problem", "mmcv", f"its operators were not built for this GPU ({error})", _rebuild())
    else:
        yield Finding("problem", "mmcv", error, _rebuild())


def _rebuild() -> str:
    return REBUILD.format(cuda=_cuda_flags())


def _cuda_flags() -> str:
    """With the architectures named (8.0: A100, 9.0: H100), a login node without a GPU builds for them as well."""
    return 'FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="8.0;9.0" ' if shutil.which("nvcc") or _driver_cuda() else ""


def check_build() -> Iterator[Finding]:
    """The build tools; they are only warned about, as mmcv may be built already."""
    for name in ("ninja", "psutil", "packaging", "wheel"):
        if not installed(name):
            yield Finding("warning", name, "not installed; needed to build mmcv and DeepSpeed's operators", BUILD_TOOLS)
    setuptools = installed("setuptools")
    if not setuptools or int(setuptools[0].split()[1].split(".")[0]) >= 81:
        version = setuptools[0] if setuptools else "not installed"
        yield Finding("warning", "setuptools", f"{version}; mmcv builds with 80 and --no-build-isolation", BUILD_TOOLS)
    else:
        yield Finding("ok", "setuptools", setuptools[0].split()[1])
    if not _driver_cuda():
        return
    nvcc = shutil.which("nvcc") or shutil.which(os.path.join(os.environ.get("CUDA_HOME", ""), "bin", "nvcc"))
    if nvcc is None:
        yield Finding("warning", "nvcc", "not found; needed to build mmcv and DeepSpeed's operators", CUDA_HOME)
    else:
        output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=TIMEOUT_S).stdout
        yield Finding("ok", "nvcc", f"{nvcc}: {(output.strip().splitlines() or ['?'])[-1]}")


if __name__ == "__main__":
    sys.exit(main())
