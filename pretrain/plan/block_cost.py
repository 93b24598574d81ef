"""What a transformer block costs: flops, bytes moved and bytes kept for the backward pass, by kind of numerics.

Bytes are per token, and most of them in units of D, the width: an activation of D values takes 2 D bytes in bf16, 4 D
in fp32. docs/planning.md derives the numbers.

Shapes: N tokens in sequences of L tokens (including the class token), H heads of C channels, D = H C.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from pretrain.models.window_attention import MAX_PREFIX_TOKENS, MAX_WINDOW_SIZE, PLACES, choose_launch, padded_tokens
from pretrain.plan.trace import BlockCall

AttentionKind = Literal["triton", "sdpa", "unfused"]
ROWS = 64  # tokens of the tiles that attention kernels work on


@dataclass(frozen=True)
class Numerics:
    """How blocks are computed.

    Attributes:
        compile: whether torch.compile fuses their element-wise operators.
        residual: the dtype of the residual stream.
        attention: the kernel for relative position; elsewhere `triton` means SDPA. `unfused` writes the logits to
            memory, like a CPU and the code of MAE's and LoMaR's authors.
        precision: of the whole training; fp32 means no autocast.
        hopper: whether the GPU has compute capability 9.x, which determines how the window kernel is launched.
        cuda_graphs: whether the host launches a pass with one call.
    """

    compile: bool = False
    residual: Literal["fp32", "bf16"] = "fp32"
    attention: AttentionKind = "sdpa"
    precision: Literal["bf16", "fp32"] = "bf16"
    hopper: bool = True
    cuda_graphs: bool = False


class Pass(NamedTuple):
    """A quantity of the forward and of the backward pass."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def matrix_flops(call: BlockCall) -> float:
    """Forward flops for each token of qkv (6 D^2), projection (2 D^2) and MLP (16 D^2).

    In cross-attention, keys and values come from the context's tokens.
    """
    if call.context:
        return 20.0 * call.dim**2 + 4.0 * call.dim * call.context_dim * call.context / call.tokens
    return 24.0 * call.dim**2


def attention_flops(call: BlockCall) -> float:
    """Forward flops for each token of q k^T and P v (2 L D each), and of the bias (2 L D)."""
    return (6.0 if call.relative else 4.0) * keys(call) * call.dim


def keys(call: BlockCall) -> int:
    """How many tokens each token attends to."""
    return call.context or call.tokens


# Bytes of element-wise operators for each token, in units of D: norms, casts, GELU, residual additions, and the sums
# of bias gradients. Eager and fp32 residual: norm 8 + 8, casts 6 + 6, GELU 16, additions 10 + 10; backward: norm
# 20 + 20, GELU 24, casts 24, bias sums 18, additions 24. Compiled: casts and additions are part of the norms.
_ELEMENTWISE = {
    ("bf16", "fp32", False): Pass(64, 130),
    ("bf16", "fp32", True): Pass(44, 90),
    ("bf16", "bf16", False): Pass(36, 74),
    ("bf16", "bf16", True): Pass(34, 66),
    ("fp32", "fp32", False): Pass(72, 148),
    ("fp32", "fp32", True): Pass(56, 108),
}


def elementwise_bytes(call: BlockCall, numerics: Numerics) -> Pass:
    """Bytes that the element-wise operators of a block move for each token."""
    forward, backward = _ELEMENTWISE[numerics.precision, _residual(call, numerics), numerics.compile]
    if call.layer_scale:  # reads and writes both branches; backward, reads them and their gradient once, writes one
        size = _width(numerics)
        forward += 0 if numerics.compile else 2 * 2 * size
        backward += 2 * size if numerics.compile else 2 * 4 * size
    return Pass(forward * call.dim, backward * call.dim)


def attention_bytes(call: BlockCall, numerics: Numerics) -> Pass:
    """Bytes that attention's core moves for each token: all between the qkv and the output projection."""
    x = _width(numerics) * call.dim  # one of q, k, v, o, or of their gradients
    bias = _width(numerics) * call.heads * keys(call)
    kind = kernel(call, numerics)
    if kind == "triton":  # reads q, k, v, writes o; backward: reads q, k, v, do, writes dq, dk, dv into one tensor
        return Pass(4 * x, 7 * x + 2 * table_gradient_bytes(call, numerics))
    if kind == "unfused":
        return _unfused_bytes(call, numerics, x, bias)
    if call.context:  # as below, but only dk and dv are stacked
        both = x * (1 + call.context / call.tokens)
        return Pass(2 * both, 4 * both + 4 * (both - x))
    aligned, gradient = bias * _up(call.tokens, 8) / call.tokens, bias * _up(call.tokens, ROWS) / call.tokens
    if call.bias:  # as below, and the bias; its gradient is written, and read to be summed over the sequences
        return Pass(4 * x + aligned, 8 * x + 6 * x + aligned + 2 * gradient)
    if not call.relative:  # backward: reads q, k, v, o, do, writes dq, dk, dv, and stacks them
        return Pass(4 * x, 8 * x + 6 * x)
    # q copied; q -> bias; bias -> aligned bias; the kernel itself
    forward = 2 * x + (x + bias) + (bias + aligned) + (4 * x + aligned)
    # the kernel; its bias gradient cut, then into q and into the table; dq, dk, dv stacked
    backward = (2 * x + 8 * x + aligned + gradient) + (gradient + bias) + (bias + x) + (3 * x) + (bias + x) + 6 * x
    return Pass(forward, backward)


def table_gradient_bytes(call: BlockCall, numerics: Numerics) -> float:
    """Bytes for each token of the window kernel's partial table gradients, which another kernel sums.

    Each program, one for each window and group of heads, writes its own part, C x 64 in fp32.
    """
    if kernel(call, numerics) != "triton":
        return 0.0
    channels = call.dim // call.heads
    launch = choose_launch(True, padded_tokens(call.tokens), call.heads, channels, numerics.hopper)
    return call.heads / launch.heads * channels * PLACES * 4.0 / call.tokens


def _unfused_bytes(call: BlockCall, numerics: Numerics, x: float, logits: float) -> Pass:
    """Logits through memory: product, scale, softmax in fp32 with its casts, product; and back."""
    full = 4.0 * call.heads * keys(call)  # the logits in fp32
    casts = 0.0 if numerics.precision == "fp32" else 1.0
    forward = (3 * x + 3 * logits) + casts * 2 * (logits + full) + 2 * full + (logits + 3 * x)
    backward = (4 * x + 5 * logits) + casts * 2 * (logits + full) + 3 * full + 2 * logits + 10 * x
    if call.relative:  # q -> bias and logits + bias; their gradients
        forward, backward = forward + 2 * x + 4 * logits, backward + 4 * x + 4 * logits
    if call.bias:  # logits + bias; the sum of its gradient
        forward, backward = forward + 2 * logits, backward + logits
    return Pass(forward, backward)


def attention_work(call: BlockCall, numerics: Numerics) -> Pass:
    """Flops that attention's core really does for each token, including whole tiles and the recomputed logits.

    They bound the time of long sequences; in windows, bytes do.
    """
    kind = kernel(call, numerics)
    if kind == "unfused":
        return Pass(attention_flops(call), 2 * attention_flops(call))
    if kind == "triton":  # tiles of a power of two, 3 products forward and 8 backward, the bias's table among them
        places = padded_tokens(call.tokens)
        width = 1 << (call.dim // call.heads - 1).bit_length()
        product = 2.0 * places * width * max(places, ROWS) * call.heads / call.tokens
        return Pass(3 * product, 8 * product)
    product = 2.0 * _up(call.tokens, ROWS) * _up(keys(call), ROWS) / call.tokens * call.dim
    return Pass(2 * product, 5 * product)


def kernel(call: BlockCall, numerics: Numerics) -> AttentionKind:
    """The kernel that a call gets: Triton's is for contextual relative position in windows of up to 7x7 patches."""
    if numerics.attention == "triton" and (not call.relative or call.tokens > MAX_PREFIX_TOKENS + MAX_WINDOW_SIZE**2):
        return "sdpa"
    return numerics.attention


def kept_bytes(call: BlockCall, numerics: Numerics) -> float:
    """Bytes that a block keeps for the backward pass for each token, its input included.

    The residual stream before each of the two norms, the four inputs of the linear layers (one of them, GELU's output,
    four times as wide), q, k and v, and GELU's input; with LayerScale, what it scales. If compiled, the attention's
    bf16 output is kept in place of the second residual stream, which is recomputed from it. In cross-attention, k, v
    and the context, the input of their layer, are kept for the context's tokens.
    """
    size, residual = _width(numerics), input_bytes(call, numerics) / call.dim
    second = size if numerics.compile else residual
    units = residual + second + size * (2 + (1 if call.context else 3) + 1 + 4 + 4)
    if call.layer_scale:
        units += 2 * size
    if call.context:
        units += size * (2 + call.context_dim / call.dim) * call.context / call.tokens
    statistics = 2 * 2 * 4.0  # mean and deviation of two norms
    return units * call.dim + statistics + _attention_kept(call, numerics)


def input_bytes(call: BlockCall, numerics: Numerics) -> float:
    """Bytes of a block's input for each token: all that `model.grad_checkpointing` keeps."""
    return (4.0 if _residual(call, numerics) == "fp32" else 2.0) * call.dim


def _residual(call: BlockCall, numerics: Numerics) -> Literal["fp32", "bf16"]:
    """The dtype of the residual stream; a decoder's is always fp32."""
    return numerics.residual if numerics.precision == "bf16" and call.encoder else "fp32"


def _attention_kept(call: BlockCall, numerics: Numerics) -> float:
    """What attention keeps besides q, k, v and its output."""
    x, bias = _width(numerics) * call.dim, _width(numerics) * call.heads * keys(call)
    kind = kernel(call, numerics)
    if kind == "triton":
        return 0.0
    if kind == "unfused":  # the softmax, and q besides its scaled copy
        full = 4.0 * call.heads * call.tokens  # a bias that blocks share is in fp32, so the softmax is too
        return bias + (x if call.relative else full if call.bias else 0.0)
    logsumexp = 4.0 * call.heads
    if not call.relative:
        return logsumexp
    return logsumexp + x + bias * _up(call.tokens, 8) / call.tokens  # q's copy, the bias in aligned rows


def _width(numerics: Numerics) -> int:
    """Bytes of a value that is not part of the residual stream."""
    return 2 if numerics.precision == "bf16" else 4


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
