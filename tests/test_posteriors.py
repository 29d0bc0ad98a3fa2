"""Posteriors against the contract, and against SciPy's densities."""

import pytest
import torch
from scipy import stats

from pyro_vae import MLP, VAE, data, fit, likelihoods, posteriors, priors
from pyro_vae.testing import check_posterior

CASES = {
    "Normal": [lambda: posteriors.Normal(MLP(4, [8], (2, 3)))],
    "FullRankNormal": [lambda: posteriors.FullRankNormal(MLP(4, [8], (4, 3)))],
    "LowRankNormal": [
        lambda: posteriors.LowRankNormal(MLP(4, [8], (4, 3))),
        lambda: posteriors.LowRankNormal(MLP(4, [8], (3, 3)), rank=1),
    ],
}


def test_every_export_has_a_case():
    assert set(posteriors.__all__) - {"Posterior"} == set(CASES)


@pytest.mark.parametrize("make", [make for cases in CASES.values() for make in cases])
def test_every_posterior_keeps_the_contract(make):
    check_posterior(make(), torch.randn(3, 4))


@pytest.mark.parametrize("kind", list(CASES))
def test_every_posterior_trains(kind):
    family, digits = getattr(posteriors, kind), data.load("digits", view=data.dynamic)
    vae = VAE(
        priors.Normal(3),
        likelihoods.Bernoulli(MLP(3, [32], digits.shape)),
        family(MLP(digits.shape, [32], family.outputs(3))),
    )
    rows = fit(vae, digits, epochs=4, warmup=0, progress=False)
    assert rows[-1]["elbo"] > rows[0]["elbo"]


X, Z = torch.randn(6, 4).double(), torch.randn(6, 3).double()


def close(posterior, truth):
    return torch.allclose(posterior(X).log_prob(Z), torch.as_tensor(truth))


def multivariate(loc, covariance):
    laws = zip(loc.detach(), covariance.detach(), Z, strict=True)
    return [stats.multivariate_normal(m, s).logpdf(z) for m, s, z in laws]


def test_normal_has_the_location_and_scale_of_its_encoder():
    posterior = CASES["Normal"][0]().double()
    loc, log_scale = posterior.network(X).detach().unbind(-2)
    assert close(posterior, stats.norm(loc, log_scale.exp()).logpdf(Z).sum(-1))


def test_full_rank_normal_has_the_covariance_of_its_factor():
    posterior = CASES["FullRankNormal"][0]().double()
    output = posterior.network(X)
    factor = torch.zeros(6, 3, 3).double()
    for row in range(3):
        for column in range(row):
            factor[:, row, column] = output[:, 1 + row, column]
        factor[:, row, row] = output[:, 1 + row, row].exp()
    assert close(posterior, multivariate(output[:, 0], factor @ factor.mT))


def test_low_rank_normal_has_the_covariance_of_its_columns():
    posterior = CASES["LowRankNormal"][0]().double()
    loc, log_scale, *columns = posterior.network(X).unbind(-2)
    covariance = torch.diag_embed((2 * log_scale).exp())
    for column in columns:
        covariance = covariance + column[:, :, None] * column[:, None, :]
    assert close(posterior, multivariate(loc, covariance))


def test_no_rank_is_refused():
    with pytest.raises(ValueError, match="at least 1, not 0"):
        posteriors.LowRankNormal(MLP(4, [8], (2, 3)), rank=0)
