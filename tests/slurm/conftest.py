"""A real Slurm cluster, and a project folder from which to submit jobs."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.slurm_cluster import NAMESPACES, Cluster
from helpers.slurm_runs import submit
from PIL import Image

ROOT = Path(__file__).parents[2]
_PACKAGES = ["slurmctld", "slurmd", "slurm-client", "munge", "iproute2"]


def _install() -> str | None:
    """Installs Slurm if it is missing. Returns why it cannot be used here, or None if it can."""
    if os.geteuid() != 0:
        return "needs root: the nodes are network namespaces"
    if subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True).returncode:
        return "needs the right to make namespaces (CAP_SYS_ADMIN)"
    programs = ("slurmctld", "slurmd", "munged", "sbatch", "ip")
    if all(shutil.which(program) for program in programs):
        return None
    if not shutil.which("apt-get"):
        return f"needs {', '.join(programs)}, and there is no apt-get to install them"
    install = f"apt-get update -qq && apt-get install -y -qq --no-install-recommends {' '.join(_PACKAGES)}"
    done = subprocess.run(
        install, shell=True, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, capture_output=True, text=True
    )
    return f"Slurm could not be installed: {done.stderr.strip()}" if done.returncode else None


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This project in another folder, where jobs leave their logs."""
    project = tmp_path_factory.mktemp("project")
    for name in ("data", "pretrain", "downstream", "ds_configs"):
        (project / name).symlink_to(ROOT / name)
    (project / "slurm").mkdir()
    for script in (ROOT / "slurm").glob("*.sh"):
        if script.name != "site.sh":  # specific to this machine
            (project / "slurm" / script.name).symlink_to(script)
    python = project / ".venv" / "bin" / "python"  # on no PATH before the job activates it
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    python.with_name("activate").write_text(f"PATH={python.parent}:$PATH\n")
    return project


@pytest.fixture(scope="session")
def slurm(project: Path) -> Iterator[Cluster]:
    """One cluster for all tests."""
    missing = _install()
    if missing:
        pytest.skip(missing)
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # short: it holds unix sockets
    script = Path(__file__).with_name("cluster.sh")
    command = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "bash", str(script), str(folder)]
    with (
        (folder / "cluster.log").open("w") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as cluster,
    ):
        assert cluster.stdin is not None
        assert cluster.stdout is not None
        try:
            first = cluster.stdout.readline()
            assert first == "ready\n", (folder / "cluster.log").read_text()
            shell = int(Path(f"/proc/{cluster.pid}/task/{cluster.pid}/children").read_text())
            yield Cluster(shell, folder, project)
        finally:
            cluster.stdin.close()
    shutil.rmtree(folder)


@pytest.fixture
def cluster(slurm: Cluster) -> Iterator[Cluster]:
    """The cluster, without jobs before and after each test."""
    yield slurm
    slurm.ask("scancel", "--user=root")
    slurm.wait_empty()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """61 images of two classes."""
    images = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(61):
        folder = images / ("odd" if number % 2 else "even")
        folder.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((112, 96)).save(folder / f"{number:02d}.jpg")
    return images


@pytest.fixture(scope="session")
def shards(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images, packed by `data.pack`."""
    shards = tmp_path_factory.mktemp("shards")
    subprocess.run(
        [sys.executable, "-m", "data.pack", str(images), str(shards)], cwd=ROOT, check=True, capture_output=True
    )
    return shards


@pytest.fixture(scope="session")
def write_recipe(project: Path, shards: Path) -> Callable[..., Path]:
    """write_recipe(name, key=section) -> a small recipe that two ranks train in a few seconds."""

    def write(name: str, **sections: object) -> Path:
        keys = {
            "name": name,
            "runs": str(project / "runs"),
            "model": {"arch": "vit_tiny"},
            "data": {"shards": str(shards), "num_workers": 1},
            "optim": {"warmup_epochs": 1, "base_lr": 1e-2},
            "checkpoint": {"every_steps": 10},
            **sections,
        }
        path = project / f"{name}.yaml"
        path.write_text(yaml.safe_dump(keys))
        return path

    return write


@pytest.fixture(scope="session")
def recipe(write_recipe: Callable[..., Path]) -> Path:
    """A LoMaR recipe."""
    return write_recipe(
        "tiny",
        method={"name": "lomar", "num_windows": 2, "window_size": 3},
        train={"epochs": 5, "global_batch_size": 8, "precision": "fp32"},
        log={"every_steps": 1, "num_reconstructions": 2},
    )


@pytest.fixture(scope="session")
def tuning(write_recipe: Callable[..., Path], shards: Path) -> Path:
    """A fine-tuning recipe that evaluates the classifier after each epoch."""
    return write_recipe(
        "tuning",
        head={"num_classes": 2},
        model={"arch": "vit_tiny", "drop_path_rate": 0.1},
        val={"shards": str(shards)},
        train={"epochs": 4, "global_batch_size": 8, "precision": "fp32"},
        log={"every_steps": 1},
    )


@pytest.fixture(scope="session")
def whole(slurm: Cluster, recipe: Path) -> Path:
    """The folder of an uninterrupted run."""
    job = submit(slurm, recipe, "name=whole")
    end = job.wait_end()
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("COMPLETED", "0", "0:0"), job.logs()
    return slurm.project / "runs" / "whole"
