"""Writes the model card of an export, from the records of the run alone."""

import json
from pathlib import Path
from typing import Any

import yaml

from data.pixel_format import IMAGENET, Pixels
from downstream.checkpoints.report import Report
from downstream.classify.classifier_spec import ClassifierSpec
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.trainer.checkpoint_layout import checkpoint_step
from pretrain.trainer.metrics import read_metrics
from pretrain.trainer.run_folder import RunFolder

# The keys of a recipe that weights depend on; None: all of a section.
_PUBLISHED: dict[str, tuple[str, ...] | None] = {
    "seed": None,
    "method": None,
    "target": None,
    "pr_mim": None,
    "lut": None,
    "model": ("arch", "patch_size", "position", "registers", "layer_scale"),
    "data": ("channels", "dtype", "mean", "std", "image_size", "crop", "crop_scale", "hflip", "color_jitter"),
    "optim": None,
    "train": ("epochs", "global_batch_size", "gradient_accumulation_steps", "precision"),
}
_POSITIONS = {
    "relative": "contextual relative position in every block (iRPE on keys)",
    "bias": "a learned relative bias in every block",
    "sincos": "absolute",
}


def find_run(path: Path) -> RunFolder | None:
    """The run whose folder contains a file or a checkpoint, if there is one."""
    for folder in (path.parent, path.parent.parent):
        if RunFolder(folder).config.is_file():
            return RunFolder(folder)
    return None


def write_card(
    report: Report,
    spec: EncoderSpec,
    library: str,
    usage: str,
    difference: float,
    classifier: ClassifierSpec | None = None,
) -> str:
    """Returns the text of README.md.

    Args:
        report: what became of the source's keys.
        spec: of the exported encoder.
        library: Hugging Face's name of the library that loads it, `timm` or `transformers`.
        usage: code that loads it.
        difference: between the features or logits of source and export, as in `compare.max_difference`.
        classifier: what it is, if the export is one.
    """
    size = "x".join(map(str, spec.image_size))
    title = f"{spec.arch}_patch{spec.patch_size}, {size} pixels" + (f", {spec.method}" if spec.method else "")
    run = find_run(report.path)
    what, task = _describe(classifier)
    parts = [
        "---",
        f"library_name: {library}",
        f"pipeline_tag: {task}",
        f"tags: [{', '.join(['vit', 'masked-image-modeling', *([spec.method] if spec.method else [])])}]",
        "---",
        f"# {title}",
        "",
        f"{what}, in fp32.",
        "",
        f"- positions: {_POSITIONS[spec.position]}",
        *([f"- registers: {spec.registers}, after the class token"] if spec.registers else []),
        f"- weights: {report.weights}"
        + {"online": " (as trained)", "ema": " (moving average)"}.get(report.weights, " (by their name in the source)"),
        f"- pixels: {_describe_pixels(spec.pixels)}"
        + (f"; trained on pixels with {report.pixels}" if report.pixels and not run else ""),
        f"- checked: computed in float64 on random images, its {'logits' if classifier else 'features'} and those of "
        f"`{report.path.name}` differ by {difference:.1g} of the largest",
        "",
        "```python",
        usage,
        "```",
        "",
        "## Training",
        "",
        _training(report, run),
    ]
    if not run:
        parts += [
            "",
            "## What became of the source's keys",
            "",
            "```",
            str(report).replace(str(report.path), report.path.name),
            "```",
        ]
    return "\n".join(parts) + "\n"


def _describe_pixels(pixels: Pixels) -> str:
    if pixels == IMAGENET:
        return "RGB in 0..1, ImageNet's mean and standard deviation"
    how = f"mean {list(pixels.mean)}, standard deviation {list(pixels.std)}"
    return f"{pixels.format}, divided by {pixels.format.white:g}; {how}"


def _describe(classifier: ClassifierSpec | None) -> tuple[str, str]:
    """What the export is, and the hub's name of its task."""
    if classifier is None:
        return "A Vision Transformer encoder without a classifier", "image-feature-extraction"
    pooled = "the class token" if classifier.pool == "token" else "the mean of the patch tokens"
    return f"A Vision Transformer classifier of {classifier.num_classes} classes, on {pooled}", "image-classification"


def _training(report: Report, run: RunFolder | None) -> str:
    if run is None:
        return f"Converted from `{report.path.name}`, which comes with no records of a run."
    recipe = yaml.safe_load(run.config.read_text())
    environment = json.loads(run.environment.read_text()) if run.environment.is_file() else {}
    step = checkpoint_step(report.path)
    logged = [line for line in read_metrics(run.metrics) if step is None or line["step"] <= step]
    lines = []
    if logged:
        last = logged[-1]
        lines += [
            f"- {last['step']} steps, {last['epoch']:g} of {recipe['train']['epochs']} epochs, "
            f"{last['step'] * recipe['train']['global_batch_size']} samples" + _of(environment.get("samples")),
            f"- last logged loss: {'not finite' if last['loss'] is None else format(last['loss'], '.4g')}",
            f"- steps skipped because of a non-finite gradient: {last['skipped_steps']}; "
            f"images that could not be decoded: {last['skipped_images']}",
        ]
    if environment:
        versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
        lines += [
            f"- {environment['world_size']} processes on {environment['device']}, "
            f"ZeRO stage {environment['deepspeed']['zero_stage']}",
            f"- code: {environment['git']}; {versions}",
        ]
    published = {key: _pick(recipe[key], keys) for key, keys in _PUBLISHED.items() if recipe.get(key) is not None}
    return "\n".join([*lines, "", "```yaml", yaml.safe_dump(published, sort_keys=False).strip(), "```"])


def _pick(value: Any, keys: tuple[str, ...] | None) -> Any:
    """The given keys of a section of the recipe, without paths, which are private to the machine that trained."""
    if not isinstance(value, dict):
        return value
    picked = {key: _pick(inner, None) for key, inner in value.items() if keys is None or key in keys}
    return {key: inner for key, inner in picked.items() if not (isinstance(inner, str) and "/" in inner)}


def _of(samples: int | None) -> str:
    return f" of a data set of {samples} images" if samples else ""
