"""CUDA graphs: a function of tensors on a GPU, recorded once and started as a whole."""

from __future__ import annotations

__all__ = ["replayed"]

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]

_WARM = 3  # runs before the one that is recorded, in which libraries set themselves up


def replayed(
    function: Function, inputs: Sequence[Tensor], held: Sequence[Tensor], device: torch.device
) -> Function | None:
    """Record a function as a CUDA graph, whose kernels start together and not one by one.

    The function runs a few times first. Random numbers go on from one replay to the next, as they
    do from call to call. All outputs but the first lie in memory that the next replay writes
    again.

    Args:
        function: From `inputs` followed by `held` to a loss and other tensors.
        inputs: Tensors like those that it will be given, which are copied at each replay.
        held: Tensors that are read and written where they are.
        device: The GPU on which it computes.

    Returns:
        From inputs to the outputs; None where the function waits for the GPU or cannot be
        recorded, or where several elements of an input share their memory.
    """
    if any(_overlaps(each) for each in inputs):
        return None
    own = [
        torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=each.device)
        for each in inputs
    ]
    for target, value in zip(own, inputs, strict=True):
        target.copy_(value)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            _warm(function, [*own, *held], stream)
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                loss, *others = function(*own, *held)
    except RuntimeError:  # it waits, which is found before it is recorded, or has no room
        return None

    def run(*inputs: Tensor) -> Sequence[Tensor | None]:
        for target, value in zip(own, inputs, strict=True):
            target.copy_(value)
        graph.replay()
        return loss.clone(), *others

    return run


def _warm(function: Function, arguments: Sequence[Tensor], stream: torch.cuda.Stream) -> None:
    """Run a function beside what the GPU does else, as recording does; refuse to wait for it."""
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            function(*arguments)  # once without being watched, since libraries are loaded in it
            with _unwaiting():
                for _ in range(_WARM - 1):
                    function(*arguments)
    finally:
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()


@contextlib.contextmanager
def _unwaiting() -> Iterator[None]:
    """Raise where the program would wait for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _overlaps(x: Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True))
