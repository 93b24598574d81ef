"""The window attention kernel: correct in Triton's interpreter, and launched without register spills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def run_helper(name: str, **environment: str) -> dict[str, dict[str, float]]:
    env = {**os.environ, **environment, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-m", f"helpers.{name}"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_interpreted_kernel_equals_the_naive_formula():
    errors = run_helper("interpreted_kernel", TRITON_INTERPRET="1")
    assert {"7x7, None, 64", "7x7, 25, 64", "7x7, 10, 64", "7x7, None, 80", "late + PR-MIM"} <= errors.keys()
    assert {"7x7, None, 16, 4", "7x7, 20, 16, 9", "registers"} <= errors.keys()
    for case, values in errors.items():
        for name, error in values.items():
            assert error < 1e-5, (case, name, error)


@pytest.mark.slow
def test_chosen_launches_do_not_spill_registers_on_sm_90():
    """Compiles machine code without a GPU, with the assembler that ships with Triton."""
    stacks = run_helper("compiled_kernel")
    assert len(stacks) == 12, "two kernels; 50, 26 and 11 tokens; heads of 64 and 80 channels"
    for case, values in stacks.items():
        assert values["stack"] == 0, (case, values)
        assert values["shared"] <= 227 * 1024, (case, values)
