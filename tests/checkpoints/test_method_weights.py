"""Tests of starting weights of a pretraining: encoder, decoder, heads and teacher are taken whole or not at all."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import originals
from helpers.tiny import random_images, random_mask_indices, randomize
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from downstream.checkpoints.method_weights import load_method, load_teacher
from downstream.checkpoints.weights import load_encoder
from pretrain.build import build_ema, build_method
from pretrain.config import PretrainConfig
from pretrain.finish import encoder_state_dict
from pretrain.methods.targets.features import EncoderTeacher
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.models.features import features
from pretrain.models.vit import ARCHS, Arch, sincos_positions
from pretrain.trainer.checkpoint_layout import EMA_FILE, MANIFEST, MODEL_STATES, TrainState

DECODER = {"decoder_embed_dim": 8, "decoder_depth": 2, "decoder_num_heads": 2}
MAE = {"method": {"name": "mae", **DECODER}, "model": {"arch": "vit_tiny", "patch_size": 4, "position": "sincos"}}
LOMAR = {
    "method": {"name": "lomar", "num_windows": 1, "window_size": 2},
    "model": {"arch": "vit_tiny", "patch_size": 4},
}
SIMMIM = {"method": {"name": "simmim", "mask_patch_size": 4}, "model": {"arch": "vit_tiny", "patch_size": 4}}
AS_TRAINED = {**SIMMIM, "model": SIMMIM["model"] | {"position": "bias", "layer_scale": 0.1, "registers": 1}}
LEARNED = {**MAE, "model": MAE["model"] | {"position": "learned"}}
BEIT = {
    "method": "beit",
    "model": {"arch": "vit_tiny", "patch_size": 4},
    "target": {"name": "tokens", "tokenizer": "random_projection", "vocab_size": 32},
}
TEC = {**MAE, "method": {"name": "tec", "num_queries": 3, **DECODER}}
LUT = {"lut": {"hidden_dim": 32}, "train": {"global_batch_size": 2}}


def configure(sections: dict[str, Any], size: int = 12, **more: Any) -> PretrainConfig:
    data = {"shards": "unused", "image_size": size}
    return PretrainConfig.model_validate({"name": "x", "data": data, **sections, **more})


def build(sections: dict[str, Any], size: int = 12, **more: Any) -> Any:
    method = build_method(configure(sections, size, **more))
    randomize(method)  # so that no values are equal by accident
    return method


def state_of(method: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in method.state_dict().items()}


def as_mae_file(method: Any, path: Path) -> dict[str, Tensor]:
    """Save a method's weights under the names of MAE's authors and return them."""
    state = {}
    for name, tensor in method.state_dict().items():
        name = name.removeprefix("method.").removeprefix("encoder.")
        for inter_block, theirs in (("decoder.inter_block.norms", "dec_norms"), ("decoder.inter_block", "wfm.linear")):
            name = name.replace(inter_block, theirs)
        name = "mask_token" if name == "decoder.mask_token" else name.replace("decoder.", "decoder_", 1)
        state[name.replace("projector.", "head.")] = tensor
    if "wfm.linear.weight" in state:
        del state["norm.weight"], state["norm.bias"]
    state["decoder_pos_embed"] = torch.ones(1, 10, 8)
    torch.save({"model": state}, path)
    return state


def write_run(method: Any, sections: dict[str, Any], folder: Path, averages: dict[str, Tensor] | None = None) -> Path:
    """Write a checkpoint as a run with ZeRO stage 0, 1 or 2 does."""
    checkpoint = folder / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    torch.save({"module": method.state_dict()}, checkpoint / MODEL_STATES)
    state = TrainState(resume_signature=configure(sections).resume_signature())
    (checkpoint / MANIFEST).write_text(json.dumps({"state": asdict(state)}))
    if averages:
        save_file(averages, checkpoint / EMA_FILE)
    return checkpoint


def lines_of(report: str) -> dict[str, str]:
    """Return the report's lines about parts, by the name of the part."""
    return dict(line.strip().split(": ", 1) for line in report.splitlines() if line.startswith("  ") and ": " in line)


@pytest.mark.parametrize("keys", [{}, {"decoder": "cross", "inter_block_attention": True}], ids=["mae", "crossmae"])
def test_mae_file_fills_encoder_and_decoder_and_gives_the_same_loss(keys: dict[str, Any], tmp_path: Path):
    sections = {**MAE, "method": MAE["method"] | keys}
    source, method = build(sections), build(sections, seed=1)
    as_mae_file(source, tmp_path / "mae.pth")
    loaded = load_method(method, tmp_path / "mae.pth")
    inner = "decoder.inter_block" if keys else "decoder.embed"
    parts = ["decoder.mask_token", inner, "decoder.blocks", "decoder.norm", "decoder.pred"]
    assert {part: lines_of(loaded.report)[part] for part in parts} == dict.fromkeys(parts, "taken")
    batch = random_images(method), random_mask_indices(method)
    assert torch.equal(method(*batch)["loss"], source(*batch)["loss"])
    assert "MAE's decoder" not in loaded.report.replace("(decoder_pos_embed): MAE's decoder", ""), "it is taken"


@pytest.mark.parametrize(
    ("keys", "unfit"),
    [
        (
            {"decoder_depth": 1},
            {"decoder.blocks": "decoder.blocks.1.attn.proj.bias is (8,) in the file and is missing"},
        ),
        ({"decoder": "conv"}, {"decoder.restore": "not in the file under any known name"}),
        ({"decoder_embed_dim": 12}, {"decoder.embed": "decoder.embed.bias is (8,) in the file and is (12,) here"}),
    ],
)
def test_load_fitting_keeps_initial_weights_of_unfitting_parts(
    keys: dict[str, Any], unfit: dict[str, str], tmp_path: Path
):
    as_mae_file(build(MAE), tmp_path / "mae.pth")
    method = build({**MAE, "method": MAE["method"] | keys}, seed=1)
    before = state_of(method)
    lines = lines_of(load_method(method, tmp_path / "mae.pth", load="fitting").report)
    for part, reason in unfit.items():
        assert reason in lines[part]
        names = {name for name in before if name.startswith(f"{part}.")}
        assert names
        assert all(torch.equal(method.state_dict()[name], before[name]) for name in names)
    assert not torch.equal(method.encoder.cls_token, before["encoder.cls_token"])


@pytest.mark.parametrize("method", ["mae", "mff", "lc_mae"])
@pytest.mark.parametrize(
    ("keys", "sides"),
    [
        ({"decoder_depth": 1}, r"decoder in .*mae\.pth has 2 blocks, 8 wide, but this run's has 1 block, 8 wide"),
        ({"decoder_embed_dim": 12}, r"decoder in .*mae\.pth has 2 blocks, 8 wide, but this run's has 2 blocks, 12"),
    ],
)
def test_decoder_of_another_size_is_rejected_unless_only_the_encoder_loads(
    method: str, keys: dict[str, Any], sides: str, tmp_path: Path
):
    as_mae_file(build(MAE), tmp_path / "mae.pth")
    blocks = {"blocks": [1, 2]} if method == "mff" else {}
    other = build({**MAE, "method": MAE["method"] | {"name": method} | keys | blocks}, seed=1)
    with pytest.raises(ValueError, match=sides) as error:
        load_method(other, tmp_path / "mae.pth")
    assert "set method.decoder_depth=2 method.decoder_embed_dim=8, or start.load=encoder to" in str(error.value)
    before = state_of(other)
    loaded = load_method(other, tmp_path / "mae.pth", load="encoder")
    assert "as initialized, since start.load=encoder" in loaded.report
    assert all(name.startswith("encoder.") for name in loaded.taken)
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items() if "encoder" not in name
    )
    as_mae_file(build({**MAE, "method": MAE["method"] | keys}), tmp_path / "mae.pth")
    assert lines_of(load_method(other, tmp_path / "mae.pth").report)["decoder.blocks"] == "taken"


@pytest.mark.parametrize("keys", [{"decoder": "conv"}, {"decoder": "cross"}], ids=["conv", "cross"])
def test_nothing_is_taken_from_another_kind_of_decoder(keys: dict[str, Any], tmp_path: Path):
    as_mae_file(build(MAE), tmp_path / "mae.pth")
    name = {"name": "lc_mae"} if keys["decoder"] == "conv" else {}
    method = build({**MAE, "method": MAE["method"] | keys | name}, seed=1)
    before = state_of(method)
    lines = lines_of(load_method(method, tmp_path / "mae.pth").report)
    decoder = {name for name in before if name.startswith("decoder.")}
    assert decoder
    assert all(torch.equal(method.state_dict()[name], before[name]) for name in decoder)
    assert (
        "the file's decoder is of another kind (decoder." in lines[next(n for n in lines if n.startswith("decoder."))]
    )


def test_another_target_replaces_only_the_prediction_layer(tmp_path: Path):
    """Another number of values per patch means another target, not a decoder that does not fit."""
    as_mae_file(build(MAE), tmp_path / "mae.pth")
    method = build({**MAE, "target": {"name": "hog", "cell_sizes": [4]}}, seed=1)
    lines = lines_of(load_method(method, tmp_path / "mae.pth").report)
    assert lines["decoder.blocks"] == "taken"
    assert "decoder.pred.bias is (48,) in the file and is (27,) here" in lines["decoder.pred"]


def test_lut_heads_of_another_width_are_rejected(tmp_path: Path):
    checkpoint = write_run(build(MAE | LUT), MAE | LUT, tmp_path)
    other = build(MAE | LUT | {"lut": {"hidden_dim": 48}})
    with pytest.raises(ValueError, match=r"LUT's projector in .* \(32,.* \(48,.*: set method\.\* or lut\.\* to match"):
        load_method(other, checkpoint)


def test_another_kind_of_position_table_is_reported(tmp_path: Path):
    def note(file: dict[str, Any], run: dict[str, Any]) -> str:
        source = build_method(configure(file))
        if file is LEARNED:
            randomize(source)
        save_file(
            source.encoder.state_dict(),
            tmp_path / "encoder.safetensors",
            metadata=EncoderSpec("vit_tiny", 4, (12, 12), "sincos").to_metadata(),
        )
        report = load_method(build(run), tmp_path / "encoder.safetensors").report
        return "".join(line for line in report.splitlines() if line.startswith("  pos_embed"))

    assert note(MAE, MAE) == note(LEARNED, LEARNED) == ""
    assert "is not sin-cos; it is loaded, and model.position=sincos keeps it fixed" in note(LEARNED, MAE)
    assert "is fixed (sin-cos), and model.position=learned trains it" in note(MAE, LEARNED)


def test_decoder_of_transformers_mae_gives_the_same_predictions(tmp_path: Path):
    from transformers import ViTMAEConfig
    from transformers.models.vit_mae.modeling_vit_mae import ViTMAEDecoder

    sizes = {"hidden_size": 16, "num_attention_heads": 2, "image_size": 12, "patch_size": 4}
    decoder = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTMAEConfig(**sizes, **{f"decoder_{key}": value for key, value in decoder.items()}, layer_norm_eps=1e-6)
    theirs = ViTMAEDecoder(config, num_patches=9)
    randomize(theirs)
    theirs.decoder_pos_embed.data[0, 1:] = sincos_positions(8, 3, 3)
    theirs.decoder_pos_embed.data[0, 0] = 0
    method = build(MAE, seed=1)
    encoder = originals.prefixed("vit.", build(MAE).encoder.state_dict())
    decoder_state = dict(sorted(originals.prefixed("decoder.", theirs.state_dict()).items()))
    torch.save({**encoder, **decoder_state}, tmp_path / "pytorch_model.bin")
    lines = lines_of(load_method(method, tmp_path / "pytorch_model.bin").report)
    assert {lines[part] for part in ("decoder.mask_token", "decoder.embed", "decoder.blocks", "decoder.pred")} == {
        "taken"
    }
    tokens, visible, masked = torch.randn(1, 4, 16), torch.tensor([[0, 4, 7]]), torch.tensor([[1, 2, 3, 5, 6, 8]])
    restore = torch.cat([visible, masked], dim=1).argsort(1)
    with torch.no_grad():
        expected = theirs(tokens, restore).logits[:, masked[0]]
        torch.testing.assert_close(method.decoder(tokens, visible, masked, masked), expected)


def test_file_of_the_lomar_authors_fills_the_mask_token_but_not_the_head(tmp_path: Path):
    path, _ = originals.lomar(tmp_path)
    stored = torch.load(path, weights_only=False)["model"]
    method = build(LOMAR)
    lines = lines_of(load_method(method, path).report)
    assert lines["predictor.mask_token"] == "taken"
    assert torch.equal(method.predictor.mask_token, stored["mask_token"])
    assert "predictor.head.bias is missing in the file" in lines["predictor.head"], "this file has none"


@pytest.mark.parametrize(
    "sections",
    [MAE, LEARNED, LOMAR, SIMMIM, AS_TRAINED, BEIT],
    ids=["mae", "mae-learned", "lomar", "simmim", "simmim-as-trained", "beit"],
)
def test_run_fills_every_method_completely(sections: dict[str, Any], tmp_path: Path):
    source, method = build(sections), build(sections, seed=1)
    checkpoint = write_run(source, sections, tmp_path)
    loaded = load_method(method, checkpoint)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in method.state_dict().items())
    assert loaded.taken == {name: name for name in source.state_dict()}
    assert loaded.record()["path"] == str(checkpoint)


def test_file_of_the_simmim_authors_fills_shared_table_and_layer_scale(tmp_path: Path):
    path, model = originals.simmim(tmp_path)
    method = build({**SIMMIM, "model": SIMMIM["model"] | {"position": "bias", "layer_scale": 0.1}})
    load_method(method, path)
    assert originals.feature_difference(method.encoder, model, originals.images()) < originals.SAME_PARAMETERS
    assert torch.equal(method.encoder.blocks[1].ls2.gamma, model.blocks[1].gamma_2)
    without = build({**SIMMIM, "model": SIMMIM["model"] | {"position": "bias"}})
    loaded = load_method(without, path)
    assert "LayerScale" in loaded.report
    assert originals.feature_difference(without.encoder, model, originals.images()) < originals.SAME_TO_FP32
    finetuned, _ = originals.beit_finetuned(tmp_path)
    with pytest.raises(ValueError, match="a different bias table in each block"):
        load_method(without, finetuned)


def test_encoder_file_fills_a_method_with_another_image_and_patch_size(tmp_path: Path):
    sections = {**MAE, "model": MAE["model"] | {"patch_size": 16}}
    source = build(sections, size=48)
    metadata = EncoderSpec("vit_tiny", 16, (48, 48), "sincos").to_metadata()
    save_file(source.encoder.state_dict(), tmp_path / "encoder.safetensors", metadata=metadata)
    method = build({**MAE, "model": MAE["model"] | {"patch_size": 14}}, size=56)
    loaded = load_method(method, tmp_path / "encoder.safetensors")
    expected = resample_abs_pos_embed(source.encoder.pos_embed, [4, 4], old_size=[3, 3], antialias=True)
    torch.testing.assert_close(method.encoder.pos_embed, expected)
    assert torch.equal(method.encoder.blocks[1].mlp.fc1.weight, source.encoder.blocks[1].mlp.fc1.weight)
    assert "resized  1 (patch_embed.proj.weight): 16 -> 14 pixels" in loaded.report
    assert not {"encoder.pos_embed", "encoder.patch_embed.proj.weight"} & loaded.taken.keys()
    assert "not in the file" in lines_of(loaded.report)["decoder.blocks"]


def test_lut_loads_runs_with_and_without_lut(tmp_path: Path):
    sections = LOMAR | LUT
    config = configure(sections)
    source, with_lut = build(sections), build(sections, seed=1)
    averages = {name: tensor + 1 for name, tensor in source.teacher_model().state_dict().items()}
    checkpoint = write_run(source, sections, tmp_path / "lut", averages)
    report = load_method(with_lut, checkpoint).report
    assert {lines_of(report)[part] for part in ("LUT's projector", "LUT's predictor", "predictor.head")} == {"taken"}
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in with_lut.state_dict().items())
    teacher = build_ema(config, with_lut, torch.device("cpu")).model
    assert "teacher: " in load_teacher(teacher, checkpoint)
    assert all(torch.equal(tensor, averages[name]) for name, tensor in teacher.state_dict().items())

    alone = build(LOMAR)
    assert lines_of(load_method(alone, checkpoint).report)["predictor.head"] == "taken"
    assert torch.equal(alone.predictor.head.weight, source.method.predictor.head.weight)
    back = build(sections)
    lines = lines_of(load_method(back, write_run(alone, LOMAR, tmp_path / "alone")).report)
    assert "not in the file" in lines["LUT's projector"]
    assert torch.equal(back.method.predictor.head.weight, source.method.predictor.head.weight)
    teacher = build_ema(config, back, torch.device("cpu")).model
    assert "a copy of the encoder and projector" in load_teacher(teacher, tmp_path / "alone/checkpoints/step_00000002")
    assert torch.equal(teacher.encoder.cls_token, alone.encoder.cls_token)


def test_moving_average_starts_from_that_of_a_run(tmp_path: Path):
    sections = MAE | {"target": {"name": "ema", "blocks": 2}}
    source, method = build(sections), build(sections, seed=1)
    averages = {f"encoder.{name}": tensor + 1 for name, tensor in source.encoder.state_dict().items()}
    checkpoint = write_run(source, sections, tmp_path, averages)
    load_method(method, checkpoint)
    teacher = build_ema(configure(sections), method, torch.device("cpu")).model
    assert torch.equal(teacher.encoder.cls_token, source.encoder.cls_token)
    assert "teacher: " in load_teacher(teacher, checkpoint)
    assert all(torch.equal(tensor, averages[name]) for name, tensor in teacher.state_dict().items())
    assert method.target.teacher is teacher


def test_file_of_the_lut_authors_fills_the_teacher_from_its_averages(tmp_path: Path):
    sections = MAE | LUT
    source = build(sections)
    state = as_mae_file(source, tmp_path / "lut.pth")
    averaged = {name: tensor if name == "pos_embed" else tensor + 1 for name, tensor in state.items()}
    averaged["head.1.num_batches_tracked"] = torch.tensor(3)
    torch.save({"model": state, "model_ema": averaged}, tmp_path / "lut.pth")
    method = build(sections, seed=1)
    load_method(method, tmp_path / "lut.pth")
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in method.state_dict().items())
    teacher = build_ema(configure(sections), method, torch.device("cpu")).model
    load_teacher(teacher, tmp_path / "lut.pth")
    assert torch.equal(teacher.encoder.cls_token, averaged["cls_token"])
    assert torch.equal(teacher.projector[0].weight, averaged["head.0.weight"])


def test_error_for_another_encoder_names_the_keys_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    as_mae_file(build(MAE), tmp_path / "mae.pth")
    monkeypatch.setitem(ARCHS, "vit_small", Arch(24, 2, 2))
    method = build(LOMAR | {"model": {"arch": "vit_small", "patch_size": 4}})
    before = state_of(method)
    with pytest.raises(ValueError, match=r"set model\.arch=vit_tiny and model\.position=sincos, or"):
        load_method(method, tmp_path / "mae.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())
    path, _ = originals.simmim(tmp_path)
    with pytest.raises(ValueError, match=r"set model\.arch=vit_tiny and model\.position=bias, or"):
        load_method(method, path)
    registers = build({**MAE, "model": MAE["model"] | {"registers": 2}})
    with pytest.raises(ValueError, match=r"set model\.registers=0, or start"):
        load_method(registers, tmp_path / "mae.pth")
    with pytest.raises(ValueError, match=r"only 14 and 16 can be converted; set model\.\* to match it"):
        load_method(build({**MAE, "model": MAE["model"] | {"patch_size": 6}}), tmp_path / "mae.pth")


def test_encoder_of_a_tec_run_includes_the_adapter_of_the_class_token(tmp_path: Path):
    method = build_method(configure(TEC), EncoderTeacher(build(MAE).encoder))
    randomize(method)
    checkpoint = write_run(method, TEC, tmp_path)
    encoder, report = load_encoder(checkpoint)
    assert encoder.state_dict().keys() == build(MAE).encoder.state_dict().keys()
    assert "after its adapter's MLP" in str(report)
    expected = encoder_state_dict(method, method.state_dict())
    torch.testing.assert_close(dict(encoder.state_dict()), expected, rtol=0, atol=0)
    images = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(features(encoder, images), features(method.encoder.eval(), images))


def test_tec_started_from_an_encoder_keeps_its_own_adapter(tmp_path: Path):
    as_mae_file(build(MAE), tmp_path / "mae.pth")
    method = build_method(configure(TEC), EncoderTeacher(build(MAE).encoder))
    before = state_of(method)
    load_method(method, tmp_path / "mae.pth")
    changed = {name for name, tensor in method.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "encoder.cls_token" in changed
    assert not any("adapter" in name for name in changed)


def test_tec_takes_everything_from_a_tec_run(tmp_path: Path):
    one, other = (build_method(configure(TEC, seed=seed), EncoderTeacher(build(MAE).encoder)) for seed in (0, 1))
    randomize(one)
    load_method(other, write_run(one, TEC, tmp_path))
    torch.testing.assert_close(other.state_dict(), one.state_dict(), rtol=0, atol=0)
