"""A detector trained by `slurm/finetune_coco.sh` on two nodes; what else Slurm does is the same for every script."""

import json
import re
import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster

sys.path.insert(0, str(Path(__file__).parents[1] / "dense"))

from tiny_coco import make_coco

pytestmark = pytest.mark.slurm


def test_detector_is_requeued_and_measured_each_epoch_once(cluster: Cluster, tmp_path: Path) -> None:
    work_dir = cluster.project / "runs" / "detector"
    changes = [f"data_root={make_coco(tmp_path / 'coco')}/", "classes=['disc', 'box']", f"work_dir={work_dir}"]
    changes += ["train_cfg.max_epochs=3", "train_cfg.val_interval=1", "train_dataloader.batch_size=1"]
    shape = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    export = "--export=ALL,RECIPE=vitdet_tiny_pennfudan"
    job = cluster.submit(*shape, export, "slurm/finetune_coco.sh", *changes, "engine=zero1", "precision=bf16")
    job.wait_for("the first epoch", lambda: (work_dir / "last_checkpoint").exists())
    cluster.ask("scancel", "--batch", "--signal=USR1", job.number)
    end = job.wait_end()
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), job.logs()
    assert re.search(r"stopped by a signal, and requeued(?s:.*)continues from ", job.logs()), job.logs()
    assert (work_dir / "last_checkpoint").read_text().endswith("epoch_3")
    measured = [json.loads(line) for line in (work_dir / "evaluation.jsonl").read_text().splitlines()]
    assert [row["iter"] for row in measured] == [4, 8, 12]
