"""The scripts themselves: one shape, no hyper-parameters, and a place for what a cluster needs."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.slurm_cluster import Cluster

FOLDER = Path(__file__).parents[2] / "slurm"
SCRIPTS = sorted(path for path in FOLDER.glob("[!_]*.sh") if path.name != "site.sh")  # that one is the site's own
# What differs between scripts: the name, the nodes, the entry and the recipe.
CHOICES = [
    r"^#SBATCH --job-name=\w+$",
    r"^#SBATCH --nodes=\d+$",
    r"^RECIPE=\$\{RECIPE:-(\w+)\}$",
    r"^# (?:Pretrains|Fine-tunes) a ViT-\w(?: and \w+)?(?: on [\w-]+)?, from the project's root:$",
    r"^#   sbatch --nodes=\d slurm/(?:pretrain_vit\w|finetune_\w+)\.sh "
    r"(?:data\.shards=/data/in1k|data_root=/data/(?:coco|ade)) .*name=myrun$",
    r"^ENTRY=(\S+\.py)$",
]


def test_scripts_have_one_shape() -> None:
    assert [script.stem for script in SCRIPTS] == [
        "finetune_ade20k",
        "finetune_coco",
        "finetune_in1k",
        "pretrain_vitb",
        "pretrain_vith",
        "pretrain_vitl",
    ]
    shapes = set()
    for script in SCRIPTS:
        shape = script.read_text()
        for choice in CHOICES:
            shape, count = re.subn(choice, "CHOICE", shape, flags=re.MULTILINE)
            assert count == 1, f"{script.name} has {count} lines {choice}"
        shapes.add(shape)
    assert len(shapes) == 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_recipe_exists(script: Path) -> None:
    (recipe,) = re.findall(CHOICES[2], script.read_text(), flags=re.MULTILINE)
    (entry,) = re.findall(CHOICES[-1], script.read_text(), flags=re.MULTILINE)
    assert (FOLDER.parent / entry).is_file()
    is_dense = script.stem in ("finetune_ade20k", "finetune_coco")
    shipped = "configs/{}.py" if is_dense else "recipes/{}.yaml"
    assert (FOLDER.parent / entry).parent.joinpath(shipped.format(recipe)).is_file()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_job_is_named_after_its_script(script: Path) -> None:
    assert f"#SBATCH --job-name={script.stem}\n" in script.read_text()


def test_scripts_set_no_hyper_parameter() -> None:
    for script in FOLDER.glob("*.sh"):
        assert not re.findall(
            r"\b(?:train|optim|model|method|data|head|augment)\.\w+=(?!/data/in1k)", script.read_text()
        ), script


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.sh")), ids=lambda script: script.stem)
def test_bash_reads_script(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def start_job(folder: Path, site: str | None) -> subprocess.CompletedProcess[str]:
    """A job's script in a project of its own, where `srun` only shows its arguments and what it inherits."""
    (folder / "slurm").mkdir()
    for name in ("_train.sh", "pretrain_vitb.sh"):
        shutil.copy(FOLDER / name, folder / "slurm")
    if site is not None:
        (folder / "slurm" / "site.sh").write_text(site)
    (folder / "bin").mkdir()
    srun = folder / "bin" / "srun"
    srun.write_text('#!/bin/sh\nline=$(printf "[%s]" "$@")\necho "$line module=$LOADED"\n')  # the script writes, too
    srun.chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_NAME": "x", "SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "3"}
    job |= {
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NTASKS": "1",
        "RECIPE": "tiny",
        "PATH": f"{srun.parent}:{os.environ['PATH']}",
    }
    script = folder / "slurm" / "pretrain_vitb.sh"
    return subprocess.run(["bash", str(script), "name=a b"], env=job, capture_output=True, text=True, timeout=30)


COMMAND = "[-u][pretrain/run.py][tiny][name=a b]"


def test_a_job_without_a_site_file_uses_the_python_on_its_path(tmp_path: Path) -> None:
    done = start_job(tmp_path, None)
    assert done.returncode == 0, done.stderr
    assert f"attempt0-rank%t.log][python]{COMMAND} module=\n" in done.stdout


def test_the_site_file_loads_modules_and_chooses_a_container(tmp_path: Path) -> None:
    site = 'export LOADED=cuda\nPYTHON=(apptainer exec "my image.sif" python)\nSRUN_OPTIONS=(--container-image=x)\n'
    done = start_job(tmp_path, site)
    assert done.returncode == 0, done.stderr
    assert f"[--container-image=x][apptainer][exec][my image.sif][python]{COMMAND} module=cuda\n" in done.stdout


def test_a_site_file_that_fails_ends_the_job(tmp_path: Path) -> None:
    done = start_job(tmp_path, "module() { return 1; }\nmodule load nothing\n")
    assert (done.returncode, done.stderr) == (1, "error: slurm/site.sh failed\n")


def test_the_example_changes_nothing_until_somebody_does(tmp_path: Path) -> None:
    example = (FOLDER / "site.sh.example").read_text()
    assert f"attempt0-rank%t.log][python]{COMMAND} module=\n" in start_job(tmp_path, example).stdout
    switched_on = re.sub(r"^# (?=[A-Z_]+=\()", "", example, flags=re.MULTILINE)
    assert subprocess.run(["bash", "-n"], input=switched_on, text=True).returncode == 0


@pytest.mark.slurm
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_slurm_takes_options(cluster: Cluster, script: Path) -> None:
    nodes = ["--nodes=2"] if script.stem == "pretrain_vith" else []  # as many as there are
    done = cluster.run("sbatch", "--test-only", *nodes, f"slurm/{script.name}")
    assert done.returncode == 0, done.stderr


@pytest.mark.slurm
def test_elsewhere_says_where_to_submit(cluster: Cluster, tmp_path: Path) -> None:
    done = cluster.run("sbatch", "--parsable", "--wait", "--gpus-per-node=0", str(SCRIPTS[0]), cwd=tmp_path)
    assert done.returncode == 1
    (log,) = tmp_path.glob("*.out")
    assert "is not the project's root: cd there and submit again" in log.read_text()
