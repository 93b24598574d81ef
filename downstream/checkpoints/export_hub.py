"""Folders for the Hugging Face hub: for transformers if it can hold the model, else for timm.

Transformers' ViTModel, or IJepaModel if there is no class token, holds encoders with absolute positions, and
ViTForImageClassification holds classifiers on the class token of such an encoder. None of them has registers.
"""

import json
from pathlib import Path
from typing import Any

import timm
from torch import Tensor

from data.pixel_format import IMAGENET
from downstream.checkpoints.exported import Export, TimmOptions
from downstream.checkpoints.model_card import write_card
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.models.vit import ARCHS
from pretrain.trainer.safetensors_file import save_state_dict


def to_hf(export: Export, out: Path) -> tuple[float, str]:
    """Writes the folder `out`; returns its difference from the source, and how to load it."""
    out.mkdir()
    kind = _transformers_class(export)
    if kind:
        library, (difference, usage) = "transformers", _transformers_folder(export, out, kind)
    else:
        library, (difference, usage) = "timm", _timm_folder(export, out)
    usage_there = usage.replace("{out}", "path/to/this/folder")
    card = write_card(export.report, export.spec, library, usage_there, difference, export.classifier)
    (out / "README.md").write_text(card)
    return difference, usage


def _transformers_class(export: Export) -> str | None:
    """The class of transformers that computes the same; None if there is none."""
    if export.spec.position != "sincos" or export.spec.registers:
        return None
    if export.classifier is None:
        return "ViTModel" if export.spec.class_token else "IJepaModel"
    return "ViTForImageClassification" if export.classifier.pool == "token" else None


def _timm_folder(export: Export, out: Path) -> tuple[float, str]:
    name, options = export.timm_call()
    save_state_dict(export.tensors, export.metadata, out / "model.safetensors")
    pretrained_cfg = {
        "input_size": [export.spec.pixels.channels, *export.spec.image_size],
        "mean": list(export.spec.pixels.mean),
        "std": list(export.spec.pixels.std),
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    num_classes = export.classifier.num_classes if export.classifier else 0
    config: dict[str, Any] = {"architecture": name, "num_classes": num_classes, "model_args": options}
    if export.classifier and export.classifier.class_names:
        config["label_names"] = list(export.classifier.class_names)
    config["pretrained_cfg"] = pretrained_cfg
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model = timm.create_model(f"local-dir:{out}", pretrained=True).double().eval()
    difference = export.check(model if export.classifier else model.forward_features)
    return difference, timm_usage(export.spec, "local-dir:{out}", {"pretrained": True})


def _transformers_folder(export: Export, out: Path, kind: str) -> tuple[float, str]:
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "a Hugging Face folder with absolute positions needs: pip install -e '.[huggingface]'"
        ) from None
    arch, (height, width) = ARCHS[export.spec.arch], export.spec.image_size
    config: dict[str, Any] = {
        "architectures": [kind],
        "model_type": "ijepa" if kind == "IJepaModel" else "vit",
        "hidden_size": arch.dim,
        "num_hidden_layers": arch.depth,
        "num_attention_heads": arch.heads,
        "intermediate_size": 4 * arch.dim,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": [height, width],
        "patch_size": export.spec.patch_size,
        "num_channels": export.spec.pixels.channels,
        "qkv_bias": True,
        "torch_dtype": "float32",
    }
    if export.classifier:
        names = export.classifier.class_names or [f"LABEL_{label}" for label in range(export.classifier.num_classes)]
        config["id2label"] = {str(label): name for label, name in enumerate(names)}
        config["label2id"] = {name: label for label, name in enumerate(names)}
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "image_mean": list(export.spec.pixels.mean),
        "image_std": list(export.spec.pixels.std),
        **({} if export.spec.pixels.dtype == "uint8" else {"rescale_factor": 1 / export.spec.pixels.format.white}),
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    save_state_dict(transformers_names(export.tensors), {"format": "pt"}, out / "model.safetensors")
    options = {} if export.classifier else {"add_pooling_layer": False}
    model, info = getattr(transformers, kind).from_pretrained(str(out), output_loading_info=True, **options)
    if problems := {kind: keys for kind, keys in info.items() if keys}:
        raise ValueError(f"transformers does not load all parameters of the export: {problems}")
    model = model.double().eval()
    difference = export.check(lambda images: model(images)["logits" if export.classifier else "last_hidden_state"])
    arguments = '"{out}"' if export.classifier else '"{out}", add_pooling_layer=False'
    return difference, f"from transformers import {kind}\n\n{kind}.from_pretrained({arguments})"


def transformers_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames our parameters to those of transformers' ViTModel, which separates queries, keys and values.

    With a head, to those of ViTForImageClassification.
    """
    whole = "vit." if "head.weight" in tensors else ""
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
        if module == "head":
            renamed[f"classifier.{kind}"] = tensor
            continue
        if not module.startswith("blocks."):
            renamed[f"{whole}{outside_blocks[module]}.{kind}".rstrip(".")] = tensor
            continue
        _, number, submodule = module.split(".", 2)
        prefix = f"{whole}encoder.layer.{number}."
        if submodule == "attn.qkv":
            for part, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"{prefix}attention.attention.{part}.{kind}"] = chunk.contiguous()
        else:
            renamed[f"{prefix}{in_block[submodule]}.{kind}"] = tensor
    return renamed


def timm_usage(spec: EncoderSpec, name: str, options: TimmOptions) -> str:
    arguments = ", ".join([f'"{name}"', *(f"{key}={value!r}" for key, value in options.items())]).replace("'", '"')
    lines = ["import timm", f"timm.create_model({arguments})"]
    if spec.position != "sincos":
        lines.insert(1, "import downstream.checkpoints.timm_models  # from lomar-deepspeed")
    if spec.pixels != IMAGENET:
        lines.append(f"# pixels: {spec.pixels}; divide the values by {spec.pixels.format.white:g} first")
    return "\n".join(lines)
