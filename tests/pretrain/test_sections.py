"""Sections with several kinds (`method`, `target`), and the keys that may change when a run resumes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from pretrain.config import PretrainConfig, load
from pretrain.trainer.schema import MAY_CHANGE, Section


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=", "method=None: must be a section with keys such as name and module"),
        ("target={norm_pix: 3}", "target.norm_pix=3: must be true or false"),
        ("pr_mim=3", "pr_mim=3: must be a section with keys such as throw_ratio and sampling, or none"),
    ],
)
def test_values_that_are_not_sections_are_rejected(recipe: str, override: str, message: str):
    with pytest.raises(ValueError, match="must be") as error:
        load(recipe, [override])
    assert str(error.value) == message


def test_method_without_a_name_is_rejected(tmp_path: Path):
    path = tmp_path / "nameless.yaml"
    path.write_text("name: x\nmethod: {mask_ratio: 0.5}\ndata: {shards: /nowhere}\n")
    with pytest.raises(ValueError, match=r"^method\.name is not set: set it in the recipe or give method\.name=value$"):
        load(str(path), [])


def test_changing_the_name_replaces_the_whole_section(recipe: str, tmp_path: Path):
    child = tmp_path / "child.yaml"
    child.write_text("extends: small.yaml\nmethod: {mask_ratio: 0.6}\ntarget: {name: pixels, norm_pix: false}\n")
    pixels = load(str(child), ["target.loss=l1"]).target
    assert (pixels.name, pixels.norm_pix, pixels.loss) == ("pixels", False, "l1"), "the same kind: key by key"
    tokens = load(str(child), ["target.name=tokens", "target.vocab_size=64"]).target
    assert (tokens.name, tokens.vocab_size, tokens.tokenizer) == ("tokens", 64, "random_projection")
    assert load(str(child), ["method.name=simmim"]).target.loss == "l1", "and the target is the new method's own"
    turned = load(str(child), ["method.mask_patch_size=16", "method.name=simmim"]).method
    assert turned.mask_patch_size == 16, "in any order"
    beit = load(str(child), ["method.name=beit"]).method
    assert (beit.name, beit.mask_ratio, beit.mask_type) == ("beit", 0.4, "block"), "nothing is left of LoMaR's keys"
    with pytest.raises(ValueError, match=r"unknown key method\.num_windows: it belongs to method\.name=lomar"):
        load(str(child), ["method.name=beit", "method.num_windows=2"])
    grandchild = tmp_path / "grandchild.yaml"
    grandchild.write_text("extends: child.yaml\nmethod: {name: simmim}\n")
    assert load(str(grandchild), []).method.mask_ratio == 0.6, "a recipe replaces it as an override does"


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("ae", {"name": "pixels", "norm_pix": True, "loss": "mse"}),
        ("lomar", {"name": "pixels", "norm_pix": True, "loss": "mse"}),
        ("simmim", {"name": "pixels", "norm_pix": False, "loss": "l1"}),
        ("beit", {"name": "tokens", "tokenizer": "random_projection", "vocab_size": 8192}),
    ],
)
def test_each_method_has_a_default_target(recipe: str, method: str, target: dict):
    keys = [f"method={method}", "model.position=sincos"]
    chosen = load(recipe, keys).target.model_dump()
    assert target.items() <= chosen.items()
    if target["name"] == "pixels":
        changed = load(recipe, [*keys, "target.norm_pix=false"]).target.model_dump()
        assert changed == chosen | {"norm_pix": False}, "its other keys stay the method's"


def test_target_that_the_method_cannot_predict_is_rejected(recipe: str):
    with pytest.raises(ValueError, match=r"method ae predicts pixels, not target\.name=tokens"):
        load(recipe, ["method=ae", "model.position=sincos", "target=tokens"])


def leaves(section: type[Section], prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Every key of a section and its subsections, and whether it may change when a run resumes."""
    for name, field in section.model_fields.items():
        if MAY_CHANGE in field.metadata:
            yield prefix + name, True
            continue
        inner = sections_in(field.annotation)
        for kind in inner:
            yield from leaves(kind, f"{prefix}{name}.")
        if not inner:
            yield prefix + name, False


def sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Section) else []
    return [section for inner in get_args(annotation) for section in sections_in(inner)]


def test_keys_that_may_change_on_resume():
    """A new key must stay equal unless it is marked, so this list changes only on purpose."""
    assert sorted({key for key, may_change in leaves(PretrainConfig) if may_change}) == [
        "checkpoint",
        "data.accept_changed_shards",
        "data.cache_dir",
        "data.cache_gb",
        "data.fetch_timeout",
        "data.max_skipped_images",
        "data.num_workers",
        "data.shards",
        "log",
        "method.module",
        "model.attention",
        "model.compile",
        "model.cuda_graphs",
        "model.grad_checkpointing",
        "model.residual",
        "name",
        "probe",
        "runs",
        "target.file",
        "target.resize_images",
        "target.weights",
        "train.deterministic",
        "train.ds_config",
        "train.gradient_accumulation_steps",
        "train.max_nonfinite_steps",
        "watchdog",
    ]


@pytest.mark.parametrize("recipe_name", ["lut_vitb16_224_1600e", "mae_pr_vitb16_224_800e", "beit_vitb16_224_300e"])
def test_resume_signature_has_every_key_that_may_not_change(recipe_name: str, tmp_path: Path):
    keys = ["data.shards=/nowhere"]
    if "beit" in recipe_name:
        (tmp_path / "model.safetensors").write_bytes(b"")
        keys += [f"target.weights={tmp_path}"]
    config = load(recipe_name, keys)
    signature = flatten(config.resume_signature())
    compared = {key for key, may_change in leaves(PretrainConfig) if not may_change}
    resolved = flatten(config.model_dump(mode="json"))
    before: dict[str, Any] = {"repeats": 1, "shuffle_shards": 0, "size_schedule": None}  # left out at their defaults
    before |= {"channels": 3, "dtype": "uint8", "mean": None, "std": None}
    assert {key: resolved.pop(f"data.{key}") for key in before} == before
    # Sections with several kinds, or optional ones: `leaves` yields the keys of all kinds.
    sections = {"method", "target", "lut", "pr_mim", "start"}
    assert signature.keys() <= compared | sections
    assert signature == {key: value for key, value in resolved.items() if key in compared | sections}
    assert {"seed", "optim.base_lr", "train.epochs", "method.mask_ratio", "target.name"} <= signature.keys()


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
