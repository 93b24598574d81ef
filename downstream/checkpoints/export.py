"""Exports an encoder: `python -m downstream.checkpoints.export RUN_OR_FILE OUT --format timm|mm|hf`.

    timm   OUT.safetensors for `timm.create_model(..., checkpoint_path=OUT)`
    mm     OUT.pth for mmengine's loader: {"state_dict": our names, "meta": how to rebuild the encoder}
    hf     a Hugging Face folder with a model card: for transformers' ViTModel if positions are absolute, else for timm

RUN_OR_FILE is whatever `downstream.checkpoints.weights.load_encoder` reads. Every export is loaded by the library that
it is for, and its features of random images are compared with the source's in float64. If they differ, the export fails
and nothing is left behind. The files are in fp32.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import timm
import torch
from safetensors.torch import save
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from downstream.checkpoints.choose import Weights
from downstream.checkpoints.compare import FLOAT64_TOLERANCE, feature_difference
from downstream.checkpoints.model_card import write_card
from downstream.checkpoints.report import Report
from downstream.checkpoints.timm_models import SIZES, model_name
from downstream.checkpoints.weights import Size, build_encoder, features, load_encoder, read_encoder
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.models.vit import ViT

TimmOptions = dict[str, int | str | tuple[int, int]]


class Export:
    """An encoder on its way to another library.

    Args:
        encoder: in fp32.
        spec: of the encoder.
        report: what became of the source's keys.
    """

    def __init__(self, encoder: ViT, spec: EncoderSpec, report: Report):
        self.encoder, self.spec, self.report = encoder, spec, report
        self.metadata = {**spec.to_metadata(), "weights": report.weights}
        self.tensors = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}

    def timm_call(self) -> tuple[str, TimmOptions]:
        """Name and arguments of `timm.create_model`."""
        arch, patch_size, (height, width) = self.spec.arch, self.spec.patch_size, self.spec.image_size
        square = height if height == width else 0
        options: TimmOptions = {}
        if self.spec.position == "sincos":
            named_patch, named_size = (14 if arch == "vit_huge" else 16), 224
            name = f"{arch}_patch{named_patch}_{named_size}"
            options["num_classes"] = 0
        else:
            entry = (arch, patch_size, square)
            named_patch, named_size = entry[1:] if entry in SIZES else (16, 224)
            name = model_name(arch, named_patch, named_size)
            if self.spec.position == "bias":
                options["position"] = "bias"
        if patch_size != named_patch:
            options["patch_size"] = patch_size
        if square != named_size:
            options["img_size"] = square or (height, width)
        return name, options

    def check(self, compute: Callable[[Tensor], Tensor]) -> float:
        """The difference of the export's features from the encoder's, as of `feature_difference`.

        Raises:
            ValueError: it is larger than `FLOAT64_TOLERANCE`.
        """
        difference = feature_difference(self.encoder, compute)
        if not difference <= FLOAT64_TOLERANCE:  # or NaN
            raise ValueError(
                f"the export of {self.report.path} computes other features: in float64 they differ by {difference:.2g} "
                f"of the largest (at most {FLOAT64_TOLERANCE:.0e})"
            )
        return difference


def _to_timm(export: Export, out: Path) -> tuple[float, str]:
    _write_safetensors(out, export.tensors, export.metadata)
    name, options = export.timm_call()
    model = timm.create_model(name, checkpoint_path=str(out), **options).double().eval()
    usage = _timm_usage(export.spec, name, {"checkpoint_path": "{out}", **options})
    return export.check(model.forward_features), usage


def _to_mm(export: Export, out: Path) -> tuple[float, str]:
    torch.save({"state_dict": export.tensors, "meta": export.metadata}, out)
    encoder = load_encoder(out)[0].double()
    spec, init_cfg = export.spec, 'init_cfg=dict(type="{loader}", checkpoint="{{out}}")'
    if spec.position == "bias":  # BEiT's tables, which our own backbone does not have
        usage = init_cfg.format(loader="Pretrained")
    else:
        options = f'arch="{spec.arch}", patch_size={spec.patch_size}, position="{spec.position}"'
        usage = (
            f'backbone=dict(type="PlainViT", {options}, {init_cfg.format(loader="EncoderCheckpoint")})'
            f"  # of downstream.dense.backbone.loading"
        )
    return export.check(lambda images: features(encoder, images)), usage


def _to_hf(export: Export, out: Path) -> tuple[float, str]:
    out.mkdir()
    write = _transformers_folder if export.spec.position == "sincos" else _timm_folder
    library, difference, usage = write(export, out)
    card = write_card(export.report, export.spec, library, usage.replace("{out}", "path/to/this/folder"), difference)
    (out / "README.md").write_text(card)
    return difference, usage


def _timm_folder(export: Export, out: Path) -> tuple[str, float, str]:
    name, options = export.timm_call()
    _write_safetensors(out / "model.safetensors", export.tensors, export.metadata)
    pretrained_cfg = {
        "input_size": [3, *export.spec.image_size],
        "mean": list(IMAGENET_DEFAULT_MEAN),
        "std": list(IMAGENET_DEFAULT_STD),
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    config = {"architecture": name, "num_classes": 0, "model_args": options, "pretrained_cfg": pretrained_cfg}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model = timm.create_model(f"local-dir:{out}", pretrained=True).double().eval()
    difference = export.check(model.forward_features)
    return "timm", difference, _timm_usage(export.spec, "local-dir:{out}", {"pretrained": True})


def _transformers_folder(export: Export, out: Path) -> tuple[str, float, str]:
    try:
        from transformers import ViTModel
    except ImportError:
        raise ValueError("a Hugging Face folder of absolute positions needs: pip install -e '.[huggingface]'") from None
    arch, (height, width) = export.encoder.arch, export.spec.image_size
    config = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": arch.dim,
        "num_hidden_layers": arch.depth,
        "num_attention_heads": arch.heads,
        "intermediate_size": 4 * arch.dim,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": [height, width],
        "patch_size": export.spec.patch_size,
        "qkv_bias": True,
        "torch_dtype": "float32",
    }
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "image_mean": list(IMAGENET_DEFAULT_MEAN),
        "image_std": list(IMAGENET_DEFAULT_STD),
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    _write_safetensors(out / "model.safetensors", transformers_names(export.tensors), {"format": "pt"})
    model, info = ViTModel.from_pretrained(str(out), add_pooling_layer=False, output_loading_info=True)
    if problems := {kind: keys for kind, keys in info.items() if keys}:
        raise ValueError(f"transformers does not load all parameters of the export: {problems}")
    model = model.double().eval()
    difference = export.check(lambda images: model(images).last_hidden_state)
    usage = 'from transformers import ViTModel\n\nViTModel.from_pretrained("{out}", add_pooling_layer=False)'
    return "transformers", difference, usage


def transformers_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters under the names of transformers' ViTModel, which separates queries, keys and values."""
    outside_blocks = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    }
    in_block = {
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
            renamed[f"{outside_blocks[module]}.{kind}".rstrip(".")] = tensor
            continue
        _, number, submodule = module.split(".", 2)
        prefix = f"encoder.layer.{number}."
        if submodule == "attn.qkv":
            for part, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"{prefix}attention.attention.{part}.{kind}"] = chunk.contiguous()
        else:
            renamed[f"{prefix}{in_block[submodule]}.{kind}"] = tensor
    return renamed


def _timm_usage(spec: EncoderSpec, name: str, options: TimmOptions) -> str:
    arguments = ", ".join([f'"{name}"', *(f"{key}={value!r}" for key, value in options.items())]).replace("'", '"')
    lines = ["import timm", f"timm.create_model({arguments})"]
    if spec.position != "sincos":
        lines.insert(1, "import downstream.checkpoints.timm_models  # of lomar-deepspeed")
    return "\n".join(lines)


def _write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    path.write_bytes(save(tensors, metadata=metadata))  # safetensors' save_file makes files that only the owner reads


FORMATS: dict[str, tuple[str, Callable[[Export, Path], tuple[float, str]]]] = {
    "timm": (".safetensors", _to_timm),
    "mm": (".pth", _to_mm),
    "hf": ("", _to_hf),
}


def export_encoder(
    path: Path | str, out: Path | str, kind: str, *, image_size: Size | None = None, weights: Weights | None = None
) -> tuple[Report, float, str]:
    """Loads an encoder, writes it in another format, and loads that to compare the features.

    Args:
        path, image_size, weights: as of `load_encoder`.
        out: the file or folder to make; it must not exist.
        kind: a name of `FORMATS`.

    Returns:
        What became of the source's keys, the difference of the features as of `feature_difference`, and how to load the
        export.

    Raises:
        ValueError: as of `load_encoder`, or the export cannot be written there or computes other features.
    """
    out = Path(out)
    suffix, write = FORMATS[kind]
    if suffix and out.suffix != suffix:
        raise ValueError(f"{out}: an export for {kind} is a file named *{suffix}")
    if out.exists():
        raise ValueError(f"{out} exists already: remove it, or give another name")
    found = read_encoder(path, weights=weights)
    encoder, report = build_encoder(found, image_size=image_size)
    spec = replace(EncoderSpec.of(encoder), method=found.spec.method, epochs=found.spec.epochs)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f"unfinished-{out.name}")
    _remove(unfinished)  # of an export that was killed
    try:
        difference, usage = write(Export(encoder, spec, report), unfinished)
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
    parser.add_argument(
        "--weights",
        metavar="NAME",
        help="online, ema, or an encoder's name in the file; default: those that the method's authors evaluate",
    )
    parser.add_argument(
        "--image-size", type=int, nargs="+", metavar="PIXELS", help="side, or height and width; default: the file's"
    )
    options = parser.parse_args(arguments)
    size = tuple(options.image_size * 2)[:2] if options.image_size else None
    try:
        report, difference, usage = export_encoder(
            options.source, options.out, options.format, image_size=size, weights=options.weights
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"{report}\n{options.out}: in float64, features agree to {difference:.1g}; load it with\n{usage}")
    sys.exit(0)


if __name__ == "__main__":
    main()
