"""benchmarks/gpu.py: the table has every cell, and sections end in time, fail independently and resume."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_convolution, gpu_kernel, gpu_table
from benchmarks.gpu_goals import FAST_OVER_MAE, goals
from benchmarks.gpu_session import Session
from benchmarks.gpu_table import BF16, IMAGES, ONE_BY_ONE, SDPA, Cell
from benchmarks.variants import NAMES
from pretrain.models import vit
from pretrain.models.relative_position import pair_buckets

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(tmp_path, 100, CPU, resume=False)


def written(folder: Path) -> dict:
    return json.loads((folder / "gpu.json").read_text())


def test_table_has_every_cell_once_and_the_most_important_first(tmp_path: Path):
    names = [section.name for section in gpu.sections(False, {"lomar": tmp_path, "mae": tmp_path})]
    assert len(names) == len(set(names))
    for arch, size in IMAGES:
        for column in ("now", "before"):
            assert {Cell(arch, size, variant, column).name for variant in NAMES} <= set(names)
        assert {Cell(arch, size, kind, "authors").name for kind in ("lomar", "mae")} <= set(names)
    for column in (BF16, SDPA):
        assert Cell("vit_base", 224, "lomar", column).name in names
    assert Cell("vit_large", 224, "lomar", BF16).name in names
    assert {arch for arch, _ in IMAGES} == {"vit_base", "vit_large", "vit_huge"}
    position = {name: place for place, name in enumerate(names)}
    order = [
        gpu_convolution.NAME,
        gpu_kernel.RIGHT,
        "vit_base 224 lomar, now",
        "vit_large 224 lomar, now",
        "vit_huge 448 pr, before",
    ]
    assert sorted(order, key=position.__getitem__) == order


def test_goals_are_met_not_met_or_not_measured():
    cells = {
        "vit_base 224 fast, now": {"images_per_s": 1900.0},
        "vit_base 224 mae, now": {"images_per_s": 1000.0},
        "vit_base 448 fast, now": {"images_per_s": 300.0},
        "vit_base 448 mae, now": {"images_per_s": 100.0},
        "vit_huge 224 lomar, now": {"images_per_s": 1.0, "mfu": 0.51},
    }
    reports = {goal.name: str(goal) for goal in goals(cells)}
    assert reports["fast_over_mae vit_base 224"] == "fast_over_mae vit_base 224: 1.90 (goal: 1.8, met)"
    assert reports["fast_over_mae vit_base 448"] == "fast_over_mae vit_base 448: 3.00 (goal: 3.3, NOT met)"
    assert reports["mfu lomar vit_huge 224"] == "mfu lomar vit_huge 224: 0.51 (goal: 0.5, met)"
    assert reports["fast_over_mae vit_large 384"] == "fast_over_mae vit_large 384: not measured (goal: 1.6)"
    assert reports["lomar_over_authors vit_base 224"].endswith("not measured (goal: 2)")
    assert len(reports) == len(FAST_OVER_MAE) + 3


def test_failing_section_does_not_affect_the_others(session: Session, tmp_path: Path, capsys):
    def fail(_: Session) -> None:
        raise ValueError("no such shape")

    session.section("first", "a", 1, fail)
    session.section("second", "b", 1, lambda session: session.keep("value", 3))
    found = written(tmp_path)
    assert found["sections"]["first"] == "error: ValueError: no such shape"
    assert "in fail" in found["tracebacks"]["first"]
    assert found["sections"]["second"].startswith("done")
    assert found["value"] == 3
    assert session.failed() == ["first"]
    assert "error: ValueError: no such shape" in capsys.readouterr().out


@pytest.mark.parametrize("noticed", ["in the section", "as the section ends"])
def test_process_with_a_broken_gpu_is_replaced_by_one_that_resumes(
    noticed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, words: started.append(words))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "out", "--seconds", "480", "--only", "vit"])
    session = Session(tmp_path, 480, torch.device("cuda"), resume=False)
    with monkeypatch.context() as broken:  # from then on every call fails
        broken.setattr(torch.cuda, "is_available", lambda: True)
        for owner, name in ((torch, "zeros"), (torch.cuda, "empty_cache"), (torch.cuda, "synchronize")):
            broken.setattr(owner, name, fail)
        session.section("first", "a", 1, fail if noticed == "in the section" else lambda _: None)
    assert written(tmp_path)["sections"]["first"].startswith("error: RuntimeError: an illegal memory access")
    assert started[0][1:-1] == ["gpu.py", "out", "--seconds", "480", "--only", "vit", "--resume", "--seconds"]
    assert 470 < float(started[0][-1]) <= 480


def test_section_without_enough_time_is_left_for_a_resume(tmp_path: Path, capsys):
    session = Session(tmp_path, 0.5, CPU, resume=False)
    done = []
    session.section("first", "slow", 0, lambda _: time.sleep(0.3))
    session.section("second", "slow", 0, lambda _: done.append("second"))  # the first of its kind took longer
    assert written(tmp_path)["sections"]["second"].startswith("left out: it may take ")
    assert "second: left out" in capsys.readouterr().out
    again = Session(tmp_path, 100, CPU, resume=True)
    again.section("first", "slow", 0, lambda _: done.append("first"))
    again.section("second", "slow", 0, lambda _: done.append("second"))
    assert done == ["second"]
    assert all(status.startswith("done") for status in written(tmp_path)["sections"].values())


def test_out_of_memory_halves_the_batch(session: Session, monkeypatch: pytest.MonkeyPatch, capsys):
    tried = []

    def measured(cell: Cell, arch: str, images: int, checkout: None, session: Session) -> dict[str, float]:
        tried.append(images)
        if images > 64:
            raise torch.OutOfMemoryError("no room")
        return {"images": images, "ms": 1.0, "images_per_s": 1e3 * images, "peak_gib": 1.0, "first_step_s": 1.0}

    monkeypatch.setattr(gpu_table, "_measure", measured)
    monkeypatch.setattr(gpu_table, "_forward_flops", lambda *_: 1e9)
    monkeypatch.setattr(Session, "dry", False)
    gpu_table.measure(Cell("vit_base", 224, "lomar", "now"))(session)
    assert tried == [256, 128, 64]
    row = session.results["cells"]["vit_base 224 lomar, now"]
    assert row["images"] == 64
    assert row["mfu"] == pytest.approx(3 * 1e9 * 64e3 / 989e12)
    assert "out of memory; retrying with 64 images" in capsys.readouterr().out


def test_wrong_kernel_is_not_timed_as_now(session: Session):
    cell, old = Cell("vit_base", 224, "fast", "now"), Cell("vit_base", 224, "fast", "before")
    assert cell.overrides(session) == ()
    session.results["sections"][gpu_kernel.RIGHT] = "error: ArithmeticError: wrong"
    assert cell.overrides(session) == ("model.attention=sdpa",)
    assert old.overrides(session) == gpu_table.BEFORE


@pytest.mark.parametrize("patches", [49, 25, 10])
def test_reference_of_the_kernel_is_our_attention(patches: int):
    inputs = gpu_kernel.Shape(windows=2, patches=patches, heads=2, channels=8).inputs(CPU, torch.bfloat16)
    row = gpu_kernel._errors(gpu_kernel.by_torch, *inputs)
    assert row.pop("same bits twice")
    assert max(row.values()) < 1e-2
    without_position = gpu_kernel._errors(lambda qkv, table, some: gpu_kernel.by_torch(qkv, 0 * table, some), *inputs)
    assert without_position["out"] > 1e-1


def test_torch_timing_excludes_buckets_that_a_step_makes_once(monkeypatch: pytest.MonkeyPatch):
    made = []

    def counted(*tensors: torch.Tensor) -> torch.Tensor:
        made.append(pair_buckets(*tensors))
        return made[-1]

    monkeypatch.setattr(gpu_kernel, "pair_buckets", counted)
    call = gpu_kernel.by_torch(
        *gpu_kernel.Shape(windows=2, patches=10, heads=2, channels=8).inputs(CPU, torch.bfloat16)
    )
    assert torch.equal(call(), call())
    assert [position.dtype for position in made] == [torch.bfloat16]


def test_convolution_is_timed_in_both_layouts_and_determinism_modes(session: Session, monkeypatch: pytest.MonkeyPatch):
    seen = set()

    def times(module: gpu_convolution.ConvAggregation, tokens: torch.Tensor, session: Session) -> dict[str, float]:
        def look(_: object, inputs: tuple[torch.Tensor]) -> None:
            last = inputs[0].is_contiguous(memory_format=torch.channels_last)
            assert last or inputs[0].is_contiguous()
            seen.add((tuple(inputs[0].shape), last, torch.backends.cudnn.deterministic))

        module.conv.register_forward_pre_hook(look)
        return measured(module, tokens, session)

    measured = gpu_convolution._times
    monkeypatch.setattr(gpu_convolution, "_times", times)
    with torch.backends.cudnn.flags(deterministic=False):
        gpu_convolution.convolution(session)
    shapes = [(2, dim, 7, 7) for dim in (768, 1024, 1280)]
    assert seen == {(shape, last, fixed) for shape in shapes for last in (True, False) for fixed in (True, False)}
    rows = session.results["convolution"]
    assert len(rows) == len(seen)
    assert all(row["forward"] > 0 and row["both"] > 0 for row in rows.values())


def test_dry_run_of_some_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setitem(vit.ARCHS, "vit_tiny", vit.Arch(dim=24, depth=3, heads=2))
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    only = ["environment", "ceilings", "kernel: B, visible 11", "vit_base 224 lomar"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path), "--dry", "--only", *only])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (end.value.code, last["failed"], last["dry"]) == (0, [], True)
    assert written(tmp_path)["cells"].keys() == {
        f"vit_base 224 lomar, {column}" for column in ("now", "before", BF16, SDPA, ONE_BY_ONE)
    }


@pytest.mark.slow
def test_dry_run_of_everything(tmp_path: Path):
    command = [sys.executable, "benchmarks/gpu.py", str(tmp_path), "--dry", "--seconds", "900"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = written(tmp_path)
    assert found["sections"].keys() == {section.name for section in gpu.sections(True, {})}
    assert all(status.startswith("done") for status in found["sections"].values())
    assert found["engine"]["engine: fast, zero0"]["data_wait"] >= 0
    assert json.loads(done.stdout.splitlines()[-1])["failed"] == []


def test_without_a_gpu_the_command_names_the_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "torch finds no GPU here; --dry tries the command without one" in capsys.readouterr().err
