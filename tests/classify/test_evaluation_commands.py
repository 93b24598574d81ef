"""Tests that the evaluation commands give the same results on two ranks as in one process."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import commands_in_turn
from helpers.labeled_images import run_command, run_in_process, write_classes, write_classifier
from safetensors.torch import save_file

from data.eval_loader import EvalLoader
from data.image_folder import load_samples
from data.pack import pack
from data.sources import list_source
from downstream import embed
from downstream.checkpoints.weights import load_encoder
from downstream.classify import predict
from downstream.classify.evaluate import evaluate
from downstream.classify.robustness.datasets import imagenet
from downstream.classify.robustness.evaluator import Evaluator, prepare
from downstream.classify.trained_classifier import load_classifier
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.models.vit import ARCHS, Arch, ViT
from pretrain.probe.measure import probe
from pretrain.probe.settings import ProbeSettings
from pretrain.trainer.launch import World

CPU = torch.device("cpu")
NAMES = [f"c{number}" for number in range(7)]


@pytest.fixture(autouse=True)
def _real_vit_tiny(monkeypatch: pytest.MonkeyPatch):
    """Restore the real ViT-Ti, which the ranks use because they are separate processes."""
    monkeypatch.setitem(ARCHS, "vit_tiny", Arch(192, 12, 3))


@pytest.mark.slow
def test_commands_on_two_ranks_match_one_process(tmp_path: Path):
    """Reads shards and folders, with batch sizes of 4 and 64 that two ranks do not fill."""
    train = write_classes(tmp_path / "train", NAMES, 5, bad=1)
    val = write_classes(tmp_path / "val", NAMES, 3, bad=2, first=100)
    pack(list_source(train), tmp_path / "shards", samples_per_shard=13, bad="skip")
    adversarial = write_classes(tmp_path / "imagenet-a", list(imagenet("a")), 1, bad=1)
    seven = write_classifier(tmp_path / "seven.safetensors", 7)
    thousand = write_classifier(tmp_path / "thousand.safetensors", 1000)
    torch.manual_seed(0)
    encoder = ViT("vit_tiny", 16, (2, 2))
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors", EncoderSpec.of(encoder).to_metadata())

    small, large = ["--batch-size", "4", "--num-workers", "1"], ["--batch-size", "64", "--num-workers", "0"]
    package, probe_options = "downstream.classify", ["--train", tmp_path / "shards", "--val", val, "--k", 3]
    settings = ProbeSettings(k=3, attentive_steps=20, finetune_epochs=3, max_images=20, pool="class_mean")
    probe_options += ["--attentive-steps", 20, "--finetune-epochs", 3, "--max-images", 20, "--pool", "class_mean"]
    commands = [
        [f"{package}.evaluate", seven, "--data", val, *small],
        [f"{package}.probe", tmp_path / "encoder.safetensors", *probe_options, *small],
        [f"{package}.robustness", thousand, "--on", f"a={adversarial}", *large],
        ["downstream.embed", tmp_path / "encoder.safetensors", val, tmp_path / "features.npy", *small],
        [f"{package}.predict", seven, val, "--out", tmp_path / "predictions.csv", *small],
    ]
    arguments = json.dumps([[str(argument) for argument in command] for command in commands])
    code, out, err = run_command(commands_in_turn.__file__, arguments, ranks=2)
    assert code == 0, err
    accuracy, *_, judge, probed, table, robust, embedded, predicted = out.splitlines()

    assert "2 of 21 images cannot be decoded and count as wrong: c0/000, c1/001" in err
    trained = load_classifier(seven, CPU)
    one_rank = {"rank": 0, "world_size": 1, "num_workers": 0, "device": CPU}
    predictions, counts = evaluate(trained.predict, load_samples(val), size=(32, 32), batch=9, **one_rank)
    assert json.loads(accuracy) == pytest.approx({**predictions.summary(), **counts})

    encoder, _ = load_encoder(tmp_path / "encoder.safetensors")
    sets = [EvalLoader(load_samples(path), size=(32, 32), batch=9) for path in (tmp_path / "shards", val)]
    expected = probe(encoder, *sets, settings, device=CPU)
    assert json.loads(probed) == pytest.approx(expected)
    assert judge.startswith("compare encoders by none of these: the fine-tuning had 3 steps on 20 images")
    assert 1 / 7 < expected["knn_top1"] < 1
    assert 1 / 7 < expected["attentive_top1"] < 1
    assert 1 / 7 < expected["finetune_top1"] < 1

    assert "a            top1" in table
    assert "200 images, 1 undecodable" in table
    trained = load_classifier(thousand, CPU)
    alone = Evaluator(trained.predict, (32, 32), batch=50, workers=0, world=World(0, 1, 0), device=CPU)
    assert json.loads(robust) == {"a": prepare("a", {"a": str(adversarial)})(alone)}

    run_in_process(embed, tmp_path / "encoder.safetensors", val, tmp_path / "alone.npy")
    assert json.loads(embedded)["shape"] == [21, 192]
    np.testing.assert_allclose(
        *(np.load(tmp_path / f"{name}.npy") for name in ("features", "alone")), rtol=1e-4, atol=1e-5
    )
    assert (tmp_path / "features.csv").read_bytes() == (tmp_path / "alone.csv").read_bytes()
    run_in_process(predict, seven, val, "--out", tmp_path / "alone.csv")
    assert json.loads(predicted)["skipped"] == 2
    assert (tmp_path / "predictions.csv").read_text()[:200] == (tmp_path / "alone.csv").read_text()[:200]


def test_user_error_is_printed_without_a_traceback(tmp_path: Path):
    write_classes(tmp_path / "val", ["x"], 1)
    missing = tmp_path / "none.safetensors"
    code, _, err = run_command("-m", "downstream.classify.evaluate", missing, "--data", tmp_path / "val")
    assert code == 1
    assert f"error: no checkpoint {missing}" in err
    assert "Traceback" not in err
