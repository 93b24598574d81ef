"""Tests of the command line of mmengine trainings, without any training."""

import re
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config

from downstream.dense.backbone.loading import EncoderCheckpoint
from downstream.dense.entry import check_folder
from downstream.dense.job import Job
from downstream.dense.mmengine.config_file import load_job, parse_value
from downstream.dense.mmengine.encoder_start import clear_start, set_start
from downstream.detect.train_detector import CONFIGS
from pretrain.trainer.engine_file import read_ds_config
from pretrain.trainer.run_folder import RunFolder

TINY = str(Path(__file__).parents[1] / "helpers" / "tiny_mask_rcnn.py")


def load_here(*overrides: str, name: str = TINY) -> Job:
    return load_job(name, list(overrides), CONFIGS, lambda cfg: None)


def test_overrides_reach_the_configuration():
    job = load_here(
        "train_cfg.max_epochs=25",
        "optim_wrapper.optimizer.lr=1e-4",
        "param_scheduler.1.milestones=[22,24]",
        "train_dataloader.dataset.pipeline.3.prob=0",
        "optim_wrapper.clip_grad={'max_norm': 1.0}",
        "load_from=other.pth",
        "train.precision=bf16",
        "train.ds_config=zero2",
        "test=runs/x",
        "resume=false",
    )
    cfg = job.cfg
    assert (cfg.train_cfg.max_epochs, cfg.optim_wrapper.optimizer.lr) == (25, 1e-4)
    assert cfg.param_scheduler[1].milestones == [22, 24]
    assert cfg.optim_wrapper.clip_grad == {"max_norm": 1.0}
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.dtype) == ("AmpOptimWrapper", "bfloat16")
    assert read_ds_config(job.ds_config or "")["zero_optimization"]["stage"] == 2
    assert (job.test, job.resume, cfg.load_from) == ("runs/x", False, "other.pth")


def test_name_and_runs_set_the_run_folder():
    assert load_here("name=first").cfg.work_dir == "runs/first"
    assert load_here("name=007", "runs=/data/runs").cfg.work_dir == "/data/runs/007"
    assert load_here("runs=elsewhere").cfg.work_dir == "elsewhere/tiny_mask_rcnn"
    assert load_here("name=null", "runs=@a").cfg.work_dir == "@a/null"  # text is taken literally
    assert load_here("start.checkpoint=null", "test=007").test == "007"


def test_dumped_configuration_keeps_its_folder(tmp_path: Path):
    load_here("name=first").cfg.dump(tmp_path / "config.py")
    assert load_here(name=str(tmp_path / "config.py")).cfg.work_dir == "runs/first"
    assert load_here("name=second", name=str(tmp_path / "config.py")).cfg.work_dir == "runs/second"


def test_start_becomes_the_init_cfg_of_the_backbone():
    job = load_here("start.checkpoint=runs/mae", "start.weights=ema", name="vitdet_vitb_lomar_25ep")
    expected = {"type": "EncoderCheckpoint", "checkpoint": "runs/mae", "weights": "ema"}
    assert job.cfg.model.backbone.init_cfg == expected
    assert EncoderCheckpoint.__name__ == expected["type"]
    cfg = load_here("start.checkpoint=7", name="vitdet_vitb_lomar_25ep").cfg
    assert cfg.model.backbone.init_cfg == {"type": "EncoderCheckpoint", "checkpoint": "7"}
    set_start(cfg, None, "online")
    assert cfg.model.backbone.init_cfg == {"type": "EncoderCheckpoint", "checkpoint": "7", "weights": "online"}
    clear_start(cfg)
    assert cfg.model.backbone.init_cfg is None


def test_other_initializers_are_kept():
    cfg = load_here().cfg
    cfg.model.backbone.init_cfg = {"type": "Pretrained", "checkpoint": "resnet.pth"}
    clear_start(cfg)
    assert cfg.model.backbone.init_cfg.type == "Pretrained"


def test_defaults():
    job = load_here()
    assert (job.ds_config, job.test, job.resume) == (None, None, True)
    assert job.cfg.work_dir == "runs/tiny_mask_rcnn"
    assert job.cfg.randomness.seed == 0
    assert job.cfg.optim_wrapper.type == "OptimWrapper"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train_cfg.max_epoch=3", "unknown key train_cfg.max_epoch: in train_cfg, did you mean max_epochs?"),
        ("modl.neck=3", "unknown key modl.neck: did you mean model?"),
        ("param_scheduler.2.end=3", "in param_scheduler, valid: 0, 1"),
        ("train_cfg.max_epochs.end=3", "train_cfg.max_epochs is a single value, 2"),
        ("train_cfg.max_epochs=ten", "train_cfg.max_epochs='ten': must be a number, as in the configuration (2)"),
        ("train_dataloader.persistent_workers=1", "must be true or false, as in the configuration"),
        ("optim_wrapper.optimizer=AdamW", "must be a group of keys (or override one of them), as in the configuration"),
        ("train_cfg.max_epochs", "is not an override: write KEY=value"),
        ("--lr=3", "is not an override: write KEY=value"),
        ("start.checkpoint=x.pth", "start.checkpoint=x.pth needs model.backbone.type=PlainViT, but it is ResNet"),
        ("train.precision=fp16", "train.precision='fp16': must be fp32 or bf16"),
        ("train.precison=bf16", "unknown key train.precison: did you mean train.precision?"),
        ("checkpoint=x.pth", "unknown key checkpoint: did you mean start.checkpoint?"),
        ("start.weights=ema", "start.weights=ema needs model.backbone.type=PlainViT"),
        ("work_dir=runs/x", "work_dir is runs/NAME: give name=, and runs= for another parent folder"),
        ("name=runs/x", "name='runs/x': must be a folder name of letters"),
        ("classes=['disc'", "is not a YAML value"),
        ("train_dataloader.dataset.indexes=5", "in train_dataloader.dataset, did you mean indices?"),
        ("experiment_nam=5", "unknown key experiment_nam: did you mean experiment_name?"),
        ("train_pipeline.3.prob=0", "read: override train_dataloader.dataset.pipeline.3.prob"),
        (
            "backend_args=x",
            "backend_args was already resolved when the configuration was read: override the keys that use it",
        ),
        ("resume=often", "resume='often': must be true or false"),
        ("optim_wrapper.type=ApexOptimWrapper", "must be OptimWrapper (fp32) or AmpOptimWrapper (bf16)"),
    ],
)
def test_invalid_override_is_rejected(override: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_here(override)


def test_start_weights_need_a_checkpoint():
    with pytest.raises(ValueError, match=r"start\.weights=ema .*: give start\.checkpoint=FILE as well"):
        load_here("start.weights=ema", name="vitdet_vitb_lomar_25ep")


@pytest.mark.parametrize("text", ["7", "010", "2026-11-26", "true", "1e3"])
def test_text_that_looks_like_another_type_stays_text(text: str):
    assert load_here(f"data_root={text}").cfg.data_root == text


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train_dataloader.dataset.indices", "50", 50),  # an argument of the class that mmdet's extends
        ("val_dataloader.dataset.backend_args", "null", None),
        ("train_dataloader.dataset.pipeline.0.color_type", "color_ignore_orientation", "color_ignore_orientation"),
        ("train_dataloader.drop_last", "true", True),
        ("train_dataloader.sampler.seed", "3", 3),
        ("train_cfg.val_begin", "2", 2),
        ("default_hooks.checkpoint.save_best", "coco/bbox_mAP", "coco/bbox_mAP"),
        ("val_evaluator.collect_device", "1", "1"),
        ("optim_wrapper.optimizer.eps", "1e-6", 1e-6),
        ("val_evaluator.classwise", "true", True),
        ("model.rpn_head.num_convs", "2", 2),
        ("log_processor.num_digits", "5", 5),
        ("experiment_name", "x", "x"),
    ],
)
def test_keys_of_the_libraries_can_be_overridden_if_unset(key: str, text: str, value: Any):
    tree: Any = load_here(f"{key}={text}").cfg
    for part in key.split("."):
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    assert tree == value


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('data_rot = "/data"', "nothing reads data_rot: did you mean data_root?"),
        ("train_pipeline = []", "Variables of inherited files are already resolved: set the keys that use them"),
    ],
)
def test_unused_variables_are_rejected(tmp_path: Path, line: str, message: str):
    config = tmp_path / "own.py"
    config.write_text(f'_base_ = "{TINY}"\n{line}\n')
    with pytest.raises(ValueError, match=re.escape(message)):
        load_here(name=str(config))
    config.write_text(f'_base_ = "{TINY}"\nsteps = []\ntrain_dataloader = dict(dataset=dict(pipeline=steps))\n')
    assert load_here(name=str(config)).cfg.train_dataloader.dataset.pipeline == []


def test_unknown_or_unreadable_configuration_is_rejected(tmp_path: Path):
    with pytest.raises(ValueError, match="did you mean vitdet_vitb_lomar_25ep"):
        load_here(name="vitdet_vitb_lomar_25e")
    (tmp_path / "bad.py").write_text("model = dict(\n")
    with pytest.raises(ValueError, match=r"bad\.py cannot be read as a configuration: "):
        load_here(name=str(tmp_path / "bad.py"))


def test_configuration_can_inherit_from_mmseg(tmp_path: Path):
    (tmp_path / "seg.py").write_text("_base_ = 'mmseg::upernet/upernet_r50_4xb2-40k_cityscapes-512x1024.py'\n")
    assert load_here(name=str(tmp_path / "seg.py")).cfg.model.type == "EncoderDecoder"


@pytest.mark.parametrize(("enable", "rate"), [("true", 1e-3 * 24 / 16), ("false", 1e-3)])
def test_learning_rate_scaling_counts_accumulation(enable: str, rate: float):
    from downstream.dense.mmengine.runner import _scale_lr
    from pretrain.trainer.launch import World

    cfg = load_here(
        "optim_wrapper.accumulative_counts=4", "train_dataloader.batch_size=3", f"auto_scale_lr.enable={enable}"
    ).cfg
    line = _scale_lr(cfg, World(0, 2, 0))
    assert "2 ranks x train_dataloader.batch_size=3 x optim_wrapper.accumulative_counts=4 = 24 images a step" in line
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(rate)
    assert not cfg.auto_scale_lr.enable  # or mmengine would scale it again


def samplers(count: int, batch: int, accumulation: int, **keys: Any) -> Any:
    from mmengine.dataset import DefaultSampler

    from downstream.dense.mmengine.data_order import ResumableBatches

    return ResumableBatches(DefaultSampler(list(range(count)), seed=1), batch, accumulation, **keys)


def test_batches_can_start_in_the_middle_of_an_epoch():
    batches = samplers(23, 2, 3)
    batches.sampler.set_epoch(4)
    complete = list(batches)
    assert len(complete) == len(batches) == 12
    assert {index.epoch for batch in complete for index in batch} == {4}
    batches.start = 5
    assert list(batches) == complete[5:]
    assert list(batches) == complete  # the next pass is complete again


def test_too_few_images_for_a_step_are_rejected():
    with pytest.raises(ValueError, match="an epoch has 2 batches per rank, fewer than"):
        samplers(4, 2, 3)


def test_seeded_index_is_pickled_for_a_worker():
    import pickle

    from downstream.dense.mmengine.data_order import SeededIndex

    index = pickle.loads(pickle.dumps(SeededIndex(7, epoch=3)))
    assert (index, index.epoch) == (7, 3)


def test_dumped_configuration_can_be_loaded(tmp_path: Path):
    job = load_here("train_cfg.max_epochs=7")
    job.cfg.dump(tmp_path / "config.py")
    assert load_here(name=str(tmp_path / "config.py")).cfg.train_cfg.max_epochs == 7
    assert isinstance(job.cfg, Config)


def test_folder_of_another_kind_of_training_is_rejected(tmp_path: Path):
    check_folder(RunFolder(tmp_path))
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match="belongs to a pretraining run or a classifier: choose another name="):
        check_folder(RunFolder(tmp_path))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("100", 100),
        ("1.5", 1.5),
        ("1e-4", 1e-4),
        ("-2E3", -2000.0),
        ("(1333, 800)", (1333, 800)),
        ("[(1333, 800), (1000, 600)]", [(1333, 800), (1000, 600)]),
        ("[224, 160]", [224, 160]),
        ("[0.9, 1e-3]", [0.9, 1e-3]),
        ("['disc', 'box']", ["disc", "box"]),
        ("[disc, box]", ["disc", "box"]),
        ("{'lr': 1e-3}", {"lr": 1e-3}),
        ("{name: lars}", {"name": "lars"}),
        ("None", None),
        ("null", None),
        ("", None),
        ("true", True),
        ("True", True),
        ("false", False),
        ("zero1", "zero1"),
        ("'100'", "100"),
        ('"a b"', "a b"),
        ("a b", "a b"),
        ("runs/lomar=2", "runs/lomar=2"),
        ("/data/{000..127}.tar", "/data/{000..127}.tar"),
        ("/data/{0,1}.tar", "/data/{0,1}.tar"),
        ("nan", "nan"),
        ("rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5-inc1"),
    ],
)
def test_value_is_a_python_literal_or_yaml(text: str, value: Any):
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("text", ["[224", "'a", "{a: 1", "(1, 2): [", "@x"])
def test_value_that_is_neither_python_nor_yaml_is_rejected(text: str):
    with pytest.raises(ValueError, match="is not a YAML value; are brackets or quotes closed"):
        parse_value(text)
