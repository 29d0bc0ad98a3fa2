"""Priors against the contract, and against SciPy's densities."""

import pytest
import torch
import zuko
from scipy import stats

from pyro_vae import MLP, VAE, data, fit, likelihoods, posteriors, priors
from pyro_vae.testing import check_prior

CASES = {
    "Normal": [lambda: priors.Normal(3), lambda: priors.Normal(3, learned=True)],
    "Laplace": [lambda: priors.Laplace(3, scale=0.5)],
    "StudentT": [lambda: priors.StudentT(2, df=4.0, scale=2.0)],
    "MixtureOfNormals": [
        lambda: priors.MixtureOfNormals(3, components=5),
        lambda: priors.MixtureOfNormals(1, components=1),
    ],
    "Flow": [lambda: priors.Flow(2, transforms=2, hidden=[16])],
    "zuko": [lambda: zuko.flows.MAF(3, transforms=2), lambda: zuko.flows.GMM(2, components=4)],
}


def test_every_export_has_a_case():
    assert set(priors.__all__) - {"Prior"} == set(CASES) - {"zuko"}


@pytest.mark.parametrize("make", [make for cases in CASES.values() for make in cases])
def test_every_prior_keeps_the_contract(make):
    check_prior(make())


@pytest.mark.parametrize("kind", list(CASES))
def test_every_prior_trains(kind):
    prior = CASES[kind][0]()
    latent = prior().event_shape[0]
    digits = data.load("digits", view=data.dynamic)
    vae = VAE(
        prior,
        likelihoods.Bernoulli(MLP(latent, [32], digits.shape)),
        posteriors.Normal(MLP(digits.shape, [32], (2, latent))),
    )
    rows = fit(vae, digits, epochs=4, warmup=0, progress=False)
    assert rows[-1]["elbo"] > rows[0]["elbo"]


Z = torch.linspace(-3, 3, 30, dtype=torch.float64).reshape(10, 3)


def close(prior, truth):
    return torch.allclose(prior.double()().log_prob(Z), torch.as_tensor(truth))


def test_normal_is_standard_by_default():
    assert close(priors.Normal(3), stats.norm.logpdf(Z).sum(-1))
    assert not list(priors.Normal(3).parameters())


def test_learned_normal_has_its_location_and_scale():
    prior = priors.Normal(3, learned=True)
    with torch.no_grad():
        prior.loc.copy_(torch.tensor([1.0, -2.0, 0.0]))
        prior.log_scale.copy_(torch.tensor([2.0, 0.5, 1.0]).log())
    assert close(prior, stats.norm([1, -2, 0], [2, 0.5, 1]).logpdf(Z).sum(-1))


def test_laplace_is_scipys():
    assert close(priors.Laplace(3, scale=0.5), stats.laplace(0, 0.5).logpdf(Z).sum(-1))


def test_student_t_is_scipys():
    assert close(priors.StudentT(3, df=4.0, scale=2.0), stats.t(4, 0, 2).logpdf(Z).sum(-1))


def test_mixture_is_the_weighted_sum_of_its_components():
    prior = priors.MixtureOfNormals(3, components=4).double()
    with torch.no_grad():
        prior.logits.copy_(torch.tensor([0.0, 1.0, -1.0, 2.0]))
        prior.log_scale.copy_(torch.randn(4, 3))
    loc, scale = prior.loc.detach().numpy(), prior.log_scale.detach().exp().numpy()
    each = [stats.norm(m, s).pdf(Z).prod(-1) for m, s in zip(loc, scale, strict=True)]
    weights = prior.logits.detach().softmax(0).numpy()
    assert close(prior, torch.as_tensor(weights @ each).log())


def test_a_flow_leaves_validation_as_it_was():
    before = torch.distributions.Distribution._validate_args
    priors.Flow(2, transforms=1)
    assert torch.distributions.Distribution._validate_args is before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: priors.Normal(0), "at least 1 dimension, not 0"),
        (lambda: priors.Laplace(2, scale=0.0), "scale of a prior must be positive and finite"),
        (lambda: priors.StudentT(2, df=-1.0), "df of a prior must be positive and finite"),
        (
            lambda: priors.MixtureOfNormals(2, components=0),
            "components of a prior must be positive",
        ),
        (lambda: priors.Flow(2, transforms=0), "transforms of a prior must be positive"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
