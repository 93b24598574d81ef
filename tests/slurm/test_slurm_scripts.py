"""The Slurm scripts: one structure, no hyperparameters, and a file for what a cluster needs."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.slurm_cluster import Cluster
from helpers.waiting import SECONDS

FOLDER = Path(__file__).parents[2] / "slurm"
SCRIPTS = sorted(path for path in FOLDER.glob("[!_]*.sh") if path.name != "site.sh")  # which the site writes itself
TRAININGS = [script for script in SCRIPTS if script.stem != "pack"]
# The lines that differ between training scripts: name, nodes, entry and recipe.
CHOICES = [
    r"^#SBATCH --job-name=\w+$",
    r"^#SBATCH --nodes=\d+$",
    r"^RECIPE=\$\{RECIPE:-(\w+)\}$",
    r"^# (?:Pretrains|Fine-tunes) a ViT-\w(?: and \w+)?(?: on [\w-]+)?, from the project's root:$",
    r"^#   sbatch --nodes=\d slurm/(?:pretrain_vit\w|finetune_\w+)\.sh "
    r"(?:data\.shards=/data/in1k|data_root=/data/(?:coco|ade)) .*name=myrun$",
    r"^ENTRY=(\S+\.py)$",
]


def test_training_scripts_differ_only_in_their_choices() -> None:
    assert [script.stem for script in TRAININGS] == [
        "finetune_ade20k",
        "finetune_coco",
        "finetune_in1k",
        "pretrain_vitb",
        "pretrain_vith",
        "pretrain_vitl",
    ]
    shapes = set()
    for script in TRAININGS:
        shape = script.read_text()
        for choice in CHOICES:
            shape, count = re.subn(choice, "CHOICE", shape, flags=re.MULTILINE)
            assert count == 1, f"{script.name} has {count} lines {choice}"
        shapes.add(shape)
    assert len(shapes) == 1


@pytest.mark.parametrize("script", TRAININGS, ids=lambda script: script.stem)
def test_entry_and_recipe_exist(script: Path) -> None:
    (recipe,) = re.findall(CHOICES[2], script.read_text(), flags=re.MULTILINE)
    (entry,) = re.findall(CHOICES[-1], script.read_text(), flags=re.MULTILINE)
    assert (FOLDER.parent / entry).is_file()
    is_dense = script.stem in ("finetune_ade20k", "finetune_coco")
    shipped = "configs/{}.py" if is_dense else "recipes/{}.yaml"
    assert (FOLDER.parent / entry).parent.joinpath(shipped.format(recipe)).is_file()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_job_is_named_after_its_script(script: Path) -> None:
    assert f"#SBATCH --job-name={script.stem}\n" in script.read_text()


def test_scripts_set_no_hyperparameters() -> None:
    for script in FOLDER.glob("*.sh"):
        assert not re.findall(
            r"\b(?:train|optim|model|method|data|head|augment)\.\w+=(?!/data/in1k)", script.read_text()
        ), script


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.sh")), ids=lambda script: script.stem)
def test_bash_accepts_the_script(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def start_job(folder: Path, site: str | None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a job script in a project folder of its own, where `srun` only prints its arguments and $LOADED."""
    (folder / "slurm").mkdir(exist_ok=True)
    for path in FOLDER.glob("*.sh"):
        if path.name != "site.sh":
            shutil.copy(path, folder / "slurm")
    if site is not None:
        (folder / "slurm" / "site.sh").write_text(site)
    (folder / "bin").mkdir()
    srun = folder / "bin" / "srun"
    # One write, since the script prints as well.
    srun.write_text('#!/bin/sh\nline=$(printf "[%s]" "$@")\necho "$line module=$LOADED"\n')
    srun.chmod(0o755)
    scontrol = folder / "bin" / "scontrol"
    scontrol.write_text("#!/bin/sh\necho node1\n")
    scontrol.chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_NAME": "x", "SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "3"}
    job |= {
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NODELIST": "node1",
        "RECIPE": "tiny",
        "PATH": f"{srun.parent}:{os.environ['PATH']}",
        **variables,
    }
    script = folder / "slurm" / "pretrain_vitb.sh"
    return subprocess.run(["bash", str(script), "name=a b"], env=job, capture_output=True, text=True, timeout=SECONDS)


COMMAND = "[-u][pretrain/run.py][tiny][name=a b]"


def test_job_without_a_site_file_uses_the_python_on_its_path(tmp_path: Path) -> None:
    done = start_job(tmp_path, None)
    assert done.returncode == 0, done.stderr
    assert f"attempt0-rank%t.log][python]{COMMAND} module=\n" in done.stdout


def test_site_file_loads_modules_and_chooses_a_container(tmp_path: Path) -> None:
    site = 'export LOADED=cuda\nPYTHON=(apptainer exec "my image.sif" python)\nSRUN_OPTIONS=(--container-image=x)\n'
    done = start_job(tmp_path, site)
    assert done.returncode == 0, done.stderr
    assert f"[--container-image=x][apptainer][exec][my image.sif][python]{COMMAND} module=cuda\n" in done.stdout


def test_one_task_per_node_starts_one_rank_per_gpu(tmp_path: Path) -> None:
    done = start_job(tmp_path, None, SLURM_GPUS_ON_NODE="3")
    assert done.returncode == 0, done.stderr
    assert f"attempt0-node%t.log][bash][slurm/_node.sh][3][slurm/logs/x-1/attempt0][python]{COMMAND}" in done.stdout
    assert "1 nodes, 3 ranks" in done.stdout


NODE = """
trap 'echo "$RANK of $WORLD_SIZE: USR1"; exit $((10 + LOCAL_RANK))' USR1
echo "$RANK $LOCAL_RANK $MASTER_PORT"
touch "$READY-$LOCAL_RANK"
until [ -e "$READY-0" ] && [ -e "$READY-1" ]; do sleep 0.05; done
[ "$LOCAL_RANK" = 1 ] || kill -USR1 $PPID
while true; do sleep 0.05; done
"""


def test_node_script_handles_logs_signals_and_exit_codes(tmp_path: Path) -> None:
    """The second of two nodes with two ranks each, one of which sends a signal to their task."""
    job = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_ID": "77", "PATH": os.environ["PATH"]}
    job["READY"] = str(tmp_path / "ready")
    attempt = tmp_path / "attempt0"
    command = ["bash", str(FOLDER / "_node.sh"), "2", str(attempt), "bash", "-c", NODE]
    done = subprocess.run(command, env=job, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 11, done.stderr
    for local in (0, 1):
        log = (tmp_path / f"attempt0-rank{2 + local}.log").read_text()
        assert log == f"{2 + local} {local} 20077\n{2 + local} of 4: USR1\n"


def run_node_with_killed_rank(signal: int, folder: Path) -> None:
    """Runs the only task of node7, whose second of two ranks gets a signal, as attempt0 in `folder`."""
    job = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_JOB_ID": "77", "SLURMD_NODENAME": "node7"}
    kill = f"[ $RANK = 0 ] || kill -{signal} $$; exit 1"
    command = ["bash", str(FOLDER / "_node.sh"), "2", str(folder / "attempt0"), "bash", "-c", kill]
    done = subprocess.run(command, env={**os.environ, **job}, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 128 + signal


def find_bad_nodes(folder: Path) -> list[str]:
    command = f". {FOLDER / '_nodes.sh'}; bad_nodes {folder / 'attempt0'}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.parametrize(
    ("signal", "reason", "bad"),
    [
        (9, "Exited with exit code 137", ["node7"]),
        (9, "Out Of Memory", []),  # the memory limit kills one rank, and srun says this of the whole task
        (7, "Exited with exit code 135", ["node7"]),
        (7, "Out Of Memory", ["node7"]),
    ],
)
def test_only_task_of_a_node_is_blamed_unless_memory_ran_out(
    signal: int, reason: str, bad: list[str], tmp_path: Path
) -> None:
    run_node_with_killed_rank(signal, tmp_path)
    (tmp_path / "attempt0-srun.log").write_text(f"srun: error: node7: task 0: {reason}\n")
    assert find_bad_nodes(tmp_path) == bad


@pytest.mark.parametrize(
    ("srun_log", "files", "bad"),
    [
        ("srun: error: gpu-07: task 3: Killed\nsrun: error: gpu-08: tasks 8-15: Killed\n", [], "gpu-07"),
        ("srun: error: gpu-07: tasks 0-3: Exited with exit code 1\n", [], ""),
        ("srun: error: gpu-07: task 1: Out Of Memory\n", [], ""),
        (
            "srun: error: n1: task 0: Exited with exit code 1\nsrun: error: n2: task 1: Bus error (core dumped)\n",
            [],
            "n2",
        ),
        (
            "srun: error: n1: task 0: Exited with exit code 1\n"
            "srun: First task exited 120s ago\nsrun: error: n2: task 1: Killed\n",
            [],
            "",
        ),
        ("srun: error: Node failure on n3\n", [], "n3"),
        ("srun: error: n1: task 0: Killed\n", ["bad-n4", "bad-n5"], "n4 n5"),
        ("srun: error: n1: task 0: Exited with exit code 137\n", ["killed-n1"], "n1"),
        ("srun: error: n1: task 0: Out Of Memory\n", ["killed-n1"], ""),
        ("srun: error: n1: task 0: Out Of Memory\n", ["killed-n2"], ""),  # srun reports one of several tasks
        ("srun: error: n1: task 0: Out Of Memory\n", ["bad-n2", "killed-n1"], "n2"),
    ],
)
def test_bad_nodes_are_found(tmp_path: Path, srun_log: str, files: list[str], bad: str) -> None:
    (tmp_path / "attempt0-srun.log").write_text(srun_log)
    for name in files:
        (tmp_path / f"attempt0-{name}").touch()
    assert find_bad_nodes(tmp_path) == bad.split()


def test_array_job_exits_at_once_if_the_run_is_finished(tmp_path: Path) -> None:
    """The next job of the array sees what the first one left in the logs folder."""
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MAX": "2"}
    (tmp_path / "first").mkdir()
    first = start_job(tmp_path / "first", None, **array)
    assert (first.returncode, f"attempt0-rank%t.log][python]{COMMAND}" in first.stdout) == (0, True)
    (tmp_path / "next" / "slurm").mkdir(parents=True)
    (tmp_path / "next" / "slurm" / "logs").symlink_to(tmp_path / "first" / "slurm" / "logs")
    following = start_job(tmp_path / "next", None, **array | {"SLURM_ARRAY_TASK_ID": "2"})
    assert (following.returncode, following.stderr) == (0, "")
    assert "the run is finished: nothing left to do" in following.stdout
    assert "pretrain/run.py" not in following.stdout


def test_failing_site_file_ends_the_job(tmp_path: Path) -> None:
    done = start_job(tmp_path, "module() { return 1; }\nmodule load nothing\n")
    assert (done.returncode, done.stderr) == (1, "error: slurm/site.sh failed\n")


def test_site_example_changes_nothing_until_it_is_edited(tmp_path: Path) -> None:
    example = (FOLDER / "site.sh.example").read_text()
    assert f"attempt0-rank%t.log][python]{COMMAND} module=\n" in start_job(tmp_path, example).stdout
    uncommented = re.sub(r"^# (?=[A-Z_]+=\()", "", example, flags=re.MULTILINE)
    assert subprocess.run(["bash", "-n"], input=uncommented, text=True).returncode == 0


@pytest.mark.slurm
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_slurm_accepts_the_options(cluster: Cluster, script: Path) -> None:
    nodes = ["--nodes=2"] if script.stem == "pretrain_vith" else []  # the default partition has two
    done = cluster.run("sbatch", "--test-only", *nodes, f"slurm/{script.name}")
    assert done.returncode == 0, done.stderr


@pytest.mark.slurm
def test_job_submitted_from_another_folder_reports_it(cluster: Cluster, tmp_path: Path) -> None:
    done = cluster.run("sbatch", "--parsable", "--wait", "--gpus-per-node=0", str(SCRIPTS[0]), cwd=tmp_path)
    assert done.returncode == 1
    (log,) = tmp_path.glob("*.out")
    assert "is not the project's root: cd there and submit again" in log.read_text()
