"""Compares every config of downstream/segment/configs with the published recipe and with its own docstring."""

import copy
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import import_modules_from_strings

from downstream.dense.mmengine.config_file import load_job
from downstream.dense.mmengine.layer_decay import LayerDecayOptimWrapperConstructor
from downstream.segment.segmentor_keys import flatten_steps, propagate_keys
from downstream.segment.train_segmentor import CONFIGS
from pretrain.models.vit import ARCHS

NAMES = sorted(path.stem for path in CONFIGS.glob("*.py"))
RECIPES = [name for name in NAMES if "tiny" not in name and not name.endswith("small")]
LAYER_DECAY = {"vit_base": 0.65, "vit_large": 0.75, "vit_huge": 0.8}
OUT_BLOCKS = {"vit_base": (3, 5, 7, 11), "vit_large": (7, 11, 15, 23), "vit_huge": (7, 15, 23, 31)}
RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@functools.cache
def _read(name: str) -> Config:
    return Config.fromfile(CONFIGS / f"{name}.py", import_custom_modules=False)


def load(name: str) -> Config:
    cfg = copy.deepcopy(_read(name))
    propagate_keys(cfg)
    return cfg


def test_every_promised_config_exists():
    upernet = {f"upernet_vit{a}_{m}_160k" for a in "blh" for m in ("lomar", "mae")}
    large = {f"upernet_vitl_{m}_160k_640" for m in ("lomar", "mae")}
    small = {f"upernet_vit{a}_lomar_160k_24gb" for a in "blh"}
    frozen = {f"upernet_vitb_{m}_160k_frozen" for m in ("lomar", "mae")}
    linear = {f"linear_vitb_{m}_40k" for m in ("lomar", "mae")}
    assert set(NAMES) == upernet | large | small | frozen | linear | {"upernet_tiny_camvid", "upernet_vits_lomar_small"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_matches_the_published_one(name: str):
    cfg = load(name)
    backbone, linear = cfg.model.backbone, name.startswith("linear")
    arch = {"b": "vit_base", "l": "vit_large", "h": "vit_huge"}[re.match(r"\w+_vit(\w)_", name)[1]]
    size = 640 if name.endswith("640") else 512
    assert (backbone.arch, backbone.patch_size, backbone.img_size) == (arch, 16, (size, size))
    assert backbone.position == ("sincos" if "_mae_" in name else "relative")
    assert (backbone.window_size, backbone.class_token, backbone.drop_path_rate) == (0, True, 0.1)
    assert backbone.out_indices == ((11,) if linear else OUT_BLOCKS[arch])
    assert backbone.frozen == (linear or name.endswith("frozen"))
    assert backbone.grad_checkpointing == name.endswith("24gb")
    assert backbone.init_cfg is None  # set by the command
    wrapper = cfg.optim_wrapper
    assert (wrapper.type, wrapper.dtype, wrapper.get("clip_grad")) == ("AmpOptimWrapper", "bfloat16", None)
    assert (wrapper.constructor, wrapper.paramwise_cfg.layer_decay) == (
        LayerDecayOptimWrapperConstructor.__name__,
        1 if linear else LAYER_DECAY[arch],
    )
    assert wrapper.optimizer.to_dict() == {
        "type": "AdamW",
        "lr": 1e-3 if linear else 1e-4,
        "betas": (0.9, 0.999),
        "weight_decay": 1e-4 if linear else 0.05,
    }
    iterations = 1000 * int(re.search(r"_(\d+)k", name)[1])
    warm_up, decay = cfg.param_scheduler
    assert (warm_up.type, warm_up.by_epoch, warm_up.begin, warm_up.end) == ("LinearLR", False, 0, 1500)
    assert (decay.type, decay.by_epoch, decay.power, decay.eta_min) == ("PolyLR", False, 1.0, 0.0)
    assert (decay.begin, decay.end) == (1500, iterations)
    assert (cfg.train_cfg.type, cfg.train_cfg.max_iters) == ("IterBasedTrainLoop", iterations)
    assert iterations % cfg.train_cfg.val_interval == 0


@pytest.mark.parametrize("name", NAMES)
def test_docstring_agrees_with_the_config(name: str):
    cfg, head = load(name), (CONFIGS / f"{name}.py").read_text().split('"""')[1]
    data = "camvid" if "tiny" in name else "fields" if name.endswith("small") else "ade"
    assert re.search(r"train_segmentor\.py (\S+) \\\s+start\.checkpoint=\S+ data_root=/data/" + data, head)[1] == name
    arithmetic = r"(\d+) images: (\d+) ranks? x (\d+) x (\d+)"
    images, ranks, batch, accumulation = map(int, re.search(arithmetic, head).groups())
    assert ranks * batch * accumulation == images == cfg.auto_scale_lr.base_batch_size
    assert (batch, accumulation) == (cfg.train_dataloader.batch_size, cfg.optim_wrapper.get("accumulative_counts", 1))
    assert images == (4 if "tiny" in name else 16)
    assert "tiny" in name or "Not run by us" in " ".join(head.split())


@pytest.mark.parametrize("name", NAMES)
def test_image_sizes_and_evaluation(name: str):
    """Checks crops, sliding windows, scales of both evaluations, and ImageNet's mean and std in RGB."""
    cfg = load(name)
    size = 256 if "tiny" in name else 640 if name.endswith("640") else 512
    scale, stride = (4 * size, size), {256: 170, 512: 341, 640: 426}[size]
    preprocessor = cfg.model.data_preprocessor
    assert (preprocessor.size, preprocessor.test_cfg.size_divisor, preprocessor.bgr_to_rgb) == ((size, size), 32, True)
    assert preprocessor.mean == pytest.approx([255 * mean for mean in (0.485, 0.456, 0.406)])
    assert preprocessor.std == pytest.approx([255 * std for std in (0.229, 0.224, 0.225)])
    assert cfg.model.test_cfg.to_dict() == {"mode": "slide", "crop_size": (size, size), "stride": (stride, stride)}
    train = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert (train["RandomResize"].scale, train["RandomResize"].ratio_range) == (scale, (0.5, 2.0))
    assert (train["RandomCrop"].crop_size, train["RandomCrop"].cat_max_ratio) == ((size, size), 0.75)
    assert train["RandomFlip"].prob == 0.5
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        steps = [step.type for step in loader.dataset.pipeline]
        assert steps == ["LoadImageFromFile", "Resize", "LoadAnnotations", "PackSegInputs"]
        assert loader.dataset.pipeline[1].to_dict() == {"type": "Resize", "scale": scale, "keep_ratio": True}
        assert loader.batch_size == 1
    augmented = list(flatten_steps(cfg.tta_pipeline))
    resized = [step for step in augmented if step.type == "RandomResize"]
    assert [(step.scale, step.ratio_range) for step in resized] == [(scale, (ratio, ratio)) for ratio in RATIOS]
    assert [step.prob for step in augmented if step.type == "RandomFlip"] == [0.0, 1.0]
    assert cfg.tta_model.type == "SegTTAModel"
    assert not cfg.env_cfg.cudnn_benchmark


@pytest.mark.parametrize("name", NAMES)
def test_heads_fit_their_feature_maps(name: str):
    """UperNet gets four maps and a linear head one, at 512 pixels. Models are built on the meta device."""
    cfg = load(name)
    import_modules_from_strings(**cfg.custom_imports)
    init_default_scope("mmseg")
    with torch.device("meta"):
        model: Any = MODELS.build(cfg.model)
        dim, classes = ARCHS[cfg.model.backbone.arch].dim, 11 if "tiny" in name else 150
        maps = [torch.zeros(2, dim, 32, 32) for _ in model.backbone.out_indices]
    if name.startswith("linear"):
        assert not model.with_neck
        assert not model.with_auxiliary_head
        assert model.decode_head(maps).shape == (2, classes, 32, 32)
    else:
        assert cfg.model.decode_head.channels == (64 if "tiny" in name else dim)
        maps = model.neck(maps)
        assert [tuple(m.shape[1:]) for m in maps] == [(dim, side, side) for side in (128, 64, 32, 16)]
        assert model.decode_head(maps).shape == (2, classes, 128, 128)
        assert model.auxiliary_head(maps).shape == (2, classes, 32, 32)
    norms = {type(module).__name__ for module in model.modules() if "BatchNorm" in type(module).__name__}
    assert norms == {"ChannelBatchNorm"}  # synchronized across ranks, on CPUs too
    trained = {part for part, p in ((n.split(".")[0], p) for n, p in model.named_parameters()) if p.requires_grad}
    assert ("backbone" in trained) != cfg.model.backbone.frozen


@pytest.mark.parametrize("name", ["upernet_vitb_lomar_160k", "linear_vitb_mae_40k"])
def test_ade20k_settings_match_mmseg(name: str):
    cfg = load(name)
    for split, folder in (("train", "training"), ("val", "validation"), ("test", "validation")):
        dataset = cfg[f"{split}_dataloader"].dataset
        assert (dataset.type, dataset.get("metainfo"), dataset.reduce_zero_label) == ("ADE20KDataset", None, True)
        assert dataset.data_prefix == {"img_path": f"images/{folder}", "seg_map_path": f"annotations/{folder}"}
    assert cfg.val_evaluator.type == cfg.test_evaluator.type == "IoUMetric"


def test_example_of_a_custom_data_set_in_the_base_config(tmp_path: Path):
    """Loads the example in the docstring of the base config."""
    head = (CONFIGS / "_base_" / "upernet.py").read_text().split('"""')[1]
    lines = re.search(r"( {4}_base_ = .*?)\n\n", head, re.DOTALL)[1]
    config_file = tmp_path / "fields.py"
    config_file.write_text(lines.replace("    ", "").replace("upernet_vitb", f"{CONFIGS}/upernet_vitb"))
    cfg = Config.fromfile(config_file, import_custom_modules=False)
    propagate_keys(cfg)
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 2
    for split, folder in (("train", "train"), ("val", "val"), ("test", "val")):
        dataset = cfg[f"{split}_dataloader"].dataset
        assert (dataset.type, dataset.data_root) == ("OwnSegDataset", "/data/fields/")
        assert dataset.data_prefix == {"img_path": f"{folder}/", "seg_map_path": f"{folder}_masks/"}
        assert (dataset.metainfo.classes, dataset.reduce_zero_label) == (("soil", "wheat"), False)
        assert dataset.pipeline[1 if split == "train" else 2].type == "LoadAnnotations"
    typed = re.search(r"data_root=\S+ classes=.*", head)[0].replace("'", "")
    overrides = re.match(r"(data_root=\S+) (classes=\[.*\]) (reduce_zero_label=\S+)", typed).groups()
    assert load_job("upernet_vitb_lomar_160k", list(overrides), CONFIGS, propagate_keys).cfg.classes == [
        "soil",
        "wheat",
    ]


def command(*overrides: str) -> Config:
    return load_job("upernet_vitb_mae_160k", list(overrides), CONFIGS, propagate_keys).cfg


def test_sizes_reach_every_key():
    cfg = command("size=320", "stride=200", "scale=[900,300]", "data_root=/data/mine")
    assert cfg.model.data_preprocessor.size == cfg.model.backbone.img_size == cfg.model.test_cfg.crop_size == (320, 320)
    assert cfg.model.test_cfg.stride == (200, 200)
    assert cfg.train_dataloader.dataset.pipeline[3].crop_size == (320, 320)
    scaled = [cfg.train_dataloader.dataset.pipeline[2], cfg.val_dataloader.dataset.pipeline[1]]
    scaled += [step for step in flatten_steps(cfg.tta_pipeline) if "scale" in step]
    assert [step.scale for step in scaled] == [(900, 300)] * 8
    assert cfg.test_dataloader.dataset.data_root == "/data/mine"
    cfg.size, cfg.stride = (320, 640), [200, 400]  # from a file: (height, width)
    propagate_keys(cfg)
    assert (cfg.model.backbone.img_size, cfg.model.test_cfg.stride) == ((320, 640), (200, 400))
    assert command("model.test_cfg.mode=whole", "size=320").model.test_cfg.mode == "whole"
    with pytest.raises(ValueError, match=r"stride=341 leaves gaps between windows of size=\(320, 320\): set stride="):
        command("size=320")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("classes=person", "classes='person': give distinct names"),
        ('classes=["a", "a"]', "give distinct names in the order of the annotations"),
        ('classes=["a"]', "give at least two; one of them may be the background"),
        ("size=500", "size=500: must be one or two multiples of 16 (model.backbone.patch_size)"),
        ("stride=0", "stride=0: must be one or two numbers of pixels"),
        ("scale=[2048]", "scale=[2048]: must be one or two numbers of pixels"),
        ("model.decode_head.num_classes=7", "a top-level key of the configuration sets it to 2: override that key"),
        ("model.test_cfg.crop_size=(256,256)", "a top-level key of the configuration sets it to (512, 512)"),
        ("train_dataloader.dataset.data_root=x", "a top-level key of the configuration sets it to"),
        ("tta=true", "tta=true applies only to evaluation: give test=FILE as well"),
    ],
)
def test_invalid_override_is_rejected(override: str, message: str):
    classes = [] if override.startswith("classes") else ['classes=["a", "b"]']
    with pytest.raises(ValueError, match=re.escape(message)):
        command(*classes, override)
