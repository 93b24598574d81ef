"""The command line of trainings on mmengine, without any training."""

import re
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config

from downstream.dense.mmengine.config_file import Job, load
from downstream.detect.train_detector import CONFIGS

TINY = str(Path(__file__).parent / "tiny_mask_rcnn.py")


def load_here(*changes: str, name: str = TINY) -> Job:
    return load(name, list(changes), CONFIGS, lambda cfg: None)


def test_changes_reach_the_configuration():
    job = load_here(
        "train_cfg.max_epochs=25",
        "optim_wrapper.optimizer.lr=1e-4",
        "param_scheduler.1.milestones=[22,24]",
        "train_pipeline.3.prob=0",
        "optim_wrapper.clip_grad={'max_norm': 1.0}",
        "load_from=other.pth",
        "precision=bf16",
        "engine=zero2",
        "test=runs/x",
        "resume=false",
    )
    cfg = job.cfg
    assert (cfg.train_cfg.max_epochs, cfg.optim_wrapper.optimizer.lr) == (25, 1e-4)
    assert cfg.param_scheduler[1].milestones == [22, 24]
    assert cfg.optim_wrapper.clip_grad == {"max_norm": 1.0}
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.dtype) == ("AmpOptimWrapper", "bfloat16")
    assert Path(job.engine or "").read_text().count('"stage": 2') == 1
    assert (job.test, job.resume, cfg.load_from) == ("runs/x", False, "other.pth")


def test_defaults():
    job = load_here()
    assert (job.engine, job.test, job.resume) == (None, None, True)
    assert job.cfg.work_dir == "runs/tiny_mask_rcnn"
    assert job.cfg.randomness.seed == 0
    assert job.cfg.optim_wrapper.type == "OptimWrapper"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train_cfg.max_epoch=3", "unknown key train_cfg.max_epoch: in train_cfg, did you mean max_epochs?"),
        ("modl.neck=3", "unknown key modl.neck: did you mean model?"),
        ("param_scheduler.2.end=3", "in param_scheduler, valid: 0, 1"),
        ("train_cfg.max_epochs.end=3", "train_cfg.max_epochs is a value, 2"),
        ("train_cfg.max_epochs=ten", "train_cfg.max_epochs='ten': it is a number in the configuration (2)"),
        ("train_dataloader.persistent_workers=1", "it is true or false"),
        ("optim_wrapper.optimizer=AdamW", "it is a group of keys: change one of them"),
        ("train_cfg.max_epochs", "is not a change: write KEY=value"),
        ("--lr=3", "is not a change: write KEY=value"),
        ("checkpoint=x.pth", "unknown key model.backbone.checkpoint"),  # a ResNet has none
        ("precision=fp16", "precision='fp16': fp32 or bf16"),
        ("resume=yes", "resume='yes': true continues"),
        ("optim_wrapper.type=ApexOptimWrapper", "OptimWrapper (fp32) or AmpOptimWrapper (bf16)"),
    ],
)
def test_refused_change(change: str, words: str):
    with pytest.raises(ValueError, match=re.escape(words)):
        load_here(change)


def test_refused_configuration(tmp_path: Path):
    with pytest.raises(ValueError, match="did you mean vitdet_vitb_lomar_25ep"):
        load_here(name="vitdet_vitb_lomar_25e")
    (tmp_path / "bad.py").write_text("model = dict(\n")
    with pytest.raises(ValueError, match=r"bad\.py is no configuration that mmengine reads: "):
        load_here(name=str(tmp_path / "bad.py"))


def test_configuration_of_mmseg_is_found(tmp_path: Path):
    (tmp_path / "seg.py").write_text("_base_ = 'mmseg::upernet/upernet_r50_4xb2-40k_cityscapes-512x1024.py'\n")
    assert load_here(name=str(tmp_path / "seg.py")).cfg.model.type == "EncoderDecoder"


@pytest.mark.parametrize(("enable", "rate"), [("true", 1e-3 * 24 / 16), ("false", 1e-3)])
def test_learning_rate_counts_accumulation(enable: str, rate: float):
    from downstream.dense.mmengine.job import _scale_lr
    from pretrain.trainer.launch import World

    cfg = load_here(
        "optim_wrapper.accumulative_counts=4", "train_dataloader.batch_size=3", f"auto_scale_lr.enable={enable}"
    ).cfg
    said = _scale_lr(cfg, World(0, 2, 0))
    assert "2 ranks x train_dataloader.batch_size=3 x optim_wrapper.accumulative_counts=4 = 24 images a step" in said
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(rate)
    assert not cfg.auto_scale_lr.enable  # mmengine would do it again


def samplers(count: int, batch: int, accumulation: int, **keys: Any) -> Any:
    from mmengine.dataset import DefaultSampler

    from downstream.dense.mmengine.data_order import ResumableBatches

    return ResumableBatches(DefaultSampler(list(range(count)), seed=1), batch, accumulation, **keys)


def test_batches_from_the_middle_are_the_rest():
    batches = samplers(23, 2, 3)
    batches.sampler.set_epoch(4)
    whole = list(batches)
    assert len(whole) == len(batches) == 12
    assert {place.turn for batch in whole for place in batch} == {4}
    batches.first = 5
    assert list(batches) == whole[5:]
    assert list(batches) == whole  # the next pass is whole again


def test_few_images_are_refused():
    with pytest.raises(ValueError, match="an epoch has 2 batches a rank, fewer than"):
        samplers(4, 2, 3)


def test_place_survives_its_way_to_a_worker():
    import pickle

    from downstream.dense.mmengine.data_order import Place

    place = pickle.loads(pickle.dumps(Place(7, turn=3)))
    assert (place, place.turn) == (7, 3)


def test_dumped_configuration_is_one_again(tmp_path: Path):
    job = load_here("train_cfg.max_epochs=7")
    job.cfg.dump(tmp_path / "config.py")
    assert load_here(name=str(tmp_path / "config.py")).cfg.train_cfg.max_epochs == 7
    assert isinstance(job.cfg, Config)
