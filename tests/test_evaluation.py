"""Evaluation against the closed form of a linear VAE."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear import FALSE_ALARM, Scalar, exact_halves, linear_vae
from scipy import stats
from torch import nn

from pyro_vae.evaluation import bound, log_likelihood


def test_both_halves_are_exact_in_expectation_for_each_datum():
    vae, x = linear_vae(4, 2), torch.randn(6, 4)
    truth = torch.cat([each.detach() for each in exact_halves(vae, x)])
    draws = torch.stack([torch.cat(bound(vae, [(x,)])) for _ in range(500)])
    z = (draws.mean(0) - truth) / (draws.std(0) / len(draws) ** 0.5)
    assert z.abs().max() < stats.t.isf(FALSE_ALARM / (2 * len(z)), len(draws) - 1)


def test_batches_and_particles_change_nothing_but_the_noise():
    vae, x = linear_vae(4, 2), torch.randn(6, 4)
    one = torch.stack([bound(vae, [(x,)]).elbo for _ in range(200)])
    many = torch.stack([bound(vae, [(x[:4],), (x[4:],)], particles=5).elbo for _ in range(200)])
    assert stats.ttest_ind(one.mean(1), many.mean(1), equal_var=False).pvalue > FALSE_ALARM
    # Five particles divide each datum's variance by five: an F test on each, Bonferroni.
    ratio = one.var(0) / (5 * many.var(0))
    low, high = stats.f.ppf([FALSE_ALARM / 12, 1 - FALSE_ALARM / 12], 199, 199)
    assert ((low < ratio) & (ratio < high)).all()


def test_the_bound_of_an_exact_posterior_is_the_evidence():
    vae = linear_vae(2, 1, scale=0.5).double()
    encoder = vae.posterior.network.last
    weight, bias = (each.detach() for each in vae.likelihood.network.last.parameters())
    precision = 1 + (weight**2).sum() / 0.25
    with torch.no_grad():
        encoder.weight[0] = weight[:, 0] / 0.25 / precision
        encoder.bias[0] = -(weight[:, 0] @ bias) / 0.25 / precision
        encoder.bias[1] = -0.5 * precision.log()
    x = torch.randn(5, 2).double()
    law = stats.multivariate_normal(bias, weight @ weight.T + 0.25 * torch.eye(2))
    assert torch.allclose(bound(vae, [(x,)]).elbo, torch.as_tensor(law.logpdf(x)))


class Shared(nn.Module):
    """w ~ N(0, 1) once for all data, x_n ~ N(w, 1); q(w) = N(0.5, 1)."""

    def model(self, x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide(self, x):
        pyro.sample("w", dist.Normal(0.5, 1.0))


def test_a_latent_outside_the_plate_counts_once_for_all_data():
    x = torch.randn(8)
    draws = torch.stack([bound(Shared(), [(x,)]).kl for _ in range(2000)])
    assert torch.allclose(draws, draws[:, :1].expand_as(draws))
    total = draws.sum(1)  # log q(w) - log p(w), whose mean is the KL of two Gaussians, 1/8
    error = total.std() / len(total) ** 0.5
    assert (total.mean() - 0.125).abs() < stats.norm.isf(FALSE_ALARM / 2) * error


class Factored(Scalar):
    """The exact posterior with a factor of e^0.7 beside it."""

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
            pyro.factor("volume", torch.full((len(x),), 0.7), has_rsample=True)


def test_a_factor_of_the_guide_belongs_to_log_q():
    x = torch.randn(5)
    truth = dist.Normal(0.0, 2**0.5).log_prob(x).double() - 0.7
    found = bound(Factored(), x)
    assert torch.allclose(found.elbo, truth, atol=1e-5)
    estimate = log_likelihood(Factored(), x, samples=20).log_likelihood
    assert torch.allclose(estimate, truth, atol=1e-5)
    assert (found.reconstruction <= -0.5 * math.log(2 * math.pi) + 1e-6).all()


def test_summary_has_means_and_the_standard_error():
    vae, x = linear_vae(4, 2), torch.randn(50, 4)
    result = bound(vae, [(x,)])
    summary = result.summary()
    assert summary["elbo"] == pytest.approx(float(result.elbo.mean()))
    assert summary["elbo"] == pytest.approx(summary["reconstruction"] - summary["kl"])
    assert summary["standard_error"] == pytest.approx(stats.sem(result.elbo.numpy()))


def test_no_particles_and_no_data_are_refused():
    with pytest.raises(ValueError, match="at least 1 particle, not 0"):
        bound(linear_vae(4, 2), [(torch.randn(5, 4),)], particles=0)
    with pytest.raises(ValueError, match="no data"):
        bound(linear_vae(4, 2), [])
