"""Tests of the small detector as built by mmdet: training steps, predictions and drawings with mmcv's operators."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mmcv
import numpy as np
import pytest
import torch
from helpers.tiny_coco import make_coco
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from PIL import Image
from torchvision.ops import roi_align

from downstream.dense.drawing import load_model
from downstream.dense.mmengine.config_file import load_job
from downstream.dense.mmengine.hooks import Fp32OutputsHook
from downstream.detect import draw_detections as draw
from downstream.detect.coco_checks import check
from downstream.detect.detector_keys import propagate_keys

CONFIG = Path(draw.__file__).parent / "configs" / "vitdet_tiny_pennfudan.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_coco(tmp_path_factory.mktemp("coco") / "set", train=2, val=2)


@pytest.fixture(scope="module")
def cfg(root: Path) -> Config:
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict({"data_root": str(root), "classes": ["disc", "box"]})
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
    propagate_keys(cfg)
    return cfg


@pytest.fixture(scope="module")
def model(cfg: Config) -> Any:
    init_default_scope("mmdet")
    torch.manual_seed(0)
    return MODELS.build(cfg.model)


@pytest.fixture(scope="module", autouse=True)
def _fp32_outputs(model: Any) -> None:
    """Install the hook that bf16 trainings use. It changes nothing in fp32."""
    Fp32OutputsHook().before_train(SimpleNamespace(model=model))


def losses(model: Any, batch: dict, autocast: bool) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(0)  # fixes the sampled regions and drop path
    model.train().zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total, terms = model.parse_losses(model(**model.data_preprocessor(batch, True), mode="loss"))
    total.backward()
    return total.item(), terms


def test_training_step_in_both_precisions(model: Any, cfg: Config):
    """Every parameter gets a finite fp32 gradient, and bf16 changes the loss only a little."""
    batch = next(iter(Runner.build_dataloader(cfg.train_dataloader, seed=0)))
    fp32_loss, terms = losses(model, batch, autocast=False)
    assert {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"} < terms.keys()
    assert all(term > 0 for name, term in terms.items() if "loss" in name)
    bf16_loss, _ = losses(model, batch, autocast=True)
    assert bf16_loss != fp32_loss
    assert bf16_loss == pytest.approx(fp32_loss, rel=0.05)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


def test_batches_are_padded_to_squares(model: Any, cfg: Config):
    for loader, training in ((cfg.train_dataloader, True), (cfg.val_dataloader, False)):
        batch = next(iter(Runner.build_dataloader(loader, seed=0)))
        data = model.data_preprocessor(batch, training)
        assert data["inputs"].shape == (2, 3, 256, 256)
        if training:
            assert {sample.gt_instances.masks.masks.shape[1:] for sample in data["data_samples"]} == {(256, 256)}


def test_pixels_are_normalized_as_in_pretraining(model: Any, cfg: Config, root: Path):
    """An image of 128 x 96 pixels is resized to twice its size and normalized in RGB with ImageNet's mean and std."""
    batch = next(iter(Runner.build_dataloader(cfg.val_dataloader, seed=0)))
    pixels = mmcv.imresize(np.array(Image.open(root / "val2017" / f"{0:012d}.jpg")), (256, 192)) / 255.0
    expected = (pixels - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    seen = model.data_preprocessor(batch, False)["inputs"][0]
    np.testing.assert_allclose(seen[:, :192].permute(1, 2, 0).numpy(), expected, atol=0.1)
    assert not seen[:, 192:].any()


@pytest.mark.parametrize("autocast", [False, True])
def test_roi_align_matches_torchvision(model: Any, autocast: bool):
    """Outputs and gradients of mmcv's operator on the neck's maps equal those of torchvision's."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        maps = [m.detach().double() for m in model.neck([torch.randn(2, 192, 16, 16)])[:4]]
    rois = torch.tensor([[0, 3, 5, 60, 70], [1, 100, 20, 250, 240], [1, 0, 0, 30, 30.0]]).double()
    ours, theirs = ([m.clone(memory_format=torch.preserve_format).requires_grad_() for m in maps] for _ in range(2))
    extractor = model.roi_head.bbox_roi_extractor
    pooled = extractor(ours, rois)
    levels = extractor.map_roi_levels(rois, 4).tolist()
    assert len(set(levels)) > 1
    expected = [
        roi_align(theirs[level], rois[[number]], 7, 1 / (4 * 2**level), 0, aligned=True)
        for number, level in enumerate(levels)
    ]
    torch.testing.assert_close(pooled, torch.cat(expected))
    weights = (
        torch.randn_like(pooled).transpose(1, 2).contiguous().transpose(1, 2)
    )  # the memory layout after a norm over channels
    for result in (pooled, torch.cat(expected)):
        (result * weights).sum().backward()
    for level in set(levels):
        torch.testing.assert_close(ours[level].grad, theirs[level].grad)


def test_proposals_are_sorted_in_fp32(model: Any):
    maps = [torch.randn(1, 64, 8, 8)]
    with torch.autocast("cpu", torch.bfloat16):
        assert {part[0].dtype for part in model.rpn_head(maps)} == {torch.float32}
        assert {part.dtype for part in model.neck([torch.randn(1, 192, 4, 4)])} == {torch.float32}


@pytest.fixture(scope="module")
def weights(model: Any, cfg: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A config and weights as a training saves them, biased towards discs so that some are detected."""
    folder = tmp_path_factory.mktemp("trained")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["roi_head.bbox_head.fc_cls.bias"] = torch.tensor([4.0, 0.0, -4.0])
    torch.save({"state_dict": state, "meta": {"epoch": 1}}, folder / "epoch_1.pth")
    cfg.dump(folder / "config.py")
    return folder / "config.py", folder / "epoch_1.pth"


def run_draw(*arguments: object) -> int:
    return draw.main([str(argument) for argument in arguments])


def test_detections_are_drawn(weights: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    photos, out = tmp_path / "photos", tmp_path / "out"
    (photos / "below").mkdir(parents=True)
    rng = np.random.default_rng(0)
    sizes = {"a.png": (90, 120), "below/b.png": (100, 70)}
    for name, size in sizes.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(photos / name)
    (photos / "notes.txt").write_text("no image")
    (photos / "broken.png").write_text("no image either")
    (photos / "empty.jpg").touch()
    assert run_draw(*weights, photos, out, "--score", 0.5) == 0
    output = capfd.readouterr()
    assert "2 drawings written to" in output.out
    assert "2 images cannot be decoded" in output.err
    assert "broken.png" in output.err
    assert "empty.jpg" in output.err
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == sorted(sizes)
    for name, size in sizes.items():
        before, after = (np.array(Image.open(folder / name)) for folder in (photos, out))
        assert after.shape == (*size, 3)
        assert (before != after).mean() > 0.05
    assert run_draw(*weights, photos / "a.png", tmp_path / "none", "--score", 1) == 0
    assert (np.array(Image.open(tmp_path / "none" / "a.png")) == np.array(Image.open(photos / "a.png"))).all()


def test_box_only_detector_trains_predicts_and_draws(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """The annotations have no masks."""
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (tmp_path / split).symlink_to(root / split)
        file = f"annotations/instances_{split}.json"
        content = json.loads((root / file).read_text())
        for annotation in content["annotations"]:
            del annotation["segmentation"]
        (tmp_path / file).write_text(json.dumps(content))
    (tmp_path / "own.py").write_text(f"""
_base_ = ["{CONFIG}"]
data_root, classes, size, with_masks = "{tmp_path}", ("disc", "box"), 64, False
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
""")
    cfg = load_job(str(tmp_path / "own.py"), [], CONFIG.parent, propagate_keys).cfg
    assert len(check(cfg)) == 2
    torch.manual_seed(0)
    detector = MODELS.build(cfg.model)
    total, terms = losses(detector, next(iter(Runner.build_dataloader(cfg.train_dataloader, seed=0))), autocast=False)
    assert total > 0
    assert "loss_bbox" in terms
    assert "loss_mask" not in terms
    detector.roi_head.bbox_head.fc_cls.bias.data = torch.tensor([4.0, 0.0, -4.0])
    torch.save({"state_dict": detector.state_dict()}, tmp_path / "epoch_1.pth")
    photo = root / "val2017" / f"{0:012d}.jpg"
    assert run_draw(tmp_path / "own.py", tmp_path / "epoch_1.pth", photo, tmp_path / "out", "--score", 0.2) == 0
    assert "1 drawings written to" in capfd.readouterr().out
    before, after = (np.array(Image.open(path)).astype(int) for path in (photo, tmp_path / "out" / photo.name))
    assert (abs(before - after).max(-1) > 50).mean() > 0.01  # drawn lines, more than compression artifacts


def test_predictions_lie_within_the_images(weights: tuple[Path, Path], cfg: Config):
    detector = load_model(Config.fromfile(weights[0]), str(weights[1]), "mmdet", torch.device("cpu"))
    assert not detector.training
    batch = next(iter(Runner.build_dataloader(cfg.val_dataloader, seed=0)))
    with torch.no_grad():
        for found in detector.test_step(batch):
            height, width = found.ori_shape
            boxes = found.pred_instances.bboxes
            assert 0 < len(boxes) <= 100
            assert found.pred_instances.masks.shape == (len(boxes), height, width)
            assert (boxes >= 0).all()
            assert (boxes <= torch.tensor([width, height, width, height]) + 1e-3).all()
            assert set(found.pred_instances.labels.tolist()) <= {0, 1}


class Malicious:
    def __reduce__(self) -> tuple:
        return (print, ("I was run",))


def test_draw_rejects_bad_arguments(
    weights: tuple[Path, Path], tmp_path: Path, root: Path, capfd: pytest.CaptureFixture[str]
):
    config, trained = weights
    photos = root / "val2017"
    state = torch.load(trained, weights_only=True)
    state["state_dict"].popitem()
    torch.save(state, tmp_path / "other.pth")
    torch.save({"state_dict": Malicious()}, tmp_path / "bad.pth")
    (tmp_path / "cut.pth").write_bytes(trained.read_bytes()[:5000])
    (tmp_path / "empty").mkdir()
    (tmp_path / "oops.png").write_text("oops")
    cases = {
        "does not match the configured model": (config, tmp_path / "other.pth", photos, tmp_path / "out"),
        "bad.pth": (config, tmp_path / "bad.pth", photos, tmp_path / "out"),
        "cut.pth": (config, tmp_path / "cut.pth", photos, tmp_path / "out"),
        "is not a checkpoint: give": (config, tmp_path / "gone.pth", photos, tmp_path / "out"),
        "no configuration": ("vitdet_vitb_lomar", trained, photos, tmp_path / "out"),
        "no image or folder": (config, trained, tmp_path / "gone", tmp_path / "out"),
        "contains no images (jpg": (config, trained, tmp_path / "empty", tmp_path / "out"),
        "none of the images can be decoded": (config, trained, tmp_path / "oops.png", tmp_path / "out"),
        "is where the images are": (config, trained, photos, photos),
    }
    for message, arguments in cases.items():
        assert run_draw(*arguments) == 1, message
        output = capfd.readouterr()
        assert output.err.strip().splitlines()[-1].startswith("error: "), output.err
        assert message in output.err.strip().splitlines()[-1]
        assert "I was run" not in output.out + output.err
    with pytest.raises(SystemExit):
        run_draw(config, trained, photos, tmp_path / "out", "--score", 2)
