"""Optimisers of a whole program: one fused torch optimiser where there can be one."""

from __future__ import annotations

__all__ = ["Share", "begun", "fused", "later", "optimizer_of", "stepper", "update"]

import copy
import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

_FUSED = (Adam, AdamW, SGD)


def stepper(optim: Any, parameters: Sequence[Tensor]) -> Optimizer | None:
    """One torch optimiser for all parameters; None where Pyro's is to be called as it is."""
    if isinstance(optim, PyroOptim):
        make, options = optim.pt_optim_constructor, optim.pt_optim_args
        begun = optim.optim_objs or optim._state_waiting_to_be_consumed
        if make not in _FUSED or not isinstance(options, dict) or optim.pt_clip_args or begun:
            return None
        optim = partial(make, **options)
    return optimizer_of(optim, parameters)


def later(optim: Any, optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Groups of parameters that an optimiser has not had yet, with the state that waits for them.

    Args:
        optim: Where it comes from: `PyroOptim.set_state` keeps what it is given by name.
        optimizer: The optimiser, whose state is filled.
        parameters: The new ones.
    """
    waiting = optim._state_waiting_to_be_consumed if isinstance(optim, PyroOptim) else {}
    plain, groups = list[Tensor](), list[dict[str, Any]]()
    for each in parameters:
        saved = waiting.pop(pyro.get_param_store().param_name(each), None)
        if saved is None:
            plain.append(each)
            continue
        alone = _alone(optimizer, each, optimizer.defaults)
        alone.state = defaultdict(dict)
        alone.load_state_dict(saved)  # which brings it to where the parameter is
        groups += alone.param_groups
        optimizer.state[each] = alone.state[each]
    return [*groups, *([{"params": plain}] if plain else [])]


def _alone(optimizer: Optimizer, parameter: Tensor, options: Mapping[str, Any]) -> Optimizer:
    """An optimiser like another one, with the same state, and one parameter."""
    alone = copy.copy(optimizer)
    alone.param_groups = [{**options, "params": [parameter]}]
    return alone


def begun(optim: Any, parameter: Tensor) -> bool:
    """Whether an optimiser, of torch's or Pyro's, has a state of a parameter."""
    own = optim.optim_objs.get(parameter) if isinstance(optim, PyroOptim) else optim
    return own is not None and bool(own.state.get(parameter))


def optimizer_of(make: Callable[..., Optimizer], parameters: Iterable[Tensor]) -> Optimizer:
    """Make a torch optimiser, fused where it can be.

    Args:
        make: From parameters to the optimiser.
        parameters: What it is to step.

    Raises:
        TypeError: It makes something else.
    """
    parameters = list(parameters)
    if isinstance(make, partial) and not make.args:
        make = partial(make.func, **fused(make.func, make.keywords, parameters))
    made = make(parameters)
    if not isinstance(made, Optimizer):
        raise TypeError(f"the optimizer must be a torch.optim.Optimizer, not {made!r}")
    return made


def fused(make: Any, options: Mapping[str, Any], parameters: Iterable[Tensor]) -> dict[str, Any]:
    """Return options of a torch optimiser, fused where it can be and they do not say how."""
    said = any(options.get(way) for way in ("foreach", "capturable", "differentiable"))
    said = said or bool(options.get("momentum") and options.get("dampening"))  # see `_begin`
    plain = all(
        p.is_floating_point()
        and p.device.type in ("cpu", "cuda")
        and (p.grad is None or p.grad.layout is torch.strided)
        for p in parameters
    )
    if make in _FUSED and plain and not said and options.get("fused") is None:
        return {**options, "fused": True}
    return dict(options)


def update(optimizer: Optimizer) -> None:
    """Take the optimiser's step: for a fused Adam that has begun, by its kernel alone.

    The numbers and the state are those of ``optimizer.step()``, whose care for hooks, profilers
    and closures takes longer than the kernel of a small network.
    """
    plan = _PLANS.get(optimizer)
    if plan is None or not plan.holds(optimizer):
        plan = _planned(optimizer)
        if plan is None:
            _begin(optimizer)
            optimizer.step()
            return
        _PLANS[optimizer] = plan
    with torch.no_grad():
        for each in plan.groups:
            each.step()


def _begin(optimizer: Optimizer) -> None:
    """Let momentum begin from 0 where that of others has begun: fused SGD wants all, or none.

    Without dampening the first step is the same.
    """
    for group in optimizer.param_groups:
        if not (group.get("fused") and group.get("momentum")):
            continue
        followed = _followed(group["params"])
        new = [each for each in followed if "momentum_buffer" not in optimizer.state[each]]
        for each in new if len(new) < len(followed) else ():
            optimizer.state[each]["momentum_buffer"] = torch.zeros_like(each)


@dataclass(frozen=True)
class _Group:
    """Parameters that one kernel steps, with what Adam has of them.

    Their numbers of steps lie in one vector, so that one operation counts them all.
    """

    options: dict[str, Any]
    parameters: Sequence[Tensor]
    followed: Sequence[Tensor]  # those with a gradient
    states: Sequence[dict[str, Tensor]]
    counts: Tensor
    steps: Sequence[Tensor]  # the elements of the counts, by reference
    kernel: Callable[..., Any]

    def holds(self) -> bool:
        return (
            _same(self.options["params"], self.parameters)
            and _same(_followed(self.parameters), self.followed)
            and _same([state.get("step") for state in self.states], self.steps)
            and self.options["fused"]
            and not self.options["amsgrad"]
        )

    def step(self) -> None:
        options, states = self.options, self.states
        self.counts.add_(1)
        self.kernel(
            self.followed,
            [each.grad for each in self.followed],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            self.steps,
            lr=options["lr"],
            beta1=options["betas"][0],
            beta2=options["betas"][1],
            weight_decay=options["weight_decay"],
            eps=options["eps"],
            amsgrad=False,
            maximize=options["maximize"],
        )


@dataclass(frozen=True)
class _Plan:
    """The step of a fused Adam, as long as its state and its parameters are the same objects."""

    state: Mapping[Tensor, Any]
    entries: Sequence[Any]
    groups: Sequence[_Group]

    def holds(self, optimizer: Optimizer) -> bool:
        return (
            optimizer.state is self.state
            and _same(self.state.values(), self.entries)
            and _same(optimizer.param_groups, [each.options for each in self.groups])
            and _plain(optimizer)
            and all(each.holds() for each in self.groups)
        )


_PLANS = WeakKeyDictionary[Optimizer, _Plan]()


def _planned(optimizer: Optimizer) -> _Plan | None:
    """How the next steps are taken, if by the fused kernel of Adam and nothing else."""
    if type(optimizer) not in (Adam, AdamW) or not _plain(optimizer):
        return None
    groups = list[_Group]()
    for options in optimizer.param_groups:
        followed = _followed(options["params"])
        states = [optimizer.state.get(each) for each in followed]
        alike = len({(each.dtype, each.device) for each in followed}) == 1
        if not (alike and all(states) and options["fused"] and not options["amsgrad"]):
            return None
        decoupled = type(optimizer) is AdamW or options.get("decoupled_weight_decay", False)
        groups.append(_group(options, states, decoupled))
    return _Plan(optimizer.state, list(optimizer.state.values()), groups)


def _group(options: dict[str, Any], states: Sequence[Any], decoupled: bool) -> _Group:
    counts = torch.stack([state["step"] for state in states])
    steps = [counts[index] for index in range(len(states))]
    for state, step in zip(states, steps, strict=True):
        state["step"] = step
    parameters = list(options["params"])
    kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
    return _Group(options, parameters, _followed(parameters), states, counts, steps, kernel)


def _followed(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The parameters that have a gradient to follow."""
    return [each for each in parameters if each.grad is not None]


def _same(one: Collection[Any], other: Sequence[Any]) -> bool:
    """Whether two collections have the same objects, and not only equal ones."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _plain(optimizer: Optimizer) -> bool:
    """Whether nothing but the step is to be done in a step."""
    waits = "step" in vars(optimizer) and not getattr(optimizer, "_opt_called", False)
    return not waits and not _hooks(optimizer)  # its schedule wants to see one step


def _hooks(optimizer: Optimizer) -> bool:
    """Whether something is to be called before or after every step."""
    return any(
        (
            optimizer._optimizer_step_pre_hooks,
            optimizer._optimizer_step_post_hooks,
            _global_optimizer_pre_hooks,
            _global_optimizer_post_hooks,
        )
    )


class Share:
    """What a fused optimiser has of one parameter, for others that use its `PyroOptim`."""

    def __init__(self, optimizer: Optimizer, parameter: Tensor) -> None:
        self.fused, self.parameter = optimizer, parameter

    @property
    def state(self) -> Mapping[Tensor, Any]:
        """The fused optimiser's, of all of its parameters."""
        return self.fused.state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The fused optimiser's group with this parameter, and others perhaps."""
        groups = self.fused.param_groups
        return [group for group in groups if any(p is self.parameter for p in group["params"])]

    def step(self, *args: Any) -> Any:
        """Step this parameter alone."""
        return _alone(self.fused, self.parameter, self.param_groups[0]).step(*args)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as that of an optimiser of this parameter alone."""
        if pyro.get_param_store().param_name(self.parameter) is None:
            raise ValueError(
                "the state of pyro.optim goes by names in the param store, and this parameter is "
                "not there: take svi.optimizer.state_dict()"
            )
        return {
            "state": {0: self.fused.state[self.parameter]},
            "param_groups": [{**self.param_groups[0], "params": [0]}],
        }
