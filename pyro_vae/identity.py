"""What makes a run that run: its settings, its random generators, and where it runs."""

from __future__ import annotations

__all__ = [
    "digest",
    "generators",
    "numbers",
    "set_generators",
    "set_numbers",
    "settings",
    "tensors",
    "versions",
]

import hashlib
import platform
import random
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from pyro.infer.elbo import ELBO
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_vae.mapped import Mapped
from pyro_vae.splits import Data, Split


def settings(
    pair: nn.Module, data: Data, objective: ELBO, optimizer: Optimizer, schedule: Any, **plain: Any
) -> dict[str, Any]:
    """Return what makes a run that run, as plain values: what is trained, on what, and how.

    Args:
        pair: What is trained, by its weights' shapes and its parts' classes.
        data: Its data, of which 1000 rows of each split stand for all.
        objective: The objective, by its class and numbers.
        optimizer: The optimiser, new, by its class and options.
        schedule: The schedule, likewise.
        plain: Whatever else, plain values.
    """
    views = hashlib.sha256()
    shapes = [f"{key} {tuple(each.shape)} {each.dtype}" for key, each in tensors(pair).items()]
    for part in data.splits[:2]:
        if len(part):
            noise = torch.Generator(part.x.device).manual_seed(0)
            scored = part.scored(torch.as_tensor(part.x[_some(part)]), noise)
            views.update(scored.contiguous().cpu().numpy().tobytes())
    groups = [
        {key: _plain(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    state = schedule.state_dict() if schedule else {}
    return {
        **plain,
        "objective": _plain({"class": _name(type(objective)), **numbers(objective, plain=True)}),
        # First, since a schedule may change the options of its optimizer.
        "schedule": schedule and _plain({"class": _name(type(schedule)), **state}),
        "optimizer": {"class": _name(type(optimizer)), "groups": groups},
        "data": digest(data),
        "view": views.hexdigest(),
        "weights": hashlib.sha256("\n".join(shapes).encode()).hexdigest(),
        "parts": {name or "pair": _name(type(each)) for name, each in pair.named_modules()},
    }


def digest(data: Data) -> str:
    """Return what tells the data of a run from others: 1000 rows of each split, but of no test."""
    found = hashlib.sha256()
    for part in data.splits[:2]:
        rows = _some(part)
        found.update(f"{len(part)} {part.top} {_name(part.view)}".encode())
        if isinstance(part.x, Mapped):
            found.update(b"mapped")  # whose order is another one
        columns: list[Tensor | Mapped] = [part.x, *part.context]
        for each in columns:
            found.update(f"{tuple(each.shape)} {each.dtype}".encode())
            found.update(each[rows].contiguous().cpu().numpy().tobytes())
    return found.hexdigest()


def _some(part: Split) -> Tensor:
    """The numbers of 1000 rows from everywhere in a split, or of all."""
    count = min(len(part), 1000)
    return (torch.arange(count) * len(part) // max(count, 1)).to(part.x.device)


def _name(each: Any) -> str:
    return getattr(each, "__qualname__", type(each).__qualname__)


def _plain(value: Any) -> Any:
    """A value as JSON has it, and of what that lacks the name of its class."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    return value if value is None or isinstance(value, (bool, int, float, str)) else _name(value)


def tensors(pair: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, those among them that no `state_dict` has."""
    return {**dict(pair.named_parameters()), **dict(pair.named_buffers())}


def numbers(objective: ELBO, *, plain: bool = False) -> dict[str, Any]:
    """Numbers and tensors that an objective holds, with those of the one inside of it."""
    held: dict[str, Any] = {}
    for key, value in vars(objective).items():
        if isinstance(value, ELBO):
            inside = {"class": _name(type(value))} if plain else {}
            held[key] = {**inside, **numbers(value, plain=plain)}
        elif isinstance(value, (bool, int, float)) and not (plain and key == "max_plate_nesting"):
            held[key] = value
        elif isinstance(value, Tensor) and not plain:
            held[key] = value.detach()
    return held


def set_numbers(objective: ELBO, held: Mapping[str, Any]) -> None:
    """Put back what `numbers` returned."""
    for key, now in numbers(objective).items():
        if isinstance(now, dict):
            set_numbers(getattr(objective, key), held[key])
        elif isinstance(now, Tensor):
            now.copy_(held[key])
        else:
            setattr(objective, key, held[key])


def generators(device: torch.device) -> dict[str, Any]:
    """The states of the random generators that programs draw from."""
    numbers: Any = np.random.get_state(legacy=False)
    if isinstance(numbers["state"].get("key"), np.ndarray):
        key = torch.from_numpy(numbers["state"]["key"].astype(np.int64))
        numbers = {**numbers, "state": {**numbers["state"], "key": key}}
    kind, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": numbers,
        "python": {"kind": kind, "internal": torch.tensor(internal), "gauss": gauss},
    }


def set_generators(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `generators` returned."""
    numbers, python = state["numpy"], state["python"]
    if isinstance(numbers["state"].get("key"), Tensor):
        key = numbers["state"]["key"].numpy().astype(np.uint32)
        numbers = {**numbers, "state": {**numbers["state"], "key": key}}
    np.random.set_state(numbers)
    random.setstate((python["kind"], tuple(python["internal"].tolist()), python["gauss"]))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def versions() -> dict[str, str]:
    """Return the versions of what the last digit of a result may depend on."""
    found = {"python": platform.python_version()}
    for name in ("pyro-vae", "pyro-ppl", "torch", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # used from its source, and not installed
            found[name] = "unknown"
    return found
