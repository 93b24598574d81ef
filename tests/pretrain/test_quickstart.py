"""The quick start takes a few minutes, on a fast machine as well as on a slow or busy one."""

from pathlib import Path

import pytest
from helpers.processes import SMALL

from pretrain import quickstart
from pretrain.config import load
from pretrain.quickstart import FEWEST, MINUTES, choose_epochs, main, measure_step

MOST = load("quickstart", []).train.epochs


@pytest.fixture(autouse=True)
def in_tmp_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("step", "epochs"), [(0.01, MOST), (0.2, MOST), (0.6, 30), (1.2, 15), (30.0, FEWEST)])
def test_epochs_fit_the_time_budget(step: float, epochs: int):
    assert choose_epochs(step, MOST) == epochs
    assert epochs in (FEWEST, MOST) or 0.8 * MINUTES < step * 1.3 * 10 * epochs / 60 <= MINUTES


def run_main(
    step: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bf16: bool = True
) -> tuple[str, str]:
    monkeypatch.setattr(quickstart, "measure_step", lambda config: step)
    monkeypatch.setattr(quickstart, "has_fast_bf16", lambda device: bf16)
    assert main() == 0
    out, err = capsys.readouterr()
    return out, err


def test_fast_machine_trains_the_full_recipe(monkeypatch, capsys):
    out, err = run_main(0.2, monkeypatch, capsys)
    assert out == ""
    assert err == f"a step takes about 0.26 s here in bf16: {MOST} epochs, about 3 minutes\n"


def test_cpu_without_fast_bf16_trains_in_fp32(monkeypatch, capsys):
    out, err = run_main(0.2, monkeypatch, capsys, bf16=False)
    assert out == "train.precision=fp32\n"
    assert "here in fp32" in err
    assert load("quickstart", out.split()).train.precision == "fp32"


def test_busy_machine_trains_fewer_epochs_and_reports_it(monkeypatch, capsys):
    out, err = run_main(1.2, monkeypatch, capsys)
    assert out == "train.epochs=15 optim.warmup_epochs=1.5\n"
    assert f"15 epochs instead of the recipe's {MOST}, about 4 minutes" in err
    config = load("quickstart", out.split())
    assert (config.train.epochs, config.optim.warmup_epochs) == (15, 1.5)


def test_existing_run_keeps_its_epochs(monkeypatch, capsys):
    """With other epochs, it could not resume: its checkpoint has another schedule."""
    Path("runs/quickstart").mkdir(parents=True)
    Path("runs/quickstart/config.yaml").write_text(load("quickstart", ["train.epochs=20"]).to_yaml())
    out, err = run_main(0.01, monkeypatch, capsys)
    assert out == "train.epochs=20 optim.warmup_epochs=6\n"
    assert err == "runs/quickstart continues with its 20 epochs\n"


def test_measure_step_returns_plausible_seconds():
    with SMALL:
        assert 0 < measure_step(load("quickstart", ["train.global_batch_size=4"]), seconds=0.0) < 60
