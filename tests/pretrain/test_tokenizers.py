"""The tokenizers: what a code depends on, DALL-E's encoder against transformers, and what is refused."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from pretrain.config import load
from pretrain.methods.targets.tokenizers import TokenizerConfig, build_tokenizer
from pretrain.trainer.checkpoint import TrainState, check_continues

GRID, SIDE = (3, 5), 4
KNOWN_CODES = [1380, 851, 8092, 709, 2484, 1120, 4303, 879, 4989, 3218, 163, 3262, 6417, 7298, 3911]


def random_images(seed: int = 0, side: int = SIDE) -> torch.Tensor:
    shape = (3, GRID[0] * side, GRID[1] * side, 3)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_a_random_projection_code_depends_on_its_patch_alone():
    tokenizer = build_tokenizer(TokenizerConfig(codes=50), GRID, SIDE)
    images = random_images()
    before = tokenizer(images).view(3, *GRID)
    images[:, SIDE : 2 * SIDE, 2 * SIDE : 3 * SIDE] = random_images(1)[:, :SIDE, :SIDE]
    changed = (tokenizer(images).view(3, *GRID) != before).any(0).nonzero().tolist()
    assert changed == [[1, 2]]


def test_random_projection_follows_its_seed_alone():
    images = random_images()
    torch.manual_seed(1)
    first = build_tokenizer(TokenizerConfig(seed=3), GRID, SIDE)(images)
    torch.manual_seed(2)
    assert torch.equal(build_tokenizer(TokenizerConfig(seed=3), GRID, SIDE)(images), first)
    assert not torch.equal(build_tokenizer(TokenizerConfig(seed=4), GRID, SIDE)(images), first)
    assert first.dtype == torch.int64
    assert first.tolist()[0] == KNOWN_CODES, "these never change: runs are continued with them"


def test_random_projection_uses_its_vocabulary():
    images = torch.randint(0, 256, (40, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes = build_tokenizer(TokenizerConfig(codes=16), (8, 8), 4)(images)
    counts = codes.flatten().bincount(minlength=16)
    assert counts.min() > 0.02 * counts.sum()


def test_codes_do_not_depend_on_the_batch_or_on_autocast():
    tokenizer = build_tokenizer(TokenizerConfig(codes=50), GRID, SIDE)
    images = random_images().repeat(15, 1, 1, 1)  # more than are encoded at once
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = tokenizer(images)
    assert torch.equal(codes, torch.cat([tokenizer(image[None]) for image in images]))


@pytest.fixture(scope="module")
def codebook() -> Any:
    """A small FlavaImageCodebook with random weights, and biases with which it uses many codes."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.FlavaImageCodebookConfig(hidden_size=8, num_blocks_per_group=2, vocab_size=24)
    model = transformers.FlavaImageCodebook(config).eval()
    with torch.no_grad():
        logits = model(0.1 + 0.8 * torch.rand(8, 3, 40, 24))
        model.blocks.output.conv.bias -= logits.mean((0, 2, 3))
    return model


@pytest.fixture
def weights(codebook: Any, tmp_path: Path) -> Path:
    """It in a folder, as transformers saves it."""
    codebook.save_pretrained(tmp_path / "codebook")
    return tmp_path / "codebook"


def dalle(weights: Path, codes: int = 24, **keys: Any) -> TokenizerConfig:
    return TokenizerConfig(name="dalle", codes=codes, weights=str(weights), **keys)


@pytest.mark.parametrize("side", [8, 16, 14])
def test_dalle_codes_are_those_of_transformers(codebook: Any, weights: Path, side: int):
    images = random_images(side=side)
    pixels = images.permute(0, 3, 1, 2) / 255
    if side != 8:
        pixels = F.interpolate(pixels, (GRID[0] * 8, GRID[1] * 8), mode="bicubic", antialias=True).clamp(0, 1)
    expected = codebook.get_codebook_indices(pixels * 0.8 + 0.1)
    codes = build_tokenizer(dalle(weights), GRID, side)(images)
    assert torch.equal(codes, expected.flatten(1))
    assert len(codes.unique()) > 3


def test_dalle_pixels_are_those_of_transformers_processor(weights: Path):
    """Its FLAVA processor maps pixels alike; where nothing is resized, they are equal."""
    processor = pytest.importorskip("transformers").FlavaImageProcessor()
    image = random_images(side=8)[:1]
    mapped = processor.map_pixels(image.permute(0, 3, 1, 2) / 255)
    torch.testing.assert_close(build_tokenizer(dalle(weights), GRID, 8)._pixels(image), mapped)


def test_dalle_reads_files_of_both_kinds_and_is_frozen(codebook: Any, weights: Path, tmp_path: Path):
    images = random_images(side=8)
    torch.save(codebook.state_dict(), tmp_path / "pytorch_model.bin")
    state = torch.random.get_rng_state()
    paths = (weights, weights / "model.safetensors", tmp_path / "pytorch_model.bin", tmp_path)
    tokenizers = [build_tokenizer(dalle(path), GRID, 8) for path in paths]
    assert torch.equal(torch.random.get_rng_state(), state), "the run's random numbers are untouched"
    assert all(torch.equal(tokenizer(images), tokenizers[0](images)) for tokenizer in tokenizers)
    assert not any(p.requires_grad for p in tokenizers[0].model.parameters())
    assert not tokenizers[0].model.training


def test_dalle_is_named_by_the_sum_of_its_file(weights: Path, tmp_path: Path):
    true = hashlib.sha256((weights / "model.safetensors").read_bytes()).hexdigest()
    assert dalle(weights).sha256 == dalle(weights, sha256=true.upper()).sha256 == true
    with pytest.raises(ValueError, match=r"not the one of method\.tokenizer\.sha256=00"):
        dalle(weights, sha256="00")


def test_a_moved_file_continues_and_another_does_not(weights: Path, tmp_path: Path):
    moved, other = shutil.copytree(weights, tmp_path / "moved"), shutil.copytree(weights, tmp_path / "other")
    save_file({"x": torch.zeros(1)}, other / "model.safetensors")
    keys = ["data.shards=/nowhere", "method.tokenizer.codes=24"]
    first, same, different = (
        TrainState(
            resume_signature=load(
                "beit_vitb16_224_300e", [*keys, f"method.tokenizer.weights={path}"]
            ).resume_signature()
        )
        for path in (weights, moved, other)
    )
    check_continues(first, same)
    with pytest.raises(ValueError, match=r"method\.tokenizer\.sha256 was"):
        check_continues(first, different)


def test_wrong_weights_are_refused(weights: Path, codebook: Any, tmp_path: Path):
    state = codebook.state_dict()
    save_file({"encoder.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    save_file({**state, "more": torch.zeros(1)}, tmp_path / "more.safetensors")
    save_file({**state, "blocks.input.weight": torch.zeros(8, 3, 5, 5)}, tmp_path / "shape.safetensors")
    (tmp_path / "text.safetensors").write_text("not weights")
    (tmp_path / "text.bin").write_text("not weights")
    (tmp_path / "empty.bin").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.bin")
    for name in ("other.safetensors", "more.safetensors", "shape.safetensors"):
        with pytest.raises(ValueError, match="holds no weights of FlavaImageCodebook"):
            build_tokenizer(dalle(tmp_path / name), GRID, 8)
    for name in ("text.safetensors", "text.bin", "empty.bin", "list.bin"):
        with pytest.raises(ValueError, match=r"is no file of plain weights|is no dictionary of tensors"):
            build_tokenizer(dalle(tmp_path / name), GRID, 8)
    with pytest.raises(ValueError, match=r"set method\.tokenizer\.codes=24"):
        build_tokenizer(dalle(weights, codes=8192), GRID, 8)


class Malicious:
    """Unpickled by `pickle.load`, it would make a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_does_not_run(tmp_path: Path):
    torch.save({"blocks.input.bias": Malicious(tmp_path / "ran")}, tmp_path / "evil.bin")
    with pytest.raises(ValueError, match="is no file of plain weights"):
        build_tokenizer(dalle(tmp_path / "evil.bin"), GRID, 8)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], r"needs method\.tokenizer\.weights"),
        (["method.tokenizer.weights=/nowhere"], r"weights='/nowhere' is neither a file nor a folder"),
        (["method.tokenizer.name=random_projection", "method.tokenizer.weights=/x"], "set both or none"),
        (["method.tokenizer.name=random_projection", "method.tokenizer.sha256=abc"], r"sha256=abc: its digest is"),
        (["method.tokenizer.codez=3"], "did you mean codes"),
        (["method.tokenizer.codes=1"], r"method\.tokenizer\.codes=1"),
    ],
)
def test_bad_keys_are_refused_before_anything_starts(overrides: list[str], says: str):
    with pytest.raises(ValueError, match=says):
        load("beit_vitb16_224_300e", ["data.shards=/nowhere", *overrides])
