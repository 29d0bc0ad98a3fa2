"""Objectives: Pyro's own that suit minibatches, and more of the ELBO family, for `SVI`."""

from __future__ import annotations

__all__ = [
    "IWAE",
    "BetaELBO",
    "Direct",
    "FreeBits",
    "Renyi",
    "TraceGraph_ELBO",
    "TraceMeanField_ELBO",
    "Trace_ELBO",
    "WakeSleep",
]

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.elbo import ELBO
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Independent, kl_divergence
from typing_extensions import override

from pyro_vae.importance import (
    IWAE,
    Direct,
    Renyi,
    at_least_one,
    data_dim,
    latents,
    need_rsample,
    observations,
    single,
)

Program = Callable[..., Any]


class BetaELBO(ELBO):
    """Any ELBO with its KL weighted, ``E_q[log p(x|z) + b (log p(z) - log q(z|x))]``.

    The weight b multiplies the log-density of every latent site in model and guide alike, so
    it is right for each of Pyro's ELBOs, and inside the importance weights of `IWAE` and
    `Renyi`. The value is no lower bound below 1, nor above 1 where weights of several draws are
    averaged. Higgins et al. (2017), beta-VAE, equation 4; annealing as in Bowman et al. (2016),
    section 3.1.

    Args:
        weight: The weight b, at least 0. To follow a schedule of your own, change it between
            steps by ``objective.weight.fill_(b)``.
        start: Weight at the first step, from which it goes to `weight` linearly. The warm-up of
            `fit` would multiply it: give that ``warmup=0``.
        steps: Number of steps, calls of `loss_and_grads`, on that way.
        elbo: The ELBO to weight, `pyro.infer.Trace_ELBO` where it is left out.

    Raises:
        ValueError: A weight or a schedule that is negative or not finite, or a schedule of
            which only one half is given.
        TypeError: What is to be weighted is no objective, or a class of them.

    Example:
        >>> BetaELBO(4.0).weight
        tensor(4.)
    """

    def __init__(
        self,
        weight: float = 1.0,
        *,
        start: float | None = None,
        steps: int = 0,
        elbo: ELBO | None = None,
    ) -> None:
        if elbo is not None and not isinstance(elbo, ELBO):
            raise TypeError(
                f"a BetaELBO weights an objective, such as IWAE(5) or Trace_ELBO(), not {elbo!r}"
            )
        for b in (weight, weight if start is None else start):
            if not 0 <= b < math.inf:
                raise ValueError(f"the weight of the KL is finite and at least 0, not {b}")
        if steps < 0 or (start is None) != (steps == 0):
            raise ValueError(
                f"a schedule of the KL's weight has a start and 1 step or more, and this one has "
                f"start={start} and steps={steps}"
            )
        self.elbo = Trace_ELBO(max_plate_nesting=1) if elbo is None else elbo
        # Tensors, as captured programs need them, which are all that changes from step to step.
        self.start, self.end, self.steps, self.step = start, float(weight), steps, torch.zeros(())
        self.weight = torch.tensor(float(weight if start is None else start))
        super().__init__(
            num_particles=self.elbo.num_particles,
            max_plate_nesting=self.elbo.max_plate_nesting,
            vectorize_particles=self.elbo.vectorize_particles,
        )

    @property
    def is_bound(self) -> bool:
        """Whether the value, at the weight to which a schedule leads, is a lower bound."""
        weight = float(self.weight) if self.start is None else self.end
        averaged = getattr(self.elbo, "alpha", 1.0) < 1 and self.elbo.num_particles > 1
        sound = weight == 1 or (weight > 1 and not averaged)
        return sound and bool(getattr(self.elbo, "is_bound", True))

    @override
    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        return self.elbo._get_trace(*self._weighted(model, guide), args, kwargs)

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        """Minus the weighted bound, summed over the batch, in nats."""
        return self.elbo.loss(*self._weighted(model, guide), *args, **kwargs)

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Any:
        """As `loss`, a tensor to differentiate."""
        return self.elbo.differentiable_loss(*self._weighted(model, guide), *args, **kwargs)

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        """As `loss`; gradients are added to the parameters', and a schedule takes a step."""
        if self.start is not None:
            done = (self.step / self.steps).clamp(max=1.0)
            self.weight.copy_(self.start + (self.end - self.start) * done)
            self.step.add_(1)
        return self.elbo.loss_and_grads(*self._weighted(model, guide), *args, **kwargs)

    def _weighted(self, model: Program, guide: Program) -> tuple[Program, Program]:
        weigh = _Weigh(self.weight)
        return weigh(model), weigh(guide)


class FreeBits(Direct):
    """ELBO whose KL costs nothing below a floor, ``E_q[log p(x|z)] - sum_g max(f, KL_g)``.

    ``KL_g`` is the mean, over those data of the batch whose latents are not all masked, of the KL
    of a group g of latents, which lie in the plate ``data``; one that all data share has no floor.
    Groups are the dimensions of z where prior and posterior both factorise and their KL has a
    closed form (with several latents, where the guide has the order of the model), and otherwise
    whole sites. Where data have scales of their own, the mean is weighted by these. Kingma et al.
    (2016), Improving Variational Inference with Inverse Autoregressive Flow, equation 15. The
    value is a lower bound, looser than the ELBO by what the floors add.

    Args:
        nats: The floor f of each group's KL, at least 0.
        particles: Draws of z, one after another.
        max_plate_nesting: Number of nested plates, the one over the data included.

    Raises:
        ValueError: A floor that is negative or not finite, or fewer than 1 particle; in use, a
            model and a guide without a plate named ``data``.

    Example:
        >>> FreeBits(0.5).nats
        0.5
    """

    def __init__(
        self, nats: float = 0.5, *, particles: int = 1, max_plate_nesting: int = 1
    ) -> None:
        if not 0 <= nats < math.inf:
            raise ValueError(f"the free nats of a group are finite and at least 0, not {nats}")
        super().__init__(at_least_one(particles), max_plate_nesting)
        self.nats = nats

    @override
    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        bound: Any = 0.0
        groups: dict[str, list[Tensor]] = {}
        for modelled, guided in self._get_traces(model, guide, args, kwargs):
            for name, site in latents(guided):
                need_rsample(site, "FreeBits")
                if name not in modelled.nodes:
                    bound = bound - site["log_prob_sum"] / self.num_particles
            # The KL of a later site is one given the earlier, in either program.
            order = [name for name, _ in latents(guided) if name in modelled.nodes]
            closed = order == [name for name, _ in latents(modelled)]
            for name, site in modelled.nodes.items():
                if site["type"] != "sample":
                    continue
                if site["is_observed"]:
                    bound = bound + site["log_prob_sum"] / self.num_particles
                elif data_dim(site) is None:
                    kl = guided.nodes[name]["log_prob_sum"] - site["log_prob_sum"]
                    bound = bound - kl / self.num_particles
                else:
                    kl = _kl(guided.nodes[name], site, closed=closed)
                    groups.setdefault(name, []).append(kl)
        drawn = [*modelled.nodes.values(), *guided.nodes.values()]
        if not any(data_dim(site) for site in drawn if site["type"] == "sample"):
            raise ValueError(
                "free bits are a floor under the KL of latents in a plate named 'data', and "
                "neither the model nor the guide has a site in one: rename the plate of the data"
            )
        for name, draws in groups.items():
            bound = bound - self._floored(torch.stack(draws).mean(0), guided.nodes[name])
        return -torch.as_tensor(bound)

    def _floored(self, kl: Tensor, site: Any) -> Tensor:
        """The KL ``(N, groups)`` of one site, each datum scaled, with the floor of each group."""
        if not single(site):
            raise ValueError(
                f"free bits need one scale for each datum, and '{site['name']}' has several: "
                f"scale all latents of a datum alike, or use Trace_ELBO"
            )
        scale = torch.as_tensor(site["scale"]).to(kl).expand(len(kl))
        total = scale @ kl
        # Without a floor the sum is the KL itself, also where a drawn one is negative.
        if not self.nats:
            return total.sum()
        if site["mask"] is not None:
            mask = torch.as_tensor(site["mask"], device=kl.device).expand(site["fn"].batch_shape)
            rows = mask.movedim(int(data_dim(site) or 0), 0).reshape(len(kl), -1)
            scale = scale * rows.any(1)
        return total.clamp(min=self.nats * scale.sum()).sum()


class WakeSleep(Direct):
    """The wake-sleep algorithm: two objectives in turn, of which the second is no bound.

    Wake, model: ascend ``log p(x,z)`` at ``z ~ q(z|x)``, which q does not see. Sleep, guide:
    ascend ``log q(z|x)`` at a dream ``z ~ p(z), x ~ p(x|z)``, which p does not see. Hinton et
    al. (1995), The Wake-Sleep Algorithm for Unsupervised Neural Networks; what Kingma & Welling
    (2013), section 5, compare Auto-Encoding Variational Bayes with, from the same networks. No
    gradient passes through z, so that it may be discrete.

    The value is minus the ELBO at the draws of the wake phase, comparable with that of
    `pyro.infer.Trace_ELBO`, which the steps do not descend. A `BetaELBO` weights the wake phase
    only. A latent outside the plate ``data`` is drawn once, enters as in the ELBO, and is the
    same in the dream. Dreams have holes (NaN) where the data have them, and the context of
    the data. A prior made of the encoder, such as a `VampPrior`, belongs to both.

    Args:
        particles: Draws of each phase for each datum, one after another.
        max_plate_nesting: Number of nested plates, the one over the data included.

    Raises:
        ValueError: Fewer than 1 particle; in use, a model that observes something else than
            the site ``x`` of each datum, which is the first argument.

    Example:
        >>> WakeSleep().num_particles
        1
    """

    def __init__(self, *, particles: int = 1, max_plate_nesting: int = 1) -> None:
        super().__init__(at_least_one(particles), max_plate_nesting)

    @override
    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        loss: Any = 0.0
        for _ in range(self.num_particles):
            guided = poutine.trace(guide).get_trace(*args, **kwargs)
            guided.compute_log_prob()  # of the very draws, which a flow knows
            modelled, guided = self._scored(model, _still(guided), args, kwargs)
            for trace, sign in ((guided, 1), (modelled, -1)):
                for site in _samples(trace):
                    mute = trace is guided and data_dim(site) is not None
                    score = site["log_prob_sum"]
                    loss = loss + sign * (score.detach() if mute else score)
            if torch.is_grad_enabled():
                asleep = self._asleep(model, guide, modelled, guided, args, kwargs)
                loss = loss - (asleep - asleep.detach())
        return torch.as_tensor(loss / self.num_particles)

    def _asleep(
        self,
        model: Program,
        guide: Program,
        modelled: Trace,
        guided: Trace,
        args: Any,
        kwargs: Any,
    ) -> Tensor:
        """``log q(z|x)`` of a dream, of latents within the plate ``data``."""
        local = {name for name, site in latents(guided) if data_dim(site) is not None}
        total = torch.zeros(())
        if not local:
            return total
        if strange := local - modelled.nodes.keys():
            raise ValueError(
                f"wake-sleep dreams the latents of the model, and '{min(strange)}' is one of the "
                f"guide alone: use Trace_ELBO"
            )
        (x, *context), seen = args, _seen(modelled)
        shared = Trace()
        for name, site in latents(guided):
            if name not in local:
                shared.add_node(name, **{**site, "value": site["value"].detach()})
        with torch.no_grad():
            program = poutine.replay(poutine.uncondition(model), trace=shared)
            dream = poutine.trace(program).get_trace(x, *context, **kwargs)
        dreamt = dream.nodes["x"]["value"]
        if dreamt.shape != x.shape:
            raise ValueError(
                f"the model dreams x of shape {tuple(dreamt.shape)} where the data have "
                f"{tuple(x.shape)}: let its site 'x' observe the first argument as it is"
            )
        if x.is_floating_point():
            dreamt = dreamt.where(~x.isnan(), x)
        for name in local:
            shared.add_node(name, **dream.nodes[name])
        trace = poutine.trace(poutine.replay(guide, trace=shared))
        dreaming = trace.get_trace(dreamt, *context, **kwargs)
        dreaming.compute_log_prob()
        for name in sorted(local):
            site = dreaming.nodes[name]
            # What a datum counts, and not the weight of its KL.
            score = scale_and_mask(site["unscaled_log_prob"], seen["scale"], site["mask"])
            total = total + score.sum()
        return total


def _still(guided: Trace) -> Trace:
    """The trace, with draws of each datum's latents that pass no gradient on."""
    guided = guided.copy()
    for name, site in latents(guided):
        if data_dim(site) is None:
            if site["log_prob"].requires_grad:
                need_rsample(site, f"a latent outside the data plate, '{name}',")
        else:
            guided.nodes[name] = {**site, "value": site["value"].detach()}
    return guided


def _seen(modelled: Trace) -> Any:
    """The site x, the only one of each datum that a model observes."""
    names = [name for name, site in observations(modelled) if data_dim(site) is not None]
    if names != ["x"]:
        found = ", ".join(f"'{name}'" for name in names) or "nothing"
        raise ValueError(
            f"wake-sleep dreams what the model observes of each datum, the site 'x' in the plate "
            f"'data', and this one observes {found}: hand anything else on as context"
        )
    return modelled.nodes["x"]


def _samples(trace: Trace) -> list[Any]:
    nodes = prune_subsample_sites(trace).nodes.values()
    return [site for site in nodes if site["type"] == "sample"]


def _kl(guided: Any, modelled: Any, *, closed: bool) -> Tensor:
    """The KL of one latent site ``(N, groups)``, in closed form where there is one."""
    posterior, prior, z = guided["fn"], modelled["fn"], guided["value"]
    kl = _closed_kl(posterior, prior) if closed else None
    if kl is None:
        kl = (posterior.log_prob(z) - prior.log_prob(z))[..., None]
    if guided["mask"] is not None:
        kl = kl * torch.as_tensor(guided["mask"], device=kl.device)[..., None]
    batch = kl.dim() - 1
    dim = batch + int(data_dim(guided) or 0)
    rest = [each for each in range(batch) if each != dim]
    return kl.sum(rest) if rest else kl


def _closed_kl(posterior: Any, prior: Any) -> Tensor | None:
    """The KL of each dimension ``(..., event)`` of independent ones, or of all ``(..., 1)``."""
    event, laws = len(posterior.event_shape), [posterior, prior]
    for index, law in enumerate(laws):
        while isinstance(law, Independent):
            law = laws[index] = law.base_dist
    try:
        if event and not any(law.event_shape for law in laws):
            return kl_divergence(*laws).flatten(-event)
        return kl_divergence(posterior, prior)[..., None]
    except NotImplementedError:
        return None


class _Weigh(Messenger):
    """Scales the log-density of latent sites; unlike `poutine.scale` also by 0."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.scales: dict[float | Tensor, Tensor] = {}  # one tensor for sites of one scale

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            return
        scale = msg["scale"]
        msg["scale"] = self.scales.setdefault(scale, scale * self.weight)
