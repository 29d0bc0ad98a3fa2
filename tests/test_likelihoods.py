"""Likelihoods against SciPy's densities, exact sums and torch's cross-entropy."""

import copy
import itertools

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats
from torch import nn
from torch.nn import functional

from pyro_vae import MLP, VAE, data, fit, likelihoods, posteriors, priors
from pyro_vae.pairs import elementary
from pyro_vae.scoring import validation
from pyro_vae.testing import check_likelihood, check_pair

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
    "Categorical": [
        lambda: likelihoods.Categorical(network(5, 3, 4), levels=5),
        lambda: likelihoods.Categorical(network(256, 2)),
    ],
    "DiscretizedLogistic": [
        lambda: likelihoods.DiscretizedLogistic(network(2, 3, 4)),
        lambda: likelihoods.DiscretizedLogistic(network(9, 3), components=3),
    ],
    "Poisson": [lambda: likelihoods.Poisson(network(3, 4))],
    "NegativeBinomial": [
        lambda: likelihoods.NegativeBinomial(network(3, 4), (3, 4)),
        lambda: likelihoods.NegativeBinomial(network(4), 4),
    ],
    "ZeroInflatedNegativeBinomial": [
        lambda: likelihoods.ZeroInflatedNegativeBinomial(network(2, 3, 4), (3, 4))
    ],
    "Multinomial": [lambda: likelihoods.Multinomial(network(3), length=4)],
    "Missing": [
        lambda: likelihoods.Missing(likelihoods.Bernoulli(network(3, 4))),
        lambda: likelihoods.Missing(likelihoods.Normal(network(2, 3, 4), per_element=True)),
        lambda: likelihoods.Missing(likelihoods.ContinuousBernoulli(network(3)), fill=0.5),
        lambda: likelihoods.Missing(likelihoods.NegativeBinomial(network(4), 4)),
        lambda: likelihoods.Missing(likelihoods.Categorical(network(5, 4), levels=5)),
    ],
}
SIZED = {
    "Poisson": lambda: likelihoods.Poisson(network(3), size_factor=True),
    "NegativeBinomial": lambda: likelihoods.NegativeBinomial(network(3), 3, size_factor=True),
    "ZeroInflatedNegativeBinomial": lambda: likelihoods.ZeroInflatedNegativeBinomial(
        network(2, 3), 3, size_factor=True
    ),
}


def test_every_export_has_a_case():
    assert set(likelihoods.__all__) - {"Likelihood"} == set(CASES)


@pytest.mark.parametrize("make", [make for cases in CASES.values() for make in cases])
def test_every_likelihood_keeps_the_contract(make):
    check_likelihood(make().float(), torch.randn(3, 2))


@pytest.mark.parametrize("kind", list(SIZED))
def test_likelihoods_with_size_factors_keep_the_contract(kind):
    check_likelihood(SIZED[kind]().float(), torch.randn(3, 2), torch.tensor([[0.2], [1.0], [9.0]]))


class Seeing(nn.Module):
    """An encoder that sees data of a likelihood as it should."""

    def __init__(self, family, *shapes):
        super().__init__()
        self.family, self.mlp = family, MLP(shapes[0], [32], shapes[1])

    def forward(self, x):
        return self.mlp(self.family.encoded(x))


def digits(kind):
    """The digits as such data, their options of a constructor and their event shape."""
    x = data.load("digits").train.batch()[0]
    if kind in {"Categorical", "DiscretizedLogistic"}:
        x = (255 * x).round()
    if kind in {"Poisson", "NegativeBinomial", "ZeroInflatedNegativeBinomial", "Multinomial"}:
        x = (16 * x).round()
    if kind == "Missing":
        x = x.masked_fill(torch.rand_like(x) < 0.3, torch.nan)
    x = x.flatten(1) if kind == "Multinomial" else x
    return data.Data(data.Split(x[:1000]), data.Split(x[1000:]), data.Split(x[:0]))


@pytest.mark.parametrize("kind", list(CASES))
def test_every_likelihood_trains(kind):
    family = getattr(likelihoods, kind)
    rows = digits(kind).viewed(data.dynamic if kind == "Bernoulli" else data.plain)
    decoder = MLP(2, [32], family.outputs(rows.shape))
    needs_shape = kind in {"NegativeBinomial", "ZeroInflatedNegativeBinomial"}
    complete = likelihoods.Normal(decoder) if kind == "Missing" else decoder
    vae = VAE(
        priors.Normal(2),
        family(complete, *([rows.shape] if needs_shape else [])),
        posteriors.Normal(Seeing(family, rows.shape, (2, 2))),
    )
    metrics = fit(vae, rows, epochs=4, warmup=0, progress=False)
    assert metrics[-1]["elbo"] > metrics[0]["elbo"]


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
@pytest.mark.parametrize("make", [make for cases in CASES.values() for make in cases])
def test_batch_shape_is_that_of_z_in_copies_too(make, lead):
    likelihood, z = make(), torch.randn(*lead, 2).double()
    law = copy.deepcopy(likelihood)(z)
    assert law.batch_shape == lead
    assert law.mean.shape == law.sample().shape == (*lead, *law.event_shape)
    assert law.sample().dtype == law.mean.dtype == torch.float64
    x = law.sample()
    assert torch.equal(law.log_prob(x), likelihood(z).log_prob(x))
    assert likelihood(z).expand([6, *lead]).log_prob(x).shape == (6, *lead)


@pytest.mark.skipif(
    torch.__version__ < (2, 10), reason="older compilers cannot follow Distribution.expand"
)
@pytest.mark.parametrize(
    "make", [make for cases in CASES.values() for make in cases] + list(SIZED.values())
)
def test_nothing_branches_on_a_value(make):
    """One graph holds the whole density, so that a compiler and other data can use it."""
    likelihood, z = make(), torch.randn(3, 2).double()
    size = [torch.rand(3, 1) + 0.1] if getattr(likelihood, "size_factor", False) else []
    torch._dynamo.reset()
    with validation(False):
        x = likelihood(z, *size).sample()
        whole = torch.compile(
            lambda z, x, *size: likelihood(z, *size).log_prob(x), backend="eager", fullgraph=True
        )
        assert torch.allclose(whole(z, x, *size), likelihood(z, *size).log_prob(x))


def test_categorical_is_a_softmax_over_levels():
    likelihood = likelihoods.Categorical(network(5, 3), levels=5)
    x, levels = torch.randint(5, (5, 3)), np.arange(5)
    logits = likelihood.network(Z).detach().numpy()
    score = special.log_softmax(logits, 1)
    truth = np.take_along_axis(score, x.numpy()[:, None], 1)[:, 0].sum(-1)
    assert torch.allclose(likelihood(Z).log_prob(x.double()), torch.as_tensor(truth))
    each = stats.rv_discrete(values=(levels, special.softmax(logits[2, :, 1])))
    assert likelihood(Z).mean[2, 1].item() == pytest.approx(each.mean())
    assert likelihood(Z).variance[2, 1].item() == pytest.approx(each.var())


def logistic(x, loc, scale):
    """Probability that a logistic variable, rounded into 0 to 255, is x."""
    law = stats.logistic(loc, scale)
    above = np.where(x == 255, 1.0, law.cdf(x + 0.5))
    return above - np.where(x == 0, 0.0, law.cdf(x - 0.5))


@pytest.mark.parametrize("components", [1, 3])
def test_discretized_logistic_is_scipys_rounded(components):
    shape = likelihoods.DiscretizedLogistic.outputs((7,), components=components)
    likelihood = likelihoods.DiscretizedLogistic(network(*shape), components=components)
    x = torch.tensor([0.0, 1.0, 60.0, 127.0, 130.0, 254.0, 255.0]).double()
    output = likelihood.network(Z).detach().numpy().reshape(5, -1, components, 7)
    scale = 127.5 * (np.exp(-7) + 0.1 * np.exp(output[:, -1]))
    loc = 127.5 * (1 + output[:, -2])
    weight = special.softmax(output[:, 0], 1) if components > 1 else np.ones((5, 1, 7))
    truth = np.log((weight * logistic(x.numpy(), loc, scale)).sum(1)).sum(-1)
    assert torch.allclose(likelihood(Z).log_prob(x.expand(5, 7)), torch.as_tensor(truth))
    k = np.arange(256).reshape(-1, 1, 1, 1)
    mean = (weight * (k * logistic(k, loc, scale)).sum(0)).sum(1)
    assert torch.allclose(likelihood(Z).mean, torch.as_tensor(mean))


@pytest.mark.parametrize("components", [1, 2])
@pytest.mark.parametrize("reach", [0.5, 3.0, 1e3, 1e6])
def test_discretized_logistic_is_whole_and_has_gradients_at_extremes(components, reach):
    shape = likelihoods.DiscretizedLogistic.outputs((500,), components=components)
    likelihood = likelihoods.DiscretizedLogistic(nn.Unflatten(-1, shape), components=components)
    # Locations and scales apart: narrow ones close to the range are as extreme as wide ones.
    loc, log_scale = (reach * torch.randn(components, 500) for _ in range(2))
    logits = torch.randn(components, 500) if components > 1 else torch.empty(0, 500)
    output = torch.cat([logits, loc / 10, log_scale]).flatten()[None].requires_grad_()
    law = likelihood(output).base_dist
    levels = torch.arange(256.0)[:, None, None]
    scores = law.log_prob(levels.expand(256, 1, 500))
    assert scores.isfinite().all()
    assert (scores.double().exp().sum(0) - 1).abs().max() < 1e-6
    assert torch.autograd.grad(scores.sum(), output)[0].isfinite().all()


def test_poisson_is_scipys_with_and_without_size_factors():
    likelihood, x = likelihoods.Poisson(network(3, 2)), torch.randint(9, (5, 3, 2)).double()
    mean, size = likelihood.network(Z).exp().detach().numpy(), torch.arange(1.0, 6.0)[:, None]
    truth = stats.poisson(mean).logpmf(x.numpy()).sum((1, 2))
    assert torch.allclose(likelihood(Z).log_prob(x), torch.as_tensor(truth))
    sized = likelihoods.Poisson(likelihood.network, size_factor=True)
    truth = stats.poisson(mean * size.numpy()[..., None]).logpmf(x.numpy()).sum((1, 2))
    assert torch.allclose(sized(Z, size).log_prob(x), torch.as_tensor(truth))
    assert torch.allclose(sized(torch.stack([Z, Z]), size).log_prob(x)[1], torch.as_tensor(truth))


def test_a_mean_that_underflows_has_a_gradient():
    output = torch.full((1, 3), -200.0, requires_grad=True)
    score = likelihoods.Poisson(nn.Identity())(output).log_prob(torch.tensor([0.0, 1.0, 2.0]))
    assert score.isfinite()
    assert torch.autograd.grad(score.sum(), output)[0].isfinite().all()


@pytest.mark.parametrize("dispersion", [0.3, 50.0, 99.9, 100.1, 1e4, 1e7])
def test_negative_binomial_is_scipys(dispersion):
    likelihood = likelihoods.NegativeBinomial(network(3), 3, size_factor=True)
    likelihood.double()
    nn.init.constant_(likelihood.log_dispersion, np.log(dispersion))
    x, size = torch.randint(50, (5, 3)).double(), torch.arange(1.0, 6.0).double()[:, None]
    mean = (likelihood.network(Z).exp() * size).detach().numpy()
    oracle = stats.nbinom(dispersion, dispersion / (dispersion + mean))
    law = likelihood(Z, size)
    truth = torch.as_tensor(oracle.logpmf(x.numpy()).sum(-1))
    # At 1e7 it is SciPy that cancels digits.
    assert torch.allclose(law.log_prob(x), truth, rtol=1e-8 if dispersion < 1e5 else 1e-5)
    assert torch.allclose(law.mean, torch.as_tensor(mean))
    assert torch.allclose(law.variance, torch.as_tensor(mean + mean**2 / dispersion))


@pytest.mark.parametrize("dispersion", [1.0, 1e3, 1e5, 1e7])
def test_negative_binomial_keeps_its_digits_in_single_precision(dispersion):
    likelihood = likelihoods.NegativeBinomial(nn.Identity(), 40)
    nn.init.constant_(likelihood.log_dispersion, np.log(dispersion))
    x, z = torch.arange(40.0), torch.full((40,), 1.5)
    double = likelihoods.NegativeBinomial(nn.Identity(), 40).double()
    double.load_state_dict(likelihood.state_dict())
    single, truth = likelihood(z).base_dist.log_prob(x), double(z.double()).base_dist.log_prob(x)
    # Some 1e-7 of the sums of size 200 that make it up; torch's own is off by 0.1 at 1e5.
    assert torch.allclose(single.double(), truth, atol=1e-4)


def test_zero_inflated_negative_binomial_is_a_mixture_of_scipys():
    likelihood = likelihoods.ZeroInflatedNegativeBinomial(network(2, 3), 3, size_factor=True)
    likelihood.double()
    nn.init.constant_(likelihood.log_dispersion, np.log(2.5))
    x, size = torch.randint(4, (5, 3)).double(), torch.arange(1.0, 6.0).double()[:, None]
    output = likelihood.network(Z).detach().numpy()
    mean, gate = np.exp(output[:, 0]) * size.numpy(), special.expit(output[:, 1])
    mass = (1 - gate) * stats.nbinom(2.5, 2.5 / (2.5 + mean)).pmf(x.numpy())
    truth = np.log(mass + gate * (x.numpy() == 0)).sum(-1)
    assert torch.allclose(likelihood(Z, size).log_prob(x), torch.as_tensor(truth))
    assert torch.allclose(likelihood(Z, size).mean, torch.as_tensor((1 - gate) * mean))


@pytest.mark.parametrize("kind", list(SIZED))
def test_size_factors_are_the_last_context_and_positive(kind):
    likelihood = SIZED[kind]()
    with pytest.raises(ValueError, match=rf"a {kind} with a size factor .* and got none"):
        likelihood(Z)
    with pytest.raises(ValueError, match=r"last context \(N, 1\), and got \(5, 3\)"):
        likelihood(Z, torch.ones(5, 1), torch.ones(5, 3))
    for wrong in (0.0, -1.0, torch.nan):
        with validation(False):
            score = likelihood(Z, torch.full((5, 1), wrong)).log_prob(torch.zeros(5, 3))
        assert score.isnan().all()
    family = type(likelihood)
    assert (family.features(3, size_factor=True), family.features(3), family.features(0)) == (
        (2, 3, 0)
    )
    with pytest.raises(ValueError, match="and got none"):
        family.features(0, size_factor=True)
    with pytest.raises(TypeError, match="the mean depends on the size"):
        likelihood.link(torch.ones(3))


def test_a_zero_inflation_near_one_is_scored_in_full_after_a_draw():
    likelihood = likelihoods.ZeroInflatedNegativeBinomial(nn.Unflatten(-1, (2, 1)), 1)
    law = likelihood(torch.tensor([0.0, 100.0])).base_dist  # a gate of 1 - 4e-44, mean 1
    assert law.sample() == 0
    assert law.expand([3]).log_prob(torch.tensor(1.0))[0].item() == pytest.approx(
        -100 + stats.nbinom(1, 0.5).logpmf(1)
    )


def test_the_decoder_gets_the_context_before_the_size_factor():
    decoder = MLP(2, [], 3, context=2)
    likelihood = likelihoods.Poisson(decoder, size_factor=True)
    z, labels, size = torch.randn(5, 2), torch.eye(2)[[0, 1, 0, 1, 1]], torch.full((5, 1), 7.0)
    truth = 7 * decoder(z, labels).exp()
    assert torch.allclose(likelihood(z, labels, size).mean, truth)


def documents(words, length):
    """All bags of so many words."""
    bags = itertools.product(range(length + 1), repeat=words)
    return torch.tensor([bag for bag in bags if sum(bag) == length]).double()


@pytest.mark.parametrize("length", [1, 2, 5, 11])
def test_multinomial_is_scipys_and_sums_to_one_at_any_length(length):
    likelihood = likelihoods.Multinomial(network(4), length=3)
    x, probability = documents(4, length), likelihood.network(Z).softmax(-1).detach()
    scores = likelihood(Z).log_prob(x[:, None])
    assert torch.allclose(scores.exp().sum(0), torch.ones(5).double())
    truth = stats.multinomial(length, probability[2].numpy()).logpmf(x.numpy())
    assert torch.allclose(scores[:, 2], torch.as_tensor(truth))
    assert torch.allclose(likelihood(Z).mean, 3 * probability)
    assert (likelihood(Z).sample((7,)).sum(-1) == 3).all()


def test_a_multinomial_is_over_one_vector():
    with pytest.raises(ValueError, match=r"over one vector of counts, .* \(3, 4\): flatten"):
        likelihoods.Multinomial(network(3, 4))(Z)


@pytest.mark.parametrize(
    ("likelihood", "wrong"),
    [
        (lambda: likelihoods.Categorical(network(5, 2), levels=5), [5.0, 1.0]),
        (lambda: likelihoods.Categorical(network(256, 2)), [0.5, 1.0]),
        (lambda: likelihoods.DiscretizedLogistic(network(2, 2)), [256.0, 0.0]),
        (lambda: likelihoods.DiscretizedLogistic(network(6, 2), components=2), [0.1, 0.0]),
        (lambda: likelihoods.Poisson(network(2)), [-1.0, 0.0]),
        (lambda: likelihoods.NegativeBinomial(network(2), 2), [0.5, 0.0]),
        (lambda: likelihoods.ZeroInflatedNegativeBinomial(network(2, 2), 2), [-1.0, 0.0]),
        (lambda: likelihoods.Multinomial(network(2)), [0.0, 0.0]),
        (lambda: likelihoods.Multinomial(network(2)), [1.0, 0.5]),
        (lambda: likelihoods.Multinomial(network(2)), [2.0, -1.0]),
        (lambda: likelihoods.Poisson(network(2)), [torch.nan, 0.0]),
        (lambda: likelihoods.Missing(likelihoods.Poisson(network(2))), [torch.nan, 0.5]),
    ],
)
def test_data_outside_the_support_are_refused(likelihood, wrong):
    posterior = posteriors.Normal(Seeing(likelihoods.Missing, 2, (2, 2)))
    vae = VAE(priors.Normal(2), likelihood().float(), posterior)
    x = torch.ones(4, 2)
    check_pair(vae, x)
    x[0] = torch.tensor(wrong)
    with pytest.raises(ValueError, match="lie outside the support of"):
        check_pair(vae, x)


def test_supports_say_what_they_hold():
    counts = likelihoods.Multinomial(network(3))(Z).support
    assert str(counts) == "vectors of whole numbers from 0, at least one of them positive"
    missing = likelihoods.Missing(likelihoods.Poisson(network(3)))(Z).support
    assert str(elementary(missing)).endswith("or NaN where it is missing")
    assert missing.is_discrete


HOLES = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 0]]).bool()


def test_missing_is_the_marginal_of_what_was_observed():
    """Against a joint normal, whose marginal SciPy gives by dropping rows of the covariance."""
    likelihood = likelihoods.Missing(likelihoods.Normal(network(3), scale=0.7))
    x, loc = torch.randn(5, 3).double(), likelihood.network(Z).detach().numpy()
    scores = likelihood(Z).log_prob(x.masked_fill(HOLES, torch.nan))
    for row, hole, m, score in zip(x.numpy(), HOLES.numpy(), loc, scores, strict=True):
        seen = ~hole
        law = (
            stats.multivariate_normal(m[seen], 0.49 * np.eye(3)[seen][:, seen])
            if any(seen)
            else None
        )
        assert score.item() == pytest.approx(law.logpdf(row[seen]) if law else 0.0)


def test_missing_counts_are_summed_out():
    """The sum over all values of the missing element, the others as observed."""
    likelihood = likelihoods.Missing(likelihoods.NegativeBinomial(network(2), 2).double())
    every = torch.stack([torch.full((900,), 3.0), torch.arange(900.0)], -1).double()[:, None]
    total = likelihood(Z).log_prob(every).logsumexp(0)
    assert torch.allclose(total, likelihood(Z).log_prob(torch.tensor([3.0, torch.nan])))


@pytest.mark.parametrize("particles", [(), (4,)])
def test_gradients_are_finite_and_those_of_the_observed_elements_alone(particles):
    complete = likelihoods.Normal(network(2, 3), per_element=True)
    x, z = torch.randn(5, 3).double(), Z.expand(*particles, 5, 2)
    missing = likelihoods.Missing(complete)(z).log_prob(x.masked_fill(HOLES, torch.nan))
    alone = complete(z).base_dist.log_prob(x)[..., ~HOLES]
    assert torch.allclose(missing.sum(), alone.sum())
    parameters = list(complete.parameters())
    given, truth = (torch.autograd.grad(each.sum(), parameters) for each in (missing, alone))
    for one, other in zip(given, truth, strict=True):
        assert one.isfinite().all()
        assert torch.allclose(one, other)


def test_missing_has_each_weight_once_and_is_otherwise_its_likelihood():
    complete = likelihoods.Bernoulli(network(3), greyscale=True)
    missing = likelihoods.Missing(complete)
    assert list(missing.state_dict()) == [f"likelihood.{key}" for key in complete.state_dict()]
    assert missing.network is complete.network
    assert missing.unit == complete.unit
    twin = copy.deepcopy(missing)
    assert twin.network is twin.likelihood.network is not complete.network
    mean = torch.tensor([0.1, 0.5, 0.7]).double()
    nn.init.zeros_(complete.network.last.weight)
    missing.centre(mean)
    assert torch.allclose(missing(Z).mean, mean.expand(5, 3))
    seen = likelihoods.Missing.encoded(torch.tensor([torch.nan, 2.0]))
    assert torch.equal(seen, torch.tensor([0.0, 2.0]))


def test_missing_draws_through_the_path_where_its_likelihood_does():
    missing = likelihoods.Missing(likelihoods.Normal(network(3), scale=0.5))
    torch.manual_seed(0)
    draw = missing(Z).rsample()
    torch.manual_seed(0)
    assert torch.equal(draw, missing.likelihood(Z).rsample())
    assert missing(Z).has_rsample
    assert not likelihoods.Missing(likelihoods.Poisson(network(3)))(Z).has_rsample


def test_missing_refuses_dependent_elements():
    with pytest.raises(TypeError, match="those of a Multinomial are not independent given z"):
        likelihoods.Missing(likelihoods.Multinomial(network(3)))(Z)
    with pytest.raises(ValueError, match="is finite, not nan"):
        likelihoods.Missing(likelihoods.Normal(network(3)), fill=torch.nan)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: likelihoods.Categorical(network(1, 3), levels=1), "at least 2 levels, not 1"),
        (lambda: likelihoods.DiscretizedLogistic(network(3), components=0), "1 component, not 0"),
        (lambda: likelihoods.Multinomial(network(3), length=0), "at least 1 word, not 0"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "output"),
    [
        (likelihoods.Poisson, (3,)),
        (lambda decoder: likelihoods.NegativeBinomial(decoder, 3), (3,)),
        (lambda decoder: likelihoods.ZeroInflatedNegativeBinomial(decoder, 3), (2, 3)),
        (lambda decoder: likelihoods.Multinomial(decoder, length=113), (3,)),
        (likelihoods.DiscretizedLogistic, (2, 3)),
        (lambda decoder: likelihoods.Missing(likelihoods.Poisson(decoder)), (3,)),
    ],
)
def test_centred_counts_start_at_the_mean(make, output):
    decoder, mean = network(*output), torch.tensor([70.0, 42.5, 0.5]).double()
    mean = mean + 90 * (make is likelihoods.DiscretizedLogistic)
    nn.init.zeros_(decoder.last.weight)
    centred = make(decoder).double()
    centred.centre(mean)
    # The logistic's tails lie outside the range by exp(-90 / 13) of its mass.
    assert torch.allclose(centred(Z).mean, mean.expand(5, 3), rtol=1e-3)


@pytest.mark.parametrize(
    ("family", "x", "seen"),
    [
        (likelihoods.Bernoulli, [0.0, 1.0], [0.0, 1.0]),
        (likelihoods.Categorical, [0.0, 255.0], [-1.0, 1.0]),
        (likelihoods.DiscretizedLogistic, [0.0, 255.0], [-1.0, 1.0]),
        (likelihoods.Poisson, [0.0, np.e - 1], [0.0, 1.0]),
        (likelihoods.NegativeBinomial, [0.0, np.e - 1], [0.0, 1.0]),
        (likelihoods.ZeroInflatedNegativeBinomial, [0.0, np.e - 1], [0.0, 1.0]),
        (likelihoods.Multinomial, [0.0, np.e - 1], [0.0, 1.0]),
    ],
)
def test_encoders_see_data_on_a_scale_around_one(family, x, seen):
    assert torch.allclose(family.encoded(torch.tensor(x)), torch.tensor(seen))


TOO_WIDE = {
    "Normal": (
        lambda decoder: likelihoods.Normal(decoder, per_element=True),
        r"takes \(2, \*shape\) .* got \(4, 3\): .* Normal\.outputs\(shape, per_element=True\)",
    ),
    "Categorical": (
        lambda decoder: likelihoods.Categorical(decoder, levels=17),
        r"takes \(17, \*shape\) .* got \(4, 3\): .* Categorical\.outputs\(shape, levels=17\)",
    ),
    "one logistic": (
        likelihoods.DiscretizedLogistic,
        r"a DiscretizedLogistic takes \(2, \*shape\) .* got \(4, 3\): .*, components=1\)",
    ),
    "five logistics": (
        lambda decoder: likelihoods.DiscretizedLogistic(decoder, components=5),
        r"a DiscretizedLogistic takes \(15, \*shape\) .* got \(4, 3\): .*, components=5\)",
    ),
    "dispersion": (
        lambda decoder: likelihoods.NegativeBinomial(decoder, 3),
        r"of data of shape \(3,\), and its decoder gives log means of shape \(4, 3\)",
    ),
    "zeros": (
        lambda decoder: likelihoods.ZeroInflatedNegativeBinomial(decoder, 3),
        r"takes \(2, \*shape\) .* got \(4, 3\): .* ZeroInflatedNegativeBinomial\.outputs\(shape\)",
    ),
}


@pytest.mark.parametrize("kind", list(TOO_WIDE))
@pytest.mark.parametrize("leading", [(), (5,), (2, 5)])
def test_a_decoder_of_another_width_is_refused_in_a_sentence(kind, leading):
    make, message = TOO_WIDE[kind]
    with pytest.raises(ValueError, match=message):
        make(MLP(2, [], (4, 3)))(torch.zeros(*leading, 2))
