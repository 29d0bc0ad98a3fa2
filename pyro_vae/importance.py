"""Bounds from the importance weights of several draws for each datum."""

from __future__ import annotations

__all__ = [
    "IWAE",
    "Direct",
    "Renyi",
    "Site",
    "Spread",
    "at_least_one",
    "data_dim",
    "each_datum",
    "latents",
    "need_rsample",
    "observations",
    "single",
    "unscaled",
]

import abc
import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any, cast

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.elbo import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match
from torch import Tensor, nn
from typing_extensions import override

_SMALL = 0.01  # powers of weights that are close to 1 in single precision

Program = Callable[..., Any]
Site = dict[str, Any]


class Direct(ELBO, abc.ABC):
    """An ELBO with one tensor for its value and, through autograd, for its gradient."""

    @abc.abstractmethod
    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Minus the objective, summed over the batch, a tensor to differentiate, in nats."""

    @torch.no_grad()
    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Minus the objective, summed over the batch, in nats."""
        return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """As `loss`; gradients are added to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    @override
    def _get_trace(
        self, model: Program, guide: Program, args: Any, kwargs: Any
    ) -> tuple[Trace, Trace]:
        guided = poutine.trace(guide).get_trace(*args, **kwargs)
        return self._scored(model, guided, args, kwargs)

    def _scored(
        self, model: Program, guided: Trace, args: Any, kwargs: Any
    ) -> tuple[Trace, Trace]:
        """Traces of the model, at the values of the guide's, and of the guide, both scored."""
        modelled = poutine.trace(poutine.replay(model, trace=guided)).get_trace(*args, **kwargs)
        if is_validation_enabled():
            check_model_guide_match(modelled, guided, self.max_plate_nesting)
        modelled, guided = prune_subsample_sites(modelled), prune_subsample_sites(guided)
        modelled.compute_log_prob()
        guided.compute_log_prob()
        return modelled, guided


class _Averaging(Direct, abc.ABC):
    """Bounds ``1/(1-a) log 1/K sum_k w_k^(1-a)`` for each datum of the plate ``data``."""

    def __init__(
        self, alpha: float, particles: int, doubly: bool, vectorized: bool, nesting: int
    ) -> None:
        super().__init__(at_least_one(particles), nesting, vectorize_particles=vectorized)
        self.alpha, self.doubly_reparameterised = alpha, doubly
        self._rank = nesting + 1  # of a batch of particles
        # By owner, the guides that are known to hold still.
        self._held: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()

    @override
    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        share = _Share(self._rank)
        traces = self._runs(model, guide, args, kwargs, share)
        count = self.num_particles if self.vectorize_particles else 1
        draws = [_weighed(*pair, self._rank, count) for pair in traces]
        log_w = torch.cat([each.log_weights for each in draws])
        power = 1 - self.alpha
        bound = _log_mean(log_w, power)
        # Autograd gives each draw its part of the average. Where the score function of q was
        # left out, what arrives at z is due another share of that.
        part = (power * log_w.detach()).softmax(0)
        kept = draws[0].weight * power
        share.values = 1 - kept + kept * part
        score = torch.cat([each.score.expand_as(each.log_weights) for each in draws])
        if score.requires_grad:
            gain = bound.detach() - _without_one(log_w.detach(), power)
            bound = bound + (gain * (score - score.detach())).sum(0)
        return -((draws[0].scale * bound).sum() + draws[0].shared)

    def _runs(
        self, model: Program, guide: Program, args: Any, kwargs: Any, share: _Share
    ) -> Iterator[tuple[Trace, Trace]]:
        """Scored traces of K draws, all at once or one after another."""
        count = self.num_particles if self.vectorize_particles else 1
        spread = Spread(count, -self._rank)
        shared = Trace()  # the sites outside the data plate, which all draws have in common
        for first in range(0, self.num_particles, count):
            program = poutine.replay(spread(guide), trace=shared)
            guided = poutine.trace(program).get_trace(*args, **kwargs)
            for name in [] if first else guided.nodes:
                site = guided.nodes[name]
                if site["type"] == "sample" and data_dim(site) is None:
                    shared.add_node(name, **site)
            if self.doubly_reparameterised and torch.is_grad_enabled():
                guided = self._copied(guided, share, first)
                self._check_held(guide, spread, guided, args, kwargs)
                program = poutine.replay(spread(guide), trace=guided)
                guided = _held(program, _owner(guide), args, kwargs)
            yield self._scored(spread(model), guided, args, kwargs)

    def _copied(self, guided: Trace, share: _Share, first: int) -> Trace:
        """The trace with copies of the latents, which pass on a share of their gradient.

        The copies only score: later latents were drawn from the values themselves, so that
        what flows through several latents gets its share once.
        """
        of = f"the doubly reparameterised gradient of {type(self).__name__}"
        guided = guided.copy()
        for name, site in latents(guided):
            need_rsample(site, of)
            if data_dim(site) is not None:
                guided.nodes[name] = {**site, "value": share.copy(site, first)}
            elif site["value"].requires_grad:
                raise ValueError(
                    f"{of} is for latents within the data plate, and '{name}' lies outside: use "
                    f"the pathwise one"
                )
        sites = [site for _, site in latents(guided) if data_dim(site) is not None]
        if any(not (single(each) and _alike(each["scale"], sites[0]["scale"])) for each in sites):
            raise ValueError(f"{of} needs one weight for all latents, and they have several")
        return guided

    def _check_held(
        self, guide: Program, spread: Spread, guided: Trace, args: Any, kwargs: Any
    ) -> None:
        """Refuse a guide whose density moves with parameters that were to be held.

        Refused is also one whose density at a draw is another in a second run, where it can be
        read. A guide is tried once for the modules that it has, in the mode of each.
        """
        owner = _owner(guide)
        # Modules by weak references, since an owner among them would keep itself alive.
        modules = list(owner.modules()) if isinstance(owner, nn.Module) else []
        state = tuple((weakref.ref(each), each.training) for each in modules)
        key = getattr(poutine.unwrap(guide), "__func__", None), state
        if key in self._held.get(owner, ()):
            return
        still = guided.copy()
        for name, site in latents(still):
            still.nodes[name] = {**site, "value": site["value"].detach()}
        trace = _held(poutine.replay(spread(guide), trace=still), owner, args, kwargs)
        guided.compute_log_prob()
        for name, site in latents(trace):
            score, drawn = site["log_prob"], guided.nodes[name]["log_prob"].detach()
            if score.requires_grad:
                raise ValueError(
                    f"{type(self).__name__} cannot hold the parameters of '{name}' in the guide, "
                    f"as its doubly reparameterised gradient must: make the guide a method of "
                    f"the torch.nn.Module that has them, or use the pathwise gradient"
                )
            if type(score) is Tensor and not torch.allclose(score, drawn, 1e-4, 1e-4, True):
                raise ValueError(
                    f"the guide gives a draw of '{name}' another density when it runs again, as "
                    f"with dropout, and the doubly reparameterised gradient of "
                    f"{type(self).__name__} needs that twice: use the pathwise one"
                )
        if all(type(site["log_prob"]) is Tensor for _, site in latents(trace)):
            self._held.setdefault(owner, set()).add(key)


class IWAE(_Averaging):
    """Importance-weighted bound ``E[log 1/K sum_k p(x,z_k) / q(z_k|x)]`` for each datum.

    Burda et al. (2016), Importance Weighted Autoencoders, equation 8: a lower bound on
    log p(x) that grows with K and is the ELBO at K = 1. The average is taken for each datum of
    the plate ``data``, so that minibatches and subsampling leave it as it is; a latent outside
    that plate is drawn once and enters as in the ELBO. Weighted by a `BetaELBO`,
    ``log w = log p(x|z) + b (log p(z) - log q(z|x))``.

    Gradients go through the draws where these are reparameterised; other latents get the
    score function, with the baseline of Mnih & Rezende (2016), Variational Inference for
    Monte Carlo Objectives, equation 9.

    Args:
        particles: Number K of draws.
        doubly_reparameterised: Rewrite the score function of q that the pathwise gradient
            contains, so that the encoder's signal does not drown in noise as K grows: Tucker
            et al. (2019), Doubly Reparameterized Gradient Estimators, equation 8.
        vectorize_particles: Draw all at once, in a dimension of their own on the left, and
            not one after another.
        max_plate_nesting: Number of nested plates, the one over the data included.

    Raises:
        ValueError: Fewer than 1 particle.

    Example:
        >>> IWAE(5).num_particles
        5
    """

    def __init__(
        self,
        particles: int = 5,
        *,
        doubly_reparameterised: bool = False,
        vectorize_particles: bool = True,
        max_plate_nesting: int = 1,
    ) -> None:
        super().__init__(
            0.0, particles, doubly_reparameterised, vectorize_particles, max_plate_nesting
        )


class Renyi(_Averaging):
    """Variational Rényi bound ``E[1/(1-a) log 1/K sum_k w_k^(1-a)]`` for each datum.

    Li & Turner (2016), Rényi Divergence Variational Inference, equation 9, with
    ``w = p(x,z) / q(z|x)``. At order a = 0 it is `IWAE` and at a = 1 the ELBO. In expectation
    it is a lower bound on log p(x) for a >= 0; below 0, with finitely many particles, it is
    neither a lower nor an upper one, and `is_bound` is false.

    Args:
        alpha: The order a.
        particles: Number K of draws.
        doubly_reparameterised: As for `IWAE`; at order 1, sticking the landing of Roeder et
            al. (2017).
        vectorize_particles: As for `IWAE`.
        max_plate_nesting: As for `IWAE`.

    Raises:
        ValueError: An order that is not finite, or fewer than 1 particle.

    Example:
        >>> Renyi(0.5).is_bound, Renyi(-1.0).is_bound
        (True, False)
    """

    def __init__(
        self,
        alpha: float = 0.5,
        *,
        particles: int = 5,
        doubly_reparameterised: bool = False,
        vectorize_particles: bool = True,
        max_plate_nesting: int = 1,
    ) -> None:
        if not math.isfinite(alpha):
            raise ValueError(f"the order of a Rényi bound is finite, not {alpha}")
        super().__init__(
            alpha, particles, doubly_reparameterised, vectorize_particles, max_plate_nesting
        )

    @property
    def is_bound(self) -> bool:
        """Whether the value is, in expectation, a lower bound on log p(x)."""
        return self.alpha >= 0


@dataclass(frozen=True)
class _Draws:
    """What some draws for each datum of a batch give.

    Attributes:
        log_weights: ``log w = log p(x|z) + b (log p(z) - log q(z|x))``, ``(K, N)``.
        score: ``log q`` of the latents that are not reparameterised, or zero, likewise.
        weight: The weight b of the latents.
        scale: What each datum counts.
        shared: The ELBO of the sites outside the data plate.
    """

    log_weights: Tensor
    score: Tensor
    weight: Any
    scale: Any
    shared: Any


def _weighed(modelled: Trace, guided: Trace, rank: int, count: int) -> _Draws:
    """The weights of the draws, `count` of them, in a pair of traces."""
    scale = _scale(modelled)
    log_weights, shared, weight = 0.0, 0.0, 1.0
    score: Any = 0.0
    for trace, sign in ((modelled, 1), (guided, -1)):
        for name, site in trace.nodes.items():
            if site["type"] != "sample":
                continue
            latent = trace is guided and not site["is_observed"]
            if data_dim(site) is None:
                shared = shared + sign * site["log_prob_sum"]
                if latent and site["log_prob"].requires_grad:
                    need_rsample(site, f"a latent outside the data plate, '{name}',")
                continue
            log_weights = log_weights + sign * (each_datum(site, rank, count) / scale)
            if latent:
                weight = _weight(site, scale)
                if not site["fn"].has_rsample:
                    score = score + each_datum(unscaled(site), rank, count)
    if not isinstance(log_weights, Tensor):
        raise ValueError(
            "importance weights are averaged for each datum of a plate named 'data', and neither "
            "the model nor the guide has a site in one"
        )
    return _Draws(log_weights, torch.as_tensor(score), weight, scale, shared)


def _scale(modelled: Trace) -> Any:
    """What a datum counts: the scale of its observed sites, 1 or that of a subsample."""
    sites = [modelled.nodes[name] for name in modelled.observation_nodes]
    sites = [site for site in sites if data_dim(site) is not None]
    if any(not (single(each) and _alike(each["scale"], sites[0]["scale"])) for each in sites):
        raise ValueError(
            "importance weights need one scale for all that is observed of a datum, and the "
            "observed sites of the model have several"
        )
    return sites[0]["scale"] if sites else 1.0


def single(site: Site) -> bool:
    """Whether the scale of a site is a number, or one for each datum of a rightmost plate."""
    return not torch.is_tensor(site["scale"]) or site["scale"].dim() <= (data_dim(site) == -1)


def _alike(one: Any, other: Any) -> bool:
    """Whether two scales are one tensor or equal numbers; tensors are not read."""
    return one is other or (
        not torch.is_tensor(one) and not torch.is_tensor(other) and one == other
    )


def _weight(site: Site, scale: Any) -> Any:
    return site["scale"] if _alike(scale, 1.0) else site["scale"] / scale


def each_datum(site: Site, rank: int, count: int) -> Tensor:
    """A site's log-density ``(K, N)``, summed over all dimensions but particles and data."""
    score: Tensor = site["log_prob"]
    shape = (1,) * (rank - score.dim()) + score.shape
    if len(shape) > rank or shape[0] not in (1, count):
        raise ValueError(
            f"'{site['name']}' has a log-density of shape {tuple(score.shape)}, with dimensions "
            f"that are no plates: declare what belongs to one datum as event by .to_event(n)"
        )
    dim = rank + int(data_dim(site) or 0)
    others = [each for each in range(1, rank) if each != dim]
    return score.reshape(shape).sum(others) if others else score.reshape(shape)


def unscaled(site: Site) -> Site:
    """A site with its log-density as it is without any scale; what is masked is 0."""
    score = scale_and_mask(site["unscaled_log_prob"], mask=site["mask"])
    return {**site, "log_prob": score}


def _log_mean(log_weights: Tensor, power: float, dim: int = 0) -> Tensor:
    """``1/p log 1/K sum_k w_k^p``, which at p = 0 is the mean of log w."""
    if power == 0:
        return log_weights.mean(dim)
    if abs(power) < _SMALL:
        # Beside log K the sum would lose its digits: powers are taken of ratios to one end.
        end = (log_weights.amax if power > 0 else log_weights.amin)(dim, keepdim=True).detach()
        end = end.clamp(min=torch.finfo(end.dtype).min)
        ratios = (power * (log_weights - end)).expm1().mean(dim)
        return end.squeeze(dim) + ratios.log1p() / power
    total = (power * log_weights).logsumexp(dim)
    return (total - math.log(log_weights.shape[dim])) / power


def _without_one(log_weights: Tensor, power: float) -> Tensor:
    """For each draw the bound with its weight replaced by the geometric mean of the others.

    0 where that is not finite, since weights of others are 0.
    """
    count = len(log_weights)
    if count == 1:
        return torch.zeros_like(log_weights)
    own = torch.eye(count, dtype=torch.bool, device=log_weights.device)[..., None]
    others = log_weights.expand(count, -1, -1).masked_fill(own, 0.0).sum(1) / (count - 1)
    bound = _log_mean(torch.where(own, others[:, None], log_weights), power, dim=1)
    return bound.where(bound.isfinite(), 0.0)


class Spread(Messenger):
    """Gives the sites within the plate ``data`` some draws, in a dimension of their own."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.frame = CondIndepStackFrame("particles", dim, count, 0)

    def _pyro_sample(self, msg: Any) -> None:
        if data_dim(msg) is None:
            return
        if any(each.vectorized and each.dim <= self.frame.dim for each in msg["cond_indep_stack"]):
            raise ValueError(
                f"'{msg['name']}' lies in more plates than max_plate_nesting="
                f"{-self.frame.dim - 1} leaves room for beside the particles: raise it"
            )
        if self.frame.size == 1:
            return
        msg["cond_indep_stack"] = (self.frame, *msg["cond_indep_stack"])
        BroadcastMessenger._pyro_sample(msg)

    @override
    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        # A plate that meets the particles finds itself in dimensions of another size.
        met = self.frame.size > 1 and f" dim {self.frame.dim}," in str(error)
        if met and isinstance(error, ValueError):
            raise ValueError(
                f"{str(error).splitlines()[0]}, the dim of the particles: declare what belongs "
                f"to one datum as event by .to_event(n), or raise max_plate_nesting="
                f"{-self.frame.dim - 1} where plates nest deeper"
            ) from error


class _Share:
    """The share of its gradient that each draw of a latent passes on, known after the draw."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.values = torch.ones(1, 1)  # (K, N)

    def copy(self, site: Site, first: int) -> Tensor:
        """Return a site's value, draws `first` onwards of all, as a copy with that backward."""
        value, event = site["value"], len(site["fn"].event_shape)
        batch = value.dim() - event
        count = len(value) if batch == self.rank else 1
        dim = self.rank + int(data_dim(site) or 0)

        def shares() -> Tensor:
            each = self.values[first : first + count]
            shape = [1] * self.rank
            shape[0], shape[dim] = each.shape
            return each.reshape(shape[self.rank - batch :] + [1] * event)

        copied: Tensor = _Copy.apply(value, shares)
        return copied


class _Copy(torch.autograd.Function):
    """The identity, whose gradient is multiplied by what a function then returns."""

    @staticmethod
    @override
    def forward(ctx: Any, value: Tensor, shares: Callable[[], Tensor]) -> Tensor:
        ctx.shares = shares
        return value.view_as(value)

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.shares(), None


class _Hold(Messenger):
    """Cuts the values of ``param`` sites from their parameters."""

    def _pyro_post_param(self, msg: Any) -> None:
        msg["value"] = msg["value"].detach()


def _held(program: Program, owner: Any, args: Any, kwargs: Any) -> Trace:
    """The scored trace of a guide, its module's parameters and its ``param`` sites constant."""
    with _Hold(), _constant(owner):
        trace = poutine.trace(program).get_trace(*args, **kwargs)
        trace.compute_log_prob()  # in here, since a flow reads its weights when it scores
    return trace


@contextlib.contextmanager
def _constant(owner: Any) -> Iterator[None]:
    """A module with constants for its parameters, and copies of the buffers it may update."""
    modules = list(owner.modules()) if isinstance(owner, nn.Module) else []
    before = [(each, dict(each._parameters), dict(each._buffers)) for each in modules]
    try:
        for each, parameters, buffers in before:
            still = {name: v.detach() for name, v in parameters.items() if v is not None}
            each._parameters.update(cast("dict[str, Any]", still))
            each._buffers.update({name: v.clone() for name, v in buffers.items() if v is not None})
        yield
    finally:
        for each, parameters, buffers in before:
            each._parameters.update(parameters)
            each._buffers.update(buffers)


def _owner(guide: Program) -> Any:
    """The object whose method a guide is, within any handlers, or the guide itself."""
    inner = poutine.unwrap(guide)
    return getattr(inner, "__self__", inner)


def latents(trace: Trace) -> list[tuple[str, Site]]:
    """The unobserved sites of a trace by name, those of subsampling aside."""
    nodes = prune_subsample_sites(trace).nodes
    return [
        (name, nodes[name])
        for name in nodes
        if nodes[name]["type"] == "sample" and not nodes[name]["is_observed"]
    ]


def observations(trace: Trace) -> list[tuple[str, Site]]:
    """The observed sites of a trace by name, without what `pyro.deterministic` notes down."""
    return [
        (name, trace.nodes[name])
        for name in trace.observation_nodes
        if not trace.nodes[name]["infer"].get("_deterministic")
    ]


def data_dim(site: Any) -> int | None:
    """The dimension of the plate ``data`` at a site, a negative one; None outside of it."""
    for frame in site["cond_indep_stack"]:
        if frame.name == "data" and frame.vectorized:
            return int(frame.dim)
    return None


def need_rsample(site: Site, what: str) -> None:
    """Refuse a latent without pathwise gradient.

    Raises:
        ValueError: The distribution of the site has no ``rsample``.
    """
    if not site["fn"].has_rsample:
        raise ValueError(
            f"{what} needs reparameterised draws, which '{site['name']}' has not: use Trace_ELBO, "
            f"TraceGraph_ELBO or a plain IWAE, or a posterior with rsample"
        )


def at_least_one(particles: int) -> int:
    """Return a number of particles.

    Raises:
        ValueError: It is below 1, or no whole number.
    """
    if not isinstance(particles, Real) or not math.isfinite(particles) or particles % 1:
        raise ValueError(f"an objective draws a whole number of particles, not {particles!r}")
    if particles < 1:
        raise ValueError(f"an objective draws at least 1 particle, not {particles}")
    return int(particles)
