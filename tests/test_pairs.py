"""The check of a pair: what it lets pass, and the sentence for what it does not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear import linear_vae
from pyro.nn import PyroModule
from torch import nn

from pyro_vae import MLP, VAE, ConvEncoder, likelihoods, posteriors, priors
from pyro_vae.pairs import check_pair, unvalidated

X = torch.randn(6, 4)


class Pair(nn.Module):
    """A pair with faults to choose from."""

    def __init__(self, model_site="z", guide_site="z", observe=True, event=True):
        super().__init__()
        self.sites, self.observe, self.event = (model_site, guide_site), observe, event

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample(self.sites[0], dist.Normal(torch.zeros(4), 1).to_event(1))
            noise = dist.Normal(z, 1).to_event(1) if self.event else dist.Normal(z, 1)
            pyro.sample("x", noise, obs=x if self.observe else None)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample(self.sites[1], dist.Normal(x, 1).to_event(1))


def test_a_sound_pair_passes():
    check_pair(Pair(), X)
    check_pair(linear_vae(4, 2), X)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"model_site": "w"}, "the guide draws no site 'w', which is latent in the model"),
        ({"observe": False}, "the guide draws no site 'x', which is latent in the model"),
        ({"event": False}, r"the model cannot run on 2 data: .*site x"),
    ],
)
def test_programs_that_do_not_match_are_named(fault, message):
    with pytest.raises(ValueError, match=message):
        check_pair(Pair(**fault), X)


def test_a_site_that_only_the_guide_draws_is_named():
    class Extra(Pair):
        def guide(self, x):
            super().guide(x)
            pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="draws a site 'w' that is not latent in the model"):
        check_pair(Extra(), X)


@pytest.mark.parametrize("latent", [2, 3])
def test_a_width_that_happens_to_be_the_batch_is_not_taken_for_it(latent):
    class Wrong(priors.Prior):
        def forward(self):
            return dist.Normal(torch.zeros(latent), 1.0)  # without .to_event(1)

    vae = linear_vae(4, latent)
    with pytest.raises(ValueError, match=r"the model cannot run|has batch shape"):
        check_pair(VAE(Wrong(), vae.likelihood, vae.posterior), X)


@pytest.mark.parametrize(
    ("likelihood", "value", "shown"),
    [
        (likelihoods.Bernoulli(MLP(2, [], 4)), 255.0, "Bernoulli, 255"),
        (likelihoods.Bernoulli(MLP(2, [], 4)), 0.5, "Bernoulli, 0.5"),
        (likelihoods.Bernoulli(MLP(2, [], 4), greyscale=True), 1.5, "GreyscaleBernoulli, 1.5"),
    ],
)
@pytest.mark.parametrize("validation", [True, False])
def test_data_outside_the_support_are_counted(likelihood, value, shown, validation):
    vae = VAE(priors.Normal(2), likelihood, linear_vae(4, 2).posterior)
    x = torch.zeros(6, 4)
    x[5, 1] = value  # not among the rows that the programs run on
    with pyro.validation_enabled(validation):
        with pytest.raises(ValueError, match=f"1 values of x lie outside the support of {shown}"):
            check_pair(vae, x)
        x[5, 1] = 1
        check_pair(vae, x)


def test_a_network_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"the guide cannot run on 2 data: MLP takes inputs"):
        check_pair(linear_vae(4, 2), torch.randn(6, 5))


def test_a_density_that_is_not_finite_is_named():
    vae = linear_vae(4, 2, scale=1.0)
    nn.init.constant_(vae.likelihood.network.last.bias, float("nan"))
    with pytest.raises(ValueError, match="log-density of site 'x' in the model is nan"):
        check_pair(vae, X)


def test_random_state_and_statistics_stay():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.rest = nn.BatchNorm2d(1), ConvEncoder((1, 4, 4), [2], (2, 2))

        def forward(self, x):
            return self.rest(self.norm(x))

    likelihood = likelihoods.Normal(MLP(2, [], (1, 4, 4)))
    vae = VAE(priors.Normal(2), likelihood, posteriors.Normal(Normed()))
    x, state = torch.randn(5, 1, 4, 4), {k: v.clone() for k, v in vae.state_dict().items()}
    before = torch.get_rng_state()
    check_pair(vae, x)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, state[key]) for key, value in vae.state_dict().items())


def test_statistics_stay_where_the_check_fails():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x.reshape(7)

    vae = VAE(priors.Normal(2), linear_vae(4, 2).likelihood, posteriors.Normal(Counting()))
    with pytest.raises(ValueError, match="the guide cannot run on 2 data"):
        check_pair(vae, X)
    assert vae.posterior.network.calls == 0


@pytest.mark.parametrize("flag", [True, False])
def test_validation_comes_back_as_it_was(flag):
    before = torch.distributions.Distribution._validate_args
    try:
        torch.distributions.Distribution.set_default_validate_args(flag)
        with unvalidated():
            torch.distributions.Normal(0.0, -1.0)
        assert torch.distributions.Distribution._validate_args is flag
        assert pyro.distributions.is_validation_enabled()
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)


@pytest.mark.parametrize(
    "law",
    [
        lambda: dist.Exponential(torch.ones(2)).to_event(1),
        lambda: dist.Beta(torch.ones(2), torch.ones(2)).to_event(1),
        lambda: dist.Dirichlet(torch.ones(2)),
        lambda: dist.Bernoulli(torch.full([2], 0.5)).to_event(1),
        lambda: dist.Poisson(torch.ones(2)).to_event(1),
        lambda: dist.OneHotCategorical(torch.ones(2)),
    ],
)
def test_a_prior_on_another_support_than_the_posterior_is_refused(law):
    class Elsewhere(priors.Prior):
        def forward(self):
            return law()

    vae = linear_vae(4, 2)
    with pytest.raises(ValueError, match="the guide draws values of z outside the support of"):
        check_pair(VAE(Elsewhere(), vae.likelihood, vae.posterior), X)


def test_a_part_that_was_replaced_by_a_pyro_module_is_refused():
    vae = linear_vae(4, 2)
    vae.prior = PyroModule()
    with pytest.raises(TypeError, match="'prior' is a PyroModule"):
        check_pair(vae, X)
