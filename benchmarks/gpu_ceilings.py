"""The GPU's ceilings: copies, matrix products with our layers' shapes, and torch's choice of attention."""

import os
import platform
import shutil
import subprocess

import torch
import torch.nn.functional as F

from benchmarks.gpu_session import Session, median_ms
from pretrain.models.sdpa import set_deterministic
from pretrain.models.vit import ARCHS

TOKENS = 51_200  # 256 images x 4 windows x 50 tokens
SDPA_NAMES = {0: "math", 1: "flash", 2: "memory-efficient", 3: "cuDNN"}  # torch.nn.attention.SDPBackend's values


def environment(session: Session) -> None:
    """Records versions, and the card."""
    info = {"torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
    if session.dry:
        info["device"] = f"dry run on a CPU ({platform.machine()})"
    else:
        card = torch.cuda.get_device_properties(session.device)
        info |= {
            "device": card.name,
            "memory_gib": round(card.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nvidia_smi": _nvidia_smi(),
        }
    session.keep("environment", info)
    session.say(", ".join(f"{key} {value}" for key, value in info.items()))


def _nvidia_smi() -> str:
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi not found"
    query = "--query-gpu=driver_version,clocks.max.sm,power.limit"
    done = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip()


def ceilings(session: Session) -> None:
    """Measures TB/s of a copy, and TFLOP/s of each product, its input's gradient and its weight's gradient."""
    device = session.device
    rows: dict[str, object] = {"copy TB/s": _copy_speed(2**20 if session.dry else 2**31, device)}
    session.say(f"copy {rows['copy TB/s']} TB/s")
    products = {"square": (8192, 8192, 8192)}
    for arch in ("vit_base", "vit_large", "vit_huge"):
        dim = ARCHS[arch].dim
        for layer, inputs, outputs in (("qkv", dim, 3 * dim), ("fc1", dim, 4 * dim), ("fc2", 4 * dim, dim)):
            products[f"{arch} {layer}"] = (TOKENS if arch == "vit_base" else TOKENS // 2, inputs, outputs)
    if session.dry:
        products = {"tiny": (64, 32, 32)}
    for name, (tokens, inputs, outputs) in products.items():
        x = torch.randn(tokens, inputs, device=device, dtype=torch.bfloat16)
        w = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
        dy = torch.randn(tokens, outputs, device=device, dtype=torch.bfloat16)
        calls = (lambda: x @ w.T, lambda: dy @ w, lambda: dy.T @ x)  # noqa: B023 - called at once
        speeds = [round(2 * tokens * inputs * outputs / median_ms(call, device) / 1e9) for call in calls]
        rows[f"TFLOP/s {name} {tokens}x{inputs}x{outputs}"] = speeds
        session.say(f"{name:14} {tokens} x {inputs} x {outputs}: forward, input and weight gradient: {speeds} TFLOP/s")
    session.keep("ceilings", rows)


def _copy_speed(size: int, device: torch.device) -> float:
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return round(2 * size / median_ms(lambda: target.copy_(source), device) / 1e9, 2)


def attention_choice(session: Session) -> None:
    """Records which kernel torch chooses freely: without a bias, with one, and with one that has a gradient."""
    set_deterministic(False)
    rows, batch = {}, 1 if session.dry else 8
    for name, tokens, heads, channels in (
        ("LoMaR B", 50, 12, 64),
        ("LoMaR H", 50, 16, 80),
        ("MAE encoder B 224", 50, 12, 64),
        ("MAE decoder 224", 197, 16, 32),
        ("MAE decoder 448", 785, 16, 32),
    ):
        q = torch.randn(batch, heads, tokens, channels, device=session.device, dtype=torch.bfloat16, requires_grad=True)
        bias = torch.randn(batch, heads, tokens, -(-tokens // 8) * 8, device=session.device, dtype=torch.bfloat16)
        choices = {"no bias": None}
        if name.startswith("LoMaR"):
            choices |= {"bias": bias[..., :tokens], "bias with gradient": bias.requires_grad_()[..., :tokens]}
        for kind, mask in choices.items():
            F.scaled_dot_product_attention(q, q, q, attn_mask=mask).sum().backward()  # checks that it works
            rows[f"{name}, {kind}"] = SDPA_NAMES[torch._fused_sdp_choice(q, q, q, attn_mask=mask)]
            session.say(f"torch's attention, {name}, {kind}: {rows[f'{name}, {kind}']}")
    session.keep("attention_choice", rows)
