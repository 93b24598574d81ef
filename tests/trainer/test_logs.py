"""Log messages on the console and in each rank's file, including the error or signal that ends a run."""

import io
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from downstream.dense.job import Job
from pretrain.trainer import main as entry
from pretrain.trainer.attempt import ATTEMPT
from pretrain.trainer.config import ModelConfig, RunConfig
from pretrain.trainer.launch import World
from pretrain.trainer.loggers import ProgressBar
from pretrain.trainer.logs import VERBOSE, log_to_console, log_to_file
from pretrain.trainer.nonfinite import Diverged
from pretrain.trainer.signals import Stopped

CONFIG = RunConfig(
    name="x", data={"shards": "unused"}, train={"global_batch_size": 64, "gradient_accumulation_steps": 4}
)
MAIN, OTHER = World(0, 2, 0), World(1, 2, 1)
OURS = logging.getLogger("pretrain.trainer.loop")
LIBRARY = logging.getLogger("library")


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    logging.captureWarnings(False)
    for handler in set(root.handlers) - set(before):
        root.removeHandler(handler)
        handler.close()


def log_everything() -> None:
    OURS.info("resumes from step_00000010")
    OURS.warning("checkpoint step_00000020 is damaged")
    OURS.error("error on rank")
    logging.getLogger("__main__").info("starts from a classifier")  # an entry point run as a script
    LIBRARY.info("chatter")
    LIBRARY.warning("deprecated")


def test_console_shows_the_main_rank_and_only_errors_of_others(capsys: pytest.CaptureFixture[str]):
    log_to_console(MAIN)
    log_everything()
    out, err = capsys.readouterr()
    assert out.splitlines() == ["resumes from step_00000010", "starts from a classifier"]
    assert err.splitlines() == ["checkpoint step_00000020 is damaged", "error on rank"]
    log_to_console(OTHER)
    log_everything()
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == ("", ["error on rank"])


def warn_as_a_library() -> None:
    LIBRARY.warning("deprecated")
    warnings.warn("it will change", FutureWarning, stacklevel=1)


@pytest.mark.parametrize("verbose", ["", "1"])
def test_library_messages_are_logged_but_printed_only_if_verbose(
    verbose: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv(VERBOSE, verbose)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        log_to_console(MAIN)
        log_to_file(tmp_path, MAIN)
        warn_as_a_library()
    console, file = "".join(capfd.readouterr()), (tmp_path / "rank0.log").read_text()
    assert ("deprecated" in console, "deprecated" in file) == (bool(verbose), True)
    assert ("it will change" in console, "it will change" in file) == (False, not verbose), "pytest takes the other"


def test_lost_rank_is_a_one_line_error(run_main: Callable[..., object], capsys: pytest.CaptureFixture[str]):
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1\nframes")
    assert run_main(lost, rank=1) == 1
    err = capsys.readouterr().err
    assert err.startswith("error on rank 1: another rank has ended: see its log, unless it was killed ([gloo")
    assert len(err.splitlines()) == 1


def test_own_error_about_a_connection_is_not_a_lost_rank(
    run_main: Callable[..., object], capsys: pytest.CaptureFixture[str]
):
    assert run_main(ValueError("hf://datasets/x cannot be read: [Errno 111] Connection refused"), rank=1) == 1
    assert capsys.readouterr().err == (
        "error on rank 1: hf://datasets/x cannot be read: [Errno 111] Connection refused\n"
    )


@pytest.mark.parametrize("world", [MAIN, OTHER])
def test_each_rank_has_a_file_with_all_messages(world: World, tmp_path: Path):
    (tmp_path / "logs").mkdir()  # the main rank creates it
    log_to_console(world)
    log_to_file(tmp_path / "logs", world)
    log_everything()
    log_to_file(tmp_path / "logs", world)  # a resumed run appends
    OURS.info("again")
    (path,) = (tmp_path / "logs").iterdir()
    assert path.name == f"rank{world.rank}.log"
    assert [line.split(" ", 2)[2] for line in path.read_text().splitlines()] == [
        "INFO pretrain.trainer.loop: resumes from step_00000010",
        "WARNING pretrain.trainer.loop: checkpoint step_00000020 is damaged",
        "ERROR pretrain.trainer.loop: error on rank",
        "INFO __main__: starts from a classifier",
        "WARNING library: deprecated",
        "INFO pretrain.trainer.loop: again",
    ]


def test_second_run_in_a_process_has_its_own_file(tmp_path: Path):
    log_to_console(MAIN)
    for name in ("first", "second"):
        log_to_file(tmp_path / name, MAIN)
        OURS.info(name)
        assert (tmp_path / name / "rank0.log").read_text().endswith(f": {name}\n")
    assert len((tmp_path / "first" / "rank0.log").read_text().splitlines()) == 1


def test_full_disk_does_not_break_logging(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    if not Path("/dev/full").exists():
        pytest.skip("this machine has no /dev/full")
    (tmp_path / "rank0.log").symlink_to("/dev/full")
    log_to_console(MAIN)
    log_to_file(tmp_path, MAIN)
    OURS.warning("the disk is full")
    assert capsys.readouterr().err == "the disk is full\n"


def test_logging_does_not_recreate_a_removed_folder(tmp_path: Path, capsys):
    """The main rank removes the folder of a run whose settings are rejected."""
    log_to_console(OTHER)
    log_to_file(tmp_path / "refused" / "logs", OTHER)
    OURS.error("error on rank 1: unknown key")
    assert capsys.readouterr().err == "error on rank 1: unknown key\n"
    assert not (tmp_path / "refused").exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_warning_does_not_break_the_progress_bar(monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    log_to_console(MAIN)
    bar = ProgressBar("tiny", start=0, total=10)
    bar.step()
    OURS.warning("checkpoint step_00000020 is damaged")
    bar.close()
    (line,) = (line for line in terminal.getvalue().splitlines() if "damaged" in line)
    assert line.split("\r")[-1] == "checkpoint step_00000020 is damaged", "the bar is cleared before it"
    assert "tiny" in terminal.getvalue().split("damaged\n")[1], "and drawn again below it"


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., object]:
    """run_main(error, rank=0) -> exit code of a command whose training opens its log file and raises the error."""

    def exit_process(code: int) -> NoReturn:
        raise SystemExit(code)

    def run(error: Exception | None, rank: int = 0, world_size: int = 2) -> object:
        def train(config: RunConfig, world: World) -> None:
            (tmp_path / "logs").mkdir(exist_ok=True)
            log_to_file(tmp_path / "logs", world)
            if error is not None:
                raise error

        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": 1}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        with pytest.raises(SystemExit) as ended:
            entry.main("", lambda recipe, overrides: CONFIG, train)
        return ended.value.code

    monkeypatch.setattr(entry, "exit_process", exit_process)
    monkeypatch.setattr(entry, "watch_signals", lambda: None)
    monkeypatch.setattr(sys, "argv", ["run.py", "recipe"])
    return run


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("error", [ValueError("too many images"), Diverged("no gradient"), OSError("disk full")])
def test_error_is_one_line_on_the_console_and_in_the_log_file(
    error: Exception, rank: int, run_main: Callable[..., object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run_main(error, rank) == 1
    assert capsys.readouterr().err == f"error on rank {rank}: {error}\n"
    logged = (tmp_path / "logs" / f"rank{rank}.log").read_text()
    assert logged.endswith(f" ERROR pretrain.trainer.main: error on rank {rank}: {error}\n")


@pytest.mark.parametrize("error", [ValueError("too many images"), torch.OutOfMemoryError("out of memory")])
def test_errors_of_a_single_process_do_not_name_a_rank(
    error: Exception, run_main: Callable[..., object], capsys: pytest.CaptureFixture[str]
):
    assert run_main(error, 0, world_size=1) == 1
    assert capsys.readouterr().err.startswith("error: t")


def seconds_to_raise(rank: int) -> float:
    """The seconds after which a rank raises an error that all ranks share."""
    start = time.monotonic()
    with pytest.raises(ValueError, match="no shards"), entry.said_once(rank):
        raise ValueError("no shards")
    return time.monotonic() - start


def test_other_ranks_delay_an_error_that_all_ranks_share(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(entry, "PATIENCE", 0.3)
    assert seconds_to_raise(0) < 0.3
    assert seconds_to_raise(1) >= 0.3


def test_rank_told_to_stop_leaves_the_error_to_the_first_rank(monkeypatch: pytest.MonkeyPatch):
    def exit_process(code: int) -> NoReturn:
        raise SystemExit(code)

    monkeypatch.setattr(entry, "exit_process", exit_process)
    monkeypatch.setattr(entry, "told_to_stop", lambda: True)
    with pytest.raises(SystemExit) as ended, entry.said_once(1):
        raise ValueError("no shards")
    assert ended.value.code == 1


CUDA_MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.93 GiB is free."
)


@pytest.mark.parametrize(
    ("message", "more"), [(CUDA_MESSAGE, " (tried to allocate 2.50 GiB more)"), ("out of memory", "")]
)
def test_gpu_out_of_memory_is_one_line_with_the_keys_to_change(
    message: str, more: str, run_main: Callable[..., object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run_main(torch.OutOfMemoryError(message), rank=1) == 1
    line = (
        f"error on rank 1: the GPU's memory is full{more}: set train.gradient_accumulation_steps higher than 4 (the "
        "micro-batch is 8), model.grad_checkpointing=true, or continue with a higher ZeRO stage (train.ds_config)\n"
    )
    assert capsys.readouterr().err == line
    assert (tmp_path / "logs" / "rank1.log").read_text().endswith(line)


def test_memory_advice_omits_settings_already_made():
    config = CONFIG.model_copy(update={"model": ModelConfig(grad_checkpointing=True)})
    assert "grad_checkpointing" not in config.memory_advice(2)
    assert config.memory_advice(16) == "continue with a higher ZeRO stage (train.ds_config)", "one image at a time"


def test_memory_advice_for_dense_tasks_names_their_keys():
    cfg = {"train_dataloader": {"batch_size": 4}, "test_dataloader": {"batch_size": 3}}
    assert Job(cfg).memory_advice(2).startswith("lower train_dataloader.batch_size (it is 4) and raise ")
    assert Job(cfg, test="last.pth").memory_advice(2) == "lower test_dataloader.batch_size (it is 3)"


def test_traceback_of_an_unexpected_error_is_printed_and_logged(
    run_main: Callable[..., object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run_main(ZeroDivisionError("a bug"), rank=1) == 1
    for text in (capsys.readouterr().err, (tmp_path / "logs" / "rank1.log").read_text()):
        assert "error on rank 1:\nTraceback (most recent call last):\n" in text
        assert text.endswith("ZeroDivisionError: a bug\n")


@pytest.mark.parametrize(("error", "rank", "marked"), [(Stopped("saved"), 0, True), (Stopped("saved"), 1, False)])
def test_stopped_run_is_marked_by_the_main_rank_and_logged(
    error: Exception, rank: int, marked: bool, run_main: Callable[..., object], tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setenv(ATTEMPT, str(tmp_path / "attempt0"))
    assert run_main(error, rank) == 0
    assert (tmp_path / "attempt0-stopped").exists() == marked
    assert capsys.readouterr() == ("saved\n" if marked else "", "")
    assert (tmp_path / "logs" / f"rank{rank}.log").read_text().endswith("saved\n")


def test_complete_run_leaves_no_mark(run_main: Callable[..., object], tmp_path: Path, monkeypatch):
    monkeypatch.setenv(ATTEMPT, str(tmp_path / "attempt0"))
    assert run_main(None) == 0
    assert not (tmp_path / "attempt0-stopped").exists()


def test_unwritable_mark_is_an_error(run_main: Callable[..., object], monkeypatch, capsys):
    monkeypatch.setenv(ATTEMPT, "/nowhere/attempt0")
    assert run_main(Stopped("saved")) == 1
    err = capsys.readouterr().err
    assert "error: the job is not requeued, because a file could not be written: " in err
    assert "'/nowhere/attempt0-stopped'" in err
