"""Pairs: what does not fit between a model, a guide and their data, before any training."""

from __future__ import annotations

__all__ = ["check_pair", "elementary", "family", "undisturbed", "unvalidated"]

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_vae.evaluation import Pair
from pyro_vae.vae import VAE, check_parts


def check_pair(pair: Pair, *batch: Tensor) -> None:
    """Run model and guide on a few data and say in a sentence what does not fit.

    Checked are the latent sites of both programs, the shape of every site within its plates
    (with two and with three data, so that no width passes for the batch by coincidence),
    that every log-density is finite, that the guide draws values in the support of the
    model's latent sites, and that the data lie in that of their likelihood. Random state,
    buffers and parameters stay as they were.

    Args:
        pair: Module with methods ``model`` and ``guide``.
        batch: A batch ``(x, *context)``. The programs run on its first rows; all of x is
            held against the support where that is the same for every datum.

    Raises:
        ValueError: The first promise that is broken.

    Example:
        >>> from pyro_vae import MLP, VAE, likelihoods, posteriors, priors
        >>> vae = VAE(
        ...     prior=priors.Normal(2),
        ...     likelihood=likelihoods.Bernoulli(MLP(2, [], 9)),
        ...     posterior=posteriors.Normal(MLP(9, [], (2, 2))),
        ... )
        >>> check_pair(vae, (torch.rand(4, 9) > 0.5).float())
    """
    if isinstance(pair, VAE):
        check_parts(pair)
    with undisturbed(pair, batch), torch.no_grad(), unvalidated():
        for size in sorted({min(size, len(batch[0])) for size in (2, 3)}):
            _check_programs(pair, batch, size)


def elementary(support: constraints.Constraint) -> constraints.Constraint:
    """Return the support of one element, where elements are independent."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


@contextmanager
def unvalidated() -> Iterator[None]:
    """Switch off the validation of Pyro and torch for a while, and leave both as they were."""
    before = Distribution._validate_args
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        Distribution.set_default_validate_args(before)


def _check_programs(pair: Pair, batch: tuple[Tensor, ...], size: int) -> None:
    rows = tuple(tensor[:size] for tensor in batch)
    with _worded("guide", size):
        guide = prune_subsample_sites(poutine.trace(pair.guide).get_trace(*rows))
        guide.compute_log_prob()
    with _worded("model", size):
        model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(*rows)
        model = prune_subsample_sites(model)
    _check_sites(model, guide)
    for name in model.stochastic_nodes:
        _check_latent(name, model.nodes[name]["fn"], guide.nodes[name]["fn"])
    for name in model.observation_nodes:
        _check_support(name, model.nodes[name], batch[0])
    with _worded("model", size):
        model.compute_log_prob()
    for program, trace in (("guide", guide), ("model", model)):
        for name, site in trace.nodes.items():
            if site["type"] == "sample":
                _check_score(name, program, site)


def _check_sites(model: poutine.Trace, guide: poutine.Trace) -> None:
    latent, guided = set(model.stochastic_nodes), set(guide.stochastic_nodes)
    guided -= {name for name in guided if guide.nodes[name]["infer"].get("is_auxiliary")}
    if missing := sorted(latent - guided):
        raise ValueError(f"the guide draws no site '{missing[0]}', which is latent in the model")
    if extra := sorted(guided - latent):
        raise ValueError(f"the guide draws a site '{extra[0]}' that is not latent in the model")
    if not model.observation_nodes:
        raise ValueError("the model observes no data: none of its sites has obs=x")


def _check_latent(name: str, prior: Any, posterior: Any) -> None:
    """Draws of the guide lie where the model has density."""
    draws = posterior.sample((100,))
    inside = prior.support.check(draws)
    if not inside.all():
        wrong = draws[~inside].flatten()
        raise ValueError(
            f"the guide draws values of {name} outside the support of {family(prior)} in the "
            f"model, {wrong[0]:g} for one: give them the same support, since a bound over "
            f"another one is none"
        )


def _check_support(name: str, site: Any, x: Tensor) -> None:
    """Hold x against the support, elementwise where the support is one of single elements."""
    support, value = site["fn"].support, site["value"]
    element = elementary(support)
    if value.shape[1:] == x.shape[1:] and not any(map(torch.is_tensor, vars(element).values())):
        support, value = (element, x) if element.event_dim == 0 else (element, value)
    inside = support.check(value)
    if not inside.all():
        wrong = value[~inside].flatten()
        raise ValueError(
            f"{wrong.numel()} values of {name} lie outside the support of {family(site['fn'])}, "
            f"{wrong[0]:g} for one: binarise the data (--binarisation dynamic or threshold; in "
            f"Python view=dynamic), scale them, or choose a likelihood for such values"
        )


def _check_score(name: str, program: str, site: Any) -> None:
    score: Tensor = site["log_prob"]
    plates = {frame.dim: frame.size for frame in site["cond_indep_stack"] if frame.vectorized}
    expected = [plates.get(dim, 1) for dim in range(-max(map(abs, plates), default=0), 0)]
    if list(score.shape) != expected:
        raise ValueError(
            f"site '{name}' of the {program} has batch shape {tuple(score.shape)} where its "
            f"plates have {tuple(expected)}: declare the rest as event by .to_event(n)"
        )
    if not score.isfinite().all():
        raise ValueError(
            f"the log-density of site '{name}' in the {program} is {_first_bad(score):g} at the "
            f"start: check the initial weights, the scales and the range of the data"
        )


def _first_bad(score: Tensor) -> float:
    return float(score[~score.isfinite()][0])


def family(distribution: Any) -> str:
    """Return the name of the distribution within any wrappers."""
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return type(distribution).__name__


@contextmanager
def _worded(program: str, size: int) -> Iterator[None]:
    """Turn what torch or Pyro says about a failing program into one sentence."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        reason = " ".join(str(error).partition("Trace Shapes")[0].split())
        if "Shape mismatch inside plate" in reason:
            reason += "; declare all dimensions but the data's as event by .to_event(n)"
        raise ValueError(f"the {program} cannot run on {size} data: {reason}") from error


@contextmanager
def undisturbed(pair: Any, batch: tuple[Tensor, ...]) -> Iterator[None]:
    """Leave random state and buffers (batch-norm statistics) as they were."""
    buffers = dict(pair.named_buffers()) if isinstance(pair, nn.Module) else {}
    kept = {name: buffer.clone() for name, buffer in buffers.items()}
    devices = {tensor.device for tensor in batch if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in buffers.items():
                buffer.copy_(kept[name])
