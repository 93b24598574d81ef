"""Tests of the tiny segmentor as built by mmseg: feature maps, sliding windows, metrics and training steps."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_ade import CLASSES
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.evaluation import IoUMetric
from mmseg.structures import SegDataSample
from PIL import Image
from safetensors.torch import save_file

from downstream.checkpoints.compare import float64_copy
from downstream.checkpoints.weights import features, load_encoder
from downstream.dense.backbone.loading import compare_features, load_start
from downstream.dense.backbone.plain_vit import PlainViT
from downstream.dense.mmengine.hooks import Fp32OutputsHook, plain_numbers
from downstream.segment.linear_head import LinearHead
from pretrain.models.vit import ViT

CONFIG = Path(__file__).parents[1] / "helpers" / "tiny_upernet.py"
OUT = (3, 5, 7, 11)


def images(height: int, width: int, count: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_feature_maps_have_strides_of_4_to_32(model: Any):
    for height, width in ((64, 64), (64, 160), (96, 32)):
        maps = model.extract_feat(images(height, width))
        assert [tuple(m.shape[2:]) for m in maps] == [(height // s, width // s) for s in (4, 8, 16, 32)]


@torch.no_grad()
def test_each_scale_comes_from_its_block_and_is_aligned(model: Any):
    """The map of stride 16 is the third returned block's output, and resizing does not shift the other maps."""
    maps = [m.requires_grad_(False) for m in model.backbone(images(64, 64))]
    assert torch.equal(model.neck(maps)[2], maps[2])
    for number, stride in enumerate((4, 8, 16, 32)):
        changed = [m.clone() for m in maps]
        changed[number][0, :, 2, 1] += 1
        different = [(a != b).any(1)[0] for a, b in zip(model.neck(maps), model.neck(changed), strict=True)]
        assert [bool(d.any()) for d in different] == [other == number for other in range(4)]
        rows, cols = different[number].nonzero().T
        assert (rows.min(), rows.max()) == (2 * 16 // stride, (3 * 16 - 1) // stride)
        assert (cols.min(), cols.max()) == (1 * 16 // stride, (2 * 16 - 1) // stride)


def slide_naively(model: Any, image: torch.Tensor, crop: int, stride: int) -> np.ndarray:
    """(3, H, W) -> (classes, H, W): float64 means over all windows that cover a pixel; the last end at the border."""
    _, height, width = image.shape
    total, seen = np.zeros((len(CLASSES), height, width)), np.zeros((height, width))
    tops = {min(number * stride, max(height - crop, 0)) for number in range(math.ceil(height / stride))}
    lefts = {min(number * stride, max(width - crop, 0)) for number in range(math.ceil(width / stride))}
    for top in tops:
        for left in lefts:
            window = image[None, :, top : top + crop, left : left + crop]
            logits = model.decode_head(model.extract_feat(window))
            logits = F.interpolate(logits, window.shape[2:], mode="bilinear", align_corners=False)[0]
            bottom, right = top + window.shape[2], left + window.shape[3]
            total[:, top:bottom, left:right] += logits.double().numpy()
            seen[top:bottom, left:right] += 1
    return total / seen


@pytest.mark.parametrize("size", [(64, 64), (64, 129), (107, 150), (150, 64), (33, 200)])
@torch.no_grad()
def test_sliding_windows_match_a_naive_loop(model: Any, size: tuple[int, int]):
    """Covers images of any aspect ratio and smaller than a window, which the preprocessor pads to multiples of 32."""
    height, width = size
    image = images(height, width)[0]
    sample = SegDataSample(metainfo={"ori_shape": size, "img_shape": size})
    kept = model.data_preprocessor.mean, model.data_preprocessor.std
    pixels = image[[2, 1, 0]] * kept[1].flip(0) + kept[0].flip(0)  # mmseg reads images as BGR
    (found,) = model.test_step({"inputs": [pixels], "data_samples": [sample]})
    padded = F.pad(image, (0, -width % 32, 0, -height % 32))
    expected = slide_naively(model, padded, 64, 43)[:, :height, :width]
    np.testing.assert_allclose(found.seg_logits.data.numpy(), expected, atol=2e-4)
    assert np.array_equal(found.pred_sem_seg.data[0].numpy(), expected.argmax(0))


@torch.no_grad()
def test_evaluation_on_whole_images(model: Any, cfg: Config):
    """Without sliding windows, logits are resized to the size of the file."""
    model.test_cfg.mode = "whole"
    try:
        batch = next(iter(Runner.build_dataloader(cfg.val_dataloader, seed=0)))
        (found,) = model.test_step(copy.deepcopy(batch))
        assert found.seg_logits.shape == found.ori_shape == (96, 128)
        data = model.data_preprocessor(batch, False)
        height, width = found.img_shape
        assert data["inputs"].shape[2:] == (64, 96)
        logits = model.decode_head(model.extract_feat(data["inputs"]))
        logits = F.interpolate(logits, (64, 96), mode="bilinear", align_corners=False)[:, :, :height, :width]
        expected = F.interpolate(logits, (96, 128), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(found.seg_logits.data, expected, rtol=1e-4, atol=1e-4)
    finally:
        model.test_cfg.mode = "slide"


def test_metrics_match_a_loop_over_pixels():
    rng = np.random.default_rng(0)
    metric = IoUMetric()
    metric.dataset_meta = {"classes": ("a", "b", "c", "d")}
    hits, truth, guess, labeled = np.zeros(4), np.zeros(4), np.zeros(4), 0
    for size in ((7, 9), (5, 4)):
        label = rng.integers(0, 3, size)  # class d never occurs, so it is left out of the means
        label[0] = 255
        predicted = rng.integers(0, 3, size)
        sample = {"pred_sem_seg": {"data": torch.tensor(predicted)}, "gt_sem_seg": {"data": torch.tensor(label)}}
        metric.process({}, [sample])
        for true, seen in zip(label.ravel(), predicted.ravel(), strict=True):
            if true != 255:
                hits[true] += true == seen
                truth[true] += 1
                guess[seen] += 1
                labeled += 1
    found = plain_numbers(metric.compute_metrics(metric.results))
    union = truth + guess - hits
    assert found["mIoU"] == pytest.approx(100 * np.mean((hits / np.maximum(union, 1))[:3]), abs=0.01)
    assert found["mAcc"] == pytest.approx(100 * np.mean((hits / np.maximum(truth, 1))[:3]), abs=0.01)
    assert found["aAcc"] == pytest.approx(100 * hits.sum() / labeled, abs=0.01)
    assert plain_numbers({"mIoU": np.float32("nan")}) == {"mIoU": None}


@pytest.mark.parametrize("kind", ["relative", "sincos"])
@torch.no_grad()
def test_every_map_matches_the_encoder(kind: str, tmp_path: Path):
    """Compares the output of each returned block, at 224 and at 512 pixels."""
    torch.manual_seed(0)
    encoder = ViT("vit_tiny", 16, (14, 14), kind == "relative")
    for name, parameter in encoder.named_parameters():
        if name.endswith(("bias", "lookup_table_weight")):
            parameter.normal_(std=0.2)
    facts = {"arch": "vit_tiny", "patch_size": "16", "image_size": "224x224", "position": kind}
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors", facts)
    for size in (224, 512):
        backbone = PlainViT("vit_tiny", 16, size, kind, window_size=0, class_token=True, out_indices=OUT)
        load_start(backbone, str(tmp_path / "encoder.safetensors"), None)
        expected = float64_copy(load_encoder(tmp_path / "encoder.safetensors", image_size=size)[0])
        maps = float64_copy(backbone)(images(size, size).double())
        outputs: dict[torch.nn.Module, torch.Tensor] = {}
        for block in expected.blocks:
            block.register_forward_hook(lambda block, given, out, outputs=outputs: outputs.update({block: out}))
        last = features(expected, images(size, size).double())
        for number, found in zip(OUT, maps, strict=True):
            tokens = last if number == 11 else outputs[expected.blocks[number]]
            on_grid = tokens[:, 1:].transpose(1, 2).unflatten(2, (size // 16, size // 16))
            torch.testing.assert_close(found, on_grid, rtol=1e-9, atol=1e-9)


def test_comparison_of_features_notices_a_wrong_early_map(tmp_path: Path):
    """One map is from another block than `out_indices` requests."""
    torch.manual_seed(0)
    encoder = ViT("vit_tiny", 16, (2, 2))
    facts = {"arch": "vit_tiny", "patch_size": "16", "image_size": "32x32", "position": "relative"}
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors", facts)
    backbone = PlainViT("vit_tiny", 16, 32, window_size=0, class_token=True, out_indices=OUT)
    load_start(backbone, str(tmp_path / "encoder.safetensors"), None)
    assert compare_features(backbone, encoder) < 1e-12

    class Early(PlainViT):
        def encode(self, *arguments: Any) -> list[torch.Tensor]:
            first, _, *rest = super().encode(*arguments)
            return [first, first, *rest]

    backbone.__class__ = Early
    assert compare_features(backbone, encoder) > 1e-2


def losses(model: Any, batch: dict, autocast: bool) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(0)  # fixes dropout and drop path
    model.train().zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total, terms = model.parse_losses(model(**model.data_preprocessor(copy.deepcopy(batch), True), mode="loss"))
    total.backward()
    return total.item(), terms


def test_training_step_in_both_precisions(model: Any, cfg: Config):
    """Every parameter gets a finite fp32 gradient, and the neck and the logits return fp32 even under bf16."""
    segmentor = copy.deepcopy(model)
    Fp32OutputsHook().before_train(SimpleNamespace(model=segmentor))
    outputs = {}
    for name, module in segmentor.named_modules():
        if name == "neck" or name.endswith("conv_seg"):
            module.register_forward_hook(lambda module, given, out, name=name: outputs.update({name: out}))
    batch = next(iter(Runner.build_dataloader(cfg.train_dataloader, seed=0)))
    fp32_loss, terms = losses(segmentor, batch, autocast=False)
    assert {"decode.loss_ce", "aux.loss_ce", "decode.acc_seg"} < terms.keys()
    bf16_loss, _ = losses(segmentor, batch, autocast=True)
    assert bf16_loss == pytest.approx(fp32_loss, rel=0.05)
    assert bf16_loss != fp32_loss
    assert {m.dtype for m in outputs["neck"]} == {torch.float32}
    assert outputs["decode_head.conv_seg"].dtype == outputs["auxiliary_head.conv_seg"].dtype == torch.float32
    for name, parameter in segmentor.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


def test_pixels_are_normalized_as_in_pretraining(model: Any, cfg: Config, ade: Path):
    batch = next(iter(Runner.build_dataloader(cfg.val_dataloader, seed=0)))
    seen = model.data_preprocessor(batch, False)["inputs"][0]
    image = Image.open(ade / "images/validation/00000000.jpg").resize((85, 64), Image.BILINEAR)
    expected = (np.array(image) / 255.0 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    assert seen.shape == (3, 64, 96)
    assert np.abs(seen[:, :, :85].permute(1, 2, 0).numpy() - expected).mean() < 0.1
    assert not seen[:, :, 85:].any()


def test_frozen_encoder_is_always_in_eval_mode(cfg: Config):
    torch.manual_seed(0)
    frozen = PlainViT(
        "vit_tiny", 16, 64, window_size=0, class_token=True, out_indices=OUT, drop_path_rate=0.9, frozen=True
    )
    frozen.train()
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not frozen(images(64, 64))[0].requires_grad
    assert PlainViT("vit_tiny", 16, 64, window_size=0, out_indices=OUT).train().training


@torch.no_grad()
def test_linear_head_is_a_norm_and_a_linear_layer():
    head = LinearHead(in_channels=8, norm_cfg={"type": "RankBN"}, in_index=0, num_classes=3)
    head.norm.running_mean.normal_()
    head.norm.running_var.uniform_(0.5, 2)
    head.conv_seg.weight.normal_()
    x = torch.randn(2, 8, 5, 4)
    norm = head.norm
    normalized = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
    expected = (
        torch.einsum("ncyx,kc->nkyx", normalized, head.conv_seg.weight[:, :, 0, 0]) + head.conv_seg.bias[:, None, None]
    )
    torch.testing.assert_close(head.eval()([x]), expected, rtol=1e-4, atol=1e-5)
    assert sum(parameter.numel() for parameter in head.parameters()) == 8 * 3 + 3 + 2 * 8
