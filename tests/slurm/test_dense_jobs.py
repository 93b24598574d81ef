"""Detection and segmentation jobs on two nodes. Whatever else Slurm does is the same for all scripts."""

import re
from pathlib import Path

import pytest
from helpers.dense_runs import evaluations
from helpers.slurm_cluster import Cluster
from helpers.tiny_ade import make_ade
from helpers.tiny_coco import make_coco

pytestmark = pytest.mark.slurm
TESTS = Path(__file__).parents[1]
NODES = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]


def test_detector_is_requeued_and_evaluated_once_per_epoch(cluster: Cluster, tmp_path: Path) -> None:
    work_dir = cluster.project / "runs" / "detector"
    changes = [f"data_root={make_coco(tmp_path / 'coco')}/", "classes=['disc', 'box']", "name=detector"]
    changes += ["train_cfg.max_epochs=2", "train_cfg.val_interval=1", "train_dataloader.batch_size=1"]
    export = "--export=ALL,RECIPE=vitdet_tiny_pennfudan"
    job = cluster.submit(
        *NODES, export, "slurm/finetune_coco.sh", *changes, "train.ds_config=zero1", "train.precision=fp32"
    )
    job.wait_for("the first epoch", lambda: (work_dir / "last_checkpoint").exists())
    cluster.ask("scancel", "--batch", "--signal=USR1", job.number)
    end = job.wait_end()
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), job.logs()
    assert re.search(r"stopped by a signal: requeued(?s:.*)continues from ", job.logs()), job.logs()
    assert (work_dir / "last_checkpoint").read_text().endswith("epoch_2")
    assert [row["iter"] for row in evaluations(work_dir)] == [4, 8]


def test_segmentor_is_trained_and_evaluated(cluster: Cluster, tmp_path: Path) -> None:
    work_dir = cluster.project / "runs" / "segmentor"
    changes = [f"data_root={make_ade(tmp_path / 'ade')}/", "name=segmentor", "train.ds_config=zero2"]
    export = f"--export=ALL,RECIPE={TESTS / 'helpers' / 'tiny_upernet.py'}"
    job = cluster.submit(*NODES, export, "slurm/finetune_ade20k.sh", *changes)
    end = job.wait_end()
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "0"), job.logs()
    assert "2 ranks x train_dataloader.batch_size=2 x optim_wrapper.accumulative_counts=1 = 4 images" in job.logs()
    assert (work_dir / "last_checkpoint").read_text().endswith("iter_4")
    assert [row["iter"] for row in evaluations(work_dir)] == [4]
