"""Exports an encoder or a classifier: `python -m downstream.checkpoints.export RUN_OR_FILE OUT --format FORMAT`.

    timm          OUT.safetensors for `timm.create_model(..., checkpoint_path=OUT)`
    mm            OUT.pth for mmengine's loader: {"state_dict": our names, "meta": how to rebuild the encoder}
    hf            a Hugging Face folder with a model card: for transformers where it can hold the model, else for timm
    torchscript   OUT.pt for `torch.jit.load`
    torch_export  OUT.pt2 for `torch.export.load`
    onnx          OUT.onnx

RUN_OR_FILE is whatever `downstream.checkpoints.weights.load_encoder` reads; with --classifier, the whole classifier in
it is exported, this project's or a published one. Every export is loaded by the library that it is for, and its
features (or logits) on random images are compared with the source's in float64, or in float32 for the last three
formats, which take batches of any size. If they differ, the export fails and leaves nothing behind. The files are in
fp32.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import timm
import torch

from data.parallel import print_error
from data.pixel_format import IMAGENET, Pixels
from downstream.checkpoints.choose import Weights
from downstream.checkpoints.classifiers import load_classifier_weights
from downstream.checkpoints.export_hub import timm_usage, to_hf
from downstream.checkpoints.export_programs import to_onnx, to_torch_export, to_torchscript
from downstream.checkpoints.exported import Export
from downstream.checkpoints.pixels import STATISTICS
from downstream.checkpoints.report import Report
from downstream.checkpoints.weights import Size, build_encoder, features, load_encoder, read_encoder
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.trainer.safetensors_file import save_state_dict


def _to_timm(export: Export, out: Path) -> tuple[float, str]:
    save_state_dict(export.tensors, export.metadata, out)
    name, options = export.timm_call()
    model = timm.create_model(name, checkpoint_path=str(out), **options).double().eval()
    usage = timm_usage(export.spec, name, {"checkpoint_path": "{out}", **options})
    return export.check(model if export.classifier else model.forward_features), usage


def _to_mm(export: Export, out: Path) -> tuple[float, str]:
    if export.classifier:
        raise ValueError("mm is for backbones, without a head: leave out --classifier, or use --format timm or hf")
    if export.spec.pixels != IMAGENET:
        raise ValueError(
            f"{export.report.path} expects {export.spec.pixels}, but mm's pipelines give RGB with ImageNet's: use "
            f"--format timm or hf, or, for 3 channels of uint8, give the file itself as start.checkpoint"
        )
    torch.save({"state_dict": export.tensors, "meta": export.metadata}, out)
    encoder = load_encoder(out)[0].double()
    spec, init_cfg = export.spec, 'init_cfg=dict(type="{loader}", checkpoint="{{out}}")'
    if spec.position == "bias":  # BEiT's tables, which our own backbone does not have
        usage = init_cfg.format(loader="Pretrained")
    else:
        options = f'arch="{spec.arch}", patch_size={spec.patch_size}, position="{spec.position}"'
        usage = (
            f'backbone=dict(type="PlainViT", {options}, {init_cfg.format(loader="EncoderCheckpoint")})'
            f"  # from downstream.dense.backbone.loading"
        )
    return export.check(lambda images: features(encoder, images)), usage


FORMATS: dict[str, tuple[str, Callable[[Export, Path], tuple[float, str]]]] = {
    "timm": (".safetensors", _to_timm),
    "mm": (".pth", _to_mm),
    "hf": ("", to_hf),
    "torchscript": (".pt", to_torchscript),
    "torch_export": (".pt2", to_torch_export),
    "onnx": (".onnx", to_onnx),
}
PROGRAMS = ("torchscript", "torch_export", "onnx")


def export_encoder(
    path: Path | str,
    out: Path | str,
    kind: str,
    *,
    image_size: Size | None = None,
    weights: Weights | None = None,
    pixels: Pixels | None = None,
) -> tuple[Report, float, str]:
    """Loads an encoder, writes it in another format, and loads the result to compare the features.

    Args:
        path, image_size, weights, pixels: as in `load_encoder`.
        out: the file or folder to make; it must not exist.
        kind: a name of `FORMATS`.

    Returns:
        What became of the source's keys, the difference of the features as in `max_difference`, and how to load the
        export.

    Raises:
        ValueError: as in `load_encoder`, or the export cannot be written there or computes other features.
    """
    _check_name(Path(out), kind)
    found = read_encoder(path, weights=weights, pixels=pixels)
    encoder, report = build_encoder(found, image_size=image_size)
    spec = replace(EncoderSpec.of(encoder), method=found.spec.method, epochs=found.spec.epochs)
    return _write(Export(encoder, spec, report), Path(out), kind)


def export_classifier(
    path: Path | str, out: Path | str, kind: str, *, weights: Weights | None = None, pixels: Pixels | None = None
) -> tuple[Report, float, str]:
    """Loads a classifier, writes it in another format, and loads the result to compare the logits.

    Raises:
        ValueError: as in `load_classifier_weights`; the file has no classifier; or as in `export_encoder`.
    """
    _check_name(Path(out), kind)
    found = load_classifier_weights(path, weights=weights, pixels=pixels)
    if found is None:
        raise ValueError(f"{path} has no classifier: leave out --classifier to export its encoder")
    return _write(Export(None, found.spec.encoder, found.report, found), Path(out), kind)


def _check_name(out: Path, kind: str) -> None:
    suffix, _ = FORMATS[kind]
    if suffix and out.suffix != suffix:
        raise ValueError(f"{out}: an export for {kind} is a file named *{suffix}")
    if out.exists():
        raise ValueError(f"{out} exists already: remove it, or give another name")


def _write(export: Export, out: Path, kind: str) -> tuple[Report, float, str]:
    """Writes under another name until the export is complete and compared."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f"unfinished-{out.name}")
    _remove(unfinished)  # left by a killed export
    try:
        difference, usage = FORMATS[kind][1](export, unfinished)
        os.replace(unfinished, out)
    finally:
        _remove(unfinished)
    return export.report, difference, usage.replace("{out}", str(out))


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
    parser.add_argument("--classifier", action="store_true", help="export the whole classifier, not its encoder alone")
    parser.add_argument(
        "--weights",
        metavar="NAME",
        help="online, ema, or an encoder's name in the file; default: those that the method's authors evaluate",
    )
    parser.add_argument(
        "--image-size", type=int, nargs="+", metavar="PIXELS", help="side, or height and width; default: the file's"
    )
    parser.add_argument(
        "--pixels",
        choices=STATISTICS,
        help="pixel statistics of the weights' training, if the file does not say: ImageNet's, or 0.5 and 0.5",
    )
    options = parser.parse_args(arguments)
    size = tuple(options.image_size * 2)[:2] if options.image_size else None
    if options.classifier and size:
        parser.error("--image-size is for encoders: a classifier is exported at its own size")
    which = {"weights": options.weights, "pixels": STATISTICS.get(options.pixels)}
    try:
        if options.classifier:
            report, difference, usage = export_classifier(options.source, options.out, options.format, **which)
        else:
            report, difference, usage = export_encoder(
                options.source, options.out, options.format, image_size=size, **which
            )
    except (ValueError, OSError) as error:
        print_error(error)
        sys.exit(1)
    what = "logits" if options.classifier else "features"
    precision = "float32" if options.format in PROGRAMS else "float64"
    print(f"{report}\n{options.out}: in {precision}, {what} agree to {difference:.1g}; load it with\n{usage}")
    sys.exit(0)


if __name__ == "__main__":
    main()
