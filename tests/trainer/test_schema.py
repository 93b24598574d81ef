"""The names suggested for a wrong one, and the keys that a run may not change when it resumes."""

from typing import Annotated, Any

import pytest

from pretrain.trainer.checkpoint import CannotContinueError, check_continues
from pretrain.trainer.checkpoint_layout import TrainState
from pretrain.trainer.config import RunConfig
from pretrain.trainer.schema import DEFAULT_AS_BEFORE, MAY_CHANGE, Section, nearest


@pytest.mark.parametrize(
    ("name", "names", "message"),
    [
        (
            "lomar_vitb16_400",
            ["lomar_vitb16_224_1600e", "lomar_vitb16_224_400e"],
            "did you mean lomar_vitb16_224_400e?",
        ),
        ("windows", ["window_size", "num_windows"], "did you mean num_windows?"),
        ("epoch", ["every_epochs", "epochs"], "did you mean epochs?"),
        ("lr", ["base_lr", "min_lr", "betas"], "did you mean base_lr or min_lr?"),
        ("400", ["x_4000e", "x_400e"], "did you mean x_400e?"),
        ("vit_s", ["vit_tiny", "vit_small", "vit_base"], "did you mean vit_small?"),
        ("qqq", ["b", "a"], "valid: a, b"),
    ],
)
def test_nearest_names_contain_every_typed_part(name: str, names: list[str], message: str):
    assert nearest(name, names) == message


class Inner(Section):
    kept: int = 1
    free: Annotated[int, MAY_CHANGE] = 2


class Outer(Section):
    inner: Inner = Inner()
    other: Annotated[Inner | None, MAY_CHANGE] = None
    size: tuple[int, int] = (3, 4)
    younger: Annotated[int, DEFAULT_AS_BEFORE] = 1


def test_resume_signature_has_all_keys_that_are_not_marked():
    assert Outer(other=Inner()).resume_signature() == {"inner": {"kept": 1}, "size": [3, 4]}


def test_newer_key_is_compared_only_where_it_is_set():
    def resume_error(before: dict[str, Any], now: int) -> str:
        signature = Outer(younger=now).resume_signature()
        try:
            check_continues(TrainState(resume_signature=before), TrainState(resume_signature=signature))
        except CannotContinueError as error:
            return str(error)
        return ""

    older = {"inner": {"kept": 1}, "size": [3, 4]}  # of a run that is older than the key
    one, two = (Outer(younger=value).resume_signature() for value in (1, 2))
    assert resume_error(older, 1) == resume_error(one, 1) == resume_error(two, 2) == ""
    assert "younger was 'unset' and is 2" in resume_error(older, 2)
    assert "younger was 'unset' and is 2" in resume_error(one, 2)
    assert "younger was 2 and is 'unset'" in resume_error(two, 1)


def test_only_keys_that_do_not_change_the_weights_are_marked():
    """A new key of a shared section is compared when a run resumes, unless it is added here, too."""

    def marked(section: type[Section], prefix: str = "") -> set[str]:
        found = set()
        for name, field in section.model_fields.items():
            if MAY_CHANGE in field.metadata:
                found.add(prefix + name)
            elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                found |= marked(field.annotation, f"{prefix}{name}.")
        return found

    assert marked(RunConfig) == {
        "name",
        "runs",
        "model.grad_checkpointing",
        "data.shards",  # compared by its index's fingerprint
        "data.accept_changed_shards",
        "data.cache_dir",
        "data.cache_gb",
        "data.fetch_timeout",
        "data.num_workers",
        "data.max_skipped_images",
        "train.gradient_accumulation_steps",
        "train.deterministic",
        "train.ds_config",  # compared by its ZeRO stage
        "train.max_nonfinite_steps",
        "checkpoint",
        "log",
        "watchdog",
    }
