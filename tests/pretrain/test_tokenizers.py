"""Tests of the tokenizers: random projection, DALL-E's encoder compared with transformers, and rejected weights."""

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
from pretrain.methods.targets.tokenizers import Tokenizer
from pretrain.methods.targets.tokens import TokensConfig, TokenTarget
from pretrain.trainer.checkpoint import TrainState, check_continues

GRID, PATCH_SIZE = (3, 5), 4
KNOWN_CODES = [1380, 851, 8092, 709, 2484, 1120, 4303, 879, 4989, 3218, 163, 3262, 6417, 7298, 3911]


def random_images(seed: int = 0, side: int = PATCH_SIZE) -> torch.Tensor:
    shape = (3, GRID[0] * side, GRID[1] * side, 3)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def random_projection(vocab_size: int = 8192, seed: int = 0) -> Tokenizer:
    return TokenTarget(TokensConfig(vocab_size=vocab_size, seed=seed), GRID, PATCH_SIZE).tokenizer


def test_random_projection_code_depends_only_on_its_patch():
    tokenizer = random_projection(vocab_size=50)
    images = random_images()
    before = tokenizer(images).view(3, *GRID)
    images[:, PATCH_SIZE : 2 * PATCH_SIZE, 2 * PATCH_SIZE : 3 * PATCH_SIZE] = random_images(1)[
        :, :PATCH_SIZE, :PATCH_SIZE
    ]
    changed = (tokenizer(images).view(3, *GRID) != before).any(0).nonzero().tolist()
    assert changed == [[1, 2]]


def test_random_projection_depends_only_on_its_seed():
    images = random_images()
    torch.manual_seed(1)
    first = random_projection(seed=3)(images)
    torch.manual_seed(2)
    assert torch.equal(random_projection(seed=3)(images), first)
    assert not torch.equal(random_projection(seed=4)(images), first)
    assert first.dtype == torch.int64
    assert first.tolist()[0] == KNOWN_CODES, "these never change: runs are continued with them"


def test_random_projection_uses_its_vocabulary():
    images = torch.randint(0, 256, (40, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes = TokenTarget(TokensConfig(vocab_size=16), (8, 8), 4).tokenizer(images)
    counts = codes.flatten().bincount(minlength=16)
    assert counts.min() > 0.02 * counts.sum()


def test_codes_do_not_depend_on_the_batch_or_on_autocast():
    tokenizer = random_projection(vocab_size=50)
    images = random_images().repeat(15, 1, 1, 1)  # more than one internal chunk
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = tokenizer(images)
    assert torch.equal(codes, torch.cat([tokenizer(image[None]) for image in images]))


@pytest.fixture(scope="module")
def codebook() -> Any:
    """A small FlavaImageCodebook with random weights and output biases that make it use many codes."""
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
    """The folder in which transformers saved the codebook."""
    codebook.save_pretrained(tmp_path / "codebook")
    return tmp_path / "codebook"


def dalle(weights: Path, patch_size: int = 8, vocab_size: int = 24, **keys: Any) -> Tokenizer:
    config = TokensConfig(tokenizer="dalle", vocab_size=vocab_size, weights=str(weights), **keys)
    return TokenTarget(config, GRID, patch_size).tokenizer


def dalle_sha256(weights: Path, sha256: str | None = None) -> str | None:
    return TokensConfig(tokenizer="dalle", weights=str(weights), sha256=sha256).sha256


@pytest.mark.parametrize("side", [8, 16, 14])
def test_dalle_codes_equal_those_of_transformers(codebook: Any, weights: Path, side: int):
    images = random_images(side=side)
    pixels = images.permute(0, 3, 1, 2) / 255
    if side != 8:
        pixels = F.interpolate(pixels, (GRID[0] * 8, GRID[1] * 8), mode="bicubic", antialias=True).clamp(0, 1)
    expected = codebook.get_codebook_indices(pixels * 0.8 + 0.1)
    codes = dalle(weights, side)(images)
    assert torch.equal(codes, expected.flatten(1))
    assert len(codes.unique()) > 3


def test_dalle_pixels_equal_those_of_the_transformers_processor(weights: Path):
    """Without resizing, the pixels equal those of the FLAVA processor."""
    processor = pytest.importorskip("transformers").FlavaImageProcessor()
    image = random_images(side=8)[:1]
    mapped = processor.map_pixels(image.permute(0, 3, 1, 2) / 255)
    torch.testing.assert_close(dalle(weights)._pixels(image), mapped)


def test_dalle_reads_safetensors_and_torch_files_and_is_frozen(codebook: Any, weights: Path, tmp_path: Path):
    images = random_images(side=8)
    torch.save(codebook.state_dict(), tmp_path / "pytorch_model.bin")
    state = torch.random.get_rng_state()
    paths = (weights, weights / "model.safetensors", tmp_path / "pytorch_model.bin", tmp_path)
    tokenizers = [dalle(path) for path in paths]
    assert torch.equal(torch.random.get_rng_state(), state), "the run's random numbers are untouched"
    assert all(torch.equal(tokenizer(images), tokenizers[0](images)) for tokenizer in tokenizers)
    assert not any(p.requires_grad for p in tokenizers[0].model.parameters())
    assert not tokenizers[0].model.training


def test_dalle_sha256_is_that_of_the_weights_file(weights: Path, tmp_path: Path):
    true = hashlib.sha256((weights / "model.safetensors").read_bytes()).hexdigest()
    assert dalle_sha256(weights) == dalle_sha256(weights, true.upper()) == true
    with pytest.raises(ValueError, match=r"not target\.sha256=00"):
        dalle_sha256(weights, "00")


def test_resume_accepts_a_moved_file_but_not_another(weights: Path, tmp_path: Path):
    moved, other = shutil.copytree(weights, tmp_path / "moved"), shutil.copytree(weights, tmp_path / "other")
    save_file({"x": torch.zeros(1)}, other / "model.safetensors")
    keys = ["data.shards=/nowhere", "target.vocab_size=24"]
    first, same, different = (
        TrainState(resume_signature=load("beit_vitb16_224_300e", [*keys, f"target.weights={path}"]).resume_signature())
        for path in (weights, moved, other)
    )
    check_continues(first, same)
    with pytest.raises(ValueError, match=r"target\.sha256 was"):
        check_continues(first, different)


def test_wrong_weights_are_rejected(weights: Path, codebook: Any, tmp_path: Path):
    state = codebook.state_dict()
    save_file({"encoder.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    save_file({**state, "more": torch.zeros(1)}, tmp_path / "more.safetensors")
    save_file({**state, "blocks.input.weight": torch.zeros(8, 3, 5, 5)}, tmp_path / "shape.safetensors")
    (tmp_path / "text.safetensors").write_text("not weights")
    (tmp_path / "text.bin").write_text("not weights")
    (tmp_path / "empty.bin").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.bin")
    for name in ("other.safetensors", "more.safetensors", "shape.safetensors"):
        with pytest.raises(ValueError, match="does not contain weights of FlavaImageCodebook"):
            dalle(tmp_path / name)
    for name in ("text.safetensors", "text.bin", "empty.bin", "list.bin"):
        with pytest.raises(ValueError, match=r"is not a file of plain weights|is not a dictionary of tensors"):
            dalle(tmp_path / name)
    with pytest.raises(ValueError, match=r"set target\.vocab_size=24"):
        dalle(weights, vocab_size=8192)


class Malicious:
    """Creates a folder if it is unpickled with `pickle.load`."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_malicious_pickle_is_rejected_without_running(tmp_path: Path):
    torch.save({"blocks.input.bias": Malicious(tmp_path / "ran")}, tmp_path / "evil.bin")
    with pytest.raises(ValueError, match="is not a file of plain weights"):
        dalle(tmp_path / "evil.bin")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"needs target\.weights"),
        (["target.weights=/nowhere"], r"weights='/nowhere' is neither a file nor a folder"),
        (["target.tokenizer=random_projection", "target.weights=/x"], "set both or neither"),
        (["target.tokenizer=random_projection", "target.sha256=abc"], r"has the SHA-256 \w+, not target\.sha256=abc"),
        (["target.vocab_sizes=3"], "did you mean target.vocab_size"),
        (["target.vocab_size=1"], r"target\.vocab_size=1"),
    ],
)
def test_invalid_keys_are_rejected_when_loading_the_recipe(overrides: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        load("beit_vitb16_224_300e", ["data.shards=/nowhere", *overrides])
