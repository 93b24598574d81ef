"""What each library calls the parameters of a Vision Transformer: tables of patterns.

A library is recognized by its name for the kernel that embeds patches. Its names become timm's, which are also ours.
One table of what is dropped or refused then serves all libraries, since no name means different things in them.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

BIAS_TABLE = "attn.rpe_bias.relative_position_bias_table"
SHARED_BIAS = "rel_pos_bias.relative_position_bias_table"  # in BEiT's and SimMIM's pretraining


class Library(NamedTuple):
    """How one library, or the authors' code that shares its names, names parameters.

    Attributes:
        title: for messages.
        anchor: its name for the kernel that embeds patches, which no other library uses.
        renamed: a name, without the prefix of the encoder in the file -> timm's.
        outside: names without that prefix that are not the encoder's, in a file where the encoder has one.
    """

    title: str
    anchor: str
    renamed: tuple[tuple[str, str], ...]
    outside: tuple[tuple[str, str], ...]


_TIMM = Library(
    "timm's",
    "patch_embed.proj.weight",
    (
        (r"blocks\.\d+\.(\d+)\.(.+)", r"blocks.\1.\2"),  # DINOv2 in training: chunks of blocks, numbered throughout
        (r"blocks\.(\d+)\.attn\.relative_position_bias_table", rf"blocks.\1.{BIAS_TABLE}"),
        (r"blocks\.(\d+)\.gamma_([12])", r"blocks.\1.ls\2.gamma"),
        (r"register_tokens", "reg_token"),  # DINOv2
    ),
    (
        (r"decoder\..+", "the pretraining decoder"),
        (r"(head|dino_head|ibot_head)\..+", "a self-distillation head or a classifier"),
        (r"(mask_token|predictor\..+)", "the pretraining predictor"),
    ),
)

_LAYER = r"(?:encoder\.)?layers?\.(\d+)\."  # in its files, and in its modules since version 5
_TRANSFORMERS = Library(
    "transformers'",
    "embeddings.patch_embeddings.projection.weight",
    (
        (r"embeddings\.position_embeddings", "pos_embed"),
        (r"embeddings\.patch_embeddings\.projection\.(.+)", r"patch_embed.proj.\1"),
        (r"embeddings\.distillation_token", "dist_token"),
        (r"embeddings\.register_tokens", "reg_token"),
        (r"embeddings\.(.+)", r"\1"),
        (r"layernorm\.(.+)", r"norm.\1"),
        (r"pooler\.layernorm\.(.+)", r"fc_norm.\1"),
        (r"classifier\.(.+)", r"head.\1"),
        (r"(?:cls|distillation)_classifier\.(.+)", r"head_dist.\1"),
        (r"(?:encoder\.relative_position_bias|shared_position_bias)\.(.+)", r"rel_pos_bias.\1"),
        (_LAYER + r"(?:layernorm_before|norm1)\.(.+)", r"blocks.\1.norm1.\2"),
        (_LAYER + r"(?:layernorm_after|norm2)\.(.+)", r"blocks.\1.norm2.\2"),
        *(
            (_LAYER + rf"attention\.(?:attention\.)?(?:{name}|{name[0]}_proj)\.(.+)", rf"blocks.\1.attn.{name[0]}.\2")
            for name in ("query", "key", "value")
        ),
        (_LAYER + r"attention\.(?:output\.dense|o_proj)\.(.+)", r"blocks.\1.attn.proj.\2"),
        (_LAYER + r"(?:attention\.)*relative_position_bias\.(.+)", r"blocks.\1.attn.rpe_bias.\2"),
        (_LAYER + r"(?:intermediate\.dense|mlp\.fc1)\.(.+)", r"blocks.\1.mlp.fc1.\2"),
        (_LAYER + r"(?:output\.dense|mlp\.fc2)\.(.+)", r"blocks.\1.mlp.fc2.\2"),
        (_LAYER + r"mlp\.weights_(?:in|out)\.(.+)", r"blocks.\1.mlp.w12.\2"),
        (_LAYER + r"(?:lambda_|layer_scale)([12])(?:\.lambda1)?", r"blocks.\1.ls\2.gamma"),
    ),
    (),
)

_MMPRETRAIN = Library(
    "mmpretrain's (mmcls', mmselfsup's)",
    "patch_embed.projection.weight",
    (
        (r"patch_embed\.projection\.(.+)", r"patch_embed.proj.\1"),
        (r"pre_norm\.(.+)", r"norm_pre.\1"),
        (r"ln1\.(.+)", r"norm.\1"),
        (r"ln2\.(.+)", r"fc_norm.\1"),
        (r"head\.(?:layers\.head|fc)\.(weight|bias)", r"head.\1"),
        (r"layers\.(\d+)\.ln([12])\.(.+)", r"blocks.\1.norm\2.\3"),
        (r"layers\.(\d+)\.(?:attn|ffn)\.gamma([12])\.(?:weight|scale|gamma)", r"blocks.\1.ls\2.gamma"),
        (r"layers\.(\d+)\.gamma_([12])", r"blocks.\1.ls\2.gamma"),
        (r"layers\.(\d+)\.attn\.relative_position_bias_table", rf"blocks.\1.{BIAS_TABLE}"),
        (r"layers\.(\d+)\.attn\.(.+)", r"blocks.\1.attn.\2"),
        (r"layers\.(\d+)\.ffn\.layers\.0\.0\.(.+)", r"blocks.\1.mlp.fc1.\2"),
        (r"layers\.(\d+)\.ffn\.layers\.1\.(.+)", r"blocks.\1.mlp.fc2.\2"),
        (r"layers\.(\d+)\.ffn\.(w\d+)\.(.+)", r"blocks.\1.mlp.\2.\3"),
    ),
    (
        (r"(neck|decoder)\..+", "the pretraining decoder"),
        (r"(head|target_generator|momentum_encoder|teacher)\..+", "a pretraining head or target"),
        (r"(decode|auxiliary|bbox|mask|roi|rpn)_head\..+", "a detection or segmentation head"),
        (r"data_preprocessor\..+", "pixel statistics"),
        (r"steps", "a counter"),
    ),
)

LIBRARIES = (_TIMM, _TRANSFORMERS, _MMPRETRAIN)

# The encoder's own parameters, by our names.
_KEPT = re.compile(
    r"cls_token|reg_token|pos_embed|(patch_embed\.proj|norm)\.(weight|bias)"
    r"|blocks\.\d+\.((norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
    rf"|attn\.rpe_k\.lookup_table_weight|{re.escape(BIAS_TABLE)})"
)

# What a classifier has after the encoder.
CLASSIFIER = re.compile(r"(fc_norm|head)\.(weight|bias)|head\.[01]\.(weight|bias|running_mean|running_var)")

CROSSMAE = "CrossMAE's sums over the encoder's blocks, for its decoder"

# Names that are not the encoder's.
DROPPED = (
    (r"decoder_(embed|pred|norm|blocks|pos_embed)\b.*", "MAE's decoder"),
    (r"(wfm\.linear|dec_norms\.\d+)\..+", CROSSMAE),
    (r"decoder\..+", "the pretraining decoder"),
    (r"encoder_pred\..+", "LoMaR's prediction head"),
    (r"lm_head\..+", "BEiT's token prediction head"),
    (r"cls_pt_layers\..+", "BEiT v2's pretraining layers"),
    (r"mask_token", "the pretraining mask token"),
    (r"pooler\.dense\..+", "transformers' pooler, which no classifier uses"),
    (r"(head|predictor)\.\d+\..+", "a projection head of LUT or MoCo v3, or a linear probe's"),
    (r"(head|fc)\.(weight|bias)", "a classifier"),
    (r"(blocks\.\d+\.attn(\.rpe_bias)?|rel_pos_bias)\.relative_position_index", "an index that is recomputed"),
)

REFUSED = (
    (r"dist_token|head_dist\..+", "a distillation token: this encoder has a class token and registers"),
    (r"blocks\.\d+\.mlp\.(w12|w3|w1|w2)\..+", "a gated MLP: this encoder's MLP has two matrices"),
    (r"blocks\.\d+\.attn\.(q_norm|k_norm)\..+", "norms of queries and keys, which this encoder does not have"),
    (r"norm_pre\..+", "a norm before the blocks, which this encoder does not have"),
    (r"rope\b.*", "rotary positions, which this encoder does not have"),
)


def is_kept(name: str) -> bool:
    """Whether our encoder has a parameter of this name."""
    return bool(_KEPT.fullmatch(name))


def match(name: str, table: Iterable[tuple[str, str]]) -> str | None:
    """What a table says about a name; None if nothing."""
    return next((reason for pattern, reason in table if re.fullmatch(pattern, name)), None)


def rename(library: Library, name: str) -> str:
    """timm's name for a library's, if its table has one; otherwise the same name."""
    for pattern, ours in library.renamed:
        name = re.sub(rf"^(?:{pattern})$", ours, name)
    return name


def find_encoders(names: Iterable[str]) -> dict[str, Library]:
    """The prefix of every encoder among the names of a state dictionary -> the library whose names it has."""
    return {
        name.removesuffix(library.anchor): library
        for name in names
        for library in LIBRARIES
        if name == library.anchor or name.endswith("." + library.anchor)
    }
