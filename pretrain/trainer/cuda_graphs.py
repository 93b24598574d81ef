"""The forward and the backward pass of a module as two CUDA graphs, each of which the CPU starts with one call.

Started one by one, a step's thousands of kernels take some CPUs longer than the GPU needs to compute them: in
docs/speed.md, twice as long for ViT-L by the fast variant. A graph computes what was captured, from and into the same
memory: the shapes are fixed, and nothing in it may wait for the GPU or depend on its results.
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
    """What a function did, to be done again: its kernels, captured in a CUDA graph.

    Attributes:
        result: what the function returned; tensors in it are overwritten by each replay.
    """

    def __init__(self, function: Callable[[], Any], before: "Recording | None" = None):
        """With `before`, a recording that is always replayed first, whose memory this one shares."""
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
        differentiated: the inputs of the pass, for autograd: these, or a substitute.
        gradients: theirs, written by each backward pass.
        upstream: the gradient of the loss.
    """

    def __init__(self, module: nn.Module, function: Function, leaves: list[Any], structure: Any, hooked: bool):
        self.inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.layout = layout(leaves, structure)
        self._all_parameters = list(module.parameters())
        self._addresses = [parameter.data_ptr() for parameter in self._all_parameters]
        # Engines keep nodes of autograd that belong to their parameters and to another stream, which a capture must not
        # touch: the graphs are captured with other parameters, in the same memory.
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
            # Autograd would copy each gradient by a kernel of its own.
            substitute = torch.ones((), device=self.parameters[0].device, requires_grad=True)
            self.differentiated = self.parameters if hooked else [substitute]
            self._aliases = [aliases[name] for name in used]
            # Not among what the graphs allocate, which another forward pass may use anew; laid out as the parameters.
            self.gradients = [torch.empty_like(alias) for alias in self._aliases]
            self.forward = Recording(run)
            self.upstream = torch.ones_like(self.forward.result["loss"])
            self.backward = Recording(self._differentiate, self.forward)

    def _differentiate(self) -> None:
        found = torch.autograd.grad(self.forward.result["loss"], self._aliases, self.upstream)
        torch._foreach_copy_(self.gradients, list(found))

    def moved(self) -> bool:
        """Whether parameters are elsewhere in memory than they were."""
        return self._addresses != [parameter.data_ptr() for parameter in self._all_parameters]

    def differentiate(self, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The backward pass; returns the gradients that autograd adds to what parameters have, if it shall."""
        self.upstream.copy_(upstream)
        if self.differentiated is self.parameters:
            self.backward.replay()
            return tuple(self.gradients)
        # What the graph writes is the gradient itself, until another micro-batch overwrites it.
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
    """To autograd, and to hooks of DeepSpeed's, one operator from all parameters, or a substitute, to the loss."""

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
    """A module that is called by another function than its `forward`."""

    def __init__(self, module: nn.Module, function: Function):
        super().__init__()
        self.module, self._function = module, function

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return self._function(*args, **kwargs)


class GraphedForward:
    """Takes the place of a module's `forward`, which returns a dict with a scalar `loss` and numbers to be logged.

    The graphs are captured at the first call in training, and again when parameters have moved in memory; evaluation,
    and inputs of other shapes, get the function itself. Between a call and the next one, its backward pass has to be
    done or is lost.

    Args:
        hooked: whether something waits for the gradient of each parameter, as ZeRO does from stage 1 on; autograd then
            hands it out. Otherwise it is put where it belongs, in a hundredth of the time.

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
                problem = f"no CUDA graph can be made of a step ({str(error).splitlines()[0]})"
                raise ValueError(f"{problem}: set model.cuda_graphs=off") from error
        if layout(leaves, structure) != self._graphs.layout:
            return self._function(*args, **kwargs)
        return self._graphs(leaves)


def graph_steps(module: nn.Module, stage: int) -> None:
    """From now on a module on a GPU trains by CUDA graphs, in a ZeRO stage."""
    module.forward = GraphedForward(module, hooked=stage > 0)


def layout(leaves: list[Any], structure: Any) -> tuple[Any, ...]:
    """What has to be equal for a graph to serve: shapes and dtypes of tensors, and all that is no tensor."""
    return structure, *((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)


def _uncached_autocast() -> torch.autocast:
    """As it is around, but weights in lower precision are not kept: they would be memory of the graph."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    return torch.autocast("cuda", dtype, enabled, cache_enabled=False)


def warm_up(function: Callable[[], Any]) -> Any:
    """The last result of a function that is called a few times beside the current stream, as a capture needs it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            result = function()
    torch.cuda.current_stream().wait_stream(stream)
    return result


@contextmanager
def _state_kept(module: nn.Module) -> Iterator[None]:
    """Random numbers and buffers, such as a batch norm's averages, are afterwards as they were before."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    state = torch.cuda.get_rng_state()
    yield
    torch.cuda.set_rng_state(state)
    for buffer, before in buffers:
        buffer.copy_(before)
