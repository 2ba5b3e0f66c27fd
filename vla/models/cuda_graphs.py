"""CUDA graphs: a fixed sequence of kernels that is recorded once and launched as one.

One decode step of a 7B model with adapters has a few thousand small kernels. Python issues them more slowly than a GPU
runs them, and a graph avoids this cost. The graph records the same function that runs eagerly on a CPU or without
graphs, so both compute the same.

A graph reads weights and writes caches at the addresses that they had when it was recorded. The next launch sees
weights that were updated in place (by copy_trainable() or an optimizer). Weights that were moved, for example to the
host and back, have other addresses. GraphStore notices this, and the graphs are recorded again.
"""

from collections.abc import Callable

import torch
from torch import nn

MAX_KEPT = 4  # graphs per model. Each keeps its inputs, outputs, activations and cache on the device


class GraphedCall:
    """A function from tensors to a tuple of tensors. The first call records it for the shapes of its inputs.

    Args:
        function: must use only tensors with fixed addresses (its inputs, weights, a cache of its own), must not wait
            for the device, and must give the same result if it runs twice in a row.
    """

    def __init__(self, function: Callable[..., tuple[torch.Tensor, ...]]):
        self.function = function
        self.inputs: list[torch.Tensor] | None = None

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Copies of the results of function(*inputs). The inputs must have the shapes of the first call."""
        if self.inputs is None:
            with torch.inference_mode(False), torch.no_grad():  # buffers that any later caller may write
                static = [value.clone() for value in inputs]
                self.replay, self.outputs = capture(self.function, static)
            self.inputs = static
        for static, value in zip(self.inputs, inputs, strict=True):
            if static.shape != value.shape:
                raise ValueError(f"recorded for an input of shape {tuple(static.shape)}, called with {value.shape}")
            static.copy_(value)
        self.replay()
        return tuple(output.clone() for output in self.outputs)


def capture(
    function: Callable[..., tuple[torch.Tensor, ...]], inputs: list[torch.Tensor]
) -> tuple[Callable[[], None], tuple[torch.Tensor, ...]]:
    """Record function(*inputs). Returns a function that launches the graph, and the results that it overwrites."""
    with torch.cuda.device(inputs[0].device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function(*inputs)  # a graph cannot create the handles and workspaces that libraries need at first use
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # other threads, such as NCCL's watchdog or the simulator's, may call CUDA in the meantime
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = function(*inputs)
    return graph.replay, outputs


def can_capture(tensor: torch.Tensor) -> bool:
    """Whether a graph can be recorded: only on a GPU and without autograd."""
    return tensor.is_cuda and not torch.is_grad_enabled()


class GraphStore:
    """The recorded calls of one model, by key.

    Args:
        model: the calls read its weights. All of its modules, such as adapters, must exist already.
    """

    def __init__(self, model: nn.Module):
        # (dict, key) instead of the tensor itself, because a module that is moved gets new buffers
        kinds = [kind for module in model.modules() for kind in (module._parameters, module._buffers)]
        self.places = [(kind, name) for kind in kinds for name, tensor in kind.items() if tensor is not None]
        self.kept: dict[tuple, object] = {}
        self.addresses: list[int] = []

    def get(self, key: tuple, make: Callable[[], object]) -> object:
        """The result of make() for this key. If weights have moved, everything is made again."""
        addresses = [kind[name].data_ptr() for kind, name in self.places]
        if addresses != self.addresses:
            self.kept, self.addresses = {}, addresses
        if key not in self.kept:
            if len(self.kept) == MAX_KEPT:
                self.kept.pop(next(iter(self.kept)))  # the oldest
            self.kept[key] = make()
        return self.kept[key]

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of the model has its own weights, so it begins without graphs."""
        return None
