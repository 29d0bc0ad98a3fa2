"""Likelihoods against SciPy's densities and torch's cross-entropy."""

import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional

from pyro_vae import MLP, likelihoods

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
    scales = {"fixed": 0.3, "learned": 0.05 + 1.0}
    scale = scales.get(kind) or 0.05 + output[:, 1].exp().numpy()
    loc = loc.sigmoid() if bounded else loc
    truth = stats.norm(loc.numpy(), scale).logpdf(x.numpy()).sum((1, 2))
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
