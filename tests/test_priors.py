"""Priors against the contract, and against SciPy's densities."""

import copy
import math

import numpy as np
import pytest
import torch
import zuko
from scipy import special, stats
from torch import nn

from pyro_vae import MLP, VAE, fit, likelihoods, posteriors, priors
from pyro_vae.testing import check_prior


def vamp(family, **options):
    posterior = family(MLP(4, [8], family.outputs(3)), **options)
    return priors.VampPrior(posterior, torch.randn(40, 4), components=7)


CASES = {
    "Normal": [lambda: priors.Normal(3), lambda: priors.Normal(3, learned=True)],
    "Laplace": [lambda: priors.Laplace(3, scale=0.5)],
    "StudentT": [lambda: priors.StudentT(2, df=4.0, scale=2.0)],
    "MixtureOfNormals": [
        lambda: priors.MixtureOfNormals(3, components=5),
        lambda: priors.MixtureOfNormals(1, components=1),
    ],
    "Flow": [lambda: priors.Flow(2, transforms=2, hidden=[16])],
    "VampPrior": [
        lambda: vamp(posteriors.Normal),
        lambda: vamp(posteriors.FullRankNormal),
        lambda: vamp(posteriors.LowRankNormal),
        lambda: vamp(posteriors.Flow, latent=3, hidden=[8]),
    ],
    "zuko": [lambda: zuko.flows.MAF(3, transforms=2), lambda: zuko.flows.GMM(2, components=4)],
}


def test_every_export_has_a_case():
    assert set(priors.__all__) - {"Prior"} == set(CASES) - {"zuko"}


@pytest.mark.parametrize("make", [make for cases in CASES.values() for make in cases])
def test_every_prior_keeps_the_contract(make):
    check_prior(make())


def test_a_conditional_flow_keeps_the_contract():
    check_prior(priors.Flow(2, context=3, transforms=2, hidden=[16]), torch.randn(2, 3))


def test_contexts_of_a_flow_may_have_unlike_batches():
    """A latent above has a dimension for particles, which what a datum brings has not."""
    flow, above, given = priors.Flow(1, context=5), torch.randn(4, 3, 2), torch.randn(3, 3)
    z = torch.randn(4, 3, 1)
    scores = [flow(each, given).log_prob(part) for each, part in zip(above, z, strict=True)]
    torch.testing.assert_close(flow(above, given).log_prob(z), torch.stack(scores))


@pytest.mark.parametrize("kind", list(CASES))
def test_every_prior_trains(kind, digits):
    likelihood = likelihoods.Bernoulli(MLP(3, [32], digits.shape))
    posterior = posteriors.Normal(MLP(digits.shape, [32], (2, 3)))
    if kind == "VampPrior":
        prior = priors.VampPrior(posterior, digits.train.batch()[0], components=20)
    else:
        prior = zuko.flows.NSF(3, transforms=1) if kind == "zuko" else getattr(priors, kind)(3)
    vae = VAE(prior, likelihood, posterior)
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


def network(*normalisation):
    hidden = MLP(4, [8], (2, 3))
    hidden.hidden = nn.Sequential(nn.Linear(4, 8), *normalisation)
    return posteriors.Normal(hidden)


@pytest.mark.parametrize(
    ("kind", "spread"), [("Normal", 0.01), ("Normal", 1.0), ("FullRankNormal", 1.0)]
)
def test_vamp_prior_is_the_mean_of_posterior_densities(kind, spread):
    # Narrow components are where squares multiplied out would lose their digits.
    prior = vamp(getattr(posteriors, kind))
    with torch.no_grad():
        for parameter in prior.posterior.parameters():
            parameter.mul_(3)
        prior.posterior.network.last.bias.add_(math.log(spread))
    prior.double()
    law = prior.posterior(prior.pseudo_inputs)
    loc, covariance = law.mean.detach(), torch.stack([torch.eye(3)] * 7)
    if kind == "Normal":
        covariance = torch.diag_embed(law.variance.detach())
    else:
        covariance = law.covariance_matrix.detach()
    laws = zip(loc, covariance, strict=True)
    each = np.stack([stats.multivariate_normal(m, c).logpdf(Z) for m, c in laws])
    truth = torch.as_tensor(special.logsumexp(each, 0) - math.log(7))
    assert torch.allclose(prior().log_prob(Z), truth)
    # Single precision enters by its inputs only: relative error 1e-7 of squares of a distance.
    assert torch.allclose(prior.float()().log_prob(Z.float()).double(), truth, rtol=1e-4)


def test_vamp_prior_draws_each_component_alike():
    prior = vamp(posteriors.Normal)
    with torch.no_grad():  # far apart, so that a draw tells its component
        prior.posterior.network.last.bias.sub_(torch.tensor([0.0] * 3 + [6.0] * 3))
    z = prior().sample((7000,))
    loc = prior.posterior(prior.pseudo_inputs).mean
    nearest = torch.cdist(z, loc).argmin(1).bincount(minlength=7)
    assert stats.chisquare(nearest.numpy()).pvalue > 1e-3  # the false-alarm rate


def test_vamp_prior_shares_the_weights_and_trains_the_encoder():
    prior = vamp(posteriors.Normal)
    vae = VAE(prior, likelihoods.Normal(MLP(3, [8], 4)), prior.posterior)
    assert [name for name in vae.state_dict() if "pseudo" in name] == ["prior.pseudo_inputs"]
    assert len(vae.state_dict()) == len({each.data_ptr() for each in vae.state_dict().values()})
    prior().log_prob(torch.zeros(3)).backward()
    assert vae.posterior.network.last.weight.grad.abs().sum() > 0


def test_a_copied_vae_has_a_vamp_prior_of_its_own_posterior():
    prior = vamp(posteriors.Normal)
    vae = VAE(prior, likelihoods.Normal(MLP(3, [8], 4)), prior.posterior)
    twin = copy.deepcopy(vae)
    assert twin.prior.posterior is twin.posterior is not vae.posterior


def test_pseudo_inputs_go_on_learning_at_the_ends_of_their_range():
    """All begin there, and the first step takes half of them over it."""
    data = (torch.rand(40, 4) > 0.5).float()
    prior = priors.VampPrior(network(), data, components=7)
    optimizer = torch.optim.Adam([prior.pseudo_inputs], lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        (-prior().log_prob(torch.zeros(3))).backward()
        assert (prior.pseudo_inputs.grad != 0).all()
        optimizer.step()
    inputs = prior.pseudo_inputs
    beyond = (inputs < 0) | (inputs > 1)
    assert beyond.any()
    inside = torch.where(inputs < 0, -inputs, torch.where(inputs > 1, 2 - inputs, inputs))
    truth = prior.posterior(inside).log_prob(torch.zeros(3)).logsumexp(0) - math.log(7)
    torch.testing.assert_close(prior().log_prob(torch.zeros(3)), truth)


def test_pseudo_inputs_leave_batch_norm_and_dropout_alone():
    posterior = network(nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU())
    prior = priors.VampPrior(posterior, torch.randn(40, 4), components=7)
    statistics = posterior.network.hidden[1].running_mean.clone()
    first, second = prior().log_prob(torch.zeros(3)), prior().log_prob(torch.zeros(3))
    assert torch.equal(first, second)
    assert torch.equal(statistics, posterior.network.hidden[1].running_mean)
    assert posterior.network.hidden[2].training


def test_pseudo_inputs_are_encoded_once_in_evaluation():
    prior, calls = vamp(posteriors.Normal), []
    prior.posterior.network.register_forward_hook(lambda *_: calls.append(1))
    prior.eval()
    with torch.no_grad():
        before = [prior().log_prob(torch.zeros(3)) for _ in range(3)][-1]
        assert len(calls) == 1
        prior.posterior.network.last.bias.add_(1)
        after = prior().log_prob(torch.zeros(3))
        prior.load_state_dict({**prior.state_dict(), "pseudo_inputs": torch.zeros(7, 4)})
        last = prior().log_prob(torch.zeros(3))
    assert len({float(before), float(after), float(last)}) == len(calls) == 3


def written(module):
    for parameter in module.parameters():
        parameter.data.mul_(0.5)


def averaged(module):
    average = torch.optim.swa_utils.AveragedModel(copy.deepcopy(module))
    written(average)
    for parameter, mean in zip(module.parameters(), average.module.parameters(), strict=True):
        parameter.data.copy_(mean)


def normalised(module):
    module.network.hidden[1].running_mean.data.fill_(3.0)


def sharper(module):
    module.network.hidden[2].negative_slope = 0.5


def replaced(module):
    module.network.hidden[2] = nn.Tanh()


def assigned(module):
    state = {name: value.clone() for name, value in module.state_dict().items()}
    state["network.last.bias"] += 1
    module.load_state_dict(state, assign=True)


@pytest.mark.parametrize("change", [written, averaged, normalised, sharper, replaced, assigned])
def test_what_is_kept_in_evaluation_never_grows_stale(change):
    posterior = network(nn.BatchNorm1d(8), nn.LeakyReLU(0.1))
    prior = priors.VampPrior(posterior, torch.randn(40, 4), components=7).eval()
    with torch.no_grad():
        before = prior().log_prob(torch.zeros(3))
        change(prior.posterior.eval())
        after, fresh = prior(), copy.deepcopy(prior)
        fresh._encoded = None
        assert torch.equal(after.log_prob(torch.zeros(3)), fresh().log_prob(torch.zeros(3)))
        assert before != after.log_prob(torch.zeros(3))
        prior.pseudo_inputs.data.zero_()
        assert not torch.equal(prior().components.mean, after.components.mean)


def test_a_posterior_of_another_prior_is_refused():
    prior = vamp(posteriors.Normal)
    likelihood = likelihoods.Normal(MLP(3, [8], 4))
    with pytest.raises(ValueError, match="another posterior than the VAE's"):
        VAE(prior, likelihood, network())
    vae, other = VAE(prior, likelihood, prior.posterior), network()
    with pytest.raises(ValueError, match="set the prior before the posterior"):
        vae.posterior = other
    vae.prior = priors.VampPrior(other, torch.randn(40, 4), components=3)
    vae.posterior = other
    assert vae.prior.posterior is vae.posterior


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
        (lambda: priors.Normal(2.5), "latent of a prior must be a whole number, not 2.5"),
        (lambda: priors.MixtureOfNormals(2, components=2.5), "components .* whole number, not 2"),
        (lambda: priors.Flow(2, transforms=1.5), "transforms .* whole number, not 1.5"),
        (lambda: priors.Flow(2, context=-1), "at least 0 features, not -1"),
        (
            lambda: priors.VampPrior(network(), torch.ones(9, 4).byte()),
            r"these are bytes: give it floats, such as data.train.batch\(\)\[0\]",
        ),
        (lambda: priors.Flow(2, transforms=0), "transforms of a prior must be positive"),
        (lambda: priors.Flow(2, context=3)(torch.zeros(1, 2)), "context=3 was given 2 context"),
        (lambda: vamp(posteriors.Normal)(torch.zeros(1, 2)), "VampPrior has no context"),
        (
            lambda: priors.VampPrior(network(), torch.rand(9, 4), components=0),
            "components of a prior must be positive",
        ),
        (
            lambda: priors.VampPrior(network(), torch.rand(9, 2, 2)),
            r"takes no pseudo-inputs of shape \(2, 2\): MLP takes inputs of shape \(..., 4\)",
        ),
    ],
)
def test_sizes_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
