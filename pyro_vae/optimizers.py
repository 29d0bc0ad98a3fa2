"""Optimisers of a whole program: one fused torch optimiser where there can be one."""

from __future__ import annotations

__all__ = ["Share", "fused", "optimizer_of", "stepper", "update"]

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

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
    plain = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    if make in _FUSED and plain and not said and options.get("fused") is None:
        return {**options, "fused": True}
    return dict(options)


def update(optimizer: Optimizer) -> None:
    """Take the optimiser's step: for a fused Adam that has begun, by its kernel alone.

    The numbers and the state are those of ``optimizer.step()``, whose care for hooks, profilers
    and closures takes longer than the kernel of a small network.
    """
    stepped = [
        [p for p in group["params"] if p.grad is not None] for group in optimizer.param_groups
    ]
    if not _bare(optimizer, stepped):
        optimizer.step()
        return
    for group, parameters in zip(optimizer.param_groups, stepped, strict=True):
        states = [optimizer.state[each] for each in parameters]
        decoupled = type(optimizer) is AdamW or group.get("decoupled_weight_decay", False)
        with torch.no_grad():
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1)
            (torch._fused_adamw_ if decoupled else torch._fused_adam_)(
                parameters,
                [each.grad for each in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=group["maximize"],
            )


def _bare(optimizer: Optimizer, stepped: Sequence[Sequence[Tensor]]) -> bool:
    """Whether the next step is the fused kernel of Adam and nothing else."""
    if type(optimizer) not in (Adam, AdamW) or _hooks(optimizer):
        return False
    if "step" in vars(optimizer) and not getattr(optimizer, "_opt_called", False):
        return False  # its schedule wants to see one step
    return all(
        group["fused"]
        and not group["amsgrad"]
        and all(optimizer.state.get(each) for each in parameters)
        and len({(each.dtype, each.device) for each in parameters}) == 1
        for group, parameters in zip(optimizer.param_groups, stepped, strict=True)
    )


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
    """What a fused optimiser has of one parameter, for `PyroOptim.get_state`."""

    def __init__(self, optimizer: Optimizer, parameter: Tensor) -> None:
        self.fused, self.parameter = optimizer, parameter

    def state_dict(self) -> dict[str, Any]:
        """Return the state as that of an optimiser of this parameter alone."""
        if pyro.get_param_store().param_name(self.parameter) is None:
            raise ValueError(
                "the state of pyro.optim goes by names in the param store, and this parameter is "
                "not there: take svi.optimizer.state_dict()"
            )
        groups = self.fused.param_groups
        group = next(g for g in groups if any(p is self.parameter for p in g["params"]))
        return {
            "state": {0: self.fused.state[self.parameter]},
            "param_groups": [{**group, "params": [0]}],
        }
