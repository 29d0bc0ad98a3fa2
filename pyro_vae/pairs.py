"""Pairs: what does not fit between a model, a guide and their data, before any training."""

from __future__ import annotations

__all__ = [
    "check_objective",
    "check_pair",
    "elementary",
    "family",
    "undisturbed",
    "validation",
]

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.infer.elbo import ELBO
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.hierarchy import HierarchicalVAE, check_layers
from pyro_vae.likelihoods import Missing
from pyro_vae.objectives import BetaELBO
from pyro_vae.scoring import Pair, check_sites, validation
from pyro_vae.state import restored
from pyro_vae.vae import VAE, check_parts


def check_pair(pair: Pair, *batch: Tensor) -> None:
    """Run model and guide on a few data and say in a sentence what does not fit.

    Checked are the latent sites of both programs and their scales, the shape of every site
    within its plates (with two and with three data, so that no width passes for the batch by
    coincidence), that what is observed has the event shape of its likelihood, that every
    log-density is finite, that the guide draws values in the support of the model's latent
    sites, that the data lie in that of their likelihood, and that every trainable parameter
    gets a gradient. Random state, buffers and parameters stay as they were.

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
        _check_sizes(pair.likelihood, batch)
    elif isinstance(pair, HierarchicalVAE):
        check_layers(pair)
    with (
        undisturbed(pair, batch),
        torch.enable_grad(),
        validation(False),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Encountered NaN")  # told of in a sentence instead
        rows = batch  # all of them once
        for size in sorted({min(size, len(batch[0])) for size in (2, 3)}):
            _check_programs(pair, rows, size)
            rows = tuple(tensor[:3] for tensor in batch)


def check_objective(objective: ELBO, pair: Pair, *batch: Tensor) -> None:
    """Take the gradient of an objective on a few data, with Pyro's own checks of it on.

    Args:
        objective: The objective, which stays as it is.
        pair: Module with methods ``model`` and ``guide``, whose gradients are set to None.
        batch: A batch ``(x, *context)``, of which the first two rows are used.

    Raises:
        ValueError: The objective cannot train this pair.
    """
    if objective.num_particles < 1:
        raise ValueError(f"an objective draws at least 1 particle, not {objective.num_particles}")
    if isinstance(objective, BetaELBO) and objective.weight < 0:
        raise ValueError(f"the weight of the KL is at least 0, not {objective.weight:g}")
    rows = tuple(tensor[:2] for tensor in batch)
    try:
        with undisturbed(pair, rows), validation(True), warnings.catch_warnings():
            warnings.filterwarnings("error", "Failed to verify mean field restriction")
            copy.deepcopy(objective).loss_and_grads(pair.model, pair.guide, *rows)
    except (RuntimeError, ValueError, NotImplementedError, UserWarning) as error:
        first, _, rest = str(error).partition("\n")
        cause = rest.partition("\n")[0] if first.endswith("':") else ""  # Pyro's, of a site
        reason = " ".join(f"{first} {cause}".split()).removesuffix(":")
        if isinstance(error, UserWarning):
            reason = (
                "its KLs in closed form need a guide that draws the latents in the order of the "
                "model; use Trace_ELBO"
            )
        raise ValueError(
            f"{type(objective).__name__} cannot train this model and guide: {reason}"
        ) from error
    finally:
        if isinstance(pair, nn.Module):
            pair.zero_grad()


def elementary(support: constraints.Constraint) -> constraints.Constraint:
    """Return the support of one element, where elements are independent."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _check_programs(pair: Pair, batch: tuple[Tensor, ...], size: int) -> None:
    rows = tuple(tensor[:size] for tensor in batch)
    # First the model by itself, whose sentences on x and its context are the more telling.
    with _worded("model", size):
        alone = poutine.trace(pair.model).get_trace(*rows)
    for name in alone.observation_nodes:
        _check_event(name, alone.nodes[name], rows[0])
        _check_support(name, alone.nodes[name], batch[0])
    with _worded("guide", size):
        guide = prune_subsample_sites(poutine.trace(pair.guide).get_trace(*rows))
        guide.compute_log_prob()
    _check_scores("guide", guide, missing=bool(rows[0].isnan().any()))
    with _worded("model", size):
        model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(*rows)
        model = prune_subsample_sites(model)
    check_sites(model, guide)
    for name in model.stochastic_nodes:
        _check_latent(name, model.nodes[name]["fn"], guide.nodes[name]["fn"])
        _check_scale(name, model.nodes[name]["scale"], guide.nodes[name]["scale"])
    with _worded("model", size):
        model.compute_log_prob()
    _check_scores("model", model)
    if isinstance(pair, nn.Module):
        _check_trained(pair, model, guide)


def _check_sizes(likelihood: nn.Module, batch: tuple[Tensor, ...]) -> None:
    """Size factors are positive, where a likelihood takes the last context as them."""
    while isinstance(likelihood, Missing):
        likelihood = likelihood.likelihood
    if not getattr(likelihood, "size_factor", False) or len(batch) < 2:
        return
    size = batch[-1]
    wrong = size[~(size > 0)]
    if len(wrong):
        raise ValueError(
            f"{len(wrong)} size factors of {type(likelihood).__name__} are not positive, "
            f"{wrong[0]:g} for one: remove such rows, since a count of mean 0 teaches nothing"
        )


def _check_latent(name: str, prior: Any, posterior: Any) -> None:
    """Draws of the guide lie where the model has density, or mass as the guide."""
    if prior.support.is_discrete != posterior.support.is_discrete:
        kinds = {True: "discrete", False: "continuous"}
        raise ValueError(
            f"{name} is {kinds[prior.support.is_discrete]} in the model ({family(prior)}) and "
            f"{kinds[posterior.support.is_discrete]} in the guide ({family(posterior)}), and a "
            f"mass over a density is no bound: choose both of one kind"
        )
    draws = posterior.sample((100,))
    inside = prior.support.check(draws)
    if not inside.all():
        wrong = draws[~inside].flatten()
        raise ValueError(
            f"the guide draws values of {name} outside the support of {family(prior)} in the "
            f"model, {wrong[0]:g} for one: give them the same support, since a bound over "
            f"another one is none"
        )


def _check_scale(name: str, modelled: Any, guided: Any) -> None:
    """A scale of the KL, one number or one for each datum, is that of both programs."""
    scales = torch.broadcast_tensors(*map(torch.as_tensor, (modelled, guided)))
    differ = scales[0] != scales[1]
    if differ.any():
        one, other = (scale[differ][0] for scale in scales)
        raise ValueError(
            f"the latent '{name}' is scaled by {one:g} in the model and by {other:g} in the "
            f"guide, which is no weight of the KL: scale both alike, or use BetaELBO"
        )


def _check_trained(pair: nn.Module, *traces: poutine.Trace) -> None:
    """Every parameter that is to be trained reaches a density, also where data have holes."""
    named = [(name, each) for name, each in pair.named_parameters() if each.requires_grad]
    sites = [site for trace in traces for site in trace.nodes.values() if site["type"] == "sample"]
    scores = [site["log_prob"].sum() for site in sites if site["log_prob"].requires_grad]
    seen = [site["value"] for site in sites if site["is_observed"]]
    holes = any(bool(each.isnan().any()) for each in seen if isinstance(each, Tensor))
    slopes: Sequence[Tensor | None] = [None] * len(named)
    if scores and named:
        # Random factors, since densities of one z may cancel in their sum.
        total = torch.stack(scores) @ torch.rand(len(scores)).to(scores[0])
        slopes = torch.autograd.grad(total, [each for _, each in named], allow_unused=True)
    for (name, _), slope in zip(named, slopes, strict=True):
        if slope is None:
            raise ValueError(
                f"the parameter '{name}' would never change: neither the model nor the guide "
                f"depends on it, or the global param store holds another of its name; use it, or "
                f"freeze it by requires_grad_(False)"
            )
        values = slope.coalesce().values() if slope.is_sparse else slope
        if holes and not values.isfinite().all():
            raise ValueError(
                f"the parameter '{name}' gets a NaN or infinite gradient: fill what is missing "
                f"before it is scored, since a mask after that mends the loss only"
            )


def _check_event(name: str, site: Any, x: Tensor) -> None:
    """An observed value has the event shape of its law, where torch would broadcast either."""
    value, batch, event = site["value"], site["fn"].batch_shape, site["fn"].event_shape
    own = value.shape[len(batch) :]
    constant = value.dim() < len(batch) + len(event) and value.shape != x.shape
    if constant and value.shape[value.dim() - len(event) :] == event:
        return  # one value for all data, as of a factor
    if own != event:
        raise ValueError(
            f"the likelihood's event shape is {tuple(event)} and {name} has {tuple(own)}: "
            f"give the decoder's output the shape of the data"
        )


def _check_support(name: str, site: Any, x: Tensor) -> None:
    """Hold x against the support, all of it where the support is the same for every datum."""
    support, value = site["fn"].support, site["value"]
    element = elementary(support)
    held = vars(getattr(element, "complete", element)).values()
    if value.shape[1:] == x.shape[1:] and not any(map(torch.is_tensor, held)):
        support, value = (element if element.event_dim == 0 else support), x
    inside = support.check(value)
    if inside.all():
        return
    outside, example = int((~inside).sum()), value[~inside].flatten()
    element = getattr(element, "complete", element)  # of what is not missing
    whole = len(example) > outside  # the support is one of whole vectors
    row = int((~inside).nonzero()[0, 0])
    shown = f", {example[0]:g} for one"
    if whole:  # `fit` has shuffled them
        shown = f", row {row} of a batch for one"
    raise ValueError(
        f"{outside} {'data' if whole else 'values'} of {name} lie outside the support of "
        f"{family(site['fn'])}{_described(element)}{shown}: {_advice(element, example)}"
    )


def _described(support: constraints.Constraint) -> str:
    """What a support is in words, where it says so itself."""
    return "" if type(support).__module__.startswith("torch.") else f" ({support})"


def _advice(support: constraints.Constraint, wrong: Tensor) -> str:
    """What to do about values outside of a support."""
    if wrong.isnan().any():
        return "wrap the likelihood as Missing(likelihood), which leaves out NaN (--missing)"
    other = "or choose a likelihood for such values"
    if support is constraints.boolean:
        return (
            f"binarise the data (--binarisation dynamic or threshold; in Python view=dynamic), "
            f"{other}"
        )
    if support.is_discrete and (wrong % 1 != 0).any() and wrong.min() >= 0 and wrong.max() <= 1:
        return f"score grey levels as whole numbers (--binarisation levels; view=levels), {other}"
    return f"remove or scale them, {other}"


def _check_scores(program: str, trace: poutine.Trace, *, missing: bool = False) -> None:
    """Every site has the batch of its plates, and a finite log-density."""
    for name, site in trace.nodes.items():
        if site["type"] != "sample":
            continue
        score: Tensor = site["log_prob"]
        plates = {frame.dim: frame.size for frame in site["cond_indep_stack"] if frame.vectorized}
        expected = [plates.get(dim, 1) for dim in range(-max(map(abs, plates), default=0), 0)]
        if list(score.shape) != expected:
            raise ValueError(
                f"site '{name}' of the {program} has batch shape {tuple(score.shape)} where its "
                f"plates have {tuple(expected)}: declare the rest as event by .to_event(n)"
            )
        if not score.isfinite().all():
            advice = (
                "check the initial weights, the scales and the range of the data, which an "
                "encoder's transform can bring to one around 1"
            )
            if missing:
                advice = "x has NaN, which an encoder takes by transform=networks.fill"
            raise ValueError(
                f"the log-density of site '{name}' in the {program} is {_first_bad(score):g} at "
                f"the start: {advice}"
            )


def _first_bad(score: Tensor) -> float:
    return float(score.detach()[~score.isfinite()][0])


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
    module = pair if isinstance(pair, nn.Module) else nn.Module()
    tensors = (*batch, *module.parameters())
    devices = {each.device for each in tensors if each.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), restored(list(module.buffers())):
        yield
