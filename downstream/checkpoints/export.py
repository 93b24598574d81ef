"""Exports an encoder: `python -m downstream.checkpoints.export RUN_OR_FILE OUT --format timm|mm|hf`.

    timm   OUT.safetensors for `timm.create_model(..., checkpoint_path=OUT)`
    mm     OUT.pth for mmengine's loader: {"state_dict": our names, "meta": how to rebuild the encoder}
    hf     a Hugging Face folder with a model card: for transformers' ViTModel if positions are absolute, else for timm

RUN_OR_FILE is whatever `downstream.checkpoints.weights.load_encoder` reads. Every export is read back by what it is meant for;
where its features are not those of the source, to 1e-5 on random images, it fails and nothing is left behind.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch
from safetensors.torch import save
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from downstream.checkpoints.formats import Report
from downstream.checkpoints.model_card import write_card
from downstream.checkpoints.timm_models import SIZES, model_name
from downstream.checkpoints.weights import Size, features, load_encoder, max_difference, position
from pretrain.models.vit import ARCHS, ViT

TOLERANCE = 1e-5


class Export:
    """An encoder on its way to another library."""

    def __init__(self, encoder: ViT, report: Report):
        self.encoder, self.report = encoder, report
        self.arch = next(name for name, arch in ARCHS.items() if arch == encoder.arch)
        self.height, self.width = (side * encoder.patch_size for side in encoder.grid)
        self.facts = {
            **report.facts,
            "arch": self.arch,
            "patch": str(encoder.patch_size),
            "size": f"{self.height}x{self.width}",
            "position": position(encoder),
            "weights": report.weights,
        }
        self.tensors = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}

    def timm_call(self) -> tuple[str, dict[str, Any]]:
        """Name and arguments of `timm.create_model`."""
        patch, size = self.encoder.patch_size, (self.height, self.width)
        square = self.height if self.height == self.width else 0
        if position(self.encoder) == "sincos":
            named_patch, named_size = (14 if self.arch == "vit_huge" else 16), 224
            name = f"{self.arch}_patch{named_patch}_{named_size}"
            options: dict[str, Any] = {"num_classes": 0}
        else:
            entry = (self.arch, patch, square)
            named_patch, named_size = entry[1:] if entry in SIZES else (16, 224)
            name = model_name(self.arch, named_patch, named_size)
            options = {} if position(self.encoder) == "relative" else {"position": "bias"}
        if patch != named_patch:
            options["patch_size"] = patch
        if square != named_size:
            options["img_size"] = square or size
        return name, options

    def check(self, compute: Callable[[Tensor], Tensor]) -> float:
        """The difference of the export's features, on random images, from the encoder's.

        Raises:
            ValueError: it is larger than `TOLERANCE`.
        """
        images = torch.randn(2, 3, self.height, self.width, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            difference = max_difference(features(self.encoder, images), compute(images))
        if not difference <= TOLERANCE:  # nor NaN
            raise ValueError(
                f"the export of {self.report.path} computes other features: they differ by {difference:.2g}"
            )
        return difference


def _to_timm(export: Export, out: Path) -> tuple[float, str]:
    _write_safetensors(out, export.tensors, export.facts)
    name, options = export.timm_call()
    model = timm.create_model(name, checkpoint_path=str(out), **options).eval()
    return export.check(model.forward_features), _timm_usage(export, name, {"checkpoint_path": "{out}", **options})


def _to_mm(export: Export, out: Path) -> tuple[float, str]:
    torch.save({"state_dict": export.tensors, "meta": export.facts}, out)
    encoder, _ = load_encoder(out)
    kind, patch = position(export.encoder), export.encoder.patch_size
    if kind == "bias":  # BEiT's tables, which our own backbone has not
        usage = 'init_cfg=dict(type="Pretrained", checkpoint="{out}")'
    else:
        start = f'patch={patch}, position="{kind}", checkpoint="{{out}}"'
        usage = (
            f'backbone=dict(type="PlainViT", arch="{export.arch}", {start})  # of downstream.dense.backbone.plain_vit'
        )
    return export.check(lambda images: features(encoder, images)), usage


def _to_hf(export: Export, out: Path) -> tuple[float, str]:
    out.mkdir()
    write = _transformers_folder if position(export.encoder) == "sincos" else _timm_folder
    library, difference, usage = write(export, out)
    card = write_card(export.report, export.facts, library, usage.replace("{out}", "path/to/this/folder"), difference)
    (out / "README.md").write_text(card)
    return difference, usage


def _timm_folder(export: Export, out: Path) -> tuple[str, float, str]:
    name, options = export.timm_call()
    _write_safetensors(out / "model.safetensors", export.tensors, export.facts)
    pixels = {
        "input_size": [3, export.height, export.width],
        "mean": list(IMAGENET_DEFAULT_MEAN),
        "std": list(IMAGENET_DEFAULT_STD),
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    config = {"architecture": name, "num_classes": 0, "model_args": options, "pretrained_cfg": pixels}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    difference = export.check(model.forward_features)
    return "timm", difference, _timm_usage(export, "local-dir:{out}", {"pretrained": True})


def _transformers_folder(export: Export, out: Path) -> tuple[str, float, str]:
    try:
        from transformers import ViTModel
    except ImportError:
        raise ValueError("a Hugging Face folder of absolute positions needs: pip install -e '.[huggingface]'") from None
    arch, size = export.encoder.arch, {"height": export.height, "width": export.width}
    config = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": arch.dim,
        "num_hidden_layers": arch.depth,
        "num_attention_heads": arch.heads,
        "intermediate_size": 4 * arch.dim,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": [export.height, export.width],
        "patch_size": export.encoder.patch_size,
        "qkv_bias": True,
        "torch_dtype": "float32",
    }
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": size,
        "resample": 3,  # bicubic
        "image_mean": list(IMAGENET_DEFAULT_MEAN),
        "image_std": list(IMAGENET_DEFAULT_STD),
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    _write_safetensors(out / "model.safetensors", transformers_names(export.tensors), {"format": "pt"})
    model, info = ViTModel.from_pretrained(str(out), add_pooling_layer=False, output_loading_info=True)
    if strange := {kind: keys for kind, keys in info.items() if keys}:
        raise ValueError(f"transformers does not take all parameters of the export: {strange}")
    difference = export.check(lambda images: model.eval()(images).last_hidden_state)
    usage = 'from transformers import ViTModel\n\nViTModel.from_pretrained("{out}", add_pooling_layer=False)'
    return "transformers", difference, usage


def transformers_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters under the names of files for transformers' ViTModel, queries, keys and values apart."""
    stem = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    }
    layer = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    renamed = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".") if name.endswith(("weight", "bias")) else (name, "", "")
        if not module.startswith("blocks."):
            renamed[f"{stem[module]}.{kind}".rstrip(".")] = tensor
            continue
        _, number, within = module.split(".", 2)
        at = f"encoder.layer.{number}."
        if within == "attn.qkv":
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"{at}attention.attention.{part}.{kind}"] = rows.contiguous()
        else:
            renamed[f"{at}{layer[within]}.{kind}"] = tensor
    return renamed


def _timm_usage(export: Export, name: str, options: dict[str, Any]) -> str:
    arguments = ", ".join([f'"{name}"', *(f"{key}={value!r}" for key, value in options.items())]).replace("'", '"')
    lines = ["import timm", f"timm.create_model({arguments})"]
    if position(export.encoder) != "sincos":
        lines.insert(1, "import downstream.checkpoints.timm_models  # of lomar-deepspeed")
    return "\n".join(lines)


def _write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    path.write_bytes(save(tensors, metadata=metadata))  # its own save_file lets nobody else read the file


FORMATS: dict[str, tuple[str, Callable[[Export, Path], tuple[float, str]]]] = {
    "timm": (".safetensors", _to_timm),
    "mm": (".pth", _to_mm),
    "hf": ("", _to_hf),
}


def export_encoder(
    path: Path | str, out: Path | str, kind: str, *, size: Size | None = None, weights: Any = None
) -> tuple[Report, float, str]:
    """Loads an encoder, writes it in another format, and reads it back to compare.

    Args:
        path, size, weights: as of `load_encoder`.
        out: the file or folder to make; it must not exist.
        kind: a name of `FORMATS`.

    Returns:
        What became of the source's keys, the largest difference of the features, and how to load the export.

    Raises:
        ValueError: as of `load_encoder`, or the export cannot be written there or does not compute the same.
    """
    out = Path(out)
    suffix, write = FORMATS[kind]
    if suffix and out.suffix != suffix:
        raise ValueError(f"{out}: an export for {kind} is a file named *{suffix}")
    if out.exists():
        raise ValueError(f"{out} is there already: remove it, or give another name")
    encoder, report = load_encoder(path, size=size, weights=weights)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f"unfinished-{out.name}")
    _remove(unfinished)  # what a killed export left
    try:
        difference, usage = write(Export(encoder, report), unfinished)
        os.replace(unfinished, out)
    finally:
        _remove(unfinished)
    return report, difference, usage.replace("{out}", str(out))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Exit code 0 with what became of every key and how to load the export, 1 with one clear error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="RUN_OR_FILE")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--weights", choices=("online", "ema"), help="default: what the method's authors evaluate")
    parser.add_argument(
        "--size", type=int, nargs="+", metavar="PIXELS", help="side, or height and width; default: the file's"
    )
    options = parser.parse_args(arguments)
    size = tuple(options.size * 2)[:2] if options.size else None
    try:
        report, difference, usage = export_encoder(
            options.source, options.out, options.format, size=size, weights=options.weights
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"{report}\n{options.out}: features agree to {difference:.1g}; load it with\n{usage}")
    sys.exit(0)


if __name__ == "__main__":
    main()
