"""The contract: what a part or a model/guide pair promises, checked by numbers."""

from __future__ import annotations

__all__ = ["check_likelihood", "check_pair", "check_posterior", "check_prior"]

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import scipy
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, constraints

from pyro_vae.pairs import check_pair, family, undisturbed
from pyro_vae.scoring import validation
from pyro_vae.vae import as_pyro


def check_prior(prior: nn.Module, *context: Tensor, seed: int = 0) -> None:
    """Hold a prior against its contract by numbers; silence means that it is kept.

    Checked are: a distribution over one vector, whose batch shape is that of the context or
    ``()``; densities in a batch of particles as one by one; a density that integrates to 1
    and draws that follow it; the same density in double precision and after a `state_dict`
    round trip; a gradient for every trainable parameter, and one that agrees with finite
    differences of the density.

    The integral is estimated by importance sampling from kernels around the prior's own
    draws; draws are compared with it by Kolmogorov-Smirnov tests on every marginal and on
    five random projections. A sound prior fails with a probability below 1e-4. Heavy tails,
    modes far apart and more than about six dimensions can be beyond the estimate, which
    says so.

    Args:
        prior: ``prior(*context)`` is a distribution over a vector of few dimensions.
        context: What it is conditioned on, one row or more; the first is used, and compared with
            itself among the others.
        seed: Seed of all draws; the random state stays as it was.

    Raises:
        TypeError: No module, such as the class of one.
        ValueError: The first promise that is broken.
        NotImplementedError: A discrete prior, or one over fewer dimensions than its vectors
            have, such as over a simplex.

    Example:
        >>> from pyro_vae import priors
        >>> check_prior(priors.MixtureOfNormals(3, components=5))
    """
    _check_module(prior, "prior")
    row = tuple(c[:1] for c in context)
    with undisturbed(prior, row), validation(False):
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
            _check_continuous(density)
            _check_particles(density, draws[:6])
            _check_integral(density, draws)
            _check_copies(prior, lambda part, to: part(*map(to, row)), draws[:100])
        _check_gradients(prior, density.log_prob(draws[:100]))
        _check_parameters(prior, row, draws[:100])
        _check_rows(prior, context)


def check_posterior(posterior: nn.Module, x: Tensor, *context: Tensor, seed: int = 0) -> None:
    """Hold a posterior against its contract by numbers, as `check_prior` does a prior.

    Beyond what is checked of a prior, for the first datum: a batch shape that is the data's;
    draws through which gradients flow, and pathwise gradients of an expectation that agree
    with those of the score function (Mohamed et al., 2020, Monte Carlo Gradient Estimation,
    sections 4 and 5) along a random direction in the parameters. Where both lack the same
    part, as if a location were detached, the finite differences of the density differ. A
    sound posterior fails with a probability below 1e-4 for each check.

    Args:
        posterior: ``posterior(x, *context)`` is a distribution over a vector of few dimensions.
        x: A few data ``(N, *shape)``.
        context: What else each of these data brings.
        seed: Seed of all draws; the random state stays as it was.

    Raises:
        TypeError: No module, such as the class of one.
        ValueError: The first promise that is broken.
        NotImplementedError: A support that `check_prior` does not cover.

    Example:
        >>> from pyro_vae import MLP, posteriors
        >>> check_posterior(posteriors.Normal(MLP(4, [8], (2, 3))), torch.randn(2, 4))
    """
    _check_module(posterior, "posterior")
    with undisturbed(posterior, (x, *context)), validation(False):
        torch.manual_seed(seed)
        whole = as_pyro(posterior(x, *context))
        if whole.batch_shape != x.shape[:1] or len(whole.event_shape) != 1:
            raise ValueError(
                f"for {len(x)} data the posterior has batch shape {tuple(whole.batch_shape)} and "
                f"event shape {tuple(whole.event_shape)}: declare the latent vector, and nothing "
                f"else, as event by .to_event(1)"
            )
        if not whole.has_rsample or not whole.rsample().requires_grad:
            raise ValueError(
                "no gradient flows through the draws of the posterior: give a distribution with "
                "rsample, whose parameters come from an encoder that is not frozen"
            )
        row = tuple(tensor[:1] for tensor in (x, *context))
        density = as_pyro(posterior(*row))
        with torch.no_grad():
            draws = density.sample((_DRAWS,)).reshape(_DRAWS, -1)
            _check_continuous(density)
            _check_particles(density, draws[:6])
            _check_integral(density, draws)
            values = density.sample((100,))
            _check_copies(posterior, lambda part, to: part(*map(to, row)), values)
        _check_gradients(posterior, density.log_prob(values))
        _check_pathwise(posterior, row)
        _check_parameters(posterior, row, values)
        _check_rows(posterior, (x, *context))


def check_likelihood(likelihood: nn.Module, z: Tensor, *context: Tensor, seed: int = 0) -> None:
    """Hold a likelihood against its contract by numbers.

    Checked are: a batch shape that is that of z without its last dimension; densities under
    particles as one by one; that the law of each element sums or integrates to 1 and its
    draws follow it (Kolmogorov-Smirnov, or chi-squared where it is discrete), and that a
    missing element, where NaN is in the support, has density 1; the same density in double
    precision and after a `state_dict` round trip; a gradient for every trainable parameter;
    gradients in the parameters and in z that agree with finite differences of the density.
    A sound likelihood fails with a probability below 1e-4. Continuous laws are integrated on
    a grid and need a bounded density.

    Where elements are dependent and discrete, the law of each whole datum is held against
    the values that are drawn: their total mass and the frequency of each among new draws.
    That needs a law of few values, such as documents of a few words, and says so.

    Args:
        likelihood: ``likelihood(z, *context)`` is a distribution over x.
        z: A few latents ``(N, latent)``; all elements of N data are checked, so keep N and
            the data small.
        context: What else each of these data brings.
        seed: Seed of all draws; the random state stays as it was.

    Raises:
        ValueError: The first promise that is broken, or a law of too many values.
        NotImplementedError: The elements of x are continuous and not independent given z, or
            have a support that is no interval, half-line from a lower bound or line.

    Example:
        >>> from pyro_vae import MLP, likelihoods
        >>> check_likelihood(likelihoods.Normal(MLP(2, [8], 5)), torch.randn(3, 2))
    """
    _check_module(likelihood, "likelihood")
    with undisturbed(likelihood, (z, *context)), validation(False):
        torch.manual_seed(seed)
        density = as_pyro(likelihood(z, *context))
        if density.batch_shape != z.shape[:-1] or not density.event_shape:
            raise ValueError(
                f"for latents {tuple(z.shape)} the likelihood has batch shape "
                f"{tuple(density.batch_shape)} and event shape {tuple(density.event_shape)}: "
                f"declare all but the batch of z as event by .to_event(n)"
            )
        element = density
        while isinstance(element, Independent):
            element = element.base_dist
        joint = bool(element.event_shape)
        if joint and not element.support.is_discrete:
            raise NotImplementedError(
                f"the elements of {family(density)} are continuous and not independent given z"
            )
        with torch.no_grad():
            x = density.sample()
            if not density.support.check(x).all():
                raise ValueError("a draw lies outside the support that the likelihood declares")
            particles = as_pyro(likelihood(torch.stack([z, z.flip(0)]), *context))
            alone = as_pyro(likelihood(z.flip(0), *context))
            if not torch.allclose(particles.log_prob(x)[1], alone.log_prob(x), *_NEAR):
                raise ValueError(
                    "the density of several particles is not that of each: map latents "
                    "(..., latent) under any leading dimensions"
                )
            _check_data(density) if joint else _check_elements(density, element)
            _check_copies(likelihood, lambda part, to: part(to(z), *map(to, context)), x)
        _check_gradients(likelihood, density.log_prob(x))
        _check_parameters(likelihood, (z, *context), x)
        _check_latents(likelihood, z, context, x)
        _check_rows(likelihood, (z, *context))


_DRAWS = 5000
_FALSE_ALARM = 1e-4  # of each check, divided among its tests
# Relative and absolute: how far one log-density in single precision may be from itself computed
# in another way, be it close to 0, and from itself in another precision.
_NEAR, _ROUNDED = (1e-4, 1e-3), (1e-3, 1e-3)


def _check_pathwise(posterior: nn.Module, row: tuple[Tensor, ...]) -> None:
    """Both gradients of ``E_q[cos(a z) + |z|^2 / 4]`` agree along a random direction."""
    parameters = [each for each in posterior.parameters() if each.requires_grad]
    direction = [torch.randn_like(each) for each in parameters]
    slope: Tensor = as_pyro(posterior(*row)).sample()
    angle = torch.randn(slope.shape[-1], device=slope.device).to(slope)

    def target(z: Tensor) -> Tensor:
        return (z @ angle).cos() + (z**2).sum(-1) / 4

    def along(objective: Tensor) -> float:
        gradients = torch.autograd.grad(objective, parameters, allow_unused=True)
        pairs = zip(gradients, direction, strict=True)
        return float(sum((g * d).sum() for g, d in pairs if g is not None))

    pathwise, score = list[float](), list[float]()
    for _ in range(150):
        density = as_pyro(posterior(*row))
        pathwise.append(along(target(density.rsample((200,))).mean()))
        density = as_pyro(posterior(*row))
        z = density.sample((200,))
        centred = target(z) - target(density.sample((200,))).mean()
        score.append(along((centred.detach() * density.log_prob(z)).mean()))
    probability = scipy.stats.ttest_ind(pathwise, score, equal_var=False).pvalue
    if probability < _FALSE_ALARM:
        raise ValueError(
            f"the gradient through the draws is {sum(pathwise) / 150:.4g} and that by the score "
            f"function {sum(score) / 150:.4g} (p = {probability:.1g}): rsample and log_prob differ"
        )


def _check_elements(density: Any, law: Any) -> None:
    """The law of each element is normalised, the density their product, and draws follow it."""
    values = density.sample((_DRAWS,))
    each = law.log_prob(values[:10])
    draws = values.flatten(1).to(each.dtype)
    batch = len(density.batch_shape)
    if not torch.allclose(density.log_prob(values[:10]), each.flatten(1 + batch).sum(-1), *_NEAR):
        raise ValueError("the density of a datum is not the product of those of its elements")
    missing = torch.full_like(draws[0], math.nan).reshape(law.batch_shape)
    if law.support.check(missing).all() and not (law.log_prob(missing) == 0).all():
        raise ValueError(
            "an element that is missing is scored: NaN has density 1, where it is in the support"
        )
    count = draws.shape[1]
    level = _FALSE_ALARM / count
    grid, width = _grid(law, draws)
    mass = law.log_prob(grid.reshape(-1, *law.batch_shape)).flatten(1).double().exp() * width
    totals = mass.sum(0)
    wrong = int((totals - 1).abs().argmax())
    if not abs(float(totals[wrong]) - 1) < 2e-3:
        raise ValueError(
            f"the law of element {wrong} has a total mass of {totals[wrong]:.4g} and not of 1: "
            f"check its normalising constant"
        )
    for index in range(count):
        column, drawn = mass[:, index] / totals[index], draws[:, index]
        if law.support.is_discrete:
            probability = _chi_squared(column, grid[:, index], drawn)
        else:
            distance = _distance(drawn, grid[:, index], column)
            probability = float(scipy.stats.kstwo.sf(distance, len(drawn)))
        if probability < level:
            raise ValueError(
                f"draws of element {index} do not follow its law: a test of fit gives "
                f"p = {probability:.1g}"
            )


def _check_data(law: Any) -> None:
    """The law of each datum has the mass and the frequencies that its draws show.

    The values in the first half of the draws are held against the second half, since values
    are no fair test of the draws that chose them.
    """
    draws = law.sample((_DRAWS,))
    scores = law.log_prob(draws).flatten(1).double().exp()
    level = _FALSE_ALARM / scores.shape[1] / 2
    for index, datum in enumerate(draws.reshape(*scores.shape, -1).unbind(1)):
        values, which = datum.unique(dim=0, return_inverse=True)
        first, second = which.chunk(2)
        mass = scores.new_zeros(len(values)).scatter_(0, which, scores[:, index])
        seen = first.bincount(minlength=len(values))
        total, known = float(mass[seen > 0].sum()), int((seen > 0)[second].sum())
        if (seen >= 10)[second].double().mean() < 0.5:
            raise ValueError(
                f"the law of datum {index} has too many values to compare each with its "
                f"frequency: give a law of few values, such as counts of a small total"
            )
        if total > 1 + 2e-3 or _binomial(known, len(second), total) < level:
            raise ValueError(
                f"the law of datum {index} has a mass of {total:.4g} over values that make up "
                f"{known / len(second):.4g} of its draws: check its normalising constant"
            )
        cells = torch.arange(len(values), device=which.device)
        probability = _chi_squared(mass.where(seen > 0, 0.0), cells, second)
        if probability < level:
            raise ValueError(
                f"draws of datum {index} do not follow its law: a test of fit gives "
                f"p = {probability:.1g}"
            )


def _grid(law: Any, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Values ``(G, elements)`` over the support of the law, and the width that each stands for."""
    support: Any = getattr(law.support, "complete", law.support)
    support = getattr(support, "base_constraint", support)  # of a mixture's components
    low, high = (_bound(support, name, law, draws) for name in ("lower_bound", "upper_bound"))
    if support is constraints.boolean:
        low, high = torch.zeros_like(draws[0]), torch.ones_like(draws[0])
    if support.is_discrete and low is not None:
        top = 4 * draws.max(0).values + 100 if high is None else high
        steps = torch.arange(int((top - low).max()) + 1, device=draws.device).to(draws)
        values = low + steps[:, None]
        return values.minimum(top), (values <= top).double()
    if low is not None and high is not None:
        unit = (torch.arange(4000, device=draws.device).to(draws) + 0.5) / 4000
        return low + (high - low) * unit[:, None], (high - low) / 4000
    if low is not None:  # over a half-line, x = low + median exp(t)
        t = torch.linspace(-30, 14, 4001, device=draws.device, dtype=draws.dtype)[:, None]
        distance = (draws.median(0).values - low) * t.exp()
        return low + distance, distance * (44 / 4000)
    far = draws.new_tensor([-1e6, -0.5, 0.0, 0.5, 1e6])
    if support.is_discrete or high is not None or not support.check(far).all():
        raise NotImplementedError(
            f"the elements of {family(law)} have the support {support}, and the check covers "
            f"intervals, half-lines from a lower bound and the line, and integers from one on"
        )
    # Over the line, x = median + spread sinh(t) reaches far into tails in few steps.
    spread = draws.quantile(0.75, 0) - draws.quantile(0.25, 0)
    t = torch.linspace(-14, 14, 4001, device=draws.device, dtype=draws.dtype)[:, None]
    return draws.median(0).values + spread * t.sinh(), spread * t.cosh() * (28 / 4000)


def _bound(support: Any, name: str, law: Any, draws: Tensor) -> Tensor | None:
    """The bound of each element, where there is one, which may depend on the datum."""
    bound = getattr(support, name, None)
    return (
        None
        if bound is None
        else torch.as_tensor(bound).to(draws).expand(law.batch_shape).flatten()
    )


def _chi_squared(probability: Tensor, values: Tensor, draws: Tensor) -> float:
    """P-value of the draws' frequencies, whatever is rare counted as one value.

    Frequent values are compared by chi-squared and the count of all others by the binomial
    law itself, to which chi-squared is no approximation where it is small.
    """
    frequent = probability * len(draws) >= 10
    chance, observed = probability[frequent], (draws[:, None] == values[frequent]).sum(0).double()
    kept = observed.sum()
    rare = _binomial(int(kept), len(draws), float(chance.sum()))
    if len(chance) < 2 or not kept:
        return rare
    due = kept * chance / chance.sum()
    statistic = float(((observed - due) ** 2 / due).sum())
    return min(1.0, 2 * min(rare, float(scipy.stats.chi2.sf(statistic, len(due) - 1))))


def _binomial(count: int, draws: int, probability: float) -> float:
    """P-value of a count; a probability of 1 is so but for rounding."""
    return float(scipy.stats.binomtest(count, draws, min(probability, 1 - 1e-6)).pvalue)


def _check_continuous(density: Any) -> None:
    if density.support.is_discrete:
        raise NotImplementedError(
            f"{family(density)} is a law of discrete values, and the check integrates densities"
        )


def _check_particles(density: Distribution, z: Tensor) -> None:
    """Scores of shape ``(2, 3, 1)`` are those of single vectors."""
    one_by_one = torch.stack([density.log_prob(row).reshape(()) for row in z])
    together = density.log_prob(z.reshape(2, 3, *density.batch_shape, -1))
    if together.numel() != 6 or not torch.allclose(together.flatten(), one_by_one, *_NEAR):
        raise ValueError(
            "the density of several particles is not that of each: score vectors (..., latent) "
            "under any leading dimensions"
        )


def _check_integral(density: Any, draws: Tensor) -> None:
    """The density integrates to 1, and the draws follow it."""
    if not draws.isfinite().all():
        raise ValueError("a draw is NaN or infinite: check the scales of the prior")
    kernels = _kernels(draws[:300])
    z = kernels.sample((4 * _DRAWS,))
    inside = density.support.check(z).reshape(len(z), -1).all(1)
    if inside.double().mean() < 1e-3:
        raise NotImplementedError(
            f"{family(density)} has a support of fewer dimensions than its vectors, such as a "
            f"simplex, over which the check cannot integrate"
        )
    scores = density.log_prob(z.where(inside[:, None], draws[0])).flatten()
    weight = (scores - kernels.log_prob(z)).double().exp() * inside
    total, error = weight.mean(), weight.std() / len(weight) ** 0.5
    if not error < 0.05:
        raise ValueError(
            f"the integral of the density cannot be estimated ({total:.3g} ± {error:.2g}): give a "
            f"prior of fewer dimensions or with lighter tails"
        )
    if abs(total - 1) > scipy.stats.norm.isf(_FALSE_ALARM / 2) * error:
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


def _check_module(part: Any, kind: str) -> None:
    if not isinstance(part, nn.Module):
        raise TypeError(
            f"a {kind} is checked as a module that was made, such as {kind}s.Normal(...), and "
            f"this is {part!r}"
        )


@torch.no_grad()
def _check_rows(part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """The law of the first datum does not depend on the others, in evaluation."""
    part = copy.deepcopy(part).eval()
    whole, alone = (as_pyro(part(*(each[:n] for each in inputs))) for n in (None, 1))
    if not whole.batch_shape:
        return
    value = whole.sample()
    if not torch.allclose(whole.log_prob(value)[:1], alone.log_prob(value[:1]), *_NEAR):
        raise ValueError(
            "the law of a datum depends on the other data of its batch: compute each row by "
            "itself, and nothing over the first dimension"
        )


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _check_copies(
    part: nn.Module, law: Callable[[nn.Module, Callable[[Tensor], Tensor]], Any], value: Tensor
) -> None:
    """The density is the same after a `state_dict` round trip, in double and on a GPU, if any.

    ``law(part, to)`` is the distribution of a copy, `to` bringing its inputs to its precision.
    """
    scores = as_pyro(law(part, lambda tensor: tensor)).log_prob(value)
    for place, name, held in _plain_tensors(part):
        twin = copy.deepcopy(part)
        near = 0.1 * torch.rand_like(held) * held.abs().clamp(min=0.1)
        vars(twin.get_submodule(place))[name] = held + near
        try:
            other = as_pyro(law(twin, Tensor.clone)).log_prob(value)
        except Exception:  # such as of a factorisation that there no longer is
            other = None
        if other is None or not torch.allclose(other, scores, 0.0, 0.0, equal_nan=True):
            raise ValueError(
                f"the density depends on '{'.'.join(filter(None, (place, name)))}', a tensor that "
                f"is no parameter and no buffer, and so is neither saved with the weights nor "
                f"moved with them: give it to register_buffer"
            )
    twin = copy.deepcopy(part)
    for parameter in twin.parameters():
        parameter.add_(torch.randn_like(parameter))
    twin.load_state_dict(part.state_dict())
    if not torch.equal(as_pyro(law(twin, lambda tensor: tensor)).log_prob(value), scores):
        raise ValueError(
            "the density is another after its state_dict was loaded: register what it depends on "
            "as parameters or buffers"
        )
    if torch.cuda.is_available():
        moved = as_pyro(law(copy.deepcopy(part).cuda(), Tensor.cuda)).log_prob(value.cuda())
        if not torch.allclose(scores.cpu(), moved.cpu(), *_ROUNDED):
            raise ValueError(
                "on a GPU the density is another: register what it depends on as parameters or "
                "buffers, and make tensors on their device"
            )
    double = as_pyro(law(twin.double(), _double)).log_prob(_double(value))
    if double.dtype != torch.float64 or not torch.allclose(scores.double(), double, *_ROUNDED):
        raise ValueError(
            "after .double() the density is another or not in double precision: keep constants in "
            "buffers, and make tensors in the dtype of the parameters"
        )


def _plain_tensors(part: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Tensors in attributes that are neither parameters nor buffers, by module and name."""
    for place, module in part.named_modules():
        for name, held in vars(module).items():
            if isinstance(held, Tensor) and held.is_floating_point():
                yield place, name, held


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


def _check_parameters(part: nn.Module, inputs: tuple[Tensor, ...], value: Tensor) -> None:
    """The gradient of the density in the parameters is its slope."""
    twin, inputs = copy.deepcopy(part).double(), tuple(map(_double, inputs))
    parameters = [each for each in twin.parameters() if each.requires_grad]
    if parameters:
        _check_slope("the parameters", lambda: twin(*inputs), value, parameters)


def _check_latents(
    likelihood: nn.Module, z: Tensor, context: tuple[Tensor, ...], x: Tensor
) -> None:
    """The gradient of the density in z, by which a posterior is trained, is its slope."""
    twin, context = copy.deepcopy(likelihood).double(), tuple(map(_double, context))
    at = z.detach().double().requires_grad_()
    _check_slope("z", lambda: twin(at, *context), x, [at])


def _check_slope(
    name: str, law: Callable[[], Any], value: Tensor, tensors: Sequence[Tensor]
) -> None:
    """The gradient along a random direction is the central difference, in double precision.

    A kink between the two ends, such as a ReLU's, would be a false alarm. None lies within
    1e-7 but by chance, a thousandth for networks of some thousand units, once the tensors
    have moved from where they begin, a bias of 0 for one. A gradient that is cut off is wrong
    at every place; one that a kink spoils is so at each of three with a chance below 1e-8.
    """
    step, value = 1e-7, _double(value)

    def move(by: Sequence[Tensor], size: float) -> Tensor:
        with torch.no_grad():
            for tensor, each in zip(tensors, by, strict=True):
                tensor.add_(each, alpha=size)
            return as_pyro(law()).log_prob(value)

    for _ in range(3):
        move([torch.randn_like(each) for each in tensors], 1e-3)
        direction = [torch.randn_like(each) for each in tensors]
        above, below = move(direction, step), move(direction, -2 * step)
        move(direction, step)
        scores = as_pyro(law()).log_prob(value)
        # At a support that moves with the tensors, what has left it says nothing.
        kept = above.isfinite() & below.isfinite() & (scores > -math.inf)
        along = scores.new_zeros(())
        if scores.requires_grad:
            slopes = torch.autograd.grad(scores[kept].sum(), tensors, allow_unused=True)
            pairs = zip(slopes, direction, strict=True)
            along = sum(((g * d).sum() for g, d in pairs if g is not None), along)
        difference = float((above - below)[kept].sum() / (2 * step))
        rounding = 1e-6 * (1 + float(scores.detach()[kept].abs().sum()))
        if abs(difference - float(along)) <= rounding + 1e-3 * abs(difference):
            return
    raise ValueError(
        f"along a random direction in {name} the log-density changes at a rate of "
        f"{difference:.4g}, and its gradient gives {float(along):.4g}: let the gradient through, "
        f"without detach, no_grad or rounding"
    )
