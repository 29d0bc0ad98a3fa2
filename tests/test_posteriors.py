"""Posteriors against the contract, and against SciPy's densities."""

from functools import partial

import pytest
import torch
from scipy import stats
from torch import nn

from pyro_vae import MLP, VAE, data, fit, likelihoods, posteriors, priors
from pyro_vae.testing import check_posterior
from pyro_vae.vae import as_pyro


def flow(**options):
    posterior = posteriors.Flow(
        MLP(4, [8], posteriors.Flow.outputs(3, features=5)), 3, features=5, hidden=[16], **options
    )
    with torch.no_grad():  # away from the identity, where it begins
        for parameter in posterior.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return posterior


CASES = {
    "Normal": [lambda: posteriors.Normal(MLP(4, [8], (2, 3)))],
    "FullRankNormal": [lambda: posteriors.FullRankNormal(MLP(4, [8], (4, 3)))],
    "LowRankNormal": [
        lambda: posteriors.LowRankNormal(MLP(4, [8], (4, 3))),
        lambda: posteriors.LowRankNormal(MLP(4, [8], (3, 3)), rank=1),
    ],
    "Flow": [flow, partial(flow, spline=True), partial(flow, transforms=1)],
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
        family(MLP(digits.shape, [32], family.outputs(3)), *[3] * (kind == "Flow")),
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


@pytest.mark.parametrize("spline", [False, True])
def test_a_flow_begins_as_the_diagonal_gaussian(spline):
    network = MLP(4, [8], posteriors.Flow.outputs(3)).double()
    posterior = posteriors.Flow(network, 3, spline=spline).double()
    loc, log_scale, _ = network(X).detach().split([3, 3, 32], -1)
    z = loc + 2 * log_scale.exp() * torch.rand(6, 3)  # within the reach of the splines
    truth = stats.norm(loc, log_scale.exp()).logpdf(z).sum(-1)
    assert torch.allclose(posterior(X).log_prob(z), torch.as_tensor(truth))


@pytest.mark.parametrize("spline", [False, True])
def test_a_flow_is_the_change_of_variables_of_its_draws(spline):
    posterior = flow(spline=spline).double()
    law = as_pyro(posterior(X[:1]))

    def draw(noise):
        transform = law.transform.inv
        return transform(noise[None])[0]

    for noise in torch.randn(5, 3).double():
        jacobian = torch.autograd.functional.jacobian(draw, noise)
        truth = stats.norm.logpdf(noise).sum() - float(jacobian.det().abs().log())
        z = draw(noise).detach()
        assert law.log_prob(z[None]).item() == pytest.approx(truth, abs=1e-6)


def test_a_flow_scores_its_own_draws_without_inverting(monkeypatch):
    law = as_pyro(flow()(X.float()))
    value = law()
    again = law.log_prob(value.clone())  # by inversion, one dimension at a time
    assert torch.allclose(law.log_prob(value), again, atol=1e-4)
    monkeypatch.setattr(type(law.transform), "call_and_ladj", None)
    assert torch.allclose(law.log_prob(value), again, atol=1e-4)


@pytest.mark.parametrize("name", ["latent", "features", "transforms"])
def test_sizes_of_a_flow_are_checked(name):
    sizes = {"latent": 3, name: 0}
    with pytest.raises(
        ValueError, match=f"the {name} of a Flow posterior must be at least 1, not 0"
    ):
        posteriors.Flow(MLP(4, [8], 70), **sizes)


def test_no_rank_and_half_of_one_are_refused():
    for rank, said in ((0, "at least 1, not 0"), (2.5, "a whole number, not 2.5")):
        with pytest.raises(ValueError, match=f"rank of a LowRankNormal must be {said}"):
            posteriors.LowRankNormal(MLP(4, [8], (2, 3)), rank=rank)
    with pytest.raises(ValueError, match="features of a Flow posterior must be a whole number"):
        posteriors.Flow(MLP(4, [8], 70), 3, features=2.5)


@pytest.mark.parametrize(
    ("make", "output", "message"),
    [
        (
            posteriors.Normal,
            (4, 3),
            r"takes \(\.\.\., 2, latent\) .* got \(6, 4, 3\): .* Normal\.out",
        ),
        (posteriors.Normal, 4, r"takes \(\.\.\., 2, latent\) .* got \(6, 4\): .* Normal\.outputs"),
        (posteriors.FullRankNormal, (3, 3), r"takes \(\.\.\., 4, latent\) .* got \(6, 3, 3\): "),
        (partial(posteriors.LowRankNormal, rank=3), (4, 3), r"takes \(\.\.\., 5, .*, rank=3\)"),
        (
            partial(posteriors.Flow, latent=3),
            9,
            r"takes \(\.\.\., 38\) .* got \(6, 9\): .*features=32",
        ),
    ],
)
def test_an_encoder_of_another_width_is_refused_in_a_sentence(make, output, message):
    with pytest.raises(ValueError, match=message):
        make(MLP(4, [], output))(X.float())


def test_tight_posteriors_of_low_rank_keep_their_density_in_single_precision():
    output = torch.randn(50, 4, 20)
    output[:, 1] = -7.0  # the log scale, where torch loses 19 nats
    q = posteriors.LowRankNormal(nn.Identity())(output)
    z = q.rsample()
    exact = posteriors.LowRankNormal(nn.Identity())(output.double())
    truth = torch.distributions.MultivariateNormal(exact.loc, exact.covariance_matrix)
    # What the rounding of z itself, 1e-7 of it, is worth at a scale of e^-7 is a part of neither.
    apart = (q.log_prob(z) - truth.log_prob(z.double())).abs()
    assert apart.max() < 1e-4
