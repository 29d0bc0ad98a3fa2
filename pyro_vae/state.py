"""What a captured program depends on besides its inputs, and how a run of it is undone."""

from __future__ import annotations

__all__ = [
    "FLOATS",
    "append_state",
    "called",
    "changed",
    "float_type",
    "kind",
    "plain",
    "precision",
    "put_back",
    "reached",
    "restored",
    "unassigned",
    "undrawn",
    "ungraded",
    "unmade",
    "unseen",
]

import contextlib
import inspect
import random
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from pyro_vae.capture import NotCapturableError

FLOATS = (float, np.floating)  # inputs of a graph, as tensors are
# Arguments of the same value are the same.
_PLAIN = (bool, int, str, bytes, complex, range, np.generic, torch.device, torch.dtype, Enum)
_TABLES = frozenset(vars(nn.Module()))  # in which a module has what is in it


def reached(*programs: Any) -> Iterator[Any]:
    """Owners of programs, and modules and tensors in these, in closures and global variables."""
    seen, queue = set[int](), list(programs)
    while queue:
        each = queue.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, (nn.Module, Tensor)):
            yield each
        elif isinstance(each, partial):
            queue += [each.func, *each.args, *each.keywords.values()]
        elif isinstance(each, MethodType):
            owner = each.__self__
            attributes = getattr(owner, "__dict__", {}).items()
            if attributes and not isinstance(owner, (nn.Module, type)):
                yield owner
            queue += [owner, each.__func__]
            queue += [value for name, value in attributes if name not in _TABLES]
        elif isinstance(each, FunctionType):
            if inspect.unwrap(each) is not each:
                queue.append(inspect.unwrap(each))
            if (each.__module__ or "").partition(".")[0] not in ("pyro", "torch"):
                queue += _named(each, each.__code__)
        elif isinstance(each, (dict, list, tuple)):
            within = each.values() if isinstance(each, dict) else each
            queue += [one for one in within if isinstance(one, nn.Module)]
        elif _is_program(each):
            yield each
            queue += [type(each).__call__, *vars(each).values()]


def _is_program(value: Any) -> bool:
    """Whether a value is called by a method that is written in Python, and no class."""
    if isinstance(value, type) or not callable(value) or not hasattr(value, "__dict__"):
        return False
    return isinstance(type(value).__call__, FunctionType)


def _named(function: FunctionType, code: CodeType) -> Iterator[Any]:
    """What a function, or one within it, names outside of itself."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # of a cell that is still empty
            yield cell.cell_contents
    for name in code.co_names:
        if name in function.__globals__:
            yield function.__globals__[name]
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _named(function, inner)


@contextlib.contextmanager
def called(known: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """Collect modules that are called and not in `known`, whose buffers are put back.

    What is made for one call, and is gone after it, is not among them.
    """
    within = {id(each) for module in known for each in module.modules()}
    found, modules = list[weakref.ref[nn.Module]](), list[nn.Module]()

    def note(module: nn.Module, _: Any) -> None:
        if id(module) not in within:
            within.update(map(id, module.modules()))
            found.append(weakref.ref(module))
            stack.enter_context(restored(list(module.buffers())))

    with contextlib.ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(note).remove)
        yield modules
    modules += [module for each in found if (module := each()) is not None]


def append_state(module: nn.Module, state: list[Any]) -> None:
    """Append what a graph depends on in a module: cheap, since it is asked before each step."""
    state += [module, module.training, *module._forward_hooks, *module._forward_pre_hooks]
    state += module.__dict__.get("_pyro_samples", {}).values()
    for parameter in module._parameters.values():
        if parameter is not None:
            state += [id(parameter), parameter.requires_grad, parameter.dtype, parameter.device]
    for buffer in module._buffers.values():
        state.append(id(buffer))
    for child in module._modules.values():
        if child is not None:
            append_state(child, state)


def kind(leaf: Any) -> Any:
    """What an argument must have in common with that of a graph."""
    if isinstance(leaf, Tensor):
        strides = leaf.stride() if leaf.layout is torch.strided else leaf.layout
        return leaf.shape, strides, leaf.dtype, leaf.device, leaf.requires_grad
    if isinstance(leaf, FLOATS):
        return float
    if isinstance(leaf, slice):
        return slice, leaf.start, leaf.stop, leaf.step
    return type(leaf), leaf if leaf is None or isinstance(leaf, _PLAIN) else id(leaf)


def unseen(leaves: Sequence[Any]) -> list[str]:
    """The types of arguments with numbers in which a graph would not see another value."""
    return [
        type(leaf).__name__
        for leaf in leaves
        if not isinstance(leaf, (Tensor, nn.Module, type))
        for within in (leaf, *getattr(leaf, "__dict__", {}).values())
        if isinstance(within, np.ndarray) or (within is not leaf and _is_tensor(within))
    ]


def plain(held: Sequence[Any]) -> dict[tuple[int, str], Any]:
    """The plain attributes of some objects by identity, as far as a run may not change them."""
    return {
        (id(each), name): value
        for each in held
        for name, value in getattr(each, "__dict__", {}).items()
        if isinstance(value, (bool, int, float, str)) and name != "max_plate_nesting"
    }


def changed(held: Sequence[Any], before: dict[tuple[int, str], Any]) -> dict[tuple[int, str], Any]:
    """The plain attributes of some objects that were otherwise before, as they were then."""
    now = plain(held)
    return {
        key: value
        for key, value in before.items()
        if now.get(key) is not value and now.get(key) != value
    }


@contextlib.contextmanager
def restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put the values of tensors back, of those that have one yet."""
    before = [(each, each.clone()) for each in tensors if not is_lazy(each)]
    try:
        yield
    finally:
        with torch.no_grad():
            for each, value in before:
                if not _equal(each, value):
                    each.copy_(value)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same, NaN included."""
    if one.layout is not torch.strided:
        return True  # which nothing changes in place
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


@contextlib.contextmanager
def ungraded(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Take gradients away for a while, and put them back."""
    before = [(each, each.grad) for each in tensors if each.is_leaf]
    try:
        for each, _ in before:
            each.grad = None
        yield
    finally:
        for each, gradient in before:
            each.grad = gradient


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Put the generators of Python and NumPy back: a run that is prepared again draws nothing."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


@contextlib.contextmanager
def unassigned(held: Sequence[Any]) -> Iterator[None]:
    """Undo and refuse that a capture assigns attributes, which would be its fake tensors."""
    tables = [table for each in held for table in _tables(each)]
    before = [dict(table) for table in tables]
    changed = list[str]()
    try:
        yield
    finally:
        for table, values in zip(tables, before, strict=True):
            new = {name: value for name, value in table.items() if value is not values.get(name)}
            changed += [name for name, value in new.items() if pytree.tree_any(_is_tensor, value)]
            table.clear()
            table.update(values)
    if changed:
        raise NotCapturableError(f"every run assigns its attribute '{changed[0]}' anew")


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _tables(held: Any) -> list[dict[str, Any]]:
    """Where an object keeps its attributes."""
    tables = [vars(held)]
    if isinstance(held, nn.Module) and not isinstance(held, torch.jit.ScriptModule):
        tables += [held._parameters, held._buffers]
    return tables


@contextlib.contextmanager
def unmade() -> Iterator[None]:
    """Undo and refuse that a capture makes parameters, which would be its fake tensors."""
    store = pyro.get_param_store()
    before = set(store.keys())
    try:
        yield
    finally:
        new = [name for name in store.keys() if name not in before]  # noqa: SIM118
        for name in new:
            del store[name]
    if new:
        raise NotCapturableError(f"its parameter '{new[0]}' is not made by the first run")


def put_back(trace: poutine.Trace, before: Mapping[str, Tensor]) -> list[str]:
    """Undo what a run has assigned to the param store beside making its parameters.

    `before` is what was there. Returns the names of these entries.
    """
    store = pyro.get_param_store()
    now = dict(store.named_parameters())
    assigned = [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "param" and name in now
        if now[name] is not before.get(name, site["value"].unconstrained())
    ]
    for name in assigned:
        store[name] = trace.nodes[name]["value"].detach()
    return assigned


def precision() -> tuple[Any, ...]:
    """Settings of torch's that a graph keeps as they were when it was captured."""
    autocast = [
        (torch.is_autocast_enabled(each), torch.get_autocast_dtype(each))
        for each in ("cpu", "cuda")
    ]
    exact = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    return *autocast, *exact, torch.backends.mkldnn.enabled


def float_type(
    leaves: Sequence[Any], modules: Iterable[nn.Module], others: Iterable[Tensor]
) -> torch.dtype:
    """The type of the numbers among a graph's inputs, in which no single tensor is promoted."""
    within = (each for module in modules for each in module.parameters())
    tensors = (each for each in (*leaves, *others, *within) if isinstance(each, Tensor))
    double = any(each.dtype == torch.float64 for each in tensors)
    single = torch.promote_types(torch.float32, torch.get_default_dtype())
    return torch.float64 if double else single
