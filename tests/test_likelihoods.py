"""Likelihoods against SciPy's densities and torch's cross-entropy."""

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn
from torch.nn import functional

from pyro_vae import MLP, VAE, data, fit, likelihoods, posteriors, priors
from pyro_vae.testing import check_likelihood

CASES = {
    "Bernoulli": [lambda: likelihoods.Bernoulli(network(3, 4))],
    "ContinuousBernoulli": [lambda: likelihoods.ContinuousBernoulli(network(3, 4))],
    "Normal": [
        lambda: likelihoods.Normal(network(3, 4)),
        lambda: likelihoods.Normal(network(3, 4), scale=0.1, bounded=True),
        lambda: likelihoods.Normal(network(2, 3, 4), per_element=True),
    ],
    "Laplace": [
        lambda: likelihoods.Laplace(network(3, 4)),
        lambda: likelihoods.Laplace(network(3, 4), bounded=True),
    ],
    "StudentT": [lambda: likelihoods.StudentT(network(3, 4), df=2.5)],
}


def test_every_export_has_a_case():
    assert set(likelihoods.__all__) - {"Likelihood"} == set(CASES)


@pytest.mark.parametrize("make", [make for cases in CASES.values() for make in cases])
def test_every_likelihood_keeps_the_contract(make):
    check_likelihood(make().float(), torch.randn(3, 2))


@pytest.mark.parametrize("kind", list(CASES))
def test_every_likelihood_trains(kind):
    family = getattr(likelihoods, kind)
    binary = kind == "Bernoulli"
    digits = data.load("digits", view=data.dynamic if binary else data.plain)
    vae = VAE(
        priors.Normal(2),
        family(MLP(2, [32], digits.shape)),
        posteriors.Normal(MLP(digits.shape, [32], (2, 2))),
    )
    rows = fit(vae, digits, epochs=4, warmup=0, progress=False)
    assert rows[-1]["elbo"] > rows[0]["elbo"]


Z = torch.linspace(-1, 1, 10).reshape(5, 2).double()


def network(*output):
    torch.manual_seed(1)
    return MLP(2, [4], output).double()


def test_bernoulli_is_scipys():
    likelihood, x = likelihoods.Bernoulli(network(3, 4)), torch.randint(2, (5, 3, 4)).double()
    probability = likelihood.network(Z).sigmoid().detach()
    truth = stats.bernoulli(probability).logpmf(x.numpy()).sum((1, 2))
    assert torch.allclose(likelihood(Z).log_prob(x), torch.as_tensor(truth))


def test_greyscale_is_minus_the_cross_entropy_and_says_so():
    likelihood = likelihoods.Bernoulli(network(3), greyscale=True)
    x, logits = torch.rand(5, 3).double(), likelihood.network(Z)
    entropy = functional.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)
    assert torch.allclose(likelihood(Z).log_prob(x), -entropy)
    assert "cross-entropy" in likelihood.unit
    assert "cross-entropy" not in likelihoods.Bernoulli(network(3)).unit


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("kind", ["fixed", "learned", "per element"])
def test_normal_is_scipys(kind, bounded):
    options = {"fixed": {"scale": 0.3}, "learned": {}, "per element": {"per_element": True}}[kind]
    shape = likelihoods.Normal.outputs((3, 4), per_element=kind == "per element")
    likelihood = likelihoods.Normal(network(*shape), bounded=bounded, floor=0.05, **options)
    output, x = likelihood.network(Z).detach(), torch.randn(5, 3, 4).double()
    loc = output[:, 0] if kind == "per element" else output
    scales = {"fixed": 0.3, "learned": 0.05 + 0.1}
    scale = scales.get(kind) or 0.05 + output[:, 1].exp().numpy()
    loc = loc.sigmoid() if bounded else loc
    truth = stats.norm(loc.numpy(), scale).logpdf(x.numpy()).sum((1, 2))
    assert torch.allclose(likelihood(Z).log_prob(x), torch.as_tensor(truth))


def bernoulli(x, y):
    return y**x * (1 - y) ** (1 - x)


def test_continuous_bernoulli_is_a_normalised_bernoulli():
    likelihood, x = likelihoods.ContinuousBernoulli(network(3)), torch.rand(5, 3).double()
    y = likelihood.network(Z).sigmoid().detach().numpy()
    mass = [integrate.quad(bernoulli, 0, 1, args=(p,))[0] for p in y.flatten()]
    truth = np.log(bernoulli(x.numpy(), y) / np.reshape(mass, y.shape)).sum(-1)
    assert torch.allclose(likelihood(Z).log_prob(x), torch.as_tensor(truth), atol=1e-6)


@pytest.mark.parametrize("bounded", [False, True])
def test_laplace_is_scipys(bounded):
    likelihood = likelihoods.Laplace(network(3), floor=0.05, bounded=bounded)
    x, loc = torch.randn(5, 3).double(), likelihood.network(Z).detach()
    truth = stats.laplace(loc.sigmoid() if bounded else loc, 0.15).logpdf(x.numpy()).sum(-1)
    assert torch.allclose(likelihood(Z).log_prob(x), torch.as_tensor(truth))


def test_student_t_is_scipys():
    likelihood, x = (
        likelihoods.StudentT(network(3), df=2.5, floor=0.05),
        torch.randn(5, 3).double(),
    )
    truth = stats.t(2.5, likelihood.network(Z).detach(), 0.15).logpdf(x.numpy()).sum(-1)
    assert torch.allclose(likelihood(Z).log_prob(x), torch.as_tensor(truth))


def test_a_learned_scale_has_its_floor():
    likelihood = likelihoods.Normal(network(3), floor=0.05).double()
    nn.init.constant_(likelihood.log_scale, -100.0)
    assert torch.allclose(likelihood(Z).stddev, torch.full((5, 3), 0.05).double())


@pytest.mark.parametrize(
    ("likelihood", "output"),
    [
        (likelihoods.Bernoulli, (3,)),
        (likelihoods.Normal, (3,)),
        (likelihoods.Laplace, (3,)),
        (likelihoods.StudentT, (3,)),
        (lambda decoder: likelihoods.Normal(decoder, bounded=True), (3,)),
        (lambda decoder: likelihoods.Normal(decoder, per_element=True), (2, 3)),
    ],
)
def test_a_centred_likelihood_starts_at_the_mean(likelihood, output):
    decoder, mean = network(*output), torch.tensor([0.1, 0.5, 0.7]).double()
    nn.init.zeros_(decoder.last.weight)
    centred = likelihood(decoder)
    centred.centre(mean)
    assert torch.allclose(centred(Z).mean, mean.expand(5, 3))


def test_a_decoder_without_output_bias_cannot_be_centred():
    with pytest.raises(TypeError, match="a Linear decoder has no method set_bias"):
        likelihoods.Bernoulli(nn.Linear(2, 3)).centre(torch.zeros(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": -1.0}, "must be positive and finite, not -1"),
        ({"scale": float("nan")}, "must be positive and finite, not nan"),
        ({"floor": 0.0}, "floor of a scale must be positive"),
        ({"scale": 1.0, "per_element": True}, "a fixed scale or per_element=True, not both"),
    ],
)
def test_scales_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        likelihoods.Normal(network(3), **options)


@pytest.mark.parametrize("lead", [(), (5,), (4, 5)])
def test_batch_shape_is_that_of_z(lead):
    for likelihood in (
        likelihoods.Bernoulli(network(3, 4)),
        likelihoods.Normal(network(2, 3, 4), per_element=True),
    ):
        distribution = likelihood(torch.randn(*lead, 2).double())
        assert (distribution.batch_shape, distribution.event_shape) == (lead, (3, 4))
