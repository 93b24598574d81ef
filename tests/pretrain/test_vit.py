"""The encoder: names and outputs compared with timm and torch, positions compared with their formulas."""

import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import reference
from helpers.tiny import randomize, tiny_vit
from timm.models.vision_transformer import VisionTransformer

from pretrain.models.attention import attend
from pretrain.models.patches import normalize_pixels, patchify
from pretrain.models.relative_position import CLASS_BUCKET, grid_buckets, product_buckets
from pretrain.models.vit import ARCHS, Block, DropPath, PatchEmbed, ViT, sincos_positions

TIMM_NAMES = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "vit_huge": "vit_huge_patch14_224",
}


@pytest.mark.parametrize(("arch", "timm_name"), TIMM_NAMES.items())
def test_weights_have_timm_names_and_shapes(arch: str, timm_name: str):
    patch = int(timm_name.split("patch")[1].split("_")[0])
    with torch.device("meta"):
        theirs = {name: w.shape for name, w in timm.create_model(timm_name).state_dict().items()}
        relative = {name: w.shape for name, w in ViT(arch, patch, (224 // patch,) * 2).state_dict().items()}
    shared = {name: shape for name, shape in theirs.items() if not name.startswith(("head", "pos_embed"))}
    assert shared.items() <= relative.items()
    assert all("rpe_k.lookup_table_weight" in name for name in relative.keys() - shared.keys())
    assert theirs["pos_embed"] == (1, (224 // patch) ** 2 + 1, theirs["cls_token"][-1])


def random_images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 12, 20, 3), generator=generator, dtype=torch.uint8)


def test_encoder_with_absolute_positions_equals_timm():
    ours = tiny_vit(patch_size=4, grid=(3, 5), relative=False)
    randomize(ours)
    theirs = VisionTransformer(
        (12, 20), 4, embed_dim=16, depth=2, num_heads=2, num_classes=0, global_pool="", norm_layer=torch.nn.LayerNorm
    )
    for module in theirs.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    theirs.load_state_dict(ours.state_dict(), strict=True)  # pos_embed too, though timm learns it
    images = random_images()
    tokens = ours.patch_embed(patchify(images, 4)) + ours.pos_embed[:, 1:]
    # The class token's sin-cos position is zero, so timm's addition to it changes nothing.
    expected = theirs.forward_features(normalize_pixels(images).permute(0, 3, 1, 2))
    torch.testing.assert_close(ours(tokens), expected, atol=1e-5, rtol=1e-5)


def test_patch_embedding_equals_a_convolution():
    embed = PatchEmbed(4, 8)
    torch.nn.init.normal_(embed.proj.bias)
    images = random_images()
    convolved = F.conv2d(normalize_pixels(images).permute(0, 3, 1, 2), embed.proj.weight, embed.proj.bias, stride=4)
    torch.testing.assert_close(embed(patchify(images, 4)), convolved.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_sincos_positions_equal_mae():
    dim, height, width = 24, 3, 5
    positions = sincos_positions(dim, height, width).double().numpy()
    omega = 1.0 / 10000 ** (np.arange(dim // 4) / (dim / 4.0))
    # MAE's grid comes from meshgrid(width, height): its first axis, and so the first half, is the column.
    col, row = np.meshgrid(np.arange(width), np.arange(height))
    halves = [
        np.concatenate([np.sin(np.outer(p.ravel(), omega)), np.cos(np.outer(p.ravel(), omega))], 1) for p in (col, row)
    ]
    np.testing.assert_allclose(positions, np.concatenate(halves, axis=1), atol=1e-7)


@pytest.mark.parametrize(("height", "width"), [(7, 7), (14, 14), (3, 5)])
def test_grid_buckets_equal_the_formula(height: int, width: int):
    table = grid_buckets(height, width)
    tokens = 1 + height * width
    assert table.shape == (tokens, tokens)
    assert (table[0] == CLASS_BUCKET).all()
    assert (table[:, 0] == CLASS_BUCKET).all()
    expected = [
        [reference.bucket(divmod(i, width), divmod(j, width)) for j in range(height * width)]
        for i in range(height * width)
    ]
    assert table[1:, 1:].tolist() == expected


def test_grid_buckets_have_known_values():
    row = grid_buckets(1, 15)[1:, 1:]
    along = [row[d, 0].item() - 24 for d in range(15)]  # query d columns right of the key; 24 is the middle bucket
    assert along == [0, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3]
    assert [row[0, d].item() - 24 for d in range(15)] == [-b for b in along]
    column = grid_buckets(15, 1)[1:, 1:]
    assert [column[d, 0].item() - 24 for d in range(15)] == [7 * b for b in along]
    assert CLASS_BUCKET == 49
    assert set(grid_buckets(7, 7).flatten().tolist()) == set(range(50))


def test_buckets_of_scattered_patches_depend_only_on_offsets():
    rows, cols = torch.tensor([[0, 3, 9]]), torch.tensor([[2, 2, 8]])
    table = product_buckets(rows, cols)
    assert table.shape == (1, 3, 3)
    for i in range(3):
        for j in range(3):
            query, key = ((rows[0, n].item(), cols[0, n].item()) for n in (i, j))
            assert table[0, i, j] == reference.bucket(query, key)
    assert torch.equal(product_buckets(rows + 5, cols + 1), table)


@pytest.mark.parametrize("biased", [True, False])
def test_attention_and_gradients_equal_torch(biased: bool):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 8, generator=generator).double().requires_grad_() for _ in range(3))
    bias = torch.randn(2, 3, 7, 7, generator=generator).double().requires_grad_() if biased else None
    inputs = [q, k, v] + ([bias] if biased else [])
    upstream = torch.randn(2, 3, 7, 8, generator=generator).double()
    ours, theirs = attend(q, k, v, bias), F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, torchs in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, torchs, rtol=1e-12, atol=1e-12)


def test_initial_weights_follow_mae():
    encoder = ViT("vit_tiny", 16, (2, 2))
    qkv, patches = encoder.blocks[0].attn.qkv.weight, encoder.patch_embed.proj.weight
    for weight, fan_in, fan_out in ((qkv, 192, 576), (patches, 768, 192)):
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.99 * bound < weight.abs().max() <= bound
    assert encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    for name, parameter in encoder.named_parameters():
        if name.endswith(".bias") or "rpe_k" in name:
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name


def test_drop_path_drops_whole_sequences_and_rescales_the_others():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 3, dtype=torch.bfloat16)
    dropped = drop(x)
    assert dropped.dtype == torch.bfloat16
    values = dropped.float().flatten(1)
    assert (values == values[:, :1]).all(), "a sequence as a whole"
    assert set(values.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75, dtype=torch.bfloat16))}
    assert 0.7 < (values[:, 0] > 0).float().mean() < 0.8
    assert torch.equal(drop.eval()(x), x)
    assert not drop.state_dict(), "a checkpoint does not depend on the rate"


def test_drop_path_skips_attention_and_mlp_of_a_block():
    block = Block(ARCHS["vit_tiny"], relative=False, drop_path_rate=0.999999)
    x = torch.randn(2, 3, 192)
    assert torch.equal(block(x, None), x)
    assert not torch.equal(block.eval()(x, None), x)


def test_hidden_streams_equal_partial_forward_passes():
    torch.manual_seed(0)
    encoder = ViT("vit_tiny", 4, (2, 2), relative=False)
    tokens = torch.randn(3, 4, 192)
    streams = encoder(tokens, hidden=(0, 2, 12))
    assert torch.equal(streams[0], encoder(tokens, stop=0))
    assert torch.equal(streams[1], encoder(tokens, stop=2))
    assert torch.equal(encoder.norm(streams[2]), encoder(tokens))
    later = encoder(streams[1], start=2, hidden=(2, 5))
    assert torch.equal(later[0], streams[1])
    assert torch.equal(later[1], encoder(tokens, stop=5))
