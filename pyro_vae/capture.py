"""Capture: a Pyro objective, run once and kept as a graph of tensor operations.

Model, guide and objective run under fake tensors while every operation is written down; the
graph then repeats the operations without Pyro. Parameters, buffers and whatever other tensors
the programs hold are captured by reference, so that a change of their values is seen.
"""

from __future__ import annotations

__all__ = ["Graph", "NotCapturableError", "capture", "keep_freed_memory"]

import contextlib
import functools
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro.util
import torch
from pyro.ops.provenance import ProvenanceTensor, detach_provenance, get_provenance
from torch import Tensor, fx
from torch._decomp import get_decompositions
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from typing_extensions import override

from pyro_vae.products import fast_products
from pyro_vae.replay import replayed
from pyro_vae.scoring import validation

_aten = torch.ops.aten
# What makes of a tensor a value of Python's.
_READS = (
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__complex__,
    Tensor.item,
    Tensor.tolist,
)
# Likewise, and not refused by torch itself where the tensor is computed in the graph.
_UNREFUSED = (Tensor.__index__, Tensor.is_nonzero, torch.is_nonzero)
_READING = (_aten._local_scalar_dense.default, _aten.equal.default)
_HELD = "the value of a tensor that it holds is no part of a graph"
# What sets the random state, as checkpoints of activations and seeded handlers do.
_SEEDING = [
    (place, name)
    for place in (torch, torch.random)
    for name in ("manual_seed", "seed", "set_rng_state")
]
_COPIES = (_aten._to_copy.default, _aten.copy_.default)


class NotCapturableError(Exception):
    """A program has no one graph; the message names the line and the reason."""


@dataclass(frozen=True)
class Graph:
    """A function of tensors as a graph.

    Attributes:
        module: The operations, from the inputs followed by `held` to the outputs.
        held: The tensors that the programs hold, by reference.
        changed: Identities of those of them, and of inputs, that the operations change in place.
        copied: Numbers that the programs hold on the CPU, such as the weight of an objective,
            and their copies on the GPU, which stand in `held` in their place.
    """

    module: fx.GraphModule
    held: Sequence[Tensor]
    changed: Set[int]
    copied: Sequence[tuple[Tensor, Tensor]] = ()

    @property
    def gpu(self) -> torch.device | None:
        """The one GPU that all is computed on, but for numbers that the program writes down."""
        numbers, devices = set[fx.Node](), set[torch.device]()
        for node in self.module.graph.nodes:
            made = tree_leaves(node.meta.get("val"))
            places = {each.device for each in made if isinstance(each, Tensor)}
            if {place.type for place in places} == {"cpu"} and _written_down(node, numbers):
                numbers.add(node)
            elif node.target in _COPIES and not numbers.isdisjoint(node.all_input_nodes):
                return None  # from memory that would be gone when the copy is made again
            else:
                devices |= places
        place = devices.pop() if len(devices) == 1 else None
        return place if place is not None and place.type == "cuda" else None

    def interpreted(self, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        """Return the graph as a function that runs operation after operation.

        Args:
            inputs: Tensors like those that it will be given.
        """
        return self._bound(self.module, inputs)

    def compiled(self, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        """Return the graph as a function, compiled by torch's inductor.

        Dynamo, which `torch.compile` puts before it, is left out: there is a graph already, and
        `CompiledSVI` asks itself before each step whether it still holds.

        Args:
            inputs: Tensors like those that it will be given.
        """
        given: list[Any] = [*inputs, *self.held]
        # Random numbers are those of torch's own generators, as where it is not compiled. Vectors
        # of the processor's are used without compiling a program first to see that they can be.
        plain: dict[str, Any] = {"fallback_random": True, "cpp.vec_isa_ok": True}
        with torch.no_grad(), warnings.catch_warnings():
            # TensorFloat32 is as exact as three decimal digits, and the user's to choose; what
            # torch uses of torch's is not.
            warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
            warnings.simplefilter("ignore", DeprecationWarning)
            import torch._inductor as inductor  # long to import, and only for those who compile

            module = _traced(self.module, given, _rewritten())
            if all(each.device.type == "cpu" for each in given):
                # Compiling the calls too saves a twentieth of a small step; what inductor cannot
                # call from C++ it calls from Python.
                with contextlib.suppress(Exception):
                    calls = {**plain, "cpp_wrapper": True}
                    return self._bound(inductor.compile(module, given, calls), inputs)
            return self._bound(_dense(inductor.compile(module, given, plain), module), inputs)

    def _bound(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> Callable[..., Any]:
        """The function of the inputs alone: on one GPU as a CUDA graph, if it can be one."""
        held, copied, device = self.held, self.copied, self.gpu
        repeated = None
        if device:
            with torch.no_grad():
                repeated = replayed(function, inputs, held, device)
        else:
            keep_freed_memory()
        places = [each.data_ptr() for each in held] if repeated else []

        def run(*inputs: Tensor) -> Any:
            with torch.no_grad():  # the gradients are in the graph
                for number, copy in copied:
                    copy.fill_(number.item())
                # A CUDA graph reads where a parameter lay, even after the module went elsewhere.
                if repeated and places == [each.data_ptr() for each in held]:
                    return repeated(*inputs)
                return function(*inputs, *held)

        return run


@functools.cache  # once in a process is enough
def keep_freed_memory() -> None:
    """Let the C library keep what a step has freed, for the next one.

    GNU's gives the top of its heap back to the system from twice the largest block on that it
    has seen freed. A step frees its gradients and more, megabytes, and asking for them again page
    by page can take half of it. So it is shown a block of nearly the 32 MiB that it heeds, of
    which no page is used. Where one is in the heap already, there is room for a step.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


def _dense(function: Callable[..., Any], module: fx.GraphModule) -> Callable[..., Any]:
    """A compiled graph whose outputs lie in memory as those of the graph do.

    What is compiled for a GPU may return a part of a matrix that was made larger.
    """
    *_, output = module.graph.nodes
    strides = [None if node is None else node.meta["val"].stride() for node in output.args[0]]

    def run(*inputs: Tensor) -> list[Tensor | None]:
        found = function(*inputs)
        return [
            value
            if value is None or stride is None or value.stride() == stride
            else torch.empty_strided(
                value.shape, stride, dtype=value.dtype, device=value.device
            ).copy_(value)
            for value, stride in zip(found, strides, strict=True)
        ]

    return run


def capture(
    function: Callable[..., Any], inputs: Sequence[Tensor], parameters: Sequence[Tensor]
) -> Graph:
    """Capture a loss and its gradients.

    Random state, buffers and parameters stay as they are.

    Args:
        function: From `inputs` to a loss; what it calls ``backward`` on is differentiated.
        inputs: Tensors like those that the graph will be given.
        parameters: Parameters whose gradients follow the loss in the outputs, None for those
            on which nothing depends.

    Raises:
        NotCapturableError: The function has no one graph: it branches on data, for instance.
    """

    def traced(*given: Tensor) -> tuple[Tensor | None, ...]:
        recording = _Recording()
        with recording, _Refusing():
            loss = function(*given)
        return torch.as_tensor(loss).detach(), *recording.gradients(parameters)

    trace = make_fx(traced, tracing_mode="fake", _allow_non_fake_inputs=True)
    try:
        with validation(False), _marking(), _unknown(), _unseeded():
            module: fx.GraphModule = trace(*inputs)
    except Exception as error:  # whatever tracer or program meets; eagerly the program runs
        raise NotCapturableError(_located(error)) from error
    module.graph.eliminate_dead_code()
    _place(module)
    held = _lift(module)
    return _moved(Graph(module, held, _changed(module, [*inputs, *held])), inputs)


class _Recording(TorchFunctionMode):
    """Lets an objective differentiate and read its loss while it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.roots: list[tuple[Tensor, Tensor | None]] = []

    @override
    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if ProvenanceTensor in types:
            origins = get_provenance([args, kwargs])
            args, kwargs = detach_provenance([args, kwargs])
            result = self.__torch_function__(function, (), args, kwargs)
            if function is Tensor.item:
                return result
            return tree_map_only(Tensor, lambda each: _marked(each, origins), result)
        held = function in _READS and not isinstance(args[0], FakeTensor)
        if (held or function in _UNREFUSED) and not _warns(sys._getframe(1)):
            raise NotImplementedError(_HELD)
        if function is Tensor.item and args[0].is_floating_point():
            value = args[0].detach()  # what Pyro adds up is a Python number, in double precision
            return value.double() if _by_pyro(sys._getframe(1)) else value
        if function is Tensor.backward:
            self.roots.append((args[0], [*args[1:2], kwargs.get("gradient")][0]))
            return None
        if function in (Tensor.__bool__, Tensor.register_hook) and _warns(sys._getframe(1)):
            return False
        if function is Tensor.register_hook:
            raise NotImplementedError("hooks on tensors are no part of a graph")
        return function(*args, **kwargs)

    def gradients(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of everything that was differentiated, added up as autograd would."""
        total: list[Tensor | None] = [None] * len(parameters)
        trained = [index for index, each in enumerate(parameters) if each.requires_grad]
        for root, gradient in self.roots if trained else ():
            slopes = torch.autograd.grad(
                root,
                [parameters[index] for index in trained],
                gradient,
                retain_graph=True,
                allow_unused=True,
            )
            for index, new in zip(trained, slopes, strict=True):
                old = total[index]
                total[index] = old if new is None else new if old is None else old + new
        # Fused optimisers read a gradient in the order in which its parameter lies in memory, and
        # clipping writes to it: one gradient of two parameters is two tensors.
        own = set[int]()
        found = list[Tensor | None]()
        for slope, each in zip(total, parameters, strict=True):
            if slope is None or (slope.stride() == each.stride() and id(slope) not in own):
                found.append(slope)
            else:  # a view of one number has its strides too, and no memory of its own
                found.append(torch.empty_like(each).copy_(slope))
            own.add(id(slope))
        return found


class _Refusing(TorchDispatchMode):
    """Refuses to read the value of a tensor that the programs hold, however they do."""

    @override
    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        real = (isinstance(x, Tensor) and not isinstance(x, FakeTensor) for x in args)
        if operation in _READING and any(real):
            raise NotImplementedError(_HELD)
        return operation(*args, **(kwargs or {}))


@contextlib.contextmanager
def _unknown() -> Iterator[None]:
    """Let nothing that is computed from tensors that the programs hold have a known value."""
    before = FakeTensorMode.may_turn_const
    FakeTensorMode.may_turn_const = lambda self, t: False  # type: ignore[method-assign]
    try:
        yield
    finally:
        FakeTensorMode.may_turn_const = before  # type: ignore[method-assign]


@contextlib.contextmanager
def _unseeded() -> Iterator[None]:
    """Refuse that the random state is set, which a graph would not repeat."""

    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError("setting the random state is no part of a graph")

    before = [getattr(place, name) for place, name in _SEEDING]
    try:
        for place, name in _SEEDING:
            setattr(place, name, refuse)
        yield
    finally:
        for (place, name), function in zip(_SEEDING, before, strict=True):
            setattr(place, name, function)


def _marked(value: Tensor, origins: frozenset[str]) -> Any:
    """A tensor with the names of the sites that it comes from, as TraceGraph_ELBO needs them."""
    if not origins:
        return value
    with unset_fake_temporarily(), disable_proxy_modes_tracing():
        marked = torch.empty(0).as_subclass(ProvenanceTensor)
    marked._t, marked._provenance = value, origins
    return marked


@contextlib.contextmanager
def _marking() -> Iterator[None]:
    """Let Pyro mark fake tensors, whose class cannot be another's too."""
    before = ProvenanceTensor.__new__
    ProvenanceTensor.__new__ = lambda cls, value, origins=frozenset(): _marked(value, origins)
    try:
        yield
    finally:
        ProvenanceTensor.__new__ = before


def _warns(frame: Any) -> bool:
    """Whether Pyro looks for a NaN, to warn of it and for nothing else."""
    while frame.f_code.co_filename == __file__:
        frame = frame.f_back
    inside = frame.f_code.co_filename == pyro.util.__file__
    return inside and frame.f_code.co_name.startswith(("warn_if_", "torch_is"))


def _by_pyro(frame: Any) -> bool:
    """Whether Pyro or an objective of this package's reads a number."""
    while frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return frame.f_globals.get("__name__", "").partition(".")[0] in ("pyro", "pyro_vae")


def _place(module: fx.GraphModule) -> None:
    """Bring numbers that the program writes down to where it has them, once and not every time.

    ``torch.tensor([1.0, 2.0], device="cuda")`` is a copy between memories, which is waited for.
    """
    graph = module.graph
    for index, node in enumerate(list(graph.nodes)):
        if node.target is not _aten._to_copy.default:
            continue
        (source,) = node.args
        if source.target is not _aten.lift_fresh_copy.default or len(source.users) > 1:
            continue
        (value,) = source.args
        if value.op != "get_attr":
            continue
        name = f"_placed_{index}"
        written = getattr(module, value.target)
        module.register_buffer(name, _aten._to_copy.default(written, **node.kwargs))
        with graph.inserting_before(node):
            placed = graph.get_attr(name)
            own = graph.call_function(_aten.lift_fresh_copy.default, (placed,))
        placed.meta, own.meta = dict(node.meta), dict(node.meta)
        node.replace_all_uses_with(own)
        graph.erase_node(node)
        graph.erase_node(source)
    graph.eliminate_dead_code()
    module.recompile()


def _moved(graph: Graph, inputs: Sequence[Tensor]) -> Graph:
    """The graph with the numbers that the programs hold on the CPU brought to their GPU."""
    places = {each.device for each in (*inputs, *graph.held) if each.device.type == "cuda"}
    if len(places) != 1:
        return graph
    (place,) = places
    nodes = [node for node in graph.module.graph.nodes if node.op == "placeholder"]
    copies = {
        id(each): each.to(place, copy=True)
        for node, each in zip(nodes[len(inputs) :], graph.held, strict=True)
        if each.device.type == "cpu" and not each.dim() and id(each) not in graph.changed
        if not _written_down(node, set())
    }
    if not copies:
        return graph
    held = [copies.get(id(each), each) for each in graph.held]
    copied = [(each, copies[id(each)]) for each in graph.held if id(each) in copies]
    with contextlib.suppress(RuntimeError):  # where an operation is told to be on the CPU
        module = _traced(graph.module, [*inputs, *held])
        return Graph(module, held, graph.changed, copied)
    return graph


def _traced(
    module: fx.GraphModule,
    given: Sequence[Tensor],
    table: Mapping[Any, Callable[..., Any]] | None = None,
) -> fx.GraphModule:
    """A graph traced again, for tensors of another kind or with operations replaced."""
    trace = make_fx(module, decomposition_table=dict(table or {}), tracing_mode="fake")
    traced: fx.GraphModule = trace(*given)
    return traced


def _written_down(node: fx.Node, numbers: Set[fx.Node]) -> bool:
    """Whether a node on the CPU has the same value in every run."""
    if node.op == "placeholder":  # lifted where the program makes it, and out of others' reach
        return all(user.target is _aten.lift_fresh_copy.default for user in node.users)
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return set(node.all_input_nodes) <= numbers and not random


def _lift(module: fx.GraphModule) -> list[Tensor]:
    """Make the tensors that a graph holds inputs of it, each once, and return them."""
    held: dict[int, Tensor] = {}
    inputs: dict[int, fx.Node] = {}
    *_, last = [node for node in module.graph.nodes if node.op == "placeholder"] or [None]
    for node in [node for node in module.graph.nodes if node.op == "get_attr"]:
        value = getattr(module, str(node.target))
        if not isinstance(value, Tensor):
            continue
        if id(value) not in held:
            first = next(iter(module.graph.nodes))
            graph = module.graph
            with graph.inserting_after(last) if last else graph.inserting_before(first):
                last = module.graph.placeholder(f"held_{len(held)}")
            last.meta = dict(node.meta)
            held[id(value)], inputs[id(value)] = value, last
        node.replace_all_uses_with(inputs[id(value)])
        module.graph.erase_node(node)
    module.recompile()
    return list(held.values())


def _changed(module: fx.GraphModule, given: Sequence[Tensor]) -> Set[int]:
    """Identities of the tensors that a graph is given and that an operation writes to."""
    nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
    written = {
        _origin(node.args[index])
        for node in module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        for index, each in enumerate(node.target._schema.arguments[: len(node.args)])
        if each.is_write or (node.target is _aten.native_batch_norm.default and index in (3, 4))
    }
    return {id(value) for node, value in zip(nodes, given, strict=True) if node in written}


def _origin(value: Any) -> Any:
    """The node whose memory another one shows, or has written to."""
    while isinstance(value, fx.Node) and isinstance(value.target, torch._ops.OpOverload):
        if value.target._schema.arguments[0].alias_info is None:
            break
        value = value.args[0]
    return value


def _rewritten() -> dict[Any, Callable[..., Any]]:
    """What is computed otherwise where a graph is compiled."""
    special = [
        _aten.binary_cross_entropy_with_logits,
        _aten.log_sigmoid_forward,
        _aten.native_batch_norm,
        _aten.softplus,
    ]
    return {**get_decompositions(special), _aten.log1p.default: _log1p, **fast_products()}


def _log1p(x: Tensor) -> Tensor:
    """``log(1 + x)`` to the precision of log, which vectorises several times better than log1p.

    What 1 + x loses is made good to first order; from 1 on, and at -1, there is nothing to make
    good.
    """
    y = 1 + x
    return y.log() + torch.where((x.abs() < 1), (x - (y - 1)) / y, 0.0)


def _located(error: BaseException) -> str:
    """The user's line that an error comes from, and its reason, as a clause."""
    ours, standard = Path(__file__).parent, sysconfig.get_path("stdlib")
    known = [str(Path(str(each.__file__)).parent) for each in (torch, pyro)]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(("<", standard, str(ours), *known))
    ]
    reason = " ".join((str(error) or type(error).__name__).partition("\n")[0].split())
    if not frames:
        return reason
    return f"line {frames[-1].lineno} of {frames[-1].filename}, `{frames[-1].line}`: {reason}"
