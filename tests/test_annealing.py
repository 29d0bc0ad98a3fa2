"""Estimates by Hamiltonian Monte Carlo against scikit-learn's probabilistic PCA."""

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear import FALSE_ALARM, linear_vae
from scipy import integrate, stats
from test_log_likelihood import Mixed, factor_pair, pca_pair
from test_log_likelihood import double as double
from test_log_likelihood import pixels as pixels
from torch import nn

from pyro_vae import MLP, VAE, HierarchicalVAE, likelihoods, posteriors, priors
from pyro_vae.annealing import (
    _Path,
    annealed_importance_sampling,
    bidirectional,
    hmc_likelihood,
)
from pyro_vae.evaluation import log_likelihood, quadrature
from pyro_vae.scoring import Programs, validation

pytestmark = pytest.mark.filterwarnings("ignore:the importance weights")


def agrees(estimate, truth):
    """Each datum within errors, by Student's t of 16 chains, and the mean within 0.05 nats."""
    z = (estimate.log_likelihood - truth) / estimate.monte_carlo_error
    assert z.abs().max() < stats.t.isf(FALSE_ALARM / (2 * len(z)), 15)
    assert abs(float((estimate.log_likelihood - truth).mean())) < 0.05


@pytest.mark.parametrize("from_prior", [False, True])
@pytest.mark.parametrize("fit", [pca_pair, factor_pair])
def test_annealing_recovers_scikit_learns_models(fit, from_prior, pixels):
    pair, truth = fit(pixels, 5)
    options = {"distributions": 400 if from_prior else 20, "leapfrog": 4}
    found = annealed_importance_sampling(pair, pixels[:30], from_prior=from_prior, **options)
    agrees(found, truth[:30])
    assert ((found.acceptance > 0.4) & (found.acceptance < 0.95)).all()


def test_annealing_repairs_a_posterior_that_was_spoiled(pixels):
    pair, truth = pca_pair(pixels, 5, inflation=0.2)
    plain = log_likelihood(pair, pixels[:50], samples=16)
    found = annealed_importance_sampling(pair, pixels[:50], distributions=50, leapfrog=4)
    assert abs(float((found.log_likelihood - truth[:50]).mean())) < 0.1
    assert abs(plain.mean - float(truth[:50].mean())) > 0.3


def test_without_intermediate_distributions_it_is_importance_sampling(pixels):
    pair, _ = pca_pair(pixels, 3)
    x = pixels[:4]
    pyro.set_rng_seed(2)
    found = annealed_importance_sampling(pair, x, distributions=0, chains=30)
    pyro.set_rng_seed(2)
    programs = Programs(pair, (x,))
    path = _Path(programs, (x,), False)
    path.begin(8)  # what the pilot run draws
    log_w = programs.weights((x,), 30)
    expected = log_w.logsumexp(0) - torch.tensor(30.0).log()
    assert torch.allclose(found.log_likelihood, expected)
    assert (found.acceptance == 1).all()
    weights = log_w.softmax(0)
    assert torch.allclose(found.effective_sample_size, 1 / weights.square().sum(0))
    assert torch.equal(found.unreliable, weights.square().sum(0) > 0.5)


def test_moves_leave_the_posterior_as_it_is(pixels):
    pair, _ = pca_pair(pixels, 2, inflation=1.0)
    path = _Path(Programs(pair, (pixels[:1],)), (pixels[:1],), False)
    point = path.begin(2000)
    for _ in range(5):
        point, _ = path.move(point, 1.0, torch.tensor([1.2]), 3)
    white = torch.linalg.solve_triangular(
        pair.tril, (point.z[:, 0] - (pixels[0] - pair.loc) @ pair.gain.T).T, upper=False
    )
    for row in white:
        assert stats.kstest(row.numpy(), "norm").pvalue > FALSE_ALARM / 2


@pytest.mark.parametrize("from_prior", [False, True])
def test_bounds_enclose_the_truth_and_close_in(from_prior, pixels):
    pair, _ = pca_pair(pixels, 5)
    gaps = []
    for distributions in (3, 300) if from_prior else (0, 50):
        pyro.set_rng_seed(5)
        found = bidirectional(
            pair, pixels[:60], distributions=distributions, leapfrog=3, from_prior=from_prior
        )
        gaps.append(found.gap)
    pyro.set_rng_seed(5)
    assert 0 < gaps[1] < gaps[0]
    assert gaps[1] < 0.2
    assert found.verdict.endswith(f"a gap of {gaps[1]:.2f} nats; it says nothing about real data")


def test_bounds_are_bounds_of_what_was_simulated(pixels):
    pair, _ = pca_pair(pixels, 5)
    covariance = pair.weight @ pair.weight.T + torch.diag(pair.scale**2)
    law = torch.distributions.MultivariateNormal(pair.loc, covariance)
    seen = []
    simulate = Programs.simulate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Programs, "simulate", lambda self, b: seen.append(simulate(self, b)) or seen[-1]
        )
        found = bidirectional(pair, pixels[:60], distributions=30, leapfrog=3)
    truth = torch.cat([law.log_prob(batch[0]) for batch, _ in seen])
    for side, sign in ((found.lower, 1), (found.upper, -1)):
        short = sign * (truth - side)
        assert abs(float(short.mean())) < 0.1
        assert float(short.mean()) > -4 * float(short.std()) / len(short) ** 0.5


@pytest.mark.parametrize("latent", [1, 2, 4])
def test_appendix_d_recovers_probabilistic_pca(latent, pixels):
    pair, truth = pca_pair(pixels, latent)
    found = hmc_likelihood(pair, pixels[:20], samples=100, leapfrog=4)
    agrees(found, truth[:20])


class Half(nn.Module):
    """z ~ N(0, 1), x ~ N(z, 1), and a q with mass on a part of the real line only."""

    def __init__(self, law):
        super().__init__()
        self.law = law

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.law.expand([len(x), 1]).to_event(1))


@pytest.mark.parametrize("law", [dist.LogNormal(0.0, 1.0), dist.Uniform(-0.5, 0.5)])
def test_appendix_d_goes_where_q_has_no_density(law):
    x = torch.tensor([[-1.0], [0.5]])
    truth = dist.Normal(0.0, 2**0.5).log_prob(x[:, 0])
    agrees(hmc_likelihood(Half(law), x, samples=100, leapfrog=4), truth)


def test_annealing_from_a_flat_q_finds_the_mass_where_it_is():
    law, x = dist.Uniform(-0.5, 0.5), torch.tensor([[-1.0], [0.5]])
    posterior = stats.norm(x[:, 0] / 2, 0.5**0.5)
    inside = torch.as_tensor(posterior.cdf(0.5) - posterior.cdf(-0.5)).log()
    found = annealed_importance_sampling(Half(law), x, distributions=20, leapfrog=4)
    agrees(found, dist.Normal(0.0, 2**0.5).log_prob(x[:, 0]) + inside)


class TwoModes(nn.Module):
    """x ~ N((z_1^2 + tilt z_1, z_2), 0.3^2), and q near the mode at z_1 > 0 alone."""

    def __init__(self, tilt):
        super().__init__()
        self.tilt = tilt

    def mean(self, z):
        return torch.stack([z[..., 0] ** 2 + self.tilt * z[..., 0], z[..., 1]], -1)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.mean(z), 0.3).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc = torch.stack([x[:, 0].sqrt(), x[:, 1]], -1)
            pyro.sample("z", dist.Normal(loc, 0.3).to_event(1))


def exact_modes(pair, x):
    """log p(x) and the share of p(z|x) at z_1 > 0, by SciPy's quadrature of z_1.

    The integral over z_2, which is no part of the other factor, is in closed form.
    """
    second = stats.norm.logpdf(x[1], 0, (1 + 0.3**2) ** 0.5)

    def density(z):
        mean = z**2 + pair.tilt * z
        return stats.norm.pdf(z) * stats.norm.pdf(x[0], mean, 0.3)

    parts = [integrate.quad(density, *ends, limit=200)[0] for ends in ((-9, 0), (0, 9))]
    return np.log(sum(parts)) + second, parts[1] / sum(parts)


@pytest.mark.parametrize("tilt", [0.0, -0.3])
def test_appendix_d_finds_both_modes_where_the_encoder_knows_one(tilt):
    pair = TwoModes(tilt)
    x = torch.tensor([[2.0, 0.5], [3.0, -1.0], [4.0, 0.0], [5.0, 1.0]])
    truth, share = map(torch.tensor, zip(*(exact_modes(pair, each) for each in x), strict=True))
    found = hmc_likelihood(pair, x, samples=100, leapfrog=5)
    agrees(found, truth)
    assert found.apart.all()  # for no chain crosses
    # What chains that begin at q alone would give is the mass of their mode.
    assert (share.log() < -0.2).all()


def test_chains_of_one_mode_are_not_apart_and_a_mode_that_none_began_in_is_lost(monkeypatch):
    pair, x = TwoModes(0.0), torch.tensor([[4.0, 0.0], [5.0, 1.0]])
    settled = _Path.settled
    monkeypatch.setattr(
        _Path,
        "settled",
        lambda self, *rest: settled(_Path(self.programs, self.batch, False), *rest),
    )
    found = hmc_likelihood(pair, x, samples=100, leapfrog=5)
    assert not found.apart.any()
    truth = torch.tensor([exact_modes(pair, each)[0] for each in x])
    short = truth - found.log_likelihood
    assert torch.allclose(short, torch.full_like(short, 2.0).log(), atol=0.1)


def test_a_mixture_agrees_with_quadrature():
    pair, x = Mixed(False), 2 * torch.randn(10, 4)
    found = annealed_importance_sampling(pair, x, distributions=50, leapfrog=4)
    agrees(found, quadrature(pair, x).log_likelihood)


def hierarchy():
    return HierarchicalVAE(
        [priors.Normal(1), posteriors.Normal(MLP(1, [4], (2, 2)))],
        likelihoods.Normal(MLP(2, [4], 3), scale=0.8),
        [
            posteriors.Normal(MLP(3, [4], (2, 1))),
            posteriors.Normal(MLP(3, [4], (2, 2), context=1)),
        ],
    )


def flowing():
    posterior = posteriors.Flow(MLP(3, [4], posteriors.Flow.outputs(2)), 2)
    vamp = priors.VampPrior(posterior, torch.randn(20, 3), components=5)
    return VAE(vamp, likelihoods.Bernoulli(MLP(2, [4], 3)), posterior)


@pytest.mark.parametrize("make", [hierarchy, flowing])
def test_hierarchies_flows_and_mixtures_agree_with_importance_sampling(make):
    pair, x = make().double().eval(), (torch.rand(6, 3) > 0.5).double()
    plain = log_likelihood(pair, x, samples=20_000)
    found = annealed_importance_sampling(pair, x, distributions=20, chains=64, leapfrog=4)
    apart = (found.log_likelihood - plain.log_likelihood).abs()
    error = (found.monte_carlo_error**2 + plain.monte_carlo_error**2).sqrt()
    assert (apart < 4 * error).all()


class Odd(nn.Module):
    """z ~ N(0, 1), q the prior, and a likelihood that is as odd as it is given."""

    def __init__(self, likelihood):
        super().__init__()
        self.likelihood = likelihood

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", self.likelihood(z).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0 * x, 1.0).to_event(1))


ESTIMATES = [
    partial(log_likelihood, samples=100),
    quadrature,
    partial(annealed_importance_sampling, distributions=0),
    partial(annealed_importance_sampling, distributions=3),
    partial(hmc_likelihood, samples=20, chains=2, leapfrog=1),
]


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_data_that_no_draw_makes_possible_have_no_likelihood_and_no_trust(estimate):
    with validation(False):
        found = estimate(Odd(lambda z: dist.Poisson(0 * z)), torch.ones(2, 1))
    assert (found.log_likelihood == -np.inf).all()
    for trust in ("unreliable", "apart"):
        assert getattr(found, trust, torch.tensor(True)).all()
    if hasattr(found, "effective_sample_size"):
        assert (found.effective_sample_size == 0).all()
        assert (found.monte_carlo_error == np.inf).all()
    if hasattr(found, "error"):
        assert (found.error == np.inf).all()


@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize(
    ("likelihood", "words"),
    [
        (lambda z: dist.Beta(z.sigmoid(), torch.ones_like(z)), "is infinite for a draw of z"),
        (lambda z: dist.Normal(z * np.nan, 1.0), "is not a number for a draw of z"),
    ],
)
def test_densities_that_are_no_numbers_get_one_sentence(estimate, likelihood, words):
    with validation(False), pytest.raises(ValueError, match=words):
        estimate(Odd(likelihood), torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: annealed_importance_sampling(Mixed(True), x), "'c' is discrete: use log_lik"),
        (
            lambda x: hmc_likelihood(linear_vae(4, 5), x),
            "fewer than 5 latents and there are 5: use",
        ),
        (
            lambda x: annealed_importance_sampling(Mixed(False), x, chains=0),
            "chains is at least 1",
        ),
        (lambda x: hmc_likelihood(Mixed(False), x, samples=1), "samples is at least 20, not 1"),
        (lambda x: bidirectional(Mixed(True), x), "bidirectional Monte Carlo needs real latents"),
    ],
)
def test_bad_input_gets_a_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.randn(3, 4))
