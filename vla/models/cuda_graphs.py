"""CUDA graphs: a fixed sequence of kernels, recorded once and launched as one.

One decode step of a 7B model with adapters is some thousand small kernels, which Python issues more slowly than a GPU
runs them; a graph leaves that out. What is recorded is the function that runs eagerly on a CPU and wherever graphs are
off, so both compute the same.

A graph reads weights and writes caches at the addresses they had when it was recorded. Weights that are updated in
place (copy_trainable, an optimizer) are seen by the next launch. Weights that were moved (to the host and back, say)
have other addresses: that is noticed, and graphs are recorded again.
"""

from collections.abc import Callable

import torch
from torch import nn

MAX_KEPT = 4  # of one model; each keeps its inputs, outputs, activations and cache on the device


class GraphedCall:
    """function(*tensors) -> tuple of tensors, recorded at the first call for that call's shapes.

    Args:
        function: touches only tensors that stay where they are (what it is given, weights, a cache of its own), never
            waits for the device, and gives the same again when it is run twice in a row.
    """

    def __init__(self, function: Callable[..., tuple[torch.Tensor, ...]]):
        self.function = function
        self.inputs: list[torch.Tensor] | None = None

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Copies of what function(*inputs) gives; inputs must have the shapes of the first call's."""
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
    """Record function(*inputs). Returns what launches the graph, and the tensors that each launch overwrites."""
    with torch.cuda.device(inputs[0].device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function(*inputs)  # handles and workspaces that libraries make at first use can not be made in a graph
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # other threads, such as NCCL's watchdog or the simulator's, may go on calling CUDA meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = function(*inputs)
    return graph.replay, outputs


def can_capture(tensor: torch.Tensor) -> bool:
    """Graphs record kernels of a GPU, and no autograd."""
    return tensor.is_cuda and not torch.is_grad_enabled()


class GraphStore:
    """The recorded calls of one model, by key.

    Args:
        model: whose weights the calls read. Its modules must be all there already.
    """

    def __init__(self, model: nn.Module):
        # places, not tensors: a module that is moved gets new buffers
        kinds = [kind for module in model.modules() for kind in (module._parameters, module._buffers)]
        self.places = [(kind, name) for kind in kinds for name, tensor in kind.items() if tensor is not None]
        self.kept: dict[tuple, object] = {}
        self.addresses: list[int] = []

    def get(self, key: tuple, make: Callable[[], object]) -> object:
        """What make() gave for this key; everything is made anew where weights lie elsewhere than before."""
        addresses = [kind[name].data_ptr() for kind, name in self.places]
        if addresses != self.addresses:
            self.kept, self.addresses = {}, addresses
        if key not in self.kept:
            if len(self.kept) == MAX_KEPT:
                self.kept.pop(next(iter(self.kept)))  # the oldest
            self.kept[key] = make()
        return self.kept[key]

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of the model has weights of its own, so it begins without."""
        return None
