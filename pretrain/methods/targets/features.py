"""Features of whole images as targets, from a frozen teacher or from the moving average of the encoder itself.

A teacher sees the whole image. From the part that it sees, the trained model predicts what the teacher's last blocks
output at the masked patches. The teacher is another encoder (TEC's feature target, Gao et al., section 3.1), or the
moving average of the encoder itself (data2vec 2.0, Baevski et al., section 3.1). Like a tokenizer, it is not part of
the trained module: nothing in it is trained, partitioned or exported.

Shapes: B images, N patches of an image, M of them predicted, D the teacher's width, P = p*p*3.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from data.messages import counted
from data.pixel_format import RGB, Pixels
from pretrain.methods.masking import Grid
from pretrain.methods.targets.base import PatchTarget, TargetConfig, as_sha256
from pretrain.methods.targets.pca import principal_components
from pretrain.models.patches import patchify, values_per_patch
from pretrain.models.vit import ARCHS, Block, ViT
from pretrain.trainer.config import ModelConfig
from pretrain.trainer.run_folder import file_digest
from pretrain.trainer.schema import MAY_CHANGE

_EPS = 1e-6  # added to the variance under the root


def standardize_over_patches(features: Tensor) -> Tensor:
    """(B, N, D) -> fp32, with mean 0 and unbiased variance 1 over the N patches, per image and channel.

    TEC's feature target, and data2vec 2.0's instance norm.
    """
    variance, mean = torch.var_mean(features.float(), dim=1, keepdim=True)
    return (features - mean) * torch.rsqrt(variance + _EPS)


class FeatureTeacher(nn.Module, ABC):
    """A model that is applied to whole images, without gradients.

    Attributes:
        dim, depth: its width and its number of blocks.
        image_size: (height, width) in pixels of the images that it sees: they have as many patches as the trained
            encoder's, perhaps of another size.
    """

    dim: int
    depth: int
    image_size: tuple[int, int]

    @abstractmethod
    def forward(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """The patch tokens behind some blocks, each (B, N, D), in raster order; no norm is applied.

        Args:
            images: (B, H, W, C); RGB images of another size are resized to the teacher's.
            blocks: ascending numbers; 1 is the first block.
        """


class EncoderTeacher(FeatureTeacher):
    """One of our encoders, at its own image size."""

    position: Tensor

    def __init__(self, encoder: ViT):
        super().__init__()
        self.encoder = encoder
        self.class_attention: ClassAttention | None = None  # for TEC
        self.register_buffer("position", encoder.grid_position(), persistent=False)
        self.dim, self.depth, self.image_size = encoder.arch.dim, encoder.arch.depth, encoder.image_size
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        return [stream[:, self.encoder.num_prefix_tokens :] for stream in self.streams(images, blocks)]

    @torch.no_grad()
    def streams(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Like `forward`, with the class token and any other prefix tokens in front."""
        patches = patchify(resize(images, self.image_size), self.encoder.patch_size)
        streams = self.encoder(self.encoder.patch_embed(patches), self.position, hidden=tuple(blocks))
        assert isinstance(streams, list)
        return streams


class ClassAttention(nn.Module):
    """Attention from the class token and some patches in the last block of an encoder with absolute positions.

    It has copies of the parameters that queries and keys depend on.
    """

    def __init__(self, encoder: ViT):
        super().__init__()
        last, dim = encoder.blocks[-1], encoder.arch.dim
        assert isinstance(last, Block)
        self.heads, self.num_prefix_tokens = encoder.arch.heads, encoder.num_prefix_tokens
        self.norm, self.qk = copy.deepcopy(last.norm1), nn.Linear(dim, 2 * dim)
        for parameter, own in zip(last.attn.qkv.parameters(), self.qk.parameters(), strict=True):
            own.data = parameter.data[: 2 * dim].clone()
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, tokens: Tensor, num_queries: int) -> tuple[Tensor, Tensor]:
        """The patches that the class token attends to most, and the logits of the class token and of these.

        Args:
            tokens: (B, P+N, D), the input of the last block.
            num_queries: how many patches: those with the largest mean logit over the heads.

        Returns:
            Their positions (B, num_queries), and logits before the softmax (B, H, 1+num_queries, N), fp32, with the
            class token's first.
        """
        B, length, dim = tokens.shape
        qk = self.qk(self.norm(tokens)).float().view(B, length, 2, self.heads, dim // self.heads)
        queries, keys = qk.permute(2, 0, 3, 1, 4)
        first = self.num_prefix_tokens
        keys = keys[:, :, first:].transpose(2, 3) * (dim // self.heads) ** -0.5
        with torch.autocast(tokens.device.type, enabled=False):
            rows = (queries[:, :, :1] @ keys).mean(1)[:, 0].topk(num_queries).indices
            index = F.pad(first + rows, (1, 0))[:, None, :, None].expand(-1, self.heads, -1, queries.shape[-1])
            return rows, queries.gather(2, index) @ keys


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H, W, 3) images in 0..255 -> (B, *size, 3), bicubic and not rounded; unchanged if they have that size."""
    if images.shape[1:3] == size:
        return images
    pixels = F.interpolate(images.movedim(-1, 1).float(), size, mode="bicubic", antialias=True)
    return pixels.clamp(0, 255).movedim(1, -1).contiguous()


class TeacherConfig(TargetConfig):
    """The keys of `target.name=teacher`; once validated, `sha256` is always that of the file, if there is one."""

    name: Literal["teacher"] = "teacher"
    file: Annotated[str | None, MAY_CHANGE] = Field(
        None, description="the teacher's weights: an encoder from any project that downstream tools can load"
    )
    encoder: str | None = Field(None, description="which of several encoders in the file to use, as in start.weights")
    timm_model: str | None = Field(
        None, description="timm's name of the model, if the file holds its weights under timm's names"
    )
    blocks: int = Field(2, ge=1, description="how many of the teacher's last blocks are averaged into the target")
    resize_images: Annotated[bool, MAY_CHANGE] = Field(
        False,
        description="true: resize images for a teacher with another patch size: it sees as many patches as the encoder",
    )
    sha256: str | None = Field(None, description="refuse any other file; filled in if unset")

    @field_validator("file")
    @classmethod
    def _file_exists(cls, file: str | None) -> str | None:
        if file is not None and not Path(file).is_file():
            raise ValueError(
                f"target.file={file!r} is not a file: give one with the teacher's weights, such as "
                f"runs/NAME/encoder.safetensors; nothing is downloaded"
            )
        return file

    @field_validator("sha256")
    @classmethod
    def _sha256_matches_the_file(cls, given: str | None, info: ValidationInfo) -> str | None:
        if info.data.get("file") is None:
            return given  # the file is invalid, which is reported, or is yet to be named
        return as_sha256("target.sha256", given, file_digest(info.data["file"]), info.data["file"])

    def check_pixels(self, pixels: Pixels) -> None:
        if pixels.format != RGB:
            self.refuse_pixels("needs 8-bit RGB images for its teacher", pixels)


class EMAConfig(TargetConfig):
    """The keys of `target.name=ema`."""

    name: Literal["ema"] = "ema"
    blocks: int = Field(10, ge=1, description="how many last blocks of the moving average are averaged into the target")
    momentum: float = Field(
        0.9998, ge=0, le=1, description="momentum of the moving average at the start; rises along a cosine"
    )
    final_momentum: float = Field(0.99999, ge=0, le=1, description="momentum of the moving average at the end")

    def check(self, grid: Grid, model: ModelConfig) -> None:
        check_blocks(self.blocks, ARCHS[model.arch].depth, f"model.arch={model.arch}")


def check_blocks(blocks: int, depth: int, owner: str) -> None:
    """Raises ValueError if a teacher does not have that many blocks."""
    if blocks > depth:
        raise ValueError(
            f"target.blocks={blocks}, but {owner} has {counted(depth, 'block')}: set target.blocks to at most {depth}"
        )


class FeatureTarget(PatchTarget):
    """The mean output of a teacher's last blocks at the patch.

    For a frozen teacher, this mean is standardized over the patches, as in TEC. For the moving average, each block is
    standardized and the mean gets a layer norm, as in data2vec 2.0: no block outweighs the others while all of them
    change. (data2vec 2.0 averages the outputs of the MLPs; here they are those of whole blocks.)

    Attributes:
        teacher: computes the features; `build_ema` updates it if it is the moving average.
        last: numbers of its last blocks.
    """

    caption = (
        "Features have no pixels: their three principal components among the patches shown are drawn as red, green and "
        "blue. A prediction is right where the colors agree."
    )

    def __init__(self, config: TeacherConfig | EMAConfig, patch_size: int, teacher: FeatureTeacher):
        self.config, self.patch_size, self.teacher = config, patch_size, teacher
        self.num_outputs = teacher.dim
        self.last = tuple(range(teacher.depth - config.blocks + 1, teacher.depth + 1))

    def ground_truth(self, images: Tensor, patches: Tensor) -> Tensor:
        """(B, N, D) fp32; the teacher computes in the caller's precision, the statistics are in fp32."""
        self.place(images.device)
        return self.from_blocks(self.teacher(images, self.last))

    def with_attention(self, images: Tensor, num_queries: int) -> tuple[Tensor, Tensor, Tensor]:
        """The results of `ground_truth` and, for TEC, of `ClassAttention`, in one pass of the teacher."""
        self.place(images.device)
        teacher = self.teacher
        assert isinstance(teacher, EncoderTeacher)
        assert teacher.class_attention is not None
        blocks = sorted({teacher.depth - 1, *self.last})
        streams = dict(zip(blocks, teacher.streams(images, blocks), strict=True))
        patches = [streams[block][:, teacher.encoder.num_prefix_tokens :] for block in self.last]
        return self.from_blocks(patches), *teacher.class_attention(streams[teacher.depth - 1], num_queries)

    def place(self, device: torch.device) -> None:
        """Moves the teacher to a device, if it is not there."""
        if next(self.teacher.parameters()).device != device:
            self.teacher.to(device)

    def from_blocks(self, blocks: list[Tensor]) -> Tensor:
        """The target from the patch tokens (B, N, D) behind each of the blocks `last`."""
        if isinstance(self.config, TeacherConfig):
            return standardize_over_patches(torch.stack(blocks).float().mean(0))
        standardized = torch.stack([standardize_over_patches(block) for block in blocks])
        return F.layer_norm(standardized.mean(0), (self.num_outputs,))

    def loss(self, prediction: Tensor, truth: Tensor) -> Tensor:
        return (prediction.float() - truth).square().mean()

    def render(self, prediction: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """Both in the same false colors: the first principal component of the true features is red, and so on."""
        vectors = truth.flatten(0, 1).double()
        center = vectors.mean(0)
        components, variances = principal_components((vectors - center).T @ (vectors - center) / len(vectors), 3)
        spread = variances.clamp(min=1e-12).sqrt()

        def colors(features: Tensor) -> Tensor:
            values = (features.double() - center) @ components.T / spread  # black to white: two deviations each way
            return ((values / 4 + 0.5).clamp(0, 1) * 255).byte().tile(values_per_patch(self.patch_size) // 3)

        return {"features": colors(truth), "predicted features": colors(prediction)}
