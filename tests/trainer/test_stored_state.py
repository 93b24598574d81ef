"""Reads weights and moments from files that the tests lay out by hand, as DeepSpeed does in each ZeRO stage."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.trainer.checkpoint_layout import MANIFEST, TrainState
from pretrain.trainer.config import RunConfig
from pretrain.trainer.optim import build_adamw, parameter_groups
from pretrain.trainer.stored_state import MOMENTS, StoredState

SHAPES = {"cls_token": (1, 1, 5), "proj.weight": (3, 4), "out.weight": (2, 3, 2), "proj.bias": (7,), "out.bias": (1,)}
GROUPS = (["cls_token", "proj.weight", "out.weight"], ["out.bias", "proj.bias"])
FROZEN = {"frozen.weight": (3, 3)}
STEP = torch.tensor(5.0)
Kinds = dict[str, dict[str, Tensor]]


def draw() -> Kinds:
    torch.manual_seed(0)
    return {kind: {name: torch.randn(shape) for name, shape in (SHAPES | FROZEN).items()} for kind in ("", *MOMENTS)}


def write(folder: Path, stage: int, files: Sequence[Any], model: dict[str, Any], ranks: int) -> Path:
    """Writes a manifest, the module's file (one per rank in stage 3) and the optimizer file of each rank."""
    folder.mkdir()
    (folder / MANIFEST).write_text(json.dumps({"state": asdict(TrainState(world_size=ranks, zero_stage=stage))}))
    for rank in range(ranks):
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        fragments = {n: cut(t, ranks)[rank] for n, t in model.get("frozen", {}).items()}
        torch.save({"buffer_names": ["count"], **model, "frozen_param_fragments": fragments}, folder / name)
    for rank, file in enumerate(files):
        torch.save({"optimizer_state_dict": file}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def shapes(names: Sequence[str]) -> dict[str, torch.Size]:
    return {name: torch.Size((SHAPES | FROZEN)[name]) for name in names}


def cut(tensor: Tensor, ranks: int) -> list[Tensor]:
    """Splits a tensor into equal parts, padded with NaN at the end."""
    length = math.ceil(tensor.numel() / ranks)
    padded = torch.cat([tensor.flatten(), torch.full((length * ranks - tensor.numel(),), torch.nan)])
    return list(padded.split(length))


def write_flat(folder: Path, stage: int, ranks: int, drawn: Kinds, aligned: int = 1) -> Path:
    """Writes stage 1 or 2: flat groups in which each parameter starts at a multiple of `aligned`."""
    paddings = [[-math.prod(SHAPES[name]) % aligned for name in names] for names in GROUPS]
    files: list[dict[str, Any]] = [{"param_alignment_paddings": paddings} for _ in range(ranks)]
    for file in files:
        file["base_optimizer_state"] = {"state": {}}
    for group, names in enumerate(GROUPS):
        flat = {}
        for kind in MOMENTS:
            padded = zip(names, paddings[group], strict=True)
            ends = [torch.cat([drawn[kind][name].flatten(), torch.full((pad,), torch.nan)]) for name, pad in padded]
            flat[kind] = cut(torch.cat(ends), ranks)
        for rank, file in enumerate(files):
            file["base_optimizer_state"]["state"][group] = {"step": STEP, **{k: flat[k][rank] for k in MOMENTS}}
    module = {**drawn[""], "count": torch.tensor(3)}
    return write(folder, stage, files, {"module": module, "param_shapes": [shapes(names) for names in GROUPS]}, ranks)


def write_cut(folder: Path, ranks: int, drawn: Kinds) -> Path:
    """Writes stage 3, with the first parameter group split in two."""
    groups = (GROUPS[0][:2], GROUPS[0][2:], GROUPS[1])
    files: list[dict[str, Any]] = [
        {"fp32_flat_groups": [], "optimizer_state_dict": {"state": {}}} for _ in range(ranks)
    ]
    for group, names in enumerate(groups):
        for rank, file in enumerate(files):
            parts = {kind: torch.cat([cut(drawn[kind][name], ranks)[rank] for name in names]) for kind in drawn}
            file["fp32_flat_groups"].append(parts.pop(""))
            file["optimizer_state_dict"]["state"][group] = {"step": STEP, **parts}
    model = {
        "module": {"count": torch.tensor(3), **{name: torch.empty(0) for name in SHAPES | FROZEN}},
        "param_shapes": [shapes(names) for names in groups],
        "frozen_param_shapes": shapes(list(FROZEN)),
        "frozen": {name: drawn[""][name] for name in FROZEN},
    }
    return write(folder, 3, files, model, ranks)


def assert_reads(checkpoint: Path, drawn: Kinds) -> None:
    stored = StoredState(checkpoint)
    assert stored.shapes == shapes(list(SHAPES | FROZEN))
    assert stored.trained == [name for names in GROUPS for name in names]
    assert (stored.step, stored.buffers) == (5.0, {"count": torch.tensor(3)})
    for name in stored.shapes:
        assert torch.equal(stored.weight(name), drawn[""][name]), name
    for name in stored.trained:
        for kind in MOMENTS:
            assert torch.equal(stored.moment(name, kind), drawn[kind][name]), (name, kind)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 40])
@pytest.mark.parametrize("aligned", [1, 4])
def test_flat_parameter_groups_are_read(ranks: int, aligned: int, tmp_path: Path):
    """40 ranks are more than a group has elements, so some ranks have nothing but padding."""
    drawn = draw()
    assert_reads(write_flat(tmp_path / "flat", 1, ranks, drawn, aligned), drawn)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_partitioned_parameters_are_read(ranks: int, tmp_path: Path):
    drawn = draw()
    assert_reads(write_cut(tmp_path / "cut", ranks, drawn), drawn)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.cls_token, self.second = nn.Linear(3, 3), nn.Parameter(torch.randn(1, 1, 3)), nn.Linear(3, 1)


@pytest.mark.parametrize("decay_class_token", [True, False])
def test_stage_0_moments_are_found_by_parameter_group(decay_class_token: bool, tmp_path: Path):
    module, config = Small(), RunConfig(name="x", data={"shards": "unused"})
    optimizer = build_adamw(parameter_groups(module, 0.05, decay_class_token), config, 0)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    saved = {"module": module.state_dict(), "buffer_names": []}
    before = write(tmp_path / "before", 0, [], {**saved, "optimizer": optimizer.state_dict()}, 1)
    optimizer.step()
    after = write(tmp_path / "after", 0, [], {**saved, "optimizer": optimizer.state_dict()}, 1)
    assert StoredState(before).step == 0
    assert not StoredState(before).moment("cls_token", "exp_avg").any()
    stored = StoredState(after)
    assert stored.step == 1
    for name, parameter in module.named_parameters():
        assert torch.equal(stored.moment(name, "exp_avg"), optimizer.state[parameter]["exp_avg"]), name


def test_unnamed_parameter_groups_are_rejected(tmp_path: Path):
    module = Small()
    optimizer = torch.optim.AdamW(module.parameters()).state_dict()
    saved = {"module": module.state_dict(), "buffer_names": [], "optimizer": optimizer}
    checkpoint = write(tmp_path / "tuned", 0, [], saved, 1)
    with pytest.raises(ValueError, match=r"the parameter groups of .*tuned are unnamed .*: set start\.optimizer=false"):
        StoredState(checkpoint)
    names = [name for name, _ in module.named_parameters()]
    assert StoredState(checkpoint, names).trained == names


def test_missing_or_short_files_are_named(tmp_path: Path):
    short = write_cut(tmp_path / "short", 2, draw())
    path = short / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    file = torch.load(path)
    file["optimizer_state_dict"]["fp32_flat_groups"][0] = torch.zeros(4)
    torch.save(file, path)
    with pytest.raises(ValueError, match=r"short has only 7 of the 12 elements of proj\.weight"):
        StoredState(short).weight("proj.weight")
    path.unlink()
    with pytest.raises(ValueError, match=r"short has only 1 of 2 ranks' files, no zero_pp_rank_1_mp_rank_00_optim"):
        StoredState(short)


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def test_file_that_would_run_code_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = write_flat(tmp_path / "flat", 2, 2, draw())
    torch.save({"optimizer_state_dict": RunsCode()}, checkpoint / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    with pytest.raises(ValueError, match="which could run code: it is refused"):
        StoredState(checkpoint)
    assert not Path("ran").exists()
