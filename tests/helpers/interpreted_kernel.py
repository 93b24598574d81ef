"""`python -m helpers.interpreted_kernel` with TRITON_INTERPRET=1: errors of the window kernel on the CPU, as JSON.

It needs its own process, since Triton decides on import whether to interpret. It runs in fp32, because interpreted
bf16 products are wrong.
"""

import json
from typing import Any

import torch
from torch import Tensor

from helpers.naive_attention import bucket
from helpers.tiny import loss_and_gradients, random_images, random_mask_indices, randomize, tiny_lomar
from pretrain.methods.pr_mim import PRMIMConfig
from pretrain.models.vit import Arch
from pretrain.models.window_attention import window_attention, window_tokens, worst_error

# window size, number of patches that are tokens (None: all), channels per head, number of prefix tokens (default: one)
CASES: tuple[tuple[int | None, ...], ...] = (
    *((7, None, 64), (7, 25, 64), (7, 10, 64), (7, None, 80)),  # LoMaR, PR-MIM, visible patches only; ViT-H
    *((7, 15, 16), (7, 31, 16)),  # the number of tokens is a power of two
    *((6, None, 32), (5, None, 16), (2, 3, 16)),
    *((7, None, 16, 4), (7, 20, 16, 9)),  # registers
)


def naive(qkv: Tensor, table: Tensor, patches: Tensor, size: int, prefix: int) -> Tensor:
    """Compute the formula with a bucket for every pair: qkv (G, L, 3, H, C) -> (G, L, H, C)."""
    G, L, _, _, C = qkv.shape
    ids = torch.full((G, L, L), 49)
    for g in range(G):
        for i, query in enumerate(patches[g].tolist()):
            for j, key in enumerate(patches[g].tolist()):
                ids[g, prefix + i, prefix + j] = bucket(query, key, size)
    q, k, v = qkv.unbind(2)
    logits = torch.einsum("gihc,gjhc->ghij", q, k) * C**-0.5
    logits = logits + torch.einsum("gihc,gijc->ghij", q, table.T[ids])
    return torch.einsum("ghij,gjhc->gihc", logits.softmax(-1), v)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def kernel_errors(size: int, count: int | None, channels: int, prefix: int = 1) -> dict[str, float]:
    G, H = 3, 2
    patches = torch.arange(size * size).expand(G, -1)
    if count is not None:
        patches = torch.rand(G, size * size).argsort(1)[:, :count]
    tokens = window_tokens(size, None if count is None else patches, torch.device("cpu"), prefix)
    L = prefix + patches.shape[1]
    qkv, table, upstream = (
        torch.randn(G, L, 3, H, channels),
        0.3 * torch.randn(channels, 50),
        torch.randn(G, L, H, channels),
    )
    low, low_table = qkv.clone().requires_grad_(), table.clone().requires_grad_()
    out = window_attention(low, low_table, tokens)
    out.backward(upstream)
    high, high_table = qkv.double().requires_grad_(), table.double().requires_grad_()
    expected = naive(high, high_table, patches, size, prefix)
    expected.backward(upstream.double())
    errors = {"out": relative_error(out.detach(), expected.detach())}
    for i, name in enumerate(("dq", "dk", "dv")):
        errors[name] = relative_error(low.grad[:, :, i], high.grad[:, :, i])
    return {**errors, "dtable": relative_error(low_table.grad, high_table.grad)}


def method_errors(**keys: Any) -> dict[str, float]:
    """Compare loss and gradients of LoMaR with and without the kernel."""
    results = []
    for kernel in (True, False):
        method = tiny_lomar(grid=(5, 6), arch=Arch(32, 2, 2), **keys)
        randomize(method)
        method.encoder.window_kernel = kernel
        results.append(loss_and_gradients(method, random_images(method), random_mask_indices(method)))
    (loss, gradients), (expected, expected_gradients) = results
    worst = max(relative_error(gradients[name], expected_gradients[name].double()) for name in expected_gradients)
    return {"loss": relative_error(loss, expected.double()), "gradients": worst}


if __name__ == "__main__":
    torch.manual_seed(0)
    half = PRMIMConfig(throw_ratio=0.3, kernel_size=3)
    errors = {f"{case[0]}x{case[0]}, {', '.join(map(str, case[1:]))}": kernel_errors(*case) for case in CASES}
    errors["worst_error"] = {
        f"{count}, {prefix}": worst_error(7, count, 2, 64, torch.device("cpu"), torch.float32, prefix)
        for count, prefix in ((49, 1), (10, 5))
    }
    errors["LoMaR"] = method_errors()
    errors["late"] = method_errors(mask_token_block=1)
    errors["late + PR-MIM"] = method_errors(mask_token_block=1, pr_mim=half)
    errors["registers"] = method_errors(mask_token_block=1, pr_mim=half, registers=3)
    errors["asymmetric"] = method_errors(
        architecture="asymmetric", decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2
    )
    print(json.dumps(errors))
