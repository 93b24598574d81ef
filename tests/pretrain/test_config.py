"""Tests for recipes and overrides: mistakes raise errors that name the key to change."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from pretrain.build import build_method
from pretrain.config import RECIPES, load
from pretrain.models.vit import ARCHS

SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize(
    ("override", "message_parts"),
    [
        ("optimizer.base_lr=1", ["unknown key optimizer", "did you mean optim?"]),
        ("data.shardz=x", ["unknown key data.shardz: did you mean data.shards?"]),
        ("optim.base_lrr=1", ["unknown key optim.base_lrr", "did you mean optim.base_lr?"]),
        ("method.window_sise=3", ["unknown key method.window_sise", "did you mean method.window_size?"]),
        ("pr_mim.throw_ration=0.5", ["unknown key pr_mim.throw_ration", "did you mean pr_mim.throw_ratio?"]),
        ("lut.hidden_dims=8", ["unknown key lut.hidden_dims", "did you mean lut.hidden_dim?"]),
        ("train.qqqq=3", ["unknown key train.qqqq", "valid: ", "epochs", "precision"]),
        ("method.name=lomr", ["unknown method.name=lomr", "did you mean lomar?"]),
        ("method=lomr", ["unknown method.name=lomr", "did you mean lomar?"]),
        (
            "method.name=resnet",
            ["unknown method.name=resnet", "valid: ae, beit, lc_mae, local_mim, lomar, mae, mff, simmim"],
        ),
        ("target.name=pixel", ["unknown target.name=pixel", "did you mean pixels?"]),
        ("target.name=jpeg", ["unknown target.name=jpeg", "valid: ema, hog, pca, pixels, teacher, tokens"]),
        ("target.normpix=true", ["unknown key target.normpix", "did you mean target.norm_pix?"]),
    ],
)
def test_unknown_name_error_suggests_a_valid_name(recipe: str, override: str, message_parts: list[str]):
    with pytest.raises(ValueError, match="unknown") as error:
        load(recipe, [override])
    assert all(part in str(error.value) for part in message_parts), error.value
    assert len(str(error.value).splitlines()) == 1, "and nothing else is reported"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs=abc", "train.epochs=abc: must be a whole number"),
        ("train.epochs=1.5", "train.epochs=1.5: must be a whole number"),
        ("train.epochs=0", "train.epochs=0: must be at least 1"),
        ("watchdog.silent_minutes=0.1", "watchdog.silent_minutes=0.1: ranks give a sign of life every five seconds"),
        ("watchdog.slow_factor=1", "watchdog.slow_factor=1: every node takes about 1 times the median; set at least"),
        ("train.epochs=", "train.epochs=None: must be a whole number"),
        ("train=5", "train=5: must be a section with keys such as epochs and global_batch_size"),
        ("data.image_size=abc", "data.image_size=abc: must be a whole number, or [a whole number, a whole number]"),
        ("data.image_size=[224", "data.image_size=[224: must be a whole number, or [a whole number, a whole number]"),
        ("data.hflip=1.5", "data.hflip=1.5: must be at most 1"),
        ("data.shards=", "data.shards='': must be non-empty"),
        ("optim.betas=[0.9]", "optim.betas=[0.9]: must be [a number, a number]"),
        ("optim.base_lr=nan", "optim.base_lr=nan: must be a finite number"),
        ("optim.base_lr=0", "optim.base_lr=0: must be more than 0"),
        ("model.patch_size=0", "model.patch_size=0"),
        ("model.arch=vit_bas", "vit_large or vit_huge: did you mean vit_base?"),
        ("model.grad_checkpointing=maybe", "model.grad_checkpointing=maybe: must be true or false"),
        ("train.precision=fp16", "train.precision=fp16: must be bf16 or fp32"),
        ("method.mask_ratio=1.0", "method.mask_ratio=1.0: must be less than 1"),
        ("method.predict_ratio=0", "method.predict_ratio=0: must be more than 0, or none"),
        ("name=a/b", "name=a/b: must be a folder name of letters, digits"),
    ],
)
def test_invalid_value_error_names_its_key(recipe: str, override: str, message: str):
    with pytest.raises(ValueError, match="^" + override.split("=")[0]) as error:
        load(recipe, [override])
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "message_parts"),
    [
        (["data.image_size=225"], ["data.image_size=225", "model.patch_size=16", "224 and 240"]),
        (["data.image_size=[224,230]"], ["data.image_size=", "230", "224 and 240"]),
        (["data.image_size=16"], ["method.window_size=7", "1x1", "at most 1"]),
        (["method.window_size=15"], ["method.window_size=15", "14x14", "at most 14"]),
        (["data.image_size=[112,240]"], ["method.num_windows=10", "9 places", "7x15", "at most 9"]),
        (["method.mask_ratio=0.01"], ["method.mask_ratio=0.01", "masks 0"]),
        (["method.window_size=2", "method.mask_ratio=0.2"], ["method.mask_ratio=0.2", "masks 0 of a window's 4"]),
        (["train.epochs=5"], ["optim.warmup_epochs=5", "train.epochs=5"]),
        (["data.crop_scale=[1,0.2]"], ["data.crop_scale", "the smaller first"]),
        (["data.repeats=3"], ["train.epochs=400 is not a multiple of data.repeats=3", "epochs=399 or 402"]),
        (["data.crop_scale=[0,0]"], ["data.crop_scale", "above 0"]),
        (["data.crop_scale=[0.1]"], ["data.crop_scale=[0.1]: must be [a number, a number]"]),
        (["data.image_size=[1,b]"], ["data.image_size=[1, 'b']"]),
        (["optim.weight_decay=.inf"], ["optim.weight_decay=inf", "finite"]),
    ],
)
def test_incompatible_values_error_names_the_keys(recipe: str, overrides: list[str], message_parts: list[str]):
    with pytest.raises(ValueError, match=r"\w+\.\w+=") as error:
        load(recipe, ["method.num_windows=10", *overrides])
    assert all(part in str(error.value) for part in message_parts), error.value


def test_all_errors_are_reported_at_once(recipe: str):
    with pytest.raises(ValueError, match="epochs") as error:
        load(recipe, ["train.epochs=abc", "optim.base_lrr=1"])
    assert len(str(error.value).splitlines()) == 2
    with pytest.raises(ValueError, match=r"method\.window_size") as error:
        load(recipe, ["method.window_size=15", "train.epochs=3", "data.crop_scale=[1, 0.5]"])
    assert len(str(error.value).splitlines()) == 3, "also of what does not fit together"


@pytest.mark.parametrize("argument", ["train.epochs", "=3", "--epochs=3", ""])
def test_malformed_override_is_rejected(recipe: str, argument: str):
    with pytest.raises(ValueError, match=r"is not an override: write section.key=value"):
        load(recipe, [argument])


def test_missing_required_keys_are_named(tmp_path: Path):
    path = tmp_path / "bare.yaml"
    path.write_text("method: {name: lomar}\n")
    with pytest.raises(ValueError, match="name is not set") as error:
        load(str(path), [])
    assert "data is not set" in str(error.value)


def test_unknown_recipe_error_suggests_the_nearest_name():
    with pytest.raises(ValueError, match=r"no recipe 'quickstrat'.*did you mean quickstart"):
        load("quickstrat", [])


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words"])
def test_recipe_that_is_not_a_mapping_is_rejected(tmp_path: Path, text: str):
    path = tmp_path / "empty.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"empty\.yaml is not a YAML mapping"):
        load(str(path), [])


def test_recipe_with_invalid_yaml_is_rejected(tmp_path: Path):
    path = tmp_path / "torn.yaml"
    path.write_text("name: [\n")
    with pytest.raises(ValueError, match=r"torn\.yaml is not YAML"):
        load(str(path), [])


def test_recipe_can_extend_a_shipped_one_by_name_but_not_itself(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: quickstart\nname: 2024\n")
    assert load(str(path), []).name == "2024"
    path.write_text("extends: mine.yaml\n")
    with pytest.raises(ValueError, match=r"mine\.yaml extends itself"):
        load(str(path), [])


def test_missing_base_recipe_is_named(tmp_path: Path):
    path = tmp_path / "child.yaml"
    path.write_text("extends: parent.yaml\n")
    with pytest.raises(ValueError, match=r"no recipe .*parent\.yaml"):
        load(str(path), [])


def test_overrides_change_single_keys_and_the_last_one_wins(recipe: str):
    config = load(
        recipe, ["method.mask_ratio=0.5", "optim.base_lr=1e-3", "optim.base_lr=2e-3", "data.image_size=[160, 224]"]
    )
    assert config.method.mask_ratio == 0.5
    assert config.method.num_windows == 2, "its other keys stay"
    assert config.optim.base_lr == 2e-3
    assert config.data.shards == "/nowhere"
    assert config.grid == (10, 14)
    assert config.peak_lr == pytest.approx(2e-3 * 4096 / 256)


def test_recipe_overrides_single_keys_of_the_one_it_extends(recipe: str, tmp_path: Path):
    (tmp_path / "nested").mkdir()
    child, grandchild = tmp_path / "child.yaml", tmp_path / "nested" / "grandchild.yaml"
    child.write_text("extends: small.yaml\nname: child\nmethod: {mask_ratio: 0.6}\n")
    grandchild.write_text("extends: ../child.yaml\ntrain: {epochs: 50}\n")
    config = load(str(grandchild), [])
    assert (config.name, config.method.num_windows, config.method.mask_ratio) == ("child", 2, 0.6)
    assert config.train.epochs == 50
    assert config.optim.warmup_epochs == 5
    assert load(recipe, []).method.mask_ratio == 0.8, "the base is as it was"


def test_resolved_recipe_loads_as_the_same_config(recipe: str, tmp_path: Path):
    config = load(recipe, ["data.image_size=[160, 224]", "optim.base_lr=1e-4", "target.norm_pix=false"])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(config.to_yaml())
    assert load(str(resolved), []) == config
    assert yaml.safe_load(config.to_yaml())["optim"]["betas"] == [0.9, 0.95], "defaults are written out"


def test_config_is_frozen(recipe: str):
    config = load(recipe, [])
    with pytest.raises(ValueError, match="frozen"):
        config.train.epochs = 3


def _empty_weights_file(folder: Path) -> Path:
    (folder / "weights.safetensors").write_bytes(b"")
    return folder / "weights.safetensors"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load_again_after_being_resolved(name: str, tmp_path: Path):
    keys = ["data.shards=/nowhere"]
    if "beit" in name:  # their tokenizer's weights are not shipped
        keys += [f"target.weights={_empty_weights_file(tmp_path)}"]
    config = load(name, keys)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(config.to_yaml())
    assert load(str(resolved), []) == config
    assert config.optim.weight_decay == 0.05


@pytest.mark.parametrize("arch", ["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_recipe_works_with_every_encoder(name: str, arch: str, tmp_path: Path):
    """If a recipe needs further overrides for an encoder, such as ViT-H with 14-pixel patches, the error names each."""
    keys = ["data.shards=/nowhere", f"model.arch={arch}"]
    if "beit" in name:
        keys += [f"target.weights={_empty_weights_file(tmp_path)}"]
    needed = []
    if arch == "vit_huge":
        keys += ["model.patch_size=14", *(["data.image_size=252"] if "_256_" in name else [])]
        needed += ["data.image_size=378"] if "_384_" in name else []
        cells = "simmim" in name or name in ("mae_vitb16_448_1600e", "mae_vitl16_448_1600e")
        needed += ["method.mask_patch_size=28"] if cells or name == "pixio_vitb16_256_400e" else []
        needed += ["method.mask_patch_size=84"] if name == "pixio_vith16_256_400e" else []
    if ("_fast_vitl" in name or "_fast_vith" in name) and ARCHS[arch].depth == 12:
        needed += ["method.mask_token_block=11"]
    depth = ARCHS[arch].depth
    if name.startswith("local_mim") and depth != (24 if "vitl" in name else 12):
        needed += [f"method.blocks=[2, 4, {depth - 2}, {depth}]"]
    if name.startswith("lomar_multiscale") and depth != 12:
        needed += [f"method.blocks=[2, 4, {depth}]"]
    if name.startswith("mff") and depth != 12:
        needed += [f"method.blocks=[1, 3, 5, {depth - 5}, {depth - 3}, {depth}]"]
    if arch == "vit_huge":
        sizes = {
            "local_mim": "[7, 7, 14, 28]",
            "lomar_next": "[7]",
            "lomar_multiscale": "[7, 7, 14]",
            "maskfeat": "[7]",
        }
        needed += [f"target.cell_sizes={cell_sizes}" for prefix, cell_sizes in sizes.items() if name.startswith(prefix)]
    for key in needed:
        with pytest.raises(ValueError, match=key.partition("=")[0] + ".*" + re.escape(key.partition("=")[2])):
            load(name, keys)
    config = load(name, [*keys, *needed])
    assert config.model.arch == arch


@pytest.mark.parametrize("name", [name for name in SHIPPED if "_fast_" in name])
def test_fast_recipes_combine_late_mask_tokens_and_pr_mim(name: str):
    config = load(name, ["data.shards=/nowhere"])
    size = int(name.split("_")[3])
    assert config.data.image_size == size
    assert config.method.mask_token_block == ARCHS[config.model.arch].depth * 2 // 3
    assert config.method.num_windows == {224: 4, 378: 6, 384: 6, 448: 9}[size]
    assert (config.pr_mim.throw_ratio, config.pr_mim.sampling, config.pr_mim.aggregation) == (0.5, "furthest", "conv")
    assert config.train.global_batch_size % (8 * config.train.gradient_accumulation_steps) == 0
    assert config.train.epochs == int(name.split("_")[4][:-1])


@pytest.mark.parametrize(
    ("name", "size", "patch", "windows", "warmup"),
    [
        ("lomar_vitb16_224_1600e", 224, 16, 4, 40),
        ("lomar_vitb16_224_800e", 224, 16, 4, 20),
        ("lomar_vitb16_224_400e", 224, 16, 4, 10),
        ("lomar_vitb16_384_300e", 384, 16, 6, None),
        ("lomar_vitb16_448_300e", 448, 16, 9, None),
        ("lomar_vitb8_224_400e", 224, 8, 4, 10),
    ],
)
def test_lomar_recipes_match_the_paper(name: str, size: int, patch: int, windows: int, warmup: int | None):
    config = load(name, ["data.shards=/nowhere"])
    assert config.train.epochs == int(name.split("_")[-1][:-1])
    assert (config.data.image_size, config.model.patch_size, config.method.num_windows) == (size, patch, windows)
    assert (config.method.window_size, config.method.mask_ratio, config.target.norm_pix) == (7, 0.8, True)
    assert (config.train.global_batch_size, config.optim.base_lr, config.optim.betas) == (4096, 1.5e-4, (0.9, 0.95))
    assert (config.optim.min_lr, config.data.crop_scale, config.data.hflip) == (0, (0.2, 1.0), 0.5)
    if warmup is not None:
        assert config.optim.warmup_epochs == warmup


@pytest.mark.parametrize("name", [name for name in SHIPPED if "simmim" in name])
def test_simmim_recipes_match_the_authors_code(name: str):
    config = load(name, ["data.shards=/nowhere"])
    optim = config.optim
    assert config.peak_lr == pytest.approx(4e-4), "1e-4 x 2048 / 512"
    assert (optim.betas, optim.clip_grad, optim.decay_class_token, optim.warmup_epochs) == ((0.9, 0.999), 5, False, 10)
    assert (config.model.drop_path_rate, config.target.loss, config.target.norm_pix) == (0.1, "l1", False)
    assert (config.model.position, config.model.layer_scale) == ("bias", 0.1)
    steps = ("steps", (700,), 0.1) if config.train.epochs == 800 else ("cosine", (), 0.1)
    assert (optim.schedule, optim.step_epochs, optim.step_factor) == steps


@pytest.mark.parametrize(
    ("name", "decoder"),
    [
        ("crossmae_vits16_224_800e", (256, 12, 8)),
        ("crossmae_vitb16_224_800e", (512, 12, 16)),
        ("crossmae_vitl16_224_800e", (512, 12, 16)),
        ("lomar_cross_vitb16_224_400e", (512, 8, 16)),
        ("mae_vitb16_448_1600e", (384, 8, 12)),
        ("mae_vitl16_448_1600e", (512, 8, 16)),
    ],
)
def test_recipes_with_other_decoders_have_the_expected_settings(name: str, decoder: tuple[int, int, int]):
    config = load(name, ["data.shards=/nowhere"])
    method, cross = config.method, "cross" in name
    assert (method.decoder_embed_dim, method.decoder_depth, method.decoder_num_heads) == decoder
    assert (method.decoder == "cross", method.inter_block_attention) == (cross, "crossmae" in name)
    assert (config.train.global_batch_size, config.optim.base_lr, config.optim.betas) == (4096, 1.5e-4, (0.9, 0.95))
    assert method.predict_ratio is None, "with one, the rate would have to be lower"
    if "448" in name:
        assert method.count_patches(config.grid, 16) == (784, 588)
        assert (method.mask_type, method.mask_patch_size) == ("cell", 32)


def test_pixio_recipe_matches_the_authors_script():
    config = load("pixio_vith16_256_400e", ["data.shards=/nowhere"])
    assert config.method.count_patches(config.grid, 16) == (256, 192), "of 16 squares of 64 pixels 4 are seen"
    assert (config.model.registers, config.model.position, config.model.drop_path_rate) == (7, "learned", 0.4)
    assert (config.peak_lr, config.data.hflip, config.method.decoder_depth) == (pytest.approx(8e-4), 0, 32)


def test_drop_path_rate_grows_linearly_over_encoder_blocks():
    config = load("simmim_vits16_224_800e", ["data.shards=/nowhere", "model.drop_path_rate=0.11", "data.image_size=64"])
    first, *others = build_method(config).encoder.blocks
    assert isinstance(first.drop_path, torch.nn.Identity)
    assert [1 - float(block.drop_path.kept_share) for block in others] == pytest.approx([k / 100 for k in range(1, 12)])


def test_initial_weights_are_determined_by_the_seed(recipe: str):
    small = ["model.arch=vit_tiny", "data.image_size=128"]
    first, again, other = (build_method(load(recipe, [*small, f"seed={seed}"])).state_dict() for seed in (0, 0, 1))
    assert all((first[name] == again[name]).all() for name in first)
    assert (first["predictor.head.weight"] != other["predictor.head.weight"]).any()
