"""`python -m helpers.compiled_kernel`: prints the resources of the window kernels on sm_90 as JSON, without a GPU."""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pretrain.models.window_attention import PLACES, choose_launch
from pretrain.models.window_kernels import backward_kernel, forward_kernel

BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
INT8 = {"ids_ptr", "keys_ptr", "place_ptr", "inverse_ptr"}
TYPES = {"dtable": "*fp32", "scale": "fp32", "H": "i32", "stride_place": "i32", "stride_inverse": "i32"}


def resources(kernel: Any, constants: dict[str, Any], warps: int, stages: int) -> dict[str, float]:
    """Return registers per thread, bytes spilled to the stack, and bytes of shared memory."""
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else "*i8" if name in INT8 else TYPES.get(name, "*bf16")
        for name in names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [BINARIES / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0])
    return {"registers": registers, "stack": stack, "shared": compiled.metadata.shared}


def main() -> None:
    results = {}
    for tokens, padded in ((50, 64), (26, 32), (11, 16)):
        for channels, heads in ((64, 12), (80, 16)):
            for backward in (False, True):
                launch = choose_launch(backward, padded, heads, channels, hopper=True)
                constants = {"L": tokens, "N": padded, "C": channels, "CP": 64 if channels == 64 else 128, "NB": PLACES}
                constants["HEADS"] = launch.heads
                if backward:
                    constants["SUBSET"] = padded != PLACES
                kernel = backward_kernel if backward else forward_kernel
                name = f"{tokens} tokens, {channels} channels, {'backward' if backward else 'forward'}"
                results[name] = resources(kernel, constants, launch.warps, launch.stages)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
