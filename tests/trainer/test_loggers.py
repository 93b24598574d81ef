"""Metrics reach every logger: a custom one, JSON lines, TensorBoard, and printed lines or a progress bar."""

import itertools
import json
import logging
import math
import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers.waiting import SECONDS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from data.batch import Batch
from data.loader import Loader
from data.workers import in_workers
from pretrain.trainer import phases, signals
from pretrain.trainer.checkpoint_layout import TrainState
from pretrain.trainer.config import CheckpointConfig, LogConfig, OptimConfig, RunConfig, TrainConfig
from pretrain.trainer.data_config import DataConfig
from pretrain.trainer.ema import NoEMA
from pretrain.trainer.launch import World
from pretrain.trainer.loggers import JsonLines, Loggers, MetricLogger, ProgressBar, TensorBoard, Values, build_loggers
from pretrain.trainer.metrics import read_metrics
from pretrain.trainer.phases import report_if_slow
from pretrain.trainer.run_folder import RunFolder

METRICS = {"step": 3, "epoch": 0.75, "loss": 0.5, "lr": 1e-3, "images_per_s": 80.0, "step_s": 0.1, "data_wait": 0.25}


class Recorder(MetricLogger):
    """A minimal custom logger."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def log_metrics(self, values: Values) -> None:
        self.calls.append(("metrics", values))

    def log_evaluation(self, values: Values) -> None:
        self.calls.append(("evaluation", values))


class FullRecorder(Recorder):
    def step(self) -> None:
        self.calls.append(("step", None))

    def close(self) -> None:
        self.calls.append(("close", None))


class StubEngine:
    """An engine without DeepSpeed: plain SGD on a single weight."""

    def __init__(self) -> None:
        self.module = nn.Linear(1, 1, bias=False)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1.0)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        return {"loss": self.module(images.float().mean().view(1)).square().sum()}

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()

    def was_step_applied(self) -> bool:
        return True

    def get_global_grad_norm(self) -> float:
        return 1.5


class StubLoader:
    steps_per_epoch = 4
    sizes = ((0, (16, 16)),)

    def batches(self, start_step: int, end_step: int) -> Iterator[list[Batch]]:
        images = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
        for _ in range(start_step, end_step):
            batch = Batch(images, {}, None, torch.arange(2), ("a", "b"), ())
            with patch.object(Batch, "model_inputs", lambda self: {}):
                yield [batch]


def stub_run(root: Path, measure: Any = None, state: TrainState | None = None) -> Any:
    """Two epochs of four steps, logged every second step and evaluated after each epoch."""
    from pretrain.trainer.loop import Evaluation, Run  # imports DeepSpeed

    config = RunConfig(
        name="stub",
        data=DataConfig(shards="unused", image_size=16),
        optim=OptimConfig(warmup_epochs=0),
        train=TrainConfig(epochs=2, global_batch_size=2),
        checkpoint=CheckpointConfig(every_steps=100),
        log=LogConfig(every_steps=2),
    )
    root.mkdir(exist_ok=True)
    checkpoints: Any = SimpleNamespace(begin=lambda engine, ema, state: SimpleNamespace(done=True, wait=lambda: None))
    evaluation = Evaluation(1, measure) if measure else None
    device, world = torch.device("cpu"), World(0, 1, 0)
    loader: Any = StubLoader()
    parts = (loader, StubEngine(), NoEMA(), checkpoints, state or TrainState(), evaluation)
    return Run(config, world, device, RunFolder(root), *parts)


def test_custom_logger_sees_a_whole_training(process_group: None, tmp_path: Path):
    from pretrain.trainer.loop import train

    recorder, bare = FullRecorder(), Recorder()
    run = stub_run(tmp_path / "run", measure=lambda engine, ema: {"top1": 0.5})
    with patch("pretrain.trainer.loop.build_loggers", lambda *_: Loggers([recorder, bare])):
        train(run)
    logged, evaluated = "metrics", "evaluation"
    two_steps = ["step", "step", logged]
    assert [name for name, _ in recorder.calls] == [*(2 * two_steps), evaluated, *(2 * two_steps), evaluated, "close"]
    assert [call for call in recorder.calls if call[0] in (logged, evaluated)] == bare.calls
    metrics = [values for name, values in bare.calls if name == logged]
    assert [(values["step"], values["epoch"]) for values in metrics] == [(2, 0.5), (4, 1.0), (6, 1.5), (8, 2.0)]
    assert all({*METRICS, "grad_norm", "skipped_steps", "skipped_images"} <= values.keys() for values in metrics)
    assert [values for name, values in bare.calls if name == evaluated] == [
        {"step": 4, "epoch": 1.0, "top1": 0.5},
        {"step": 8, "epoch": 2.0, "top1": 0.5},
    ]


def test_logged_speeds_never_mix_two_image_sizes(process_group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Metrics are also logged at the last step of each size, and always with the size."""
    from pretrain.trainer.loop import train

    monkeypatch.setattr(StubLoader, "sizes", [(0, (8, 8)), (3, (8, 16)), (6, (16, 16))])
    monkeypatch.setattr(StubLoader, "size_at", Loader.size_at, raising=False)
    bare = Recorder()
    with patch("pretrain.trainer.loop.build_loggers", lambda *_: Loggers([bare])):
        train(stub_run(tmp_path / "run"))
    metrics = [(values["step"], values["image_size"]) for name, values in bare.calls if name == "metrics"]
    assert metrics == [(2, 8), (3, 8), (4, "8x16"), (6, "8x16"), (8, 16)]


def test_loggers_are_closed_when_training_fails(process_group: None, tmp_path: Path):
    from pretrain.trainer.loop import train

    def fail(engine: Any, ema: NoEMA) -> dict[str, float]:
        raise RuntimeError("a bug")

    recorder = FullRecorder()
    with (
        patch("pretrain.trainer.loop.build_loggers", lambda *_: Loggers([recorder])),
        pytest.raises(RuntimeError, match="a bug"),
    ):
        train(stub_run(tmp_path / "run", measure=fail))
    assert recorder.calls[-1] == ("close", None)


def test_main_rank_has_all_loggers_and_other_ranks_none(tmp_path: Path):
    config = RunConfig.model_validate({"name": "tiny", "data": {"shards": "unused"}})
    loggers = build_loggers(config, RunFolder(tmp_path), 0, 10, is_main=True)
    assert [type(logger) for logger in loggers.loggers] == [JsonLines, TensorBoard, ProgressBar]
    loggers.close()
    silent = tmp_path / "other"
    others = build_loggers(config, RunFolder(silent), 0, 10, is_main=False)
    others.step()
    others.log_metrics(METRICS)
    others.log_evaluation({"step": 3, "epoch": 0.75})
    others.close()
    assert not silent.exists()


def test_json_lines_write_null_for_nan_and_drop_steps_to_be_repeated(tmp_path: Path):
    folder = RunFolder(tmp_path)
    logger = JsonLines(folder, start=0)
    for step in range(1, 6):
        logger.log_metrics({"step": step, "loss": math.nan if step == 2 else 0.5})
    logger.log_evaluation({"step": 4, "top1": math.inf})
    with folder.metrics.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    assert json.loads(folder.metrics.read_text().splitlines()[1]) == {"step": 2, "loss": None}
    assert read_metrics(folder.evaluation) == [{"step": 4, "top1": None}]
    folder.nonfinite.write_text('{"step": 2, "samples": ["a"]}\n{"step": 4, "samples": ["b"]}\n')
    JsonLines(folder, start=3)
    assert [record["step"] for record in read_metrics(folder.metrics)] == [1, 2, 3]
    assert read_metrics(folder.evaluation) == []
    assert [record["step"] for record in read_metrics(folder.nonfinite)] == [2]


def test_tensorboard_has_all_finite_values(tmp_path: Path):
    logger = TensorBoard(RunFolder(tmp_path), start=0)
    logger.log_metrics({"step": 1, "loss": 0.5, "grad_norm": math.nan})
    logger.log_evaluation({"step": 1, "top1": 0.75})
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "top1"]
    (loss,) = events.Scalars("loss")
    assert (loss.step, loss.value) == (1, 0.5)


def test_without_a_terminal_first_and_logged_steps_are_printed(capsys: pytest.CaptureFixture[str]):
    """After a resume at step 2. The first step includes compilation, so the estimate leaves it out."""
    with patch("pretrain.trainer.loggers.time.monotonic", side_effect=itertools.count(0.0, 4.0)):
        bar = ProgressBar("tiny", start=2, total=10)
        bar.step()
        bar.log_metrics(METRICS)
        bar.step()
        bar.step()
        bar.log_evaluation({"step": 5, "epoch": 0.75, "top1": 0.5})
        bar.close()
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "step 3/10  the first step took 4.0 s",
        "step 3/10  loss 0.5000  lr 1.00e-03  80.0 img/s  wait 25%  00:00 left",
        "step 5/10  8.00 s a step, about 00:40 left",
    ]
    assert err == "step 5: top1 0.5\n"


def test_without_a_terminal_steps_are_printed_even_if_logged_rarely(capsys: pytest.CaptureFixture[str]):
    """Steps of 25 seconds each, none of them logged."""
    with patch("pretrain.trainer.loggers.time.monotonic", side_effect=itertools.count(0.0, 12.5)):
        bar = ProgressBar("tiny", start=0, total=100)
        for _ in range(9):
            bar.step()
    steps = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().out.splitlines()]
    assert steps[:2] == [1, 3]
    assert all(later - earlier <= 6 for earlier, later in itertools.pairwise(steps))
    assert steps[-1] >= 7


def test_only_slow_phases_are_reported(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(phases, "SLOW", 0.01)
    with report_if_slow("building the index"):
        deadline = time.monotonic() + SECONDS
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.005)
    assert caplog.messages[0] == "building the index: 00:00 so far"
    caplog.clear()
    monkeypatch.setattr(phases, "SLOW", 60.0)
    with report_if_slow("quick"):
        pass
    assert caplog.messages == []


def wait_forever(request: int) -> None:
    time.sleep(1000)


def test_signal_stops_a_run_whose_data_never_arrives(
    process_group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from pretrain.trainer.loop import train

    saved: list[int] = []
    run = stub_run(tmp_path / "run", state=TrainState(step=4))
    run.checkpoints.begin = lambda engine, ema, state: SimpleNamespace(wait=lambda: saved.append(state.step))
    one = itertools.islice(run.loader.batches(4, 8), 1)
    never = ([batch] for batch in in_workers(wait_forever, iter(range(99)), 1))
    run.loader.batches = lambda start, end: itertools.chain(one, never)
    monkeypatch.setattr(signals, "_received", [])
    threading.Timer(0.5, signals._received.append, [int(signal.SIGTERM)]).start()
    with pytest.raises(
        signals.Stopped, match="SIGTERM while waiting for data: saved and stopped after step 5 of 8"
    ) as stopped:
        train(run)
    assert stopped.value.lacks_data, "so that no images are drawn"
    assert saved == [5]
    assert not multiprocessing.active_children()
