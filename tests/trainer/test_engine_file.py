"""The engine file: unknown keys and keys owned by the recipe are rejected, and `auto` is resolved or rejected."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig

from pretrain.trainer import engine_file
from pretrain.trainer.engine import complete_settings
from pretrain.trainer.engine_file import ENGINE_KEYS, OWNED, read_ds_config

Read = Callable[..., dict[str, Any]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """read(key=value, ...) -> the settings of a run on two ranks whose engine file has these keys."""

    def settings(**keys: Any) -> dict[str, Any]:
        path = tmp_path / "engine.json"
        path.write_text(json.dumps(keys))
        return complete_settings(
            read_ds_config(str(path)), micro_batch=4, accumulation=1, world_size=2, clip_grad=0.5, bf16=True
        )

    return settings


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"zero_optimisation": {"stage": 3}}, "zero_optimisation, which DeepSpeed does not know: did you mean zero_o"),
        ({"communication_data_typ": "fp32"}, "did you mean communication_data_type?"),
        ({"learning_rate": 1}, "sets learning_rate, which DeepSpeed does not know"),
        ({"zero_optimization": {"stag": 3}}, "zero_optimization.stag, which DeepSpeed does not know: did you mean st"),
        ({"zero_optimization": {"offload_optimizer": {"devic": "cpu"}}}, "zero_optimization.offload_optimizer.devic"),
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage=7"),
        ({"zero_optimization": True}, "sets zero_optimization=true: must be a section"),
        ({"zero_optimization": {"stage": 1, "overlap_comm": "often"}}, "overlap_comm=often: must be true or false"),
        ({"flops_profiler": {"enable": True}}, "flops_profiler.enable, which DeepSpeed does not know: did you mean en"),
        ({"checkpoint": {"tag_validatio": "Warn"}}, "checkpoint.tag_validatio, which DeepSpeed does not know"),
        ({"communication_data_type": "fp64"}, "DeepSpeed rejects train.ds_config: Invalid communication_data_type"),
        ({"wall_clock_breakdown": "yes"}, 'wall_clock_breakdown="yes": must be true or false'),
        ({"steps_per_print": "10"}, 'steps_per_print="10": must be a whole number'),
        ({"train_batch_size": 8}, "train_batch_size, which the recipe owns: delete it there and set train.global_bat"),
        ({"optimizer": {"type": "Adam"}}, "optimizer, which the recipe owns: delete it there and set optim"),
        ({"amp": {"enabled": True}}, "amp, which the recipe owns: delete it there and set train.precision"),
        ({"steps_per_print": "auto"}, "steps_per_print=auto, which the recipe has no value for"),
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage=auto, which the recipe has no value for"),
    ],
)
def test_invalid_key_is_rejected_by_name(keys: dict[str, Any], message: str, read: Read):
    with pytest.raises(ValueError, match=r"set|rejects") as error:
        read(**keys)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_all_problems_are_reported_at_once(read: Read):
    with pytest.raises(ValueError, match="zero_optimisation") as error:
        read(zero_optimisation={}, fp16={"enabled": True}, dump_state="auto")
    assert len(str(error.value).splitlines()) == 3


def test_problems_within_sections_are_reported_with_the_others(read: Read):
    """DeepSpeed itself stops at the first section it rejects."""
    inner = {
        "zero_optimization": {"stag": 3, "overlap_comm": "often"},
        "flops_profiler": {"enable": True},
        "tensorboard": {"enabled": "often"},
    }
    for above in ({}, {"zero_optimisation": {}, "fp16": {"enabled": True}}):
        with pytest.raises(ValueError, match="zero_optimization") as error:
            read(**above, **inner)
        lines = str(error.value).splitlines()
        assert len(lines) == len(set(lines)) == len(above) + 4
        for key in (
            "zero_optimization.stag,",
            "overlap_comm=often",
            "flops_profiler.enable,",
            "tensorboard.enabled=",
            *above,
        ):
            assert key in str(error.value)


@pytest.mark.parametrize("is_last_first", [False, True])
def test_the_bad_one_of_two_sections_with_the_same_key_is_named(
    is_last_first: bool, read: Read, monkeypatch: pytest.MonkeyPatch
):
    """DeepSpeed names only the key within it. The names of the sections are a set, of another order in each process."""
    names = dict.fromkeys(sorted(engine_file._SECTIONS, reverse=is_last_first)).keys()
    monkeypatch.setattr(engine_file, "_SECTIONS", names)
    with pytest.raises(ValueError, match="enabled") as error:
        read(comms_logger={"enabled": "maybe"}, tensorboard={"enabled": True})
    assert str(error.value) == "train.ds_config sets comms_logger.enabled=maybe: must be true or false"


def test_problems_outside_the_sections_are_reported_with_those_in_them(read: Read):
    with pytest.raises(ValueError, match="enabled") as error:
        read(communication_data_type="fp64", tensorboard={"enabled": "maybe"})
    outside, inside = str(error.value).splitlines()
    assert "Invalid communication_data_type" in outside
    assert "tensorboard.enabled=maybe" in inside


def test_auto_is_the_recipes_value_or_deepspeeds_default(read: Read):
    settings = read(
        train_batch_size="auto",
        gradient_clipping="auto",
        bf16={"enabled": "auto"},
        scheduler={"params": {"lr": "auto"}},
        zero_optimization={"stage": 2, "reduce_bucket_size": "auto", "offload_optimizer": {"buffer_count": "auto"}},
    )
    assert (settings["train_batch_size"], settings["gradient_clipping"]) == (8, 0.5)
    assert settings["zero_optimization"] == {"stage": 2, "offload_optimizer": {}}
    assert "scheduler" not in settings


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[]", "is not a JSON object"), ('{"a": 1, "a": 2}', "duplicate key a")]
)
def test_file_that_is_not_a_json_object_is_rejected(text: str, message: str, tmp_path: Path):
    (tmp_path / "engine.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_ds_config(str(tmp_path / "engine.json"))


class RecordingDict(dict[str, Any]):
    """Records which keys DeepSpeed looks up."""

    def __init__(self, keys: dict[str, Any], looked_up: set[str]):
        super().__init__(keys)
        self.looked_up = looked_up

    def get(self, key: str, default: Any = None) -> Any:
        self.looked_up.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.looked_up.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> "RecordingDict":
        return RecordingDict(self, self.looked_up)


def test_known_keys_are_those_that_deepspeed_looks_up():
    looked_up: set[str] = set()
    DeepSpeedConfig(RecordingDict({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {}}, looked_up))
    removed = _REMOVED_TOP_LEVEL_CONFIG_KEYS.keys()
    looked_up -= {"sequence_parallel_size", "mics_shard_size"}
    assert looked_up - removed - OWNED.keys() == ENGINE_KEYS
