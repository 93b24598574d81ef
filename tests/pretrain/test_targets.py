"""Every method with every target that it supports."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import loss_and_gradients, random_images, random_mask_indices, tiny_method
from safetensors.torch import save_file

from pretrain.methods import METHODS
from pretrain.methods.targets import TARGETS, PixelsConfig, build_target
from pretrain.models.patches import pixel_target

GRID, PATCH_SIZE, VALUES = (4, 6), 2, 12
DECODER = {"decoder_embed_dim": 12, "decoder_depth": 1, "decoder_num_heads": 3}
METHOD_KEYS: dict[str, dict[str, Any]] = {
    "ae": {"block_size": 4, **DECODER},
    "beit": {},
    "lc_mae": {"proj_dim": 10, **DECODER},
    "local_mim": {"blocks": [1, 2], "decoder_embed_dim": 8, "decoder_num_heads": 2},
    "lomar": {"num_windows": 3, "window_size": 3},
    "mae": DECODER,
    "mff": {"blocks": [1, 2], **DECODER},
    "simmim": {"mask_patch_size": 4},
    "tec": {**DECODER, "num_queries": 3},
}
TARGET_KEYS: dict[str, dict[str, Any]] = {
    "normalized pixels": {"name": "pixels", "norm_pix": True},
    "pixels with l1": {"name": "pixels", "norm_pix": False, "loss": "l1"},
    "pca": {"name": "pca"},
    "hog": {"name": "hog", "cell_sizes": [1, 4]},
    "tokens": {"name": "tokens", "vocab_size": 16},
    "teacher": {"name": "teacher"},
    "ema": {"name": "ema", "blocks": 2},
}


@pytest.fixture
def components_file(tmp_path: Path) -> str:
    """A file with all 12 components of patches of 12 values."""
    vectors, _ = torch.linalg.qr(torch.randn(VALUES, VALUES, generator=torch.Generator().manual_seed(0)))
    save_file({"mean": torch.zeros(VALUES), "components": vectors.contiguous()}, tmp_path / "pca.safetensors")
    return str(tmp_path / "pca.safetensors")


def test_cases_cover_all_methods_and_targets():
    """Only three methods restrict the target: AE (blocks), LocalMIM (several cell sizes) and TEC (also attention)."""
    assert {name for name, kind in METHODS.items() if kind.targets != TARGETS.keys()} == {"ae", "local_mim", "tec"}
    assert METHOD_KEYS.keys() == METHODS.keys()
    assert {keys["name"] for keys in TARGET_KEYS.values()} == {
        name for kind in METHODS.values() for name in kind.targets
    }


@pytest.mark.parametrize(
    ("name", "target"),
    [
        (name, target)
        for name in METHODS
        for target in TARGET_KEYS
        if TARGET_KEYS[target]["name"] in METHODS[name].targets
    ],
)
def test_loss_gradients_and_reconstructions(name: str, target: str, components_file: str):
    target_keys = TARGET_KEYS[target]
    if target == "pca":
        target_keys = target_keys | {"file": components_file}
    model = tiny_method({"name": name, **METHOD_KEYS[name], "target": target_keys}, GRID, PATCH_SIZE, relative=False)
    images, mask_indices = random_images(model), random_mask_indices(model)
    loss, gradients = loss_and_gradients(model, images, mask_indices)
    assert loss.isfinite()
    assert loss > 0
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    shown = model.reconstruct(images, mask_indices)
    named = {
        "tokens": {"codes", "predicted codes"},
        "hog": {"edges", "predicted edges"},
        "teacher": {"features", "predicted features"},
        "ema": {"features", "predicted features"},
    }
    names = named.get(target, {"reconstruction"})
    assert names <= shown.keys()
    assert torch.equal(shown["original"], images)
    for image in shown.values():
        assert image.dtype == torch.uint8
        assert image.shape[0] == len(images)
        assert image.shape[3] == 3


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("loss", ["mse", "l1"])
def test_pixel_target_uses_the_chosen_loss_and_renders_exactly(loss: str, norm_pix: bool):
    target = build_target(PixelsConfig(norm_pix=norm_pix, loss=loss), GRID, PATCH_SIZE)
    patches = torch.randint(0, 256, (2, 5, VALUES), generator=torch.Generator().manual_seed(0)).byte()
    exact = pixel_target(patches, norm_pix)
    assert target.num_outputs == VALUES
    assert target.loss(exact, patches) == 0
    assert target.loss(exact + 3, patches).item() == pytest.approx({"mse": 9, "l1": 3}[loss], rel=1e-5)
    assert torch.equal(target.render(exact, patches)["reconstruction"], patches)
