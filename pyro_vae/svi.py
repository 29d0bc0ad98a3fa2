"""Stochastic variational inference of any Pyro program, at the speed of its tensor operations."""

from __future__ import annotations

__all__ = ["MODES", "CompiledSVI", "Mode", "check_mode", "mode_for"]

import contextlib
import copy
import importlib.util
import math
import os
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast, get_args

import pyro
import torch
from pyro import poutine
from pyro.infer.elbo import ELBO
from pyro.optim import PyroOptim
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from pyro_vae.capture import Graph, NotCapturableError, capture
from pyro_vae.optimizers import Share, begun, later, stepper, update
from pyro_vae.scoring import validation
from pyro_vae.state import (
    FLOATS,
    append_state,
    called,
    changed,
    float_type,
    kind,
    plain,
    precision,
    put_back,
    reached,
    restored,
    unassigned,
    undrawn,
    ungraded,
    unmade,
    unseen,
)

Program = Callable[..., Any]
Run = Callable[[Sequence[Any]], Tensor]  # of the leaves of its arguments
Mode = Literal["eager", "captured", "compiled"]
MODES: tuple[Mode, ...] = get_args(Mode)

# Steps from which capturing, and compiling, is paid back: about one second and fifteen, for
# three milliseconds less in each step, and one more (examples/benchmarks/speed.py).
_CAPTURE_PAYS, _COMPILE_PAYS = 500, 10_000
_GRAPHS = 8  # kept at a time


class CompiledSVI:
    """`pyro.infer.SVI` whose programs are captured once, and compiled.

    Model, guide and objective are run once for each kind of input and kept as a graph of tensor
    operations, gradients included, which later steps repeat without Pyro's handlers. The numbers
    are those of `pyro.infer.SVI`: captured, gradients are equal bit for bit on a CPU, but for what
    programs compute from floats, and to rounding on a GPU or compiled, from the same random
    stream. In any mode the programs first run once eagerly, with Pyro's validation on and random
    state, buffers and arguments put back, so that a wrong program fails with Pyro's message before
    anything is changed. Initial values that are drawn at random are drawn then, and the first step
    has the same random numbers again.

    A graph stands for one shape, type and device of every tensor, one value of every other
    argument but floats, which are inputs of the graph, and one state of the modules that the
    programs belong to: training or evaluation, frozen or trained, and which parameters they
    have. Another one is captured anew, and the last eight are kept; after eight calls in a row
    that each had a new one, calls run eagerly until one of these comes again. A program that has
    no one graph, since it branches on values or enumerates, is told of once and runs eagerly, as
    does a call under handlers of Pyro's, such as ``with poutine.scale(scale=0.1):``.

    On a GPU a graph all of whose tensors lie there, but for single numbers, becomes a CUDA graph:
    its kernels start together. One that waits for the GPU stays as it is. `loss_and_grads` leaves
    gradients in memory that the next call with such arguments writes to.

    What Python alone knows cannot be seen: numbers kept in attributes, lists and global
    variables, tensors that take another's place there, and draws of Python's or NumPy's
    generators and of generators that a program makes, stay in a graph as they were when it was
    captured. After changing one call `recapture`. An attribute that changes with every run is
    noticed, and its program runs eagerly; so is another tensor in the place of one in an attribute
    of a module or of the objective, which has a graph of its own.

    Args:
        model: The model, any callable with Pyro primitives.
        guide: The guide, likewise.
        optim: One of `pyro.optim`, or a function from parameters to a torch optimiser, such as
            ``partial(torch.optim.Adam, lr=1e-3)``. Adam, AdamW and SGD, of either kind, run as
            one fused optimiser where their options are plain; another `PyroOptim` is called with
            the parameters, as `pyro.infer.SVI` does.
        loss: One of Pyro's ELBO family, such as ``Trace_ELBO()``.
        mode: ``"eager"``, ``"captured"``, or ``"compiled"`` by torch's inductor, which takes some
            seconds at the first step. By default compiled where there is a compiler, and captured
            otherwise.
        validate: Whether first runs are under Pyro's validation, which also refuses values that
            are no numbers.

    Raises:
        TypeError: An argument of another kind.
        ValueError: An unknown mode.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro.infer import Trace_ELBO
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     loc = pyro.param("loc", torch.tensor(0.0))
        ...     pyro.sample("z", dist.Normal(loc, 0.7))
        >>> adam = pyro.optim.Adam({"lr": 0.02})
        >>> svi = CompiledSVI(model, guide, adam, Trace_ELBO(), mode="captured")
        >>> losses = [svi.step(torch.tensor(2.0)) for _ in range(500)]
        >>> abs(pyro.param("loc").item() - 1) < 0.2  # the posterior is N(1, 1/2)
        True
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: PyroOptim | Callable[[Iterable[Any]], Optimizer],
        loss: ELBO,
        *,
        mode: Mode | None = None,
        validate: bool = True,
    ) -> None:
        for name, program in (("model", model), ("guide", guide)):
            if not callable(program):
                raise TypeError(f"the {name} must be a function, not {program!r}")
        if not isinstance(loss, ELBO):
            raise TypeError(f"the loss must be an ELBO, such as Trace_ELBO(), not {loss!r}")
        if isinstance(optim, Optimizer) or not callable(optim):
            raise TypeError(
                "the optimizer must be one of pyro.optim, or a function of the parameters, such "
                "as partial(torch.optim.Adam, lr=1e-3)"
            )
        check_mode(mode)
        self.model, self.guide, self.optim, self.loss = model, guide, optim, loss
        self.validate = validate
        self.mode: Mode = mode or ("compiled" if _compiler() else "captured")
        self.optimizer: Optimizer | None = None
        within = list(reached(model, guide))
        self._modules = [each for each in within if isinstance(each, nn.Module)]
        self._tensors = [each for each in within if isinstance(each, Tensor)]
        self._owners = [each for each in within if not isinstance(each, (nn.Module, Tensor))]
        self._kept: list[tuple[dict[str, Any], str]] = []  # where attributes are tensors
        self._runs: OrderedDict[Any, Run] = OrderedDict()
        self._parameters: dict[int, Tensor] = {}  # by identity, so that each counts once
        self._names: dict[int, str] = {}  # of those that can be watched
        self._stored: list[str] = []  # of those in the param store
        self._missed = 0  # calls in a row for which there was no graph

    def step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take a gradient step, and return the loss, a tensor without gradient.

        Args:
            args: Arguments of model and guide.
            kwargs: Likewise.
        """
        loss = self.loss_and_grads(*args, **kwargs)
        if self.optimizer is not None:
            update(self.optimizer)
        else:
            self.optim([each for each in self._parameters.values() if each.grad is not None])
        self._forget_gradients()
        return loss

    def loss_and_grads(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss and leave gradients with the parameters, in place of earlier ones.

        Parameters are those of the programs' sites: others have no gradient in a graph.
        """
        return self._run("loss_and_grads", args, kwargs)

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss, a tensor without gradient, and take no step.

        As with `pyro.infer.SVI`, draws come from torch's generator, and what a module does in
        training, such as batch normalisation, it does here: call ``eval()`` before.
        """
        with torch.no_grad():
            return self._run("loss", args, kwargs)

    def recapture(self) -> None:
        """Forget all graphs, and the optimiser's state of parameters that were replaced."""
        self._runs.clear()
        for key in self._replaced():
            parameter = self._parameters.pop(key)
            del self._names[key]
            if isinstance(self.optim, PyroOptim):
                self.optim.optim_objs.pop(parameter, None)
                self.optim.grad_clip.pop(parameter, None)
            if self.optimizer is not None:
                self.optimizer.state.pop(parameter, None)
                for group in self.optimizer.param_groups:
                    group["params"] = [p for p in group["params"] if p is not parameter]

    def _run(self, method: str, args: Any, kwargs: Any) -> Tensor:
        leaves, structure = _leaves(args, kwargs)
        key = method, structure, self._state(leaves)
        run = self._runs.get(key)
        self._missed = 0 if run else self._missed + 1
        if run is None:
            if self._missed > _GRAPHS and self.mode != "eager":
                return self._missing(method, leaves, structure)
            with undrawn():
                run = self._prepared(method, leaves, structure)
            # Anew, since the first run of a program may make its parameters.
            self._runs[method, structure, self._state(leaves)] = run
            if len(self._runs) > _GRAPHS:
                self._runs.popitem(last=False)
        else:
            self._runs.move_to_end(key)
        return run(leaves)

    def _missing(self, method: str, leaves: Sequence[Any], structure: Any) -> Tensor:
        """Run eagerly once, since the last calls had a graph each and this one has none."""
        if self._missed == _GRAPHS + 1:
            warnings.warn(
                f"each of the last {_GRAPHS} calls has captured a graph of its own, for other "
                f"arguments or attributes; calls run eagerly until one of these comes again. "
                f"Tensors in attributes are better filled in place, by fill_ or copy_",
                stacklevel=4,
            )
        self._check(method, leaves)
        return self._eager(method, structure, leaves)

    def _state(self, leaves: Sequence[Any]) -> Any:
        """What a graph depends on and does not take as an input."""
        if self.mode == "eager":
            return None
        state = [bool(_PYRO_STACK), torch.is_grad_enabled(), torch.get_default_dtype()]
        state += [*precision(), *map(kind, leaves)]
        for module in self._modules:
            append_state(module, state)
        state += [id(table.get(name)) for table, name in self._kept]
        if self._stored:
            store = dict(pyro.get_param_store().named_parameters())
            found = [store.get(name) for name in self._stored]
            state += [(id(each), each is not None and each.requires_grad) for each in found]
        return tuple(state)

    def _prepared(self, method: str, leaves: Sequence[Any], structure: Any) -> Run:
        """Run the programs once eagerly, and return how they run from then on."""
        self._check(method, leaves)
        parameters, changing = self._rehearse(method, leaves, structure)
        self._watch(parameters)
        dtype = float_type(leaves, self._modules, parameters.values())
        if method != "loss_and_grads":
            parameters = {}
        if self.mode != "eager" and not _PYRO_STACK:
            try:
                if changing:
                    raise NotCapturableError(changing)
                if method == "loss_and_grads":
                    self._follow(parameters)
                followed = list(parameters.values())
                return self._captured(method, leaves, structure, followed, dtype)
            except NotCapturableError as error:
                warnings.warn(
                    f"the program cannot be captured and runs eagerly: {error}", stacklevel=4
                )
                self.mode = "eager"
        return partial(self._eager, method, structure)

    def _rehearse(
        self, method: str, leaves: Sequence[Any], structure: Any
    ) -> tuple[dict[str, Tensor], str | None]:
        """Run the objective as Pyro would, and leave everything as it was.

        Returns the parameters by name, and words for what a graph cannot have, where a run
        changes an attribute, or assigns to the param store, as averages for baselines do. What
        the first run sets up for good is not taken for this, since there is a second.
        """
        try:
            loss = copy.deepcopy(self.loss)
        except Exception:  # for whatever an objective of the user's own holds
            loss = self.loss
        objects = dict[int, Any]()
        first, different = dict[tuple[int, str], Any](), dict[tuple[int, str], Any]()
        try:
            for _ in range(2):
                held = self._held(loss)
                before = plain(held)
                objects |= {id(each): each for each in held}
                try:
                    parameters, reasons = self._run_through(loss, method, leaves, structure)
                finally:
                    different = changed(held, before)
                    first = different | first
                if not different:
                    break
                _, name = next(iter(different))
                reasons.insert(0, f"its attribute '{name}' changes with every run")
        finally:
            for (key, name), value in first.items() if different else ():
                vars(objects[key])[name] = value
        if math.isinf(self.loss.max_plate_nesting):
            self.loss.max_plate_nesting = loss.max_plate_nesting  # which the run has found out
        return parameters, reasons[0] if reasons else None

    def _run_through(
        self, loss: ELBO, method: str, leaves: Sequence[Any], structure: Any
    ) -> tuple[dict[str, Tensor], list[str]]:
        """One run of the objective: its parameters, and what of it a graph cannot have."""
        args, kwargs = _arguments(leaves, structure)
        parameters = nn.ModuleList(self._modules).parameters()
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        traced = poutine.trace(param_only=True)
        checked = validation(True) if self.validate else contextlib.nullcontext()
        stored = dict(pyro.get_param_store().named_parameters())
        every = [*parameters, *stored.values(), *tensors]
        with (
            torch.random.fork_rng(devices=_gpus(every)),
            restored([*self._loose(loss), *tensors]),
            ungraded(every), called(self._modules) as others, checked, traced,
        ):  # fmt: skip
            value = getattr(loss, method)(self.model, self.guide, *args, **kwargs)
            used = _unique(traced.trace)
            reasons = [
                f"the gradient of '{name}' is sparse"
                for name, each in used.items()
                if each.grad is not None and each.grad.layout is not torch.strided
            ]
        if isinstance(value, tuple):
            raise TypeError(f"the losses of {type(loss).__name__} are several: use pyro.infer.SVI")
        self._modules += others
        if method == "loss_and_grads":  # whose gradients come in place of earlier ones
            for parameter in used.values():
                parameter.grad = None
        reasons += [f"an argument of type {each} is no tensor" for each in unseen(leaves)]
        for name in put_back(traced.trace, stored):
            used.pop(name, None)
            reasons.append(f"its parameter '{name}' is assigned with every run")
        return used, reasons

    def _watch(self, parameters: Mapping[str, Tensor]) -> None:
        """Look from now on before each step at what the programs were seen to use."""
        store = dict(pyro.get_param_store().named_parameters())
        found = [name for name, each in parameters.items() if store.get(name) is each]
        self._stored += [name for name in found if name not in self._stored]
        self._kept = [
            (vars(each), name)
            for each in self._held(self.loss)
            for name, value in vars(each).items()
            if isinstance(value, Tensor)
        ]

    def _held(self, loss: ELBO) -> list[Any]:
        """The objects whose attributes may be state that a graph cannot have."""
        modules = nn.ModuleList(self._modules).modules()
        return [*_elbos(loss), *self._owners, *modules]

    def _loose(self, loss: ELBO) -> list[Tensor]:
        """Tensors within reach that a run may change in place."""
        values = [
            *self._tensors,
            *(buffer for module in self._modules for buffer in module.buffers()),
            *(value for each in _elbos(loss) for value in vars(each).values()),
        ]
        return [each for each in values if isinstance(each, Tensor) and not each.requires_grad]

    def _captured(
        self,
        method: str,
        leaves: Sequence[Any],
        structure: Any,
        parameters: Sequence[Tensor],
        dtype: torch.dtype,
    ) -> Run:
        tensors = [isinstance(leaf, (Tensor, *FLOATS)) for leaf in leaves]

        def objective(*inputs: Tensor) -> Any:
            given = iter(inputs)
            filled = [
                next(given) if free else leaf for free, leaf in zip(tensors, leaves, strict=True)
            ]
            args, kwargs = _arguments(filled, structure)
            return getattr(self.loss, method)(self.model, self.guide, *args, **kwargs)

        # Tensors of their own, so that one given twice, or held too, is not taken for the other.
        device = self._gpu(leaves)
        inputs = [
            each if isinstance(each, nn.Parameter) else each.detach()
            for each in _inputs(leaves, device, dtype)
        ]
        loose = self._loose(self.loss)
        # Some random operations have no rule for their shape, and are done to find it out.
        forked = torch.random.fork_rng(devices=_gpus(inputs, parameters))
        held = self._held(self.loss)
        with forked, restored(loose), unassigned(held), unmade():
            graph = capture(objective, inputs, parameters)
        if not graph.changed <= {id(each) for each in (*loose, *inputs)}:
            raise NotCapturableError("it changes a tensor in place that is kept out of sight")
        function = self._function(graph, inputs)
        known = [leaf for free, leaf in zip(tensors, leaves, strict=True) if not free]

        def run(leaves: Sequence[Any], known: Sequence[Any] = known) -> Tensor:
            # What is known by its identity stays alive, so that no other comes to have it.
            given = _inputs(leaves, device, dtype)
            if method == "loss_and_grads":
                self._forget_gradients()  # now, so that the new ones have their memory
            loss, *gradients = function(*given)
            if method == "loss_and_grads":
                self._give(parameters, gradients)
            return cast("Tensor", loss)

        return run

    def _forget_gradients(self) -> None:
        for each in self._parameters.values():
            each.grad = None

    def _give(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Leave gradients with the parameters.

        As with `pyro.infer.SVI`, one that a run has and nothing depends on has a gradient of 0
        where the optimiser has a state of it, as momentum, which goes on.
        """
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None and begun(self.optimizer or self.optim, parameter):
                gradient = torch.zeros_like(parameter)
            parameter.grad = gradient

    def _function(self, graph: Graph, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        still = [each for each in (*inputs, *graph.held) if id(each) in graph.changed]
        with torch.random.fork_rng(devices=_gpus(inputs, graph.held)), restored(still):
            if self.mode == "compiled":
                try:
                    function = graph.compiled(inputs)
                    function(*inputs)
                    return function
                except Exception as error:  # whatever a compiler may say
                    said = "the program is captured and not compiled: torch's inductor says "
                    warnings.warn(said + _line(error), stacklevel=6)
                    self.mode = "captured"
            try:
                function = graph.interpreted(inputs)
                function(*inputs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # operations whose graph does not run, as of an LSTM
                raise NotCapturableError(f"its graph does not run: {_line(error)}") from error
            return function

    def _eager(self, method: str, structure: Any, leaves: Sequence[Any]) -> Tensor:
        args, kwargs = _arguments(leaves, structure)
        if method == "loss_and_grads":
            self._forget_gradients()
        with poutine.trace(param_only=True) as traced:
            loss = getattr(self.loss, method)(self.model, self.guide, *args, **kwargs)
        if method == "loss_and_grads":
            parameters = _unique(traced.trace)
            sloped = {name: p for name, p in parameters.items() if p.grad is not None}
            self._follow(sloped or parameters)
            every = list(parameters.values())
            slopes = [each.grad for each in every]
            self._forget_gradients()  # those of parameters that this run has no site of
            self._give(every, slopes)
        return torch.as_tensor(loss, dtype=torch.float64).detach()

    def _follow(self, parameters: Mapping[str, Tensor]) -> None:
        """Let the optimiser have parameters that it has not had yet."""
        if not parameters and not self._parameters:
            raise ValueError("there is nothing to train: the programs have no parameters")
        new = {name: each for name, each in parameters.items() if id(each) not in self._parameters}
        if not new:
            return
        present = self._present()
        self._names |= {id(each): name for name, each in new.items() if id(each) in present}
        self._parameters |= {id(each): each for each in new.values()}
        if self.optimizer is None:
            self.optimizer = stepper(self.optim, list(new.values()))
        else:
            groups = self.optimizer.param_groups
            had = {id(each) for group in groups for each in group["params"]}
            late = [each for each in new.values() if id(each) not in had]
            for options in later(self.optim, self.optimizer, late):
                self.optimizer.add_param_group(options)
        if self.optimizer is not None and isinstance(self.optim, PyroOptim):
            for each in new.values():
                self.optim.optim_objs[each] = Share(self.optimizer, each)
                self.optim.grad_clip[each] = None

    def _present(self) -> set[int]:
        """Identities of all parameters that the programs' modules and the param store hold."""
        stored = dict(pyro.get_param_store().named_parameters()).values()
        return {
            id(each) for each in (*stored, *(p for m in self._modules for p in m.parameters()))
        }

    def _replaced(self) -> list[int]:
        """Identities of parameters that were stepped and are no longer there."""
        present = self._present()
        return [key for key in self._names if key not in present]

    def _gpu(self, leaves: Sequence[Any]) -> torch.device | None:
        """The GPU on which the arguments or parameters lie, if there is one."""
        tensors = [each for each in leaves if isinstance(each, Tensor)]
        parameters = (p for module in self._modules for p in module.parameters())
        places = (each.device for each in (*tensors, *parameters))
        return next((place for place in places if place.type == "cuda"), None)

    def _check(self, method: str, leaves: Sequence[Any]) -> None:
        """Refuse batches on another device, and steps of parameters that were replaced."""
        for key in self._replaced() if method == "loss_and_grads" else ():
            raise ValueError(
                f"the parameter '{self._names[key]}' was replaced, and the optimizer has the one "
                f"before: call recapture() to go on with the new one, or make a new CompiledSVI"
            )
        places = {p.device for module in self._modules for p in module.parameters()}
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.dim() and places and leaf.device not in places:
                raise ValueError(
                    f"a batch on '{leaf.device}' does not fit parameters on "
                    f"'{next(iter(places))}': move one of them by .to(device)"
                )


def check_mode(mode: str | None) -> None:
    """Refuse a mode that there is not.

    Raises:
        ValueError: It is none of `MODES`, and not None.
    """
    if mode not in (None, *MODES):
        raise ValueError(f"there is no mode '{mode}'; there are {', '.join(MODES)}")


def mode_for(steps: int) -> Mode:
    """Return the mode in which so many steps are done soonest, as a rule."""
    if steps >= _COMPILE_PAYS and _compiler():
        return "compiled"
    return "captured" if steps >= _CAPTURE_PAYS else "eager"


def _compiler() -> bool:
    """Whether there is what `torch.compile` needs: a C++ compiler, or Triton for a GPU."""
    if torch.cuda.is_available():
        return importlib.util.find_spec("triton") is not None
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def _elbos(loss: ELBO) -> list[ELBO]:
    """An objective, and those that it is made of, however deep."""
    inner = [each for each in vars(loss).values() if isinstance(each, ELBO)]
    return [loss, *(each for one in inner for each in _elbos(one))]


def _leaves(args: Any, kwargs: Any) -> tuple[Sequence[Any], Any]:
    """The leaves of arguments, and their structure: None for tensors one after the other."""
    if not kwargs and all(isinstance(each, Tensor) for each in args):
        return args, None
    return pytree.tree_flatten((args, kwargs))


def _arguments(leaves: Sequence[Any], structure: Any) -> Any:
    """The arguments that have these leaves."""
    return (leaves, {}) if structure is None else pytree.tree_unflatten(leaves, structure)


def _line(error: Exception) -> str:
    """The first line of what an error says."""
    return str(error).strip().partition("\n")[0]


def _inputs(
    leaves: Sequence[Any], device: torch.device | None, dtype: torch.dtype
) -> list[Tensor]:
    """The arguments that are inputs of a graph, as tensors: numbers on the GPU, if there is one.

    What has such a number is not waited for, as a copy would be.
    """
    found = list[Tensor]()
    for leaf in leaves:
        if isinstance(leaf, FLOATS):
            found.append(torch.full((), float(leaf), dtype=dtype, device=device))
        elif isinstance(leaf, Tensor):
            moves = device is not None and leaf.device.type == "cpu" and not leaf.dim()
            if moves and not leaf.requires_grad:
                found.append(torch.full((), leaf.item(), dtype=leaf.dtype, device=device))
            else:
                found.append(leaf)
    return found


def _gpus(*tensors: Sequence[Tensor]) -> list[torch.device]:
    """The GPUs on which some tensors lie, whose random state is to be put back."""
    return list({each.device for group in tensors for each in group if each.device.type == "cuda"})


def _unique(trace: poutine.Trace) -> dict[str, Tensor]:
    """The parameters of a trace by name, one of several names each."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, site in trace.nodes.items():
        if site["type"] == "param":
            parameter = site["value"].unconstrained()
            found.setdefault(id(parameter), (name, parameter))
    return dict(found.values())
