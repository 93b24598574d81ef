"""Compares every config of downstream/detect/configs with ViTDet's published settings and with its own docstring."""

import copy
import functools
import re
from pathlib import Path

import pytest
from mmengine.config import Config

from downstream.dense.mmengine.config_file import load_job
from downstream.dense.mmengine.layer_decay import LayerDecayOptimWrapperConstructor
from downstream.detect.detector_keys import heads, propagate_keys
from pretrain.models.vit import ARCHS

CONFIGS = Path(__file__).parents[2] / "downstream" / "detect" / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py"))
RECIPES = [name for name in NAMES if "tiny" not in name and not name.endswith("small")]
LAYER_DECAY = {"vit_base": 0.7, "vit_large": 0.8, "vit_huge": 0.9}
DROP_PATH = {"vit_base": 0.1, "vit_large": 0.4, "vit_huge": 0.5}
MILESTONES = {25: [22, 24], 100: [89, 96]}


@functools.cache
def _read(name: str) -> Config:
    return Config.fromfile(CONFIGS / f"{name}.py", import_custom_modules=False)


def load(name: str) -> Config:
    cfg = copy.deepcopy(_read(name))
    propagate_keys(cfg)
    return cfg


def test_every_promised_config_exists():
    vitdet = {f"vitdet_vit{a}_{m}_{e}ep" for a in "blh" for m in ("lomar", "mae") for e in (25, 100)}
    small = {f"vitdet_vit{a}_lomar_25ep_24gb" for a in "blh"}
    kinds = {
        "vitdet_vitb_lomar_25ep_global",
        "vitdet_vitb_lomar_25ep_conv",
        *(f"vitae_vitb_{m}_{e}ep" for m in ("lomar", "mae") for e in (25, 100)),
    }
    assert set(NAMES) == vitdet | small | kinds | {"vitdet_tiny_pennfudan", "vitdet_vits_lomar_small"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_matches_vitdet(name: str):
    cfg = load(name)
    backbone = cfg.model.backbone
    arch = {"b": "vit_base", "l": "vit_large", "h": "vit_huge"}[re.match(r"vit\w+_vit(\w)_", name)[1]]
    width, depth = ARCHS[arch].dim, ARCHS[arch].depth
    assert (backbone.arch, backbone.patch_size, backbone.img_size) == (arch, 16, 1024)
    assert backbone.position == ("sincos" if "_mae_" in name else "relative")
    assert (backbone.out_indices, cfg.model.neck.in_channels) == ((depth - 1,), width)
    quarters = tuple(depth * part // 4 - 1 for part in (1, 2, 3, 4))
    global_blocks = () if name.endswith(("_global", "_conv")) else quarters
    assert (backbone.window_size, backbone.global_blocks) == (0 if name.endswith("_global") else 14, global_blocks)
    assert backbone.get("conv_blocks", ()) == (quarters if name.endswith("_conv") else ())
    assert backbone.get("parallel_conv", False) == name.startswith("vitae")
    assert backbone.grad_checkpointing == name.endswith("24gb")
    assert backbone.init_cfg is None  # set by the command
    assert backbone.drop_path_rate == DROP_PATH[arch]
    wrapper = cfg.optim_wrapper
    assert (wrapper.type, wrapper.dtype, wrapper.get("clip_grad")) == ("AmpOptimWrapper", "bfloat16", None)
    assert (wrapper.constructor, wrapper.paramwise_cfg) == (
        LayerDecayOptimWrapperConstructor.__name__,
        {"layer_decay": LAYER_DECAY[arch]},
    )
    assert wrapper.optimizer.to_dict() == {
        "type": "AdamW",
        "lr": 1e-4 * cfg.auto_scale_lr.base_batch_size / 64,
        "betas": (0.9, 0.999),
        "weight_decay": 0.1,
    }
    warm_up, steps = cfg.param_scheduler
    epochs = int(re.search(r"_(\d+)ep", name)[1])
    assert cfg.train_cfg.max_epochs == steps.end == epochs
    assert (steps.milestones, steps.gamma, steps.by_epoch) == (MILESTONES[epochs], 0.1, True)
    assert (warm_up.type, warm_up.by_epoch, warm_up.end) == ("LinearLR", False, 250 * wrapper.accumulative_counts)


@pytest.mark.parametrize("name", RECIPES)
def test_docstring_agrees_with_the_config(name: str):
    cfg, head = load(name), (CONFIGS / f"{name}.py").read_text().split('"""')[1]
    command = re.search(r"train_detector\.py (\S+) \\\s+start\.checkpoint=\S+ data_root=/data/coco", head)
    assert command[1] == name
    images, ranks, batch, accumulation = map(
        int, re.search(r"(\d+) images: (\d+) ranks x (\d+) x (\d+)", head).groups()
    )
    assert ranks * batch * accumulation == images == cfg.auto_scale_lr.base_batch_size
    assert (batch, accumulation) == (cfg.train_dataloader.batch_size, cfg.optim_wrapper.accumulative_counts)
    assert images == (32 if name.endswith("24gb") else 64)
    assert "Not run by us" in " ".join(head.split())
    # Published results are from 100 passes over COCO, even if a paper counts them as 25 epochs.
    assert not re.search(r"\d\d\.\d", head) or cfg.train_cfg.max_epochs == 100


@pytest.mark.parametrize("name", NAMES)
def test_image_size_normalization_and_heads(name: str):
    """Images are square with ImageNet's mean and std in RGB, and all but the small configs use ViTDet's 1024 pixels."""
    cfg = load(name)
    size, jitter = {"vitdet_tiny_pennfudan": (256, (0.5, 1.5)), "vitdet_vits_lomar_small": (640, (0.5, 2.0))}.get(
        name, (1024, (0.1, 2.0))
    )
    assert cfg.model.data_preprocessor.pad_size_divisor == cfg.model.backbone.img_size == size
    assert cfg.model.data_preprocessor.bgr_to_rgb
    assert cfg.model.data_preprocessor.mean == pytest.approx([255 * mean for mean in (0.485, 0.456, 0.406)])
    assert cfg.model.data_preprocessor.std == pytest.approx([255 * std for std in (0.229, 0.224, 0.225)])
    train = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert (train["RandomResize"].scale, train["RandomResize"].keep_ratio) == ((size, size), True)
    assert train["RandomResize"].ratio_range == jitter
    assert train["RandomCrop"].crop_size == (size, size)
    assert train["RandomFlip"].prob == 0.5
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert {step.type: step for step in loader.dataset.pipeline}["Resize"].scale == (size, size)
    heads = cfg.model.roi_head
    assert cfg.model.rpn_head.num_convs == 2
    assert (heads.bbox_head.type, heads.bbox_head.norm_cfg.type) == ("Shared4Conv1FCBBoxHead", "LN2d")
    assert (heads.mask_head.type, heads.mask_head.norm_cfg.type) == ("FCNMaskHead", "LN2d")
    assert heads.bbox_head.num_classes == heads.mask_head.num_classes == (1 if "tiny" in name else 80)
    assert not {"times", "dataset"} & cfg.train_dataloader.dataset.keys()  # images are not repeated in an epoch
    assert cfg.default_hooks.checkpoint.max_keep_ckpts == 2
    assert [backend.type for backend in cfg.visualizer.vis_backends] == ["LocalVisBackend", "TensorboardVisBackend"]


def test_docstring_of_the_small_config_is_right():
    """Checks the arithmetic for one GPU and that of the advice for less memory."""
    cfg, head = load("vitdet_vits_lomar_small"), (CONFIGS / "vitdet_vits_lomar_small.py").read_text().split('"""')[1]
    images, ranks, batch, accumulation = map(int, re.search(r"(\d+) images: (\d+) rank x (\d+) x (\d+)", head).groups())
    assert images == ranks * batch * accumulation == cfg.auto_scale_lr.base_batch_size
    assert (batch, accumulation) == (cfg.train_dataloader.batch_size, cfg.optim_wrapper.accumulative_counts)
    less = r"batch_size=(\d+) optim_wrapper.accumulative_counts=(\d+)\s+param_scheduler.0.end=(\d+)"
    less_batch, less_accumulation, end = map(int, re.search(less, head).groups())
    assert less_batch * less_accumulation == images
    assert end / less_accumulation == cfg.param_scheduler[0].end / accumulation
    assert cfg.param_scheduler[1].end == cfg.train_cfg.max_epochs == int(re.search(r"(\d+) epochs", head)[1])
    assert (cfg.model.backbone.arch, cfg.model.neck.in_channels) == ("vit_small", ARCHS["vit_small"].dim)


@pytest.mark.parametrize("keys", [{"with_masks": False}, {"model.roi_head.mask_head": None}])
def test_box_only_detector_does_not_use_masks(keys: dict[str, object]):
    """Masks are neither loaded, predicted nor measured, also after the keys are propagated a second time."""
    cfg = load("vitdet_vitb_lomar_25ep")
    cfg.merge_from_dict({"classes": ["robin"], **keys})
    for _ in range(2):
        propagate_keys(cfg)
        assert (cfg.with_masks, cfg.model.roi_head.mask_head, cfg.model.roi_head.mask_roi_extractor) == (
            False,
            None,
            None,
        )
        assert cfg.model.roi_head.bbox_head.num_classes == 1
        for split in ("train", "val", "test"):
            steps = {step.type: step for step in cfg[f"{split}_dataloader"].dataset.pipeline}
            assert (steps["LoadAnnotations"].with_bbox, steps["LoadAnnotations"].with_mask) == (True, False)
            assert split == "train" or cfg[f"{split}_evaluator"].metric == ["bbox"]
    cfg.default_hooks.checkpoint.save_best = "coco/segm_mAP"
    with pytest.raises(ValueError, match=r"save_best=coco/segm_mAP: no masks are predicted .* give coco/bbox_mAP"):
        propagate_keys(cfg)


def test_size_reaches_images_batches_and_backbone():
    """Only sizes of 1024 x 1024 are replaced; others in a custom pipeline are kept."""
    cfg = load("vitdet_vitb_lomar_25ep")
    cfg.val_dataloader.dataset.pipeline[1].scale = (1333, 800)
    cfg.size = 512
    propagate_keys(cfg)
    assert cfg.model.backbone.img_size == cfg.model.data_preprocessor.pad_size_divisor == 512
    steps = [step for split in ("train", "val", "test") for step in cfg[f"{split}_dataloader"].dataset.pipeline]
    assert [tuple(step[key]) for step in steps for key in ("scale", "crop_size") if key in step] == [
        *[(512, 512)] * 2,
        (1333, 800),
        (512, 512),
    ]
    cfg.size = 500
    with pytest.raises(ValueError, match=r"size=500: must be the side of a square, a multiple of 16 pixels"):
        propagate_keys(cfg)


def test_heads_of_other_detectors_get_the_number_of_classes(tmp_path: Path):
    """Covers a one-stage detector and one with a list of heads."""
    for name, key in (
        ("retinanet/retinanet_r50_fpn_1x_coco.py", "model.bbox_head"),
        ("cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py", "model.roi_head.bbox_head.2"),
    ):
        (tmp_path / "own.py").write_text(f'_base_ = "mmdet::{name}"\nclasses = ("robin", "wren")\n')
        cfg = Config.fromfile(tmp_path / "own.py", import_custom_modules=False)
        propagate_keys(cfg)
        found = dict(heads(cfg))
        assert key in found
        assert {head.num_classes for head in found.values()} == {2}


def test_example_of_a_custom_data_set_in_the_base_config(tmp_path: Path):
    """Loads the example in the docstring of the base config."""
    head = (CONFIGS / "_base_" / "vitdet.py").read_text().split('"""')[1]
    lines = re.search(r"( {4}_base_ = .*?)\n\n", head, re.DOTALL)[1]
    config_file = tmp_path / "birds.py"
    config_file.write_text(lines.replace("    ", "").replace("vitdet_vitb", f"{CONFIGS}/vitdet_vitb"))
    cfg = Config.fromfile(config_file, import_custom_modules=False)
    propagate_keys(cfg)
    assert cfg.model.roi_head.bbox_head.num_classes == cfg.model.roi_head.mask_head.num_classes == 2
    for split, file in (("train", "train.json"), ("val", "val.json"), ("test", "val.json")):
        dataset = cfg[f"{split}_dataloader"].dataset
        assert (dataset.data_root, dataset.ann_file) == ("/data/birds/", file)
        assert dataset.metainfo.classes == ("robin", "wren")
        assert split == "train" or cfg[f"{split}_evaluator"].ann_file == "/data/birds/val.json"


def test_example_of_custom_photographs_in_the_docs(tmp_path: Path):
    """Loads the example for Roboflow's layout."""
    page = (CONFIGS.parents[2] / "docs" / "detection.md").read_text()
    config_file = tmp_path / "birds.py"
    config_file.write_text(
        re.search(r"```python\n(.*?)```", page, re.DOTALL)[1].replace('["down', f'["{CONFIGS.parents[2]}/down')
    )
    cfg = load_job(str(config_file), [], CONFIGS, propagate_keys).cfg
    assert cfg.work_dir == "runs/birds"
    assert cfg.model.roi_head.mask_head is None
    for split, folder in (("train", "train"), ("val", "valid"), ("test", "valid")):
        dataset = cfg[f"{split}_dataloader"].dataset
        assert (dataset.ann_file, dataset.data_prefix.img) == (f"{folder}/_annotations.coco.json", f"{folder}/")
        assert dataset.metainfo.classes == ("robin", "wren")
        assert split == "train" or cfg[f"{split}_evaluator"].ann_file == f"/data/birds/{dataset.ann_file}"


def test_keys_reach_wrapped_data_sets_and_keep_absolute_paths():
    cfg = load("vitdet_vitb_lomar_25ep")
    inner = cfg.train_dataloader.dataset.to_dict()
    cfg.train_dataloader.dataset = {
        "type": "RepeatDataset",
        "times": 2,
        "dataset": {"type": "ConcatDataset", "datasets": [inner, inner]},
    }
    cfg.merge_from_dict({"data_root": "/data/mine", "val_dataloader.dataset.ann_file": "/elsewhere/val.json"})
    propagate_keys(cfg)
    assert [dataset.data_root for dataset in cfg.train_dataloader.dataset.dataset.datasets] == ["/data/mine"] * 2
    assert cfg.val_evaluator.ann_file == "/elsewhere/val.json"
    assert cfg.test_evaluator.ann_file == "/data/mine/annotations/instances_val2017.json"


@pytest.mark.parametrize("classes", ["person", [], [1, 2]])
def test_classes_must_be_names(classes: object):
    cfg = load("vitdet_vitb_lomar_25ep")
    cfg.classes = classes
    with pytest.raises(ValueError, match="classes="):
        propagate_keys(cfg)
