"""Hierarchies against the closed form of a linear-Gaussian chain."""

import copy

import pyro
import pytest
import torch
from pyro.distributions import Normal
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO, TraceMeanField_ELBO
from scipy import stats

from pyro_vae import MLP, HierarchicalVAE, bound, fit, likelihoods, posteriors, priors
from pyro_vae.objectives import IWAE, BetaELBO, FreeBits
from pyro_vae.testing import check_pair

FALSE_ALARM = 1e-3


def linear(*, bottom_up=False):
    """z1 in 2 dimensions, z2 in 3, x in 4, all maps linear, the guide wide."""
    if bottom_up:
        guides = [posteriors.Normal(MLP(3, [], (2, 2))), posteriors.Normal(MLP(4, [], (2, 3)))]
    else:
        guides = [
            posteriors.Normal(MLP(4, [], (2, 2))),
            posteriors.Normal(MLP(4, [], (2, 3), context=2)),
        ]
    with torch.no_grad():
        for guide in guides:
            guide.network.last.weight.mul_(0.2)
            guide.network.last.bias.copy_(
                torch.tensor([0.0, 0.2]).repeat_interleave(len(guide.network.last.bias) // 2)
            )
    return HierarchicalVAE(
        [priors.Normal(2), posteriors.Normal(MLP(2, [], (2, 3)))],
        likelihoods.Normal(MLP(3, [], 4), scale=0.5),
        guides,
        bottom_up=bottom_up,
    )


def gaussian(vae):
    """Mean and covariance of x when every conditional is linear with constant scale."""
    conditional, decoder = vae.priors[1].network.last, vae.likelihood.network.last
    weight, bias = conditional.weight.detach(), conditional.bias.detach()
    with torch.no_grad():
        conditional.weight[3:] = 0  # the log scale depends on nothing
    scale = bias[3:].exp()
    covariance = weight[:3] @ weight[:3].T + torch.diag(scale**2)
    mean = bias[:3]
    outer = decoder.weight.detach()
    return outer @ mean + decoder.bias.detach(), outer @ covariance @ outer.T + 0.25 * torch.eye(4)


@pytest.mark.parametrize("bottom_up", [False, True])
def test_many_particles_reach_the_exact_likelihood(bottom_up):
    vae = linear(bottom_up=bottom_up).double()
    mean, covariance = gaussian(vae)
    x = torch.randn(6, 4).double() / 2
    truth = stats.multivariate_normal(mean, covariance).logpdf(x).sum()
    values = [-IWAE(4000).loss(vae.model, vae.guide, x) for _ in range(30)]
    one = -IWAE(1).loss(vae.model, vae.guide, x)
    assert one < truth - 0.5
    # Of six data; the bias, half the relative variance of the average, shows in the spread.
    error = stats.sem(values) * stats.t.isf(FALSE_ALARM / 2, 29) + torch.tensor(values).var() / 2
    assert sum(values) / 30 == pytest.approx(truth, abs=float(error))
    assert error < 0.1


@pytest.mark.parametrize("bottom_up", [False, True])
def test_samples_follow_the_model(bottom_up):
    vae = linear(bottom_up=bottom_up)
    mean, covariance = gaussian(vae.double())
    vae.float()
    for x in (vae.sample(4000), vae.model(size=4000).detach()):
        for d in range(4):
            law = stats.norm(float(mean[d]), float(covariance[d, d]) ** 0.5)
            assert stats.kstest(x[:, d], law.cdf).pvalue > FALSE_ALARM / 8


def losses(objective, vae, x):
    """Of 700 draws, the same for every objective."""
    values = []
    for seed in range(700):
        pyro.set_rng_seed(seed)
        values.append(objective.loss(vae.model, vae.guide, x))
    return values


@pytest.mark.parametrize("analytic", [TraceMeanField_ELBO(), FreeBits(0.0)])
def test_sampled_and_analytic_kl_agree(analytic):
    vae, x = linear().double(), torch.randn(5, 4).double()
    sampled, exact = losses(Trace_ELBO(), vae, x), losses(analytic, vae, x)
    assert stats.ttest_rel(sampled, exact).pvalue > FALSE_ALARM


def test_no_kl_is_taken_where_the_guide_goes_the_other_way():
    # KL(q(z2|x) || p(z2|z1)) at a z1 that was drawn from z2 is no term of the bound.
    vae, x = linear(bottom_up=True).double(), torch.randn(5, 4).double()
    with torch.no_grad():  # z1 follows z2 in the guide, and z2 follows z1 in the model
        for network in (vae.posteriors[0].network, vae.priors[1].network):
            network.last.weight.zero_()
            network.last.weight[: len(network.last.weight) // 2] = 0.5
    sampled, free = losses(Trace_ELBO(), vae, x), losses(FreeBits(0.0), vae, x)
    assert stats.ttest_rel(sampled, free).pvalue > FALSE_ALARM
    with pytest.warns(UserWarning, match="mean field restriction"):
        wrong = losses(TraceMeanField_ELBO(), vae, x)
    assert stats.ttest_rel(sampled, wrong).pvalue < 1e-6  # what this test would miss otherwise


def deep(shape, *, bottom_up=False):
    """Three layers on digits."""
    sizes = [2, 4, 6]
    conditionals = [posteriors.Normal(MLP(a, [16], (2, b))) for a, b in ((2, 4), (4, 6))]
    if bottom_up:
        below = [posteriors.Normal(MLP(a, [16], (2, b))) for a, b in ((4, 2), (6, 4))]
        guides = [*below, posteriors.Normal(MLP(shape, [32], (2, 6)))]
    else:
        above = [0, 2, 4]
        guides = [
            posteriors.Normal(MLP(shape, [32], (2, size), context=context))
            for size, context in zip(sizes, above, strict=True)
        ]
    likelihood = likelihoods.Bernoulli(MLP(6, [32], shape))
    layers = [priors.Normal(2), *conditionals]
    return HierarchicalVAE(layers, likelihood, guides, bottom_up=bottom_up)


@pytest.mark.parametrize("objective", [None, BetaELBO(2.0), IWAE(3, doubly_reparameterised=True)])
@pytest.mark.parametrize("bottom_up", [False, True])
def test_three_layers_train(bottom_up, objective, digits):
    vae = deep(digits.shape, bottom_up=bottom_up)
    rows = fit(vae, digits, objective=objective, epochs=4, warmup=0.2, progress=False)
    assert rows[-1]["elbo"] > rows[0]["elbo"]
    x = digits.test.batch()[0][:5]
    assert vae.reconstruct(x).shape == vae.sample(5, mean=True).shape == x.shape
    check_pair(copy.deepcopy(vae), x)


def test_context_reaches_every_part():
    vae = HierarchicalVAE(
        [
            priors.Flow(2, context=3, transforms=1),
            posteriors.Normal(MLP(2, [], (2, 3), context=3)),
        ],
        likelihoods.Normal(MLP(3, [], 4, context=3)),
        [
            posteriors.Normal(MLP(4, [], (2, 2), context=3)),
            posteriors.Normal(MLP(4, [], (2, 3), context=5)),
        ],
    )
    x, label = torch.randn(5, 4), torch.eye(3)[torch.arange(5) % 3]
    check_pair(vae, x, label)
    assert vae.sample(5, label).shape == vae.reconstruct(x, label).shape == (5, 4)
    assert bound(vae, [(x, label)]).elbo.shape == (5,)


def test_the_top_layer_may_have_a_vamp_prior(digits):
    vae = deep(digits.shape)
    vae.priors[0] = priors.VampPrior(vae.posteriors[0], digits.train.batch()[0], components=10)
    rows = fit(vae, digits, epochs=2, progress=False)
    assert rows[-1]["elbo"] > rows[0]["elbo"]


@pytest.mark.parametrize("mean", [False, True])
def test_a_layer_that_ignores_the_one_above_is_drawn_for_each_datum(mean):
    class Alone(priors.Prior):
        def forward(self, z, *context):
            return Normal(torch.full([3], 2.0), 0.1).to_event(1)

    vae = linear()
    vae.priors[1] = Alone()
    assert vae.sample(7, mean=mean).shape == (7, 4)
    outer = vae.likelihood.network.last
    scores = (vae.sample(4000, mean=True) - outer(torch.full([3], 2.0))) / 0.1
    truth = outer.weight.detach().square().sum(-1).sqrt()
    for column, scale in zip(scores.detach().T, truth, strict=True):
        assert stats.kstest(column / float(scale), "norm").pvalue > FALSE_ALARM / 8


def test_a_prior_made_of_a_foreign_posterior_is_refused():
    vae, foreign = linear(), posteriors.Normal(MLP(4, [], (2, 2)))
    prior = priors.VampPrior(foreign, torch.randn(20, 4), components=5)
    parts = [prior, vae.priors[1]], vae.likelihood, list(vae.posteriors)
    with pytest.raises(ValueError, match="VampPrior is made of another posterior than the VAE's"):
        HierarchicalVAE(*parts)
    own = HierarchicalVAE(*parts[:2], [foreign, vae.posteriors[1]])
    check_pair(own, torch.randn(5, 4))
    check_pair(copy.deepcopy(own), torch.randn(5, 4))
    vae.priors[0] = prior
    with pytest.raises(ValueError, match="VampPrior is made of another posterior than the VAE's"):
        check_pair(vae, torch.randn(5, 4))


def test_it_is_plain_pyro():
    vae, x = linear(), torch.randn(3, 4)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    losses = [svi.step(x) for _ in range(200)]
    assert sum(losses[-20:]) < sum(losses[:20])
    mcmc = MCMC(NUTS(vae.model), num_samples=20, warmup_steps=20, disable_progbar=True)
    mcmc.run(x)
    assert mcmc.get_samples()["z2"].shape == (20, 3, 3)


def test_layers_without_partner_are_refused():
    likelihood = likelihoods.Normal(MLP(2, [], 4))
    with pytest.raises(ValueError, match="there are 0 priors and 0 posteriors"):
        HierarchicalVAE([], likelihood, [])
    with pytest.raises(ValueError, match="there are 2 priors and 1 posteriors"):
        HierarchicalVAE([priors.Normal(2)] * 2, likelihood, [priors.Normal(2)])
    with pytest.raises(TypeError, match=r"prior of z1 must be a torch.nn.Module, not a float"):
        HierarchicalVAE([0.5], likelihood, [priors.Normal(2)])


def test_an_objective_that_takes_the_order_for_granted_is_refused(digits):
    vae = deep(digits.shape, bottom_up=True)
    with pytest.raises(ValueError, match="TraceMeanField_ELBO cannot train this model and guide"):
        fit(vae, digits, objective=TraceMeanField_ELBO(), epochs=1, progress=False)
