"""LoMaR as a first research implementation would write it; `step.py` measures ours against it.

It embeds the whole image, copies the token map for each window and gathers from the copies, and assigns mask tokens by
boolean index. It gathers the relative bias from the scores of all buckets, and computes the head and the target for all
tokens and patches before a mask selects. Its weights are named as in `pretrain.methods.lomar.LoMaR`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.methods.lomar import LoMaR
from pretrain.methods.targets.pixels import PixelTarget
from pretrain.models.relative_position import NUM_BUCKETS, grid_buckets
from pretrain.models.vit import Arch

PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class RelativeKey(nn.Module):
    def __init__(self, head_dim: int):
        super().__init__()
        self.lookup_table_weight = nn.Parameter(torch.zeros(1, head_dim, NUM_BUCKETS))

    def forward(self, q: Tensor, buckets: Tensor) -> Tensor:
        scores = q @ self.lookup_table_weight  # (B, heads, L, buckets)
        return scores.gather(-1, buckets.expand(*q.shape[:2], -1, -1))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rpe_k = RelativeKey(dim // heads)

    def forward(self, x: Tensor, buckets: Tensor) -> Tensor:
        B, L, D = x.shape
        q, k, v = self.qkv(x).reshape(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        logits = (q @ k.transpose(-2, -1)) * self.scale + self.rpe_k(q, buckets)
        return self.proj((logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, L, D))


class Mlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, arch: Arch):
        super().__init__()
        self.norm1 = nn.LayerNorm(arch.dim, eps=1e-6)
        self.attn = Attention(arch.dim, arch.heads)
        self.norm2 = nn.LayerNorm(arch.dim, eps=1e-6)
        self.mlp = Mlp(arch.dim)

    def forward(self, x: Tensor, buckets: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), buckets)
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    def __init__(self, arch: Arch, patch_size: int):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, arch.dim, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, arch.dim))
        self.blocks = nn.ModuleList(Block(arch) for _ in range(arch.depth))
        self.norm = nn.LayerNorm(arch.dim, eps=1e-6)


class NaiveLoMaR(nn.Module):
    """Takes the same batches as `LoMaR` and computes the same loss."""

    def __init__(self, arch: Arch, patch_size: int, window_size: int, norm_pix: bool):
        super().__init__()
        self.patch_size, self.norm_pix = patch_size, norm_pix
        self.encoder = Encoder(arch, patch_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, arch.dim))
        self.head = nn.Linear(arch.dim, patch_size**2 * 3)
        self.register_buffer("buckets", grid_buckets(window_size, window_size), persistent=False)
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(PIXEL_STD).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def like(cls, ours: LoMaR) -> "NaiveLoMaR":
        """A naive implementation of our method with the same weights."""
        encoder, target = ours.encoder, ours.target
        assert isinstance(target, PixelTarget)
        naive = cls(encoder.arch, encoder.patch_size, ours.config.window_size, target.norm_pix)
        naive.load_state_dict({name.removeprefix("predictor."): value for name, value in ours.state_dict().items()})
        return naive

    def forward(self, images: Tensor, mask_indices: dict[str, Tensor]) -> dict[str, Tensor]:
        images = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        W = mask_indices["positions"].shape[1]
        positions = mask_indices["positions"].flatten(0, 1)
        masked = torch.zeros(positions.shape, dtype=torch.bool, device=positions.device)
        masked.scatter_(1, mask_indices["masked"].flatten(0, 1), True)

        tokens = self.encoder.patch_embed.proj(images).flatten(2).transpose(1, 2)
        tokens = tokens.repeat_interleave(W, dim=0)
        x = tokens.gather(1, positions.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])).float()
        x[masked] = self.mask_token
        x = torch.cat([self.encoder.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.encoder.blocks:
            x = block(x, self.buckets)
        prediction = self.head(self.encoder.norm(x))[:, 1:]

        target = self.patchify(images).repeat_interleave(W, dim=0)
        target = target.gather(1, positions.unsqueeze(-1).expand(-1, -1, target.shape[-1]))
        if self.norm_pix:
            mean = target.mean(dim=-1, keepdim=True)
            target = (target - mean) / (target.var(dim=-1, keepdim=True) + 1e-6) ** 0.5
        error = ((prediction - target) ** 2).mean(dim=-1)
        return {"loss": (error * masked).sum() / masked.sum()}

    def patchify(self, images: Tensor) -> Tensor:
        B, C, H, W = images.shape
        p = self.patch_size
        x = images.reshape(B, C, H // p, p, W // p, p)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)


def randomize_tables(ours: LoMaR) -> None:
    """Randomizes the relative tables, because their initial zeros would hide a wrong bias."""
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lookup_table" in name:
                parameter.normal_(std=0.3)


def assert_equal_steps(ours: LoMaR, naive: NaiveLoMaR, batch: tuple[Tensor, dict[str, Tensor]], bf16: bool) -> None:
    """Asserts that losses are equal up to rounding, and all parameters' gradients have the same direction."""
    losses, gradients = [], []
    for model in (ours, naive):
        with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=bf16):
            loss = model(*batch)["loss"]
        loss.backward()
        losses.append(loss.item())
        gradients.append({name.removeprefix("predictor."): p.grad for name, p in model.named_parameters()})
        model.zero_grad()
    tolerance, least = (5e-3, 0.98) if bf16 else (1e-5, 0.9999)
    assert abs(losses[0] - losses[1]) < tolerance * losses[1], f"losses differ: {losses}"
    for name, gradient in gradients[0].items():
        cosine = torch.cosine_similarity(gradient.flatten(), gradients[1][name].flatten(), dim=0).item()
        assert cosine > least, f"the gradients of {name} differ: cosine {cosine:.5f}"
