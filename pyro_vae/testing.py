"""The contract: what a part or a model/guide pair promises, checked by numbers."""

from __future__ import annotations

__all__ = ["check_pair", "check_prior", "elementary", "unvalidated"]

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from scipy import stats
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, constraints

from pyro_vae.evaluation import Pair
from pyro_vae.vae import as_pyro


def check_pair(pair: Pair, *batch: Tensor) -> None:
    """Run model and guide on a few data and say in a sentence what does not fit.

    Checked are the latent sites of both programs, the shape of every site within its plates
    (with two and with three data, so that no width passes for the batch by coincidence),
    that every log-density is finite, and that the data lie in the support of their
    likelihood. Random state, buffers and parameters stay as they were.

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
    with _undisturbed(pair, batch), torch.no_grad(), unvalidated():
        for size in sorted({min(size, len(batch[0])) for size in (2, 3)}):
            _check_programs(pair, batch, size)


def check_prior(prior: nn.Module, *context: Tensor, seed: int = 0) -> None:
    """Hold a prior against its contract by numbers; silence means that it is kept.

    Checked are: a distribution over one vector, whose batch shape is that of the context or
    ``()``; densities in a batch of particles as one by one; a density that integrates to 1
    and draws that follow it; the same density in double precision and after a `state_dict`
    round trip; a gradient for every trainable parameter.

    The integral is estimated by importance sampling from kernels around the prior's own
    draws; draws are compared with it by Kolmogorov-Smirnov tests on every marginal and on
    five random projections. A sound prior fails with a probability below 1e-4. Tails as
    heavy as a Cauchy's and more than about six dimensions are beyond the estimate, which
    says so.

    Args:
        prior: ``prior(*context)`` is a distribution over a vector of few dimensions.
        context: What it is conditioned on, one row or more; the first is used.
        seed: Seed of all draws; the random state stays as it was.

    Raises:
        ValueError: The first promise that is broken.

    Example:
        >>> from pyro_vae import priors
        >>> check_prior(priors.MixtureOfNormals(3, components=5))
    """
    row = tuple(c[:1] for c in context)
    with _undisturbed(prior, row), unvalidated():
        torch.manual_seed(seed)
        density = as_pyro(prior(*row))
        batch, event = tuple(density.batch_shape), tuple(density.event_shape)
        if len(event) != 1 or batch not in ((), (1,) * bool(row)):
            raise ValueError(
                f"a prior over one vector has batch shape () and event shape (latent,), and this "
                f"one has {batch} and {event}: declare dimensions as event by .to_event(n)"
            )
        with torch.no_grad():
            draws = density.sample((_DRAWS,)).reshape(_DRAWS, *event)
            _check_particles(density, draws[:6])
            _check_integral(density, draws)
            _check_precision(prior, row, draws[:100])
            _check_round_trip(prior, row, draws[:100])
        _check_gradients(prior, density.log_prob(draws[:100]))


_DRAWS = 5000
_FALSE_ALARM = 1e-4  # of each check, divided among its tests


def _check_particles(density: Distribution, z: Tensor) -> None:
    """Scores of shape ``(2, 3, 1)`` are those of single vectors."""
    one_by_one = torch.stack([density.log_prob(row).reshape(()) for row in z])
    together = density.log_prob(z.reshape(2, 3, *density.batch_shape, -1))
    if together.numel() != 6 or not torch.allclose(together.flatten(), one_by_one, atol=1e-4):
        raise ValueError(
            "the density of several particles is not that of each: score vectors (..., latent) "
            "under any leading dimensions"
        )


def _check_integral(density: Distribution, draws: Tensor) -> None:
    """The density integrates to 1, and the draws follow it."""
    if not draws.isfinite().all():
        raise ValueError("a draw is NaN or infinite: check the scales of the prior")
    kernels = _kernels(draws[:300])
    z = kernels.sample((4 * _DRAWS,))
    weight = (density.log_prob(z).flatten() - kernels.log_prob(z)).double().exp()
    total, error = weight.mean(), weight.std() / len(weight) ** 0.5
    if not error < 0.05:
        raise ValueError(
            f"the integral of the density cannot be estimated ({total:.3g} ± {error:.2g}): give a "
            f"prior of fewer dimensions or with lighter tails"
        )
    if abs(total - 1) > stats.norm.isf(_FALSE_ALARM / 2) * error:
        raise ValueError(
            f"the density integrates to {total:.4g} ± {error:.2g} and not to 1: check its "
            f"normalising constant, and that draws reach wherever it is positive"
        )
    effective = float(weight.sum() ** 2 / (weight**2).sum())
    directions = torch.cat([torch.eye(z.shape[1]), torch.randn(5, z.shape[1])]).to(z)
    level = _FALSE_ALARM / len(directions)
    bound = (-0.5 * math.log(level / 2) * (1 / _DRAWS + 1 / effective)) ** 0.5
    for index, direction in enumerate(directions):
        distance = _distance(draws @ direction, z @ direction, weight)
        if distance > bound:
            place = f"dimension {index}" if index < z.shape[1] else "a random projection"
            raise ValueError(
                f"draws do not follow the density along {place}: their distribution functions "
                f"differ by {distance:.3f}, where {bound:.3f} would be chance"
            )


def _kernels(draws: Tensor) -> Distribution:
    """Student's t around each draw, wide enough to cover what lies between them."""
    count, latent = draws.shape
    spread = (draws.quantile(0.9, 0) - draws.quantile(0.1, 0)) / 2.5 + 1e-6
    scale = 1.5 * spread * count ** (-1 / (latent + 4))
    around = torch.distributions.StudentT(2.0, draws, scale)
    equal = torch.distributions.Categorical(torch.ones(count, device=draws.device))
    return torch.distributions.MixtureSameFamily(equal, Independent(around, 1))


def _distance(draws: Tensor, values: Tensor, weight: Tensor) -> float:
    """Kolmogorov's distance between draws and weighted values."""
    at = draws.sort().values
    order = values.argsort()
    cumulated = torch.cat([weight.new_zeros(1), weight[order].cumsum(0)]) / weight.sum()
    expected = cumulated[torch.searchsorted(values[order].contiguous(), at)]
    steps = torch.arange(len(at) + 1, device=at.device) / len(at)
    above, below = (steps[1:] - expected).max(), (expected - steps[:-1]).max()
    return float(torch.maximum(above, below))


def _check_precision(prior: nn.Module, row: tuple[Tensor, ...], z: Tensor) -> None:
    """In double precision the density is the same, to the digits of single precision."""
    single = as_pyro(prior(*row)).log_prob(z).flatten()
    double = as_pyro(copy.deepcopy(prior).double()(*(c.double() for c in row)))
    scores = double.log_prob(z.double()).flatten()
    if scores.dtype != torch.float64 or not torch.allclose(single.double(), scores, rtol=1e-3):
        raise ValueError(
            "after .double() the density is another or not in double precision: keep constants in "
            "buffers, and make tensors in the dtype of the parameters"
        )


def _check_round_trip(prior: nn.Module, row: tuple[Tensor, ...], z: Tensor) -> None:
    """All that the density depends on is in the `state_dict`, constants aside."""
    twin = copy.deepcopy(prior)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(torch.randn_like(parameter))
    twin.load_state_dict(prior.state_dict())
    if not torch.equal(as_pyro(twin(*row)).log_prob(z), as_pyro(prior(*row)).log_prob(z)):
        raise ValueError(
            "the density is another after its state_dict was loaded: register what it depends on "
            "as parameters or buffers"
        )


def _check_gradients(prior: nn.Module, scores: Tensor) -> None:
    named = [(name, p) for name, p in prior.named_parameters() if p.requires_grad]
    if not named:
        return
    if not scores.requires_grad:
        raise ValueError(f"the density does not depend on the parameter '{named[0][0]}'")
    slopes = torch.autograd.grad(scores.sum(), [p for _, p in named], allow_unused=True)
    for (name, _), slope in zip(named, slopes, strict=True):
        if slope is None or not slope.isfinite().all():
            fault = "no" if slope is None else "a NaN or infinite"
            raise ValueError(f"the parameter '{name}' gets {fault} gradient from the density")


@contextmanager
def unvalidated() -> Iterator[None]:
    """Switch off the validation of Pyro and torch for a while, and leave both as they were."""
    before = Distribution._validate_args
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        Distribution.set_default_validate_args(before)


def elementary(support: constraints.Constraint) -> constraints.Constraint:
    """Return the support of one element, where elements are independent."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _check_programs(pair: Pair, batch: tuple[Tensor, ...], size: int) -> None:
    rows = tuple(tensor[:size] for tensor in batch)
    with _worded("guide", size):
        guide = prune_subsample_sites(poutine.trace(pair.guide).get_trace(*rows))
        guide.compute_log_prob()
    with _worded("model", size):
        model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(*rows)
        model = prune_subsample_sites(model)
    _check_sites(model, guide)
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
            f"{wrong.numel()} values of {name} lie outside the support of {_family(site['fn'])}, "
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


def _family(distribution: Any) -> str:
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return type(distribution).__name__


@contextmanager
def _worded(program: str, size: int) -> Iterator[None]:
    """Turn what torch or Pyro says about a failing program into one sentence."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the {program} cannot run on {size} data: {reason}") from error


@contextmanager
def _undisturbed(pair: Any, batch: tuple[Tensor, ...]) -> Iterator[None]:
    """Leave random state and buffers (batch-norm statistics) as they were."""
    buffers = dict(pair.named_buffers()) if isinstance(pair, nn.Module) else {}
    kept = {name: buffer.clone() for name, buffer in buffers.items()}
    devices = {tensor.device for tensor in batch if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        yield
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(kept[name])
