"""The forward and the backward pass of a module as two CUDA graphs, each launched by the CPU in one call.

Launching a step's thousands of kernels one by one takes some CPUs longer than the GPU needs to compute them: in
docs/speed.md, twice as long for ViT-L with the fast variant. A graph replays what was captured, in the same memory. So
its shapes are fixed, and nothing in it may wait for the GPU or depend on its results.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

Function = Callable[..., dict[str, Tensor]]
WARMUP = 2  # passes before the capture: they compile, and allocate what libraries keep


class Recording:
    """The kernels that a function launched, captured in a CUDA graph for replay.

    Attributes:
        result: what the function returned; tensors in it are overwritten by each replay.
    """

    def __init__(self, function: Callable[[], Any], before: "Recording | None" = None):
        """Captures `function`; shares the memory of `before`, a recording that is always replayed first."""
        self._graph = torch.cuda.CUDAGraph()
        pool = before._graph.pool() if before else None
        # Other threads may go on, such as the one that copies the next batch to pinned memory.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.result = function()

    def replay(self) -> None:
        self._graph.replay()


class _Graphs:
    """Both passes of a function on inputs of one layout.

    Attributes:
        parameters: those that the loss depends on.
        differentiated: the inputs that autograd sees: the parameters, or a substitute.
        gradients: of the parameters, written by each backward pass.
        upstream: the gradient of the loss.
    """

    def __init__(self, module: nn.Module, function: Function, leaves: list[Any], structure: Any, hooked: bool):
        self.inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.layout = layout(leaves, structure)
        self._all_parameters = list(module.parameters())
        self._addresses = [parameter.data_ptr() for parameter in self._all_parameters]
        # Engines keep autograd nodes of their parameters that belong to another stream, which a capture must not touch.
        # So the graphs are captured with other parameters, in the same memory.
        plain = _Plain(module, function)
        aliases: dict[str, Tensor] = {
            name: nn.Parameter(p.detach(), p.requires_grad) for name, p in plain.named_parameters()
        }

        def run() -> dict[str, Tensor]:
            args, kwargs = tree_unflatten(self.inputs, structure)
            with _uncached_autocast():
                return functional_call(plain, aliases, args, kwargs)

        trained = {name: alias for name, alias in aliases.items() if alias.requires_grad}
        with _state_kept(module):
            gradients = warm_up(lambda: torch.autograd.grad(run()["loss"], [*trained.values()], allow_unused=True))
            used = [name for name, gradient in zip(trained, gradients, strict=True) if gradient is not None]
            del gradients
            self.parameters = [plain.get_parameter(name) for name in used]
            # From the parameters, autograd would copy each gradient by a kernel of its own.
            substitute = torch.ones((), device=self.parameters[0].device, requires_grad=True)
            self.differentiated = self.parameters if hooked else [substitute]
            self._aliases = [aliases[name] for name in used]
            # Outside the graphs' pool, whose memory another forward pass may reuse; laid out like the parameters.
            self.gradients = [torch.empty_like(alias) for alias in self._aliases]
            self.forward = Recording(run)
            self.upstream = torch.ones_like(self.forward.result["loss"])
            self.backward = Recording(self._differentiate, self.forward)

    def _differentiate(self) -> None:
        found = torch.autograd.grad(self.forward.result["loss"], self._aliases, self.upstream)
        torch._foreach_copy_(self.gradients, list(found))

    def moved(self) -> bool:
        """Whether parameters have moved in memory."""
        return self._addresses != [parameter.data_ptr() for parameter in self._all_parameters]

    def differentiate(self, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Does the backward pass; returns the gradients if autograd is to accumulate them."""
        self.upstream.copy_(upstream)
        if self.differentiated is self.parameters:
            self.backward.replay()
            return tuple(self.gradients)
        # A parameter's gradient may be the graph's output itself, which is overwritten now.
        for parameter, written in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is not None and parameter.grad is written:
                parameter.grad = parameter.grad.clone()
        self.backward.replay()
        sums = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if sums:
            torch._foreach_add_(sums, self.gradients)
        else:
            for parameter, written in zip(self.parameters, self.gradients, strict=True):
                parameter.grad = written
        return (None,)

    def __call__(self, leaves: list[Any]) -> dict[str, Tensor]:
        for mine, given in zip(self.inputs, leaves, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(given, non_blocking=True)
        loss, *others = _Replay.apply(self, *self.differentiated)
        names = [name for name in self.forward.result if name != "loss"]
        return {"loss": loss, **dict(zip(names, others, strict=True))}


class _Replay(torch.autograd.Function):
    """For autograd and DeepSpeed's hooks, one operator from all parameters, or a substitute, to the loss."""

    @staticmethod
    def forward(ctx: Any, graphs: _Graphs, *differentiated: Tensor) -> tuple[Tensor, ...]:
        ctx.graphs = graphs
        graphs.forward.replay()
        result = dict(graphs.forward.result)
        # The next replay overwrites the originals.
        loss, others = result.pop("loss").detach().clone(), [value.detach().clone() for value in result.values()]
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.graphs.differentiate(upstream)


class _Plain(nn.Module):
    """A module that runs another function than its `forward` when it is called."""

    def __init__(self, module: nn.Module, function: Function):
        super().__init__()
        self.module, self._function = module, function

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return self._function(*args, **kwargs)


class GraphedForward:
    """Replaces a module's `forward`, which returns a dict with a scalar `loss` and numbers to log.

    The graphs are captured at the first call in training, and again when parameters have moved in memory. Evaluation
    and inputs of other shapes run the function itself. The backward pass of a call must be done before the next call,
    or it is lost.

    Args:
        hooked: whether something waits for the gradient of each parameter, as ZeRO does from stage 1 on; autograd then
            delivers it. Otherwise it is written to its place directly, in a hundredth of the time.

    Raises, when called:
        ValueError: the module cannot be captured.
        torch.OutOfMemoryError: as the function itself.
    """

    def __init__(self, module: nn.Module, hooked: bool):
        self._module, self._function, self._hooked = module, module.forward, hooked
        self._graphs: _Graphs | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if not (self._module.training and torch.is_grad_enabled()):
            return self._function(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        if self._graphs is None or self._graphs.moved():
            self._graphs = None
            try:
                self._graphs = _Graphs(self._module, self._function, leaves, structure, self._hooked)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                problem = f"a step cannot be captured as a CUDA graph ({str(error).splitlines()[0]})"
                raise ValueError(f"{problem}: set model.cuda_graphs=off") from error
        if layout(leaves, structure) != self._graphs.layout:
            return self._function(*args, **kwargs)
        return self._graphs(leaves)


def graph_steps(module: nn.Module, stage: int) -> None:
    """Makes a module on a GPU train with CUDA graphs, in the given ZeRO stage."""
    module.forward = GraphedForward(module, hooked=stage > 0)


def layout(leaves: list[Any], structure: Any) -> tuple[Any, ...]:
    """What must be equal for a graph to be used: shapes and dtypes of tensors, and everything that is no tensor."""
    return structure, *((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)


def _uncached_autocast() -> torch.autocast:
    """The surrounding autocast without its cache of low-precision weights, which would be in the graph's memory."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    return torch.autocast("cuda", dtype, enabled, cache_enabled=False)


def warm_up(function: Callable[[], Any]) -> Any:
    """Calls a function a few times on a side stream, as a capture requires; returns the last result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            result = function()
    torch.cuda.current_stream().wait_stream(stream)
    return result


@contextmanager
def _state_kept(module: nn.Module) -> Iterator[None]:
    """Restores the random state and buffers, such as a batch norm's averages, afterwards."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    state = torch.cuda.get_rng_state()
    yield
    torch.cuda.set_rng_state(state)
    for buffer, before in buffers:
        buffer.copy_(before)
