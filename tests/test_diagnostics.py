"""Diagnostics on models whose answer is known."""

import itertools
import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear import FALSE_ALARM, Scalar, linear_vae
from scipy import stats
from test_log_likelihood import Exact, Level, Mixed
from test_log_likelihood import double as double
from torch import nn

from pyro_vae import MLP, VAE, likelihoods, posteriors, priors
from pyro_vae.annealing import (
    annealed_importance_sampling,
    bidirectional,
    hmc_likelihood,
)
from pyro_vae.diagnostics import (
    Calibration,
    calibration,
    decompose,
    inference_gap,
    predictive_check,
    to_arviz,
)
from pyro_vae.evaluation import bound, log_likelihood, quadrature
from pyro_vae.gaps import _better
from pyro_vae.objectives import WakeSleep
from pyro_vae.scoring import Programs

pytestmark = pytest.mark.filterwarnings("ignore:the importance weights")


def linear(scale=1.0, inflation=1.0):
    """A pair of 2 latents and 3 features with its posterior, scaled in its covariance."""
    weight = torch.tensor([[1.0, 0.3], [-0.5, 1.2], [0.2, 0.4]])
    return Exact(weight, torch.zeros(3), torch.full((3,), scale), inflation)


def drawn(pair, size):
    covariance = pair.weight @ pair.weight.T + torch.diag(pair.scale**2)
    return torch.distributions.MultivariateNormal(pair.loc, covariance).sample((size,))


def test_the_parts_of_the_bound_of_a_linear_model_are_those_of_gaussians():
    pair = linear()
    x = drawn(pair, 4000)
    parts = decompose(pair, x, draws=4000)
    # Under the exact posterior q(z) is the prior, up to the finite mixture.
    precision = torch.eye(2) + pair.weight.T @ pair.weight / pair.scale[0] ** 2
    information = float(precision.logdet() / 2)
    assert parts.mutual_information == pytest.approx(information, abs=0.06)
    assert parts.marginal_kl == pytest.approx(0, abs=0.03)
    assert parts.mutual_information <= parts.without_itself
    assert parts.kl == pytest.approx(parts.mutual_information + parts.marginal_kl, abs=0.06)
    assert parts.reconstruction == parts.distortion * -1
    assert parts.rate == parts.kl
    moments = (pair.gain @ (pair.weight @ pair.weight.T + torch.eye(3)) @ pair.gain.T).diagonal()
    assert torch.allclose(parts.unit_variance, moments, rtol=0.15)
    assert parts.verdict.startswith("no collapse: 2 of 2 units are active")


def test_total_correlation_is_that_of_gaussians():
    vae, x = linear_vae(2, 2), torch.randn(4000, 2)
    with torch.no_grad():
        vae.posterior.network.last.weight[:2] = torch.tensor([[1.0, 0.0], [1.0, 0.5]])
    loc, log_scale = vae.posterior.network(x).detach().unbind(-2)
    covariance = loc.T.cov() + (2 * log_scale[0]).exp().diag()
    variance = covariance.diagonal()
    total = float(variance.log().sum() - covariance.logdet()) / 2
    dimension = 0.5 * (loc.mean(0) ** 2 + variance - 1 - variance.log())
    # The mean over 2000 draws of a log-ratio, whose standard deviation is below 0.7.
    parts = decompose(vae, x, draws=2000)
    assert total > 0.1
    assert parts.total_correlation == pytest.approx(total, abs=0.04)
    assert torch.allclose(parts.marginal_dimension_kl, dimension, atol=0.05)
    assert parts.marginal_kl == pytest.approx(
        parts.total_correlation + float(parts.marginal_dimension_kl.sum()), abs=1e-6
    )
    assert parts.summary()["total_correlation"] == parts.total_correlation
    vae.prior = priors.MixtureOfNormals(2)
    other = decompose(vae, x[:50])
    assert other.total_correlation is other.marginal_dimension_kl is None
    assert "total_correlation" not in other.summary()


@pytest.mark.parametrize("count", [2, 10])
def test_a_posterior_that_is_a_conditional_prior_is_not_called_sound(count):
    class Told(nn.Module):
        """z ~ N(c, 1), which x ~ N(0, 1) does not depend on, and q is the prior."""

        def model(self, x, c):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(c, 1.0).to_event(1))
                pyro.sample("x", dist.Normal(0 * x, 1.0).to_event(1), obs=x)

        def guide(self, x, c):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(c, 1.0).to_event(1))

    x = torch.randn(500, 1)
    parts = decompose(Told(), (x, 3 * torch.arange(500).remainder(count)[:, None].to(x)))
    assert parts.kl == 0
    assert math.isnan(parts.marginal_kl)
    assert parts.marginal_dimension_kl is None
    assert parts.verdict.startswith("no verdict: 1 of 1 units are active, but the prior differs")
    alike = decompose(Told(), (x, torch.ones_like(x)))
    assert alike.marginal_kl == pytest.approx(0, abs=1e-6)
    assert alike.verdict.startswith("posterior collapse: 0 of 1 units")


def test_information_saturates_at_log_n_and_the_verdict_is_withheld():
    pair = linear(scale=0.01)
    parts = decompose(pair, drawn(pair, 100))
    truth = float((torch.eye(2) + 1e4 * pair.weight.T @ pair.weight).logdet() / 2)
    assert truth > 8 > math.log(100) + 1e-6 > parts.mutual_information > math.log(100) - 1
    assert parts.without_itself > truth - 2
    assert parts.verdict.startswith("no verdict: 2 of 2 units are active")
    assert parts.log_count == pytest.approx(4.605, abs=1e-3)


def test_the_kl_of_each_dimension_is_exact_where_both_factorise():
    vae, x = linear_vae(4, 2), torch.randn(50, 4)
    parts = decompose(vae, x)
    loc, log_scale = vae.posterior.network(x).detach().unbind(-2)
    kl = 0.5 * (loc**2 + (2 * log_scale).exp() - 1 - 2 * log_scale)
    assert torch.allclose(parts.dimension_kl, kl.mean(0))
    vae.prior = priors.MixtureOfNormals(2)
    assert decompose(vae, x).dimension_kl is None
    assert decompose(linear(), torch.randn(20, 3)).dimension_kl is None


class Discrete(nn.Module):
    """A discrete prior and a q that is the same for each x, which does not depend on z."""

    def __init__(self, prior, posterior):
        super().__init__()
        self.prior, self.posterior = prior, posterior

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.prior)
            pyro.sample("x", dist.Normal(0 * x, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.posterior)


@pytest.mark.parametrize("size", [3, 20])
@pytest.mark.parametrize(
    ("family", "shape", "known"),
    [
        (dist.Categorical, (), None),
        (dist.Categorical, (2,), (2,)),
        (dist.OneHotCategorical, (), None),
        (dist.OneHotCategorical, (3,), None),
    ],
)
def test_discrete_latents_are_decomposed(family, shape, known, size):
    even, odd = torch.ones(3) / 3, torch.tensor([0.2, 0.3, 0.5])
    laws = (family(each.expand(*shape, 3)).to_event(len(shape)) for each in (even, odd))
    parts = decompose(Discrete(*laws), torch.randn(size, 1), particles=4000 // size)
    each = float((odd * (odd / even).log()).sum())
    count = shape[0] if shape else 1
    # The log-ratio has a standard deviation of 0.36: five standard errors of 4000 draws.
    assert parts.kl == pytest.approx(count * each, abs=0.03 * count**0.5)
    assert (parts.dimension_kl is None) == (known is None)
    if known:
        assert torch.allclose(parts.dimension_kl, torch.full(known, each))
    assert parts.mutual_information == pytest.approx(0, abs=1e-6)
    # Means of 100 draws with a variance below 1, of which it takes away what is noise.
    assert parts.unit_variance.abs().max() < 0.1


def test_latents_that_are_masked_are_not_decomposed():
    class Masked(Scalar):
        def model(self, x, seen):
            with pyro.poutine.mask(mask=seen):
                super().model(x)

        def guide(self, x, seen):
            with pyro.poutine.mask(mask=seen):
                super().guide(x)

    x, seen = torch.randn(8), torch.ones(8, dtype=torch.bool)
    assert decompose(Masked(), (x, seen)).unit_variance.shape == (1,)
    seen[5] = False
    with pytest.raises(ValueError, match="latents of all data, and 'z' is masked for some"):
        decompose(Masked(), (x, seen))


def test_units_that_carry_less_than_a_bit_are_not_called_sound():
    pair = linear(scale=2.0)
    precision = torch.eye(2) + pair.weight.T @ pair.weight / pair.scale[0] ** 2
    parts = decompose(pair, drawn(pair, 2000), draws=2000)
    assert 0.1 < precision.logdet() / 2 < 0.6 < math.log(2)
    assert parts.verdict.startswith("near collapse: 2 of 2 units are active, but the latents")


@pytest.mark.parametrize(("used", "words"), [(0, "posterior collapse: 0 of 3"), (1, "partial")])
def test_collapse_is_said_in_words(used, words):
    vae = linear_vae(4, 3)
    with torch.no_grad():
        vae.posterior.network.last.weight[used:] = 0
        vae.posterior.network.last.weight[:used] = 0.5
        vae.posterior.network.last.bias.zero_()
    parts = decompose(vae, torch.randn(500, 4))
    assert parts.active == used
    assert parts.verdict.startswith(words)
    assert parts.summary()["active_units"] == used
    if not used:
        assert parts.mutual_information == pytest.approx(0, abs=1e-6)


def test_a_starved_encoder_loses_to_amortisation():
    vae = linear_vae(3, 2, scale=0.5)
    with torch.no_grad():
        vae.posterior.network.last.weight.zero_()
        vae.posterior.network.last.bias.zero_()
    gap = inference_gap(vae, torch.randn(20, 3), steps=200, samples=3000)
    assert gap.verdict.startswith("more is lost to amortisation")
    assert gap.amortization > 10 * abs(gap.family)
    # The full covariance of a linear model is its posterior.
    exact = quadrature(vae, torch.randn(1, 3))
    assert exact.error.isfinite().all()
    assert float((gap.log_likelihood - gap.richer).mean()) < 0.05


class Bimodal(nn.Module):
    """x ~ N(z^2, 1), whose posterior has a mode at either sign of z; q is the better half."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z**2, 0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.clamp(min=0.1).sqrt(), 0.25).to_event(1))


def test_a_bimodal_target_loses_to_the_family():
    x = torch.full((4, 1), 2.0)
    truth = quadrature(Bimodal(), x).log_likelihood
    found = annealed_importance_sampling(
        Bimodal(), x, distributions=100, chains=64, leapfrog=5, from_prior=True
    )
    gap = inference_gap(Bimodal(), x, steps=200, log_p=found.log_likelihood)
    assert gap.verdict.startswith("more is lost to the family")
    assert gap.family == pytest.approx(math.log(2), abs=0.1)  # the other half
    assert torch.allclose(found.log_likelihood.mean(), truth.mean(), atol=0.1)
    assert gap.regained < 0.1
    mixed = inference_gap(Bimodal(), x, steps=200, components=11, log_p=truth)
    # That none of ten components begins in the other half has, for four data, a chance of 1/256.
    assert mixed.regained == pytest.approx(math.log(2), abs=0.1)
    assert "a mixture of 11 such with full covariance regains" in mixed.verdict


def test_an_encoder_that_is_the_best_of_its_family_loses_nothing_to_amortisation():
    pair = linear()
    precision = torch.linalg.inv(pair.covariance)
    pair.tril = precision.diagonal().rsqrt().diag()
    law = torch.distributions.MultivariateNormal
    x = drawn(pair, 300)
    truth = law(pair.loc, pair.weight @ pair.weight.T + torch.eye(3)).log_prob(x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            loc = (x - pair.loc) @ pair.gain.T
            pyro.sample("z", dist.Normal(loc, pair.tril.diagonal()).to_event(1))

    pair.guide = guide
    gap = inference_gap(pair, x, steps=100, log_p=truth)
    # The KL of two Gaussians of one mean and one diagonal of the precision.
    family = float(precision.diagonal().log().sum() - precision.logdet()) / 2
    # 150,000 draws of a log-weight whose standard deviation is below 1: five standard errors.
    assert gap.family == pytest.approx(family, abs=0.013)
    assert gap.amortization == pytest.approx(0, abs=0.013)


@pytest.mark.parametrize("steps", [0, 100])
def test_a_q_with_full_covariance_loses_nothing_that_a_diagonal_one_would(steps):
    pair = linear(scale=0.5)
    x = drawn(pair, 30)
    gap = inference_gap(pair, x, steps=steps, samples=50)
    assert torch.allclose(gap.amortized, gap.log_likelihood)
    # Each is the mean of 500 draws whose standard deviation is about 1: five standard errors.
    assert float((gap.richer - gap.log_likelihood).mean()) == pytest.approx(0, abs=0.04)
    assert math.isnan(gap.amortization)
    assert gap.verdict.startswith("no verdict: q is no diagonal Gaussian and loses 0.00 nats")


class Chain(nn.Module):
    """z1 ~ N(0, 1), z2 ~ N(z1, 0.1^2), x ~ N(0, 1); q is the prior, from either end."""

    def __init__(self, *, upwards=False):
        super().__init__()
        self.upwards = upwards

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            first = pyro.sample("z1", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("z2", dist.Normal(first, 0.1).to_event(1))
            pyro.sample("x", dist.Normal(torch.zeros(1), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            if self.upwards:
                last = pyro.sample("z2", dist.Normal(0 * x, math.sqrt(1.01)).to_event(1))
                law = dist.Normal(last / 1.01, 0.1 / math.sqrt(1.01))
                pyro.sample("z1", law.to_event(1))
            else:
                first = pyro.sample("z1", dist.Normal(0 * x, 1.0).to_event(1))
                pyro.sample("z2", dist.Normal(first, 0.1).to_event(1))


def test_a_fit_that_went_astray_is_not_the_better_one():
    one, two = torch.tensor([[3.0, math.nan, 1.0]] * 2), torch.tensor([[2.0, 1.0, math.nan]] * 2)
    assert torch.equal(_better(one, two), torch.tensor([[3.0, 1.0, 1.0]] * 2))


def test_sites_that_depend_on_each_other_are_not_taken_for_independent():
    x = torch.randn(20, 1)
    down, up = decompose(Chain(), x), decompose(Chain(upwards=True), x)
    assert torch.equal(down.dimension_kl, torch.zeros(2))
    assert up.dimension_kl is None  # of which each is one given the other
    assert down.kl == pytest.approx(0, abs=1e-5)
    assert up.kl == pytest.approx(0, abs=1e-4)
    assert down.marginal_dimension_kl is down.total_correlation is None
    truth = dist.Normal(0.0, 1.0).log_prob(x[:, 0])
    gap = inference_gap(Chain(), x, steps=1000, particles=64, log_p=truth)
    # The best diagonal Gaussian: half the log-determinant of the correlation of z1 and z2.
    assert gap.family == pytest.approx(math.log(101) / 2, abs=0.05)
    assert gap.regained == pytest.approx(gap.family, abs=0.05)


def test_latents_may_be_numbers():
    x = torch.linspace(-2, 2, 5)
    truth = dist.Normal(0.0, math.sqrt(2)).log_prob(x).double()
    assert torch.allclose(quadrature(Scalar(), x).log_likelihood, truth, atol=2e-3)
    ais = annealed_importance_sampling(Scalar(), x, distributions=5)
    assert torch.allclose(ais.log_likelihood, truth, atol=1e-4)  # from the posterior itself
    assert decompose(Scalar(), x).unit_variance.shape == (1,)
    assert calibration(Scalar(), x).passed
    gap = inference_gap(Scalar(), x, steps=3, samples=100)
    assert torch.allclose(gap.amortized, truth, atol=1e-4)


def test_what_varies_within_one_datum_is_weighed_as_one_datum():
    class Wide(nn.Module):
        """A unit whose mean varies by 1 / 20, and one wide datum at the end."""

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(0 * z, 1.0).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                law = dist.Normal(x.clamp(max=1.0), 0.05 + 10 * (x > 1).float())
                pyro.sample("z", law.to_event(1))

    rows = 2**21 // 100 + 1  # of which the last is a part of its own
    x = 0.22 * torch.randn(rows, 1)
    x[-1] = 2.0
    parts = decompose(Wide(), x, draws=2)
    assert float(parts.unit_variance) == pytest.approx(0.22**2, rel=0.1)


@pytest.mark.parametrize("inexact", [0.0, 2.0])
def test_calibration_of_a_discrete_latent_breaks_its_ties_at_random(inexact):
    class Coin(nn.Module):
        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Bernoulli(torch.full((1,), 0.5)).to_event(1))
                pyro.sample("x", dist.Normal(2 * z, 1.0).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                logits = 2 * x - 2 + inexact
                pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

    assert calibration(Coin(), torch.zeros(1, 1)).passed == (not inexact)


def test_a_note_of_the_mean_changes_nothing():
    class Noted(nn.Module):
        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                mean = pyro.deterministic("mean", 2 * z, event_dim=1)
                pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(0.4 * x, math.sqrt(0.2)).to_event(1))

    assert calibration(Noted(), torch.zeros(1, 1)).passed
    check = predictive_check(Noted(), math.sqrt(5) * torch.randn(400, 1), {"var": torch.var})
    assert check.replicated["var"].mean() == pytest.approx(5, rel=0.1)
    loss = WakeSleep().loss_and_grads(Noted().model, Noted().guide, torch.randn(5, 1))
    assert math.isfinite(loss)


def test_calibration_passes_for_the_exact_posterior_and_not_for_half_its_scale():
    exact = calibration(linear(), torch.zeros(1, 3))
    assert exact.passed
    narrow = calibration(linear(inflation=0.25), torch.zeros(1, 3))
    assert not narrow.passed
    # Too narrow: true values lie outside of the draws too often.
    ends = ((narrow.ranks == 0) | (narrow.ranks == narrow.draws)).double().mean(0)
    assert (ends[:2] > 3 * 2 / 100).all()


class Placed(nn.Module):
    """z ~ N(c, 1), x ~ N(z, 1), and the posterior of c = 0 whatever c is."""

    def model(self, x, c):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(c, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x, c):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)).to_event(1))


@pytest.mark.parametrize("size", [50, 1000])
def test_calibration_is_under_the_context_of_all_data(size):
    x, right = torch.zeros(size, 1), torch.zeros(size, 1)
    wrong = torch.full_like(right, 3.0)
    assert calibration(Placed(), [(x, right), (x, right)]).passed
    assert not calibration(Placed(), [(x, right), (x, wrong)]).passed


def test_the_prior_as_posterior_passes_on_its_latents_and_fails_on_the_joint():
    pair = linear(scale=0.3)
    pair.gain, pair.tril = torch.zeros(2, 3), torch.eye(2)
    found = calibration(pair, torch.zeros(1, 3))
    assert (found.p_values[:2] > found.alpha / 3).all()
    assert found.p_values[2] < 1e-10
    assert not found.passed


def test_the_false_alarm_rate_of_calibration_is_what_it_says():
    ranks = torch.randint(0, 100, (1000, 500, 3), generator=torch.Generator().manual_seed(0))
    failed = sum(not Calibration(each, 99, 0.05).passed for each in ranks)
    assert stats.binomtest(failed, 1000, 0.05, alternative="greater").pvalue > FALSE_ALARM


def test_grey_levels_have_no_calibration():
    grey = likelihoods.Bernoulli(MLP(2, [], 4), greyscale=True)
    vae = VAE(priors.Normal(2), grey, posteriors.Normal(MLP(4, [], (2, 2))))
    looks = calibration, partial(predictive_check, statistics={"ink": torch.mean})
    for look, likelihood in itertools.product(looks, (grey, likelihoods.Missing(grey))):
        vae.likelihood = likelihood
        with pytest.raises(ValueError, match="draws black and white where the data are grey"):
            look(vae, torch.rand(5, 4))


def test_a_predictive_check_finds_what_the_model_has_not():
    pair = linear()
    x = drawn(pair, 300)
    measures = {"mean": torch.mean, "spread": torch.std}
    fits = predictive_check(pair, x, measures)
    assert all(p > 0.01 for p in fits.p_values.values())
    wide = predictive_check(pair, 2 * x, measures)
    assert wide.p_values["spread"] < 0.05
    assert wide.observed["spread"] == pytest.approx(2 * float(x.std()))
    expected = math.sqrt(float((pair.weight**2).sum() / 3 + 1))
    assert float(fits.replicated["spread"].mean()) == pytest.approx(expected, rel=0.05)


def test_a_predictive_check_of_incomplete_data_has_their_holes():
    encoder = MLP(3, [], (2, 1), transform=torch.nan_to_num)
    likelihood = likelihoods.Missing(likelihoods.Normal(nn.Linear(1, 3), scale=1.0))
    vae = VAE(priors.Normal(1), likelihood, posteriors.Normal(encoder))
    x = vae.sample(50)
    x[:7, 0] = math.nan
    measures = {"seen": lambda x: (~x.isnan()).sum(), "mean": torch.nanmean, "max": torch.max}
    check = predictive_check(vae, x, measures)
    assert check.p_values["seen"] == 1
    assert check.p_values["mean"] > 0.01
    assert math.isnan(check.p_values["max"])


class Labelled(nn.Module):
    """y ~ Bernoulli(1/2), z ~ N(0, 1), x ~ N(z + 10 y, 1), y and x observed, q the posterior."""

    def model(self, x, y):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            y = pyro.sample("y", dist.Bernoulli(torch.full((1,), 0.5)).to_event(1), obs=y)
            pyro.sample("x", dist.Normal(z + 10 * y, 1.0).to_event(1), obs=x)

    def guide(self, x, y):
        with pyro.plate("data", len(x), dim=-1):
            law = dist.Normal((x - 10 * y) / 2, math.sqrt(0.5))
            pyro.sample("z", law.to_event(1))


def test_data_are_predicted_under_the_labels_that_are_observed():
    y = torch.arange(300).remainder(3)[:, None].clamp(max=1).double()
    x = 10 * y + math.sqrt(2) * torch.randn_like(y)
    check = predictive_check(Labelled(), (x, y), {"mean": torch.mean})
    # A hundred means of 300 data with variance 2: five standard errors.
    assert float(check.replicated["mean"].mean()) == pytest.approx(20 / 3, abs=0.041)
    programs = Programs(Labelled(), (x, y))
    predicted = programs.predict((x, y), (x - 10 * y)[None] / 2)
    apart = predicted - (x - 10 * y) / 2 - 10 * y
    assert stats.kstest(apart[:, 0].numpy(), "norm").pvalue > FALSE_ALARM


@pytest.mark.parametrize("call", [calibration, bidirectional])
def test_what_is_observed_beside_x_is_not_simulated(call):
    x = torch.zeros(5, 1)
    with pytest.raises(ValueError, match=r"observes x alone of each datum, .* observes 'y' too"):
        call(Labelled(), (x, x))


class Parts(nn.Module):
    """z_k ~ N(0, 1) in a plate of three parts, x ~ N(z_1 + z_2 + z_3, 1), q the prior."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            with pyro.plate("parts", 3, dim=-2):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.sum(-2, keepdim=z.dim() > 2), 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("parts", 3, dim=-2):
            pyro.sample("z", dist.Normal(0.0, 1.0))


def test_a_predictive_check_takes_latents_in_two_plates():
    x = 2 * torch.randn(500)
    check = predictive_check(Parts(), x, {"spread": torch.std})
    # A hundred standard deviations of 500 data around 2: five standard errors.
    assert float(check.replicated["spread"].mean()) == pytest.approx(2, abs=0.032)


def test_a_predictive_check_draws_latents_of_all_data_anew():
    check = predictive_check(Level(), torch.randn(100), {"mean": torch.mean}, simulations=400)
    # Means vary by the posterior, 1/101, and by their own data; 3.5 % are a standard error.
    spread = float(check.replicated["mean"].std())
    assert spread == pytest.approx((1 / 101 + 1 / 100) ** 0.5, rel=0.17)


class Pixels(nn.Module):
    """z ~ N(0, 1), x_d ~ N(z, 1) in a plate of its own right of the data, q the posterior."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            with pyro.plate("pixels", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-2):
            law = dist.Normal(x.sum(-1)[:, None, None] / 4, 0.5)
            pyro.sample("z", law.to_event(1))


LATENT = quadrature, annealed_importance_sampling, hmc_likelihood, decompose, calibration


@pytest.mark.parametrize("call", LATENT)
def test_a_data_plate_left_of_another_is_refused_in_a_sentence(call):
    x = torch.randn(4, 3)
    truth = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(x)
    assert torch.allclose(log_likelihood(Pixels(), x, samples=20).log_likelihood, truth)
    with pytest.raises(ValueError, match="needs the plate 'data' of 'z' at dim=-1"):
        call(Pixels(), x)
    check = predictive_check(Pixels(), x.repeat(100, 1), {"var": torch.var})
    assert float(check.replicated["var"].mean()) == pytest.approx(2, abs=0.1)


class Sampled(nn.Module):
    """A plate that draws a subsample of the batch by itself."""

    def model(self, x):
        with pyro.plate("data", len(x), subsample_size=3) as rows:
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]), obs=x[rows])

    def guide(self, x):
        pass


@pytest.mark.parametrize("call", [bound, log_likelihood])
def test_a_plate_that_subsamples_the_batch_is_refused_in_a_sentence(call):
    with pytest.raises(ValueError, match="'x' has 3 rows where the batch has 10: let it have"):
        call(Sampled(), torch.randn(10))


@pytest.mark.filterwarnings("default")
def test_arviz_gets_draws_and_the_integrated_likelihood_under_its_own_name():
    pytest.importorskip("arviz")
    pair = linear()
    x = drawn(pair, 6)
    exported = to_arviz(pair, x, draws=500)
    assert exported.posterior["z"].shape == (1, 500, 6, 2)
    assert "log_likelihood" not in exported.groups()
    posterior = np.asarray(exported.posterior["z"]).mean((0, 1))
    assert np.allclose(posterior, (x @ pair.gain.T).numpy(), atol=0.25)
    spread = np.asarray(exported.prior_predictive["x"]).std((0, 1, 2))
    truth = (pair.weight @ pair.weight.T + torch.eye(3)).diagonal().sqrt().numpy()
    assert np.allclose(spread, truth, rtol=0.1)
    found = np.asarray(exported.constant_data["integrated_log_likelihood"])
    assert np.allclose(found, log_likelihood(pair, x, samples=10).log_likelihood)
    assert np.array_equal(exported.observed_data["x"], x.numpy())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: decompose(linear(), x, draws=0), "at least 1 draw, not 0"),
        (lambda x: calibration(linear(), x, simulations=10), "at least 100 simulations"),
        (lambda x: predictive_check(linear(), x, {}, simulations=0), "at least 1 simulation"),
        (lambda x: inference_gap(Mixed(True), torch.randn(3, 4)), "'c' is discrete"),
        (lambda x: decompose(linear(), x[:0]), "no data to evaluate"),
    ],
)
def test_bad_input_gets_a_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.randn(3, 3))
