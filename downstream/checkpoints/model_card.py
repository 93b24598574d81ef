"""The model card of an export, written from the run's own records: nothing in it is typed by hand."""

import json
from pathlib import Path
from typing import Any

import yaml

from downstream.checkpoints.formats import Report
from pretrain.trainer.metrics import read_metrics
from pretrain.trainer.run_folder import RunFolder

# Of the recipe what the weights depend on.
_TOLD: dict[str, tuple[str, ...] | None] = {
    "seed": None,
    "method": None,
    "partial": None,
    "context": None,
    "model": ("arch", "patch", "position"),
    "data": ("size", "crop", "crop_scale", "flip", "color_jitter"),
    "optim": None,
    "train": ("epochs", "batch", "accumulation", "precision"),
}


def find_run(path: Path) -> RunFolder | None:
    """The run that a file or a checkpoint lies in, if it does."""
    for folder in (path.parent, path.parent.parent):
        if RunFolder(folder).config.is_file():
            return RunFolder(folder)
    return None


def write_card(report: Report, facts: dict[str, str], library: str, usage: str, difference: float) -> str:
    """The text of README.md.

    Args:
        report: what became of the source's keys.
        facts: arch, patch, size and position of the export, and what else is known.
        library: Hugging Face's name of what loads it, `timm` or `transformers`.
        usage: code that loads it.
        difference: of the features of source and export.
    """
    method = facts.get("method")
    title = f"{facts['arch']}_patch{facts['patch']}, {facts['size']} pixels" + (f", {method}" if method else "")
    run = find_run(report.path)
    position = {
        "relative": "contextual relative position in every block (iRPE on keys)",
        "bias": "a learned relative bias in every block",
        "sincos": "absolute",
    }[facts["position"]]
    parts = [
        "---",
        f"library_name: {library}",
        "pipeline_tag: image-feature-extraction",
        f"tags: [{', '.join(['vit', 'masked-image-modeling', *([method] if method else [])])}]",
        "---",
        f"# {title}",
        "",
        "A Vision Transformer encoder without a classifier, in fp32.",
        "",
        f"- positions: {position}",
        f"- weights: {report.weights}" + (" (as trained)" if report.weights == "online" else " (moving average)"),
        "- pixels: RGB in 0..1, ImageNet's mean and standard deviation"
        + ("" if run else ", unless its authors say otherwise"),
        f"- checked: on random images its features and those of `{report.path.name}` differ by {difference:.1g}",
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


def _training(report: Report, run: RunFolder | None) -> str:
    if run is None:
        return f"Converted from `{report.path.name}`, beside which there are no records of a run."
    recipe = yaml.safe_load(run.config.read_text())
    environment = json.loads(run.environment.read_text()) if run.environment.is_file() else {}
    step = int(report.path.name.removeprefix("step_")) if report.path.name.startswith("step_") else None
    rows = [row for row in read_metrics(run.metrics) if step is None or row["step"] <= step]
    lines = []
    if rows:
        last = rows[-1]
        lines += [
            f"- {last['step']} steps, {last['epoch']:g} of {recipe['train']['epochs']} epochs, "
            f"{last['step'] * recipe['train']['batch']} samples seen" + _of(environment.get("samples")),
            f"- last logged loss: {'not finite' if last['loss'] is None else format(last['loss'], '.4g')}",
            f"- steps refused for a gradient that was not finite: {last['refused_steps']}; "
            f"images that could not be decoded: {last['skipped_images']}",
        ]
    if environment:
        versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
        lines += [
            f"- {environment['world_size']} processes on {environment['device']}, "
            f"ZeRO stage {environment['deepspeed']['zero_stage']}",
            f"- code: {environment['git']}; {versions}",
        ]
    told = {key: _pick(recipe[key], keys) for key, keys in _TOLD.items() if recipe.get(key) is not None}
    return "\n".join([*lines, "", "```yaml", yaml.safe_dump(told, sort_keys=False).strip(), "```"])


def _pick(value: Any, keys: tuple[str, ...] | None) -> Any:
    """Without paths: they are of the machine that trained, and nobody else's business."""
    if not isinstance(value, dict):
        return value
    told = {key: _pick(inner, None) for key, inner in value.items() if keys is None or key in keys}
    return {key: inner for key, inner in told.items() if not (isinstance(inner, str) and "/" in inner)}


def _of(samples: int | None) -> str:
    return f" of a data set of {samples} images" if samples else ""
