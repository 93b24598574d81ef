"""A run that is killed, stopped or damaged ends bitwise identical to one that was not."""

import functools
import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import state_checks
from helpers.rank_checks import assert_same_bits, assert_same_run, newest, wait_for
from safetensors.torch import load_file

from pretrain.trainer.metrics import read_metrics

pytestmark = pytest.mark.engine
STAGES = ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
TWENTY_STEPS = "train.epochs=2"  # with a checkpoint every five steps
ACCUMULATED = (TWENTY_STEPS, "train.ds_config=zero1", "train.gradient_accumulation_steps=2")
BEFORE, LAST = "step_00000015", "step_00000020"


def settings(stage: str) -> tuple[str, ...]:
    precision = "bf16" if stage in ("zero1", "zero3") else "fp32"
    return TWENTY_STEPS, f"train.ds_config={stage}", f"train.precision={precision}"


@pytest.fixture(scope="module")
def whole(
    write_recipe: Callable[..., Path], start_once: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """whole('key=value', ...) -> the folder of a complete run. All tests share it, and write only to copies."""

    @functools.cache
    def run(*overrides: str) -> Path:
        recipe = write_recipe(tmp_path_factory.mktemp("whole"), "whole")
        start_once(recipe, *overrides).finish()
        return recipe.parent / "runs" / "whole"

    return run


@pytest.mark.parametrize("stage", STAGES)
def test_killed_run_resumes_bitwise_identically(
    stage: str, whole: Callable[..., Path], recipe: Path, start: Callable[..., Any], tmp_path: Path
):
    unbroken, broken = whole(*settings(stage)), tmp_path / "runs" / "broken"
    killed = start(recipe, *settings(stage), "name=broken")
    wait_for(broken / "checkpoints" / "step_00000005" / "manifest.json", killed)
    killed.kill()
    assert not (broken / "encoder.safetensors").exists(), "the run ended before it was killed"
    last = newest(broken)
    assert last <= BEFORE
    assert f"resumes from {last}" in start(recipe, *settings(stage), "name=broken").finish()
    assert_same_run(unbroken, broken)


def test_changed_numerics_are_rejected_unless_exact_resume_is_off(
    whole: Callable[..., Path], recipe: Path, start: Callable[..., Any], tmp_path: Path
):
    moved = tmp_path / "runs" / "moved"
    shutil.copytree(whole(*settings("zero1")), moved, ignore=shutil.ignore_patterns(LAST))
    manifest = moved / "checkpoints" / BEFORE / "manifest.json"
    content = json.loads(manifest.read_text())
    content["state"]["machine"]["torch"] = "2.9.0"
    del content["crc32"]  # older manifests have none
    manifest.write_text(json.dumps(content))
    again = (recipe, *settings("zero1"), "name=moved", "model.residual=bf16")
    (first, _) = (processes := start(*again)).outputs()
    assert all(rank.returncode == 1 for rank in processes.all)
    assert "residual was 'fp32' and is 'bf16'" in first
    assert "checkpoint.exact_resume=false" in first
    continued = start(*again, "checkpoint.exact_resume=false").finish()
    assert f"resumes from {BEFORE}" in continued
    assert "continues with different bits: residual was" in continued
    assert "may continue with different bits: torch was '2.9.0'" in continued
    assert "photographs whose short side was over 90 pixels were shrunk to it, JPEG 90" in continued
    recorded = json.loads((moved / "checkpoints" / LAST / "manifest.json").read_text())["state"]["numerics"]
    kernels = {"compile": False, "cuda_graphs": False, "attention": "sdpa", "residual": "bf16", "sdpa": "cpu"}
    assert recorded == kernels | {"masks": "drawn from raw words", "decoder": "torchvision's, resized by torch"}


@pytest.mark.parametrize(("stage", "ranks", "repeats"), [("zero0", 1, 2), ("zero1", 4, 1)])
def test_run_resumes_on_another_number_of_ranks(
    stage: str,
    ranks: int,
    repeats: int,
    whole: Callable[..., Path],
    recipe: Path,
    start: Callable[..., Any],
    tmp_path: Path,
):
    keys = [] if repeats == 1 else [f"data.repeats={repeats}"]
    unmoved = whole(*(ACCUMULATED if stage == "zero1" else settings(stage)), *keys)
    moved = tmp_path / "runs" / "moved"
    shutil.copytree(unmoved, moved, ignore=shutil.ignore_patterns(LAST))
    again = (recipe, TWENTY_STEPS, f"train.ds_config={stage}", *keys, "name=moved")
    output = start(*again, processes=ranks).finish()
    assert f"resumes from {BEFORE}" in output
    assert ("2 epochs in 1 pass of 2 crops of each image, 20 steps" in output) == (repeats == 2)
    one, other = (read_metrics(run / "metrics.jsonl") for run in (unmoved, moved))
    assert [row["loss"] for row in other] == pytest.approx([row["loss"] for row in one], rel=1e-6)
    assert [row["grad_norm"] for row in other] == pytest.approx([row["grad_norm"] for row in one], rel=1e-4)
    if stage == "zero1":
        assert f"resumes from {LAST}" in start(*again, processes=ranks).finish()


def test_default_engine_is_stage_0_or_that_of_the_checkpoint(
    whole: Callable[..., Path], recipe: Path, start: Callable[..., Any], tmp_path: Path
):
    """From two ranks to one, without setting the engine again."""

    def engine(run: Path) -> tuple[int, str]:
        settings = json.loads((run / "environment.json").read_text())["deepspeed"]
        return settings["zero_stage"], settings["basic_optimizer"]

    of_two, run = whole(*settings("zero1")), tmp_path / "runs" / "tiny"
    shutil.copytree(of_two, run, ignore=shutil.ignore_patterns(LAST))
    output = start(recipe, TWENTY_STEPS, "train.precision=bf16", processes=1).finish()
    assert f"resumes from {BEFORE}" in output
    assert '"zero_stage": 1' in output
    assert engine(run) == (1, "AdamW")
    start(recipe, "name=new").finish()
    assert engine(tmp_path / "runs" / "new") == (0, "GuardedAdamW")


def test_signal_saves_at_a_step_and_the_same_command_continues(
    whole: Callable[..., Path], recipe: Path, start: Callable[..., Any], tmp_path: Path
):
    unstopped = whole(*ACCUMULATED)
    run = start(recipe, "name=stopped", *ACCUMULATED, "checkpoint.every_steps=1000")
    wait_for(tmp_path / "runs" / "stopped" / "metrics.jsonl", run)
    while not read_metrics(tmp_path / "runs" / "stopped" / "metrics.jsonl"):
        time.sleep(0.002)
    run.all[1].send_signal(signal.SIGUSR1)  # one rank is enough: all ranks agree to stop
    output = run.finish()
    assert "SIGUSR1: saved and stopped after step" in output
    (so_far,) = (tmp_path / "runs" / "stopped").glob("encoder_step_*.safetensors")
    assert so_far.stem == f"encoder_{newest(tmp_path / 'runs' / 'stopped')}"
    assert load_file(so_far).keys() == load_file(unstopped / "encoder.safetensors").keys()
    for name in ("loss.png", "reconstructions.png", so_far.name):
        assert (tmp_path / "runs" / "stopped" / name).exists()
        assert f"{tmp_path / 'runs' / 'stopped' / name} " in output
    for rank in (0, 1):
        log = (tmp_path / "runs" / "stopped" / "logs" / f"rank{rank}.log").read_text()
        assert "SIGUSR1: saved and stopped after step" in log
    start(recipe, "name=stopped", *ACCUMULATED, "checkpoint.every_steps=1000").finish()
    assert not so_far.exists(), "the encoder at the end is there"
    assert_same_run(unstopped, tmp_path / "runs" / "stopped")


def test_damaged_checkpoint_is_reported_and_the_previous_one_used(
    whole: Callable[..., Path], recipe: Path, start: Callable[..., Any], tmp_path: Path
):
    folder = tmp_path / "runs" / "tiny"
    shutil.copytree(whole(*ACCUMULATED), folder)
    before = load_file(folder / "encoder.safetensors")
    (folder / "encoder.safetensors").unlink()
    victim = next((folder / "checkpoints" / LAST).glob("*optim_states.pt"))
    damaged = bytearray(victim.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    victim.write_bytes(damaged)
    (folder / "checkpoints" / "unfinished" / "step_00000025").mkdir(parents=True)  # a save that was killed
    output = start(recipe, *ACCUMULATED).finish()
    assert f"{LAST} is damaged and skipped: {victim.name} differs from what was written" in output
    assert f"resumes from {BEFORE}" in output
    assert_same_bits(before, load_file(folder / "encoder.safetensors"))

    for name in (BEFORE, LAST):
        (folder / "checkpoints" / name / "manifest.json").unlink()
    run = start(recipe, *ACCUMULATED)
    assert "no intact checkpoint" in "".join(run.outputs())
    assert all(p.returncode == 1 for p in run.all)


def test_complete_run_that_is_started_again_draws_its_figures(
    whole: Callable[..., Path], recipe: Path, start: Callable[..., Any], tmp_path: Path
):
    folder = tmp_path / "runs" / "tiny"
    shutil.copytree(whole(*ACCUMULATED), folder)
    for name in ("loss.png", "reconstructions.png"):
        (folder / name).unlink()
    assert f"resumes from {LAST}" in start(recipe, *ACCUMULATED).finish()
    assert (folder / "loss.png").exists()
    assert (folder / "reconstructions.png").exists()
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == list(range(1, 21))


def test_resume_of_another_training_is_rejected_with_the_differences(
    whole: Callable[..., Path], recipe: Path, start: Callable[..., Any], tmp_path: Path
):
    shutil.copytree(whole(*ACCUMULATED), tmp_path / "runs" / "tiny")
    changed = ["optim.base_lr=0.5", "method.num_windows=3", "target.norm_pix=false", "train.precision=bf16", "seed=1"]
    run = start(recipe, *changed)
    output = "".join(run.outputs())
    assert "method.num_windows was 2 and is 3" in output
    assert "optim.base_lr was 0.01 and is 0.5" in output
    assert "target.norm_pix was True and is False" in output
    assert "train.precision was 'fp32' and is 'bf16'" in output
    assert "train.epochs was 2 and is 1" in output
    assert "seed was 0 and is 1" in output
    assert f"start.run={tmp_path / 'runs' / 'tiny'} and another name=" in output
    assert all(p.returncode == 1 for p in run.all)


def test_keys_that_do_not_affect_the_weights_may_change(
    whole: Callable[..., Path], recipe: Path, start: Callable[..., Any], tmp_path: Path
):
    shutil.copytree(whole(*ACCUMULATED), tmp_path / "runs" / "tiny", ignore=shutil.ignore_patterns(LAST))
    changed = ["model.grad_checkpointing=true", "data.num_workers=0", "data.max_skipped_images=3"]
    changed += ["train.gradient_accumulation_steps=1", "train.max_nonfinite_steps=3", "checkpoint.keep_last=1"]
    assert f"resumes from {BEFORE}" in start(recipe, *ACCUMULATED, *changed, "log.every_steps=5").finish()


def test_new_run_starts_with_the_weights_and_moments_of_another(
    whole: Callable[..., Path], recipe: Path, start: Callable[..., Any], tmp_path: Path
):
    """With another image size, engine and number of ranks. It then resumes by itself, even if the other run is gone."""
    first = tmp_path / "first"
    shutil.copytree(whole(*ACCUMULATED), first)
    keys = (f"start.run={first}", "start.optimizer=true", "data.image_size=[80,64]", "train.ds_config=zero3")
    output = start(recipe, *keys, processes=1).finish()
    assert f"starts from {first / 'checkpoints' / LAST} (online weights)" in output
    assert "predictor.head: taken" in output
    assert "the optimizer starts with the moments of" in output
    assert "starts at step 0" in output
    run = tmp_path / "runs" / "tiny"
    before, after = (read_metrics(folder / "metrics.jsonl") for folder in (first, run))
    assert [row["step"] for row in after] == list(range(1, 11))
    assert after[0]["loss"] < (before[0]["loss"] + before[-1]["loss"]) / 2
    recorded = json.loads((run / "environment.json").read_text())["start"]
    assert (
        recorded == json.loads((run / "checkpoints" / "step_00000010" / "manifest.json").read_text())["state"]["start"]
    )
    assert recorded["path"] == str(first / "checkpoints" / LAST)
    shutil.rmtree(first)
    again = start(recipe, *keys, processes=1).finish()
    assert "resumes from step_00000010" in again
    assert "the start is not loaded again" in again
    assert json.loads((run / "environment.json").read_text())["start"] == recorded


def test_state_moves_between_all_engines(recipe: Path, start: Callable[..., Any], tmp_path: Path):
    output = start(recipe, tmp_path, script=state_checks.__file__).finish()
    assert output.count(": the same") == len(state_checks.PAIRS)


def test_manifest_has_the_state_of_the_run(whole: Callable[..., Path]):
    manifest = json.loads((whole(*ACCUMULATED) / "checkpoints" / LAST / "manifest.json").read_text())
    assert {k: manifest["state"][k] for k in ("step", "updates", "samples", "world_size", "zero_stage")} == {
        "step": 20,
        "updates": 20,
        "samples": 160,
        "world_size": 2,
        "zero_stage": 1,
    }
