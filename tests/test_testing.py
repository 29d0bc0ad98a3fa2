"""The check of a pair: what it lets pass, and the sentence for what it does not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear import linear_vae
from pyro.nn import PyroModule
from torch import nn

from pyro_vae import MLP, VAE, ConvEncoder, likelihoods, posteriors, priors
from pyro_vae.pairs import unvalidated
from pyro_vae.testing import check_likelihood, check_pair, check_posterior, check_prior

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


class Broken(priors.Prior):
    """A normal prior with one fault."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault
        self.loc = nn.Parameter(torch.tensor([1.0, -1.0]))
        self.hidden = [torch.zeros(2)]
        if fault == "unused":
            self.idle = nn.Parameter(torch.zeros(2))
        if fault == "unregistered":
            self.hidden[0] = self.loc.detach()

    def forward(self):
        loc = self.loc.detach() if self.fault == "detached" else self.loc
        law = FAULTY.get(self.fault, dist.Normal)(loc + self.hidden[0], torch.ones(2))
        return law if self.fault == "event" else law.to_event(1)


class Unnormalised(dist.Normal):
    def log_prob(self, value):
        return super().log_prob(value) - 0.1


class Misdrawn(dist.Normal):
    def sample(self, sample_shape=()):
        return 1.1 * super().sample(sample_shape)


class Correlated(dist.Normal):
    """Marginals are right and the joint is not: every dimension is drawn from one source."""

    def sample(self, sample_shape=()):
        return self.loc + super().sample(sample_shape)[..., :1] - self.loc[..., :1]


class Pooled(dist.Normal):
    def log_prob(self, value):
        centred = value - value.mean(0) if value.dim() > 2 else value
        return super().log_prob(centred)


class Single(dist.Normal):
    def log_prob(self, value):
        return super().log_prob(value).float()


FAULTY = {
    "single": Single,
    "unnormalised": Unnormalised,
    "misdrawn": Misdrawn,
    "correlated": Correlated,
    "pooled": Pooled,
}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("event", r"batch shape \(2,\) and event shape \(\)|has \(2,\) and \(\)"),
        ("unnormalised", r"integrates to 0\.8\d+ .* and not to 1"),
        ("misdrawn", "draws do not follow the density along dimension"),
        ("correlated", r"draws do not follow the density along|integrates to"),
        ("pooled", "density of several particles is not that of each"),
        ("detached", "does not depend on the parameter 'loc'"),
        ("unused", "the parameter 'idle' gets no gradient"),
        ("single", r"after \.double\(\) the density is another or not in double precision"),
    ],
)
def test_a_prior_that_breaks_its_promise_is_told_which(fault, message):
    check_prior(Broken("none"))
    with pytest.raises(ValueError, match=message):
        check_prior(Broken(fault))


def test_a_prior_whose_state_is_not_registered_is_told():
    class Drifting(priors.Prior):
        """Its density depends on how often it was called, which no file keeps."""

        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self):
            self.calls += 1
            return dist.Normal(torch.zeros(2) + self.calls / 10, 1.0).to_event(1)

    with pytest.raises(ValueError, match=r"state_dict was loaded|in double precision"):
        check_prior(Drifting())


def test_the_check_of_a_prior_leaves_the_random_state():
    prior = priors.MixtureOfNormals(2)
    before = torch.get_rng_state()
    check_prior(prior)
    assert torch.equal(before, torch.get_rng_state())


class Unsound(likelihoods.Likelihood):
    """A likelihood with one fault."""

    def __init__(self, fault):
        super().__init__(MLP(2, [8], 3))
        self.fault = fault

    def forward(self, z, *context):
        loc = self.network(z)
        if self.fault == "pooled":
            loc = loc - loc.mean(0, keepdim=True)
        law = {"misdrawn": Misdrawn, "unnormalised": Unnormalised}.get(self.fault, dist.Normal)(
            loc, 1.0
        )
        if self.fault == "counts":
            law = Miscounted(loc.exp())
        if self.fault == "greyscale":
            return likelihoods.Bernoulli(self.network, greyscale=True)(z)
        return law if self.fault == "event" else law.to_event(1)


class Miscounted(dist.Poisson):
    def sample(self, sample_shape=()):
        return super().sample(sample_shape) + 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("event", r"has batch shape \(4, 3\) and event shape \(\)"),
        ("pooled", "density of several particles is not that of each"),
        ("unnormalised", r"has a total mass of 0\.904\d and not of 1"),
        ("greyscale", "total mass of"),
        ("misdrawn", r"draws of element \d+ do not follow its law"),
        ("counts", r"draws of element \d+ do not follow its law"),
    ],
)
def test_a_likelihood_that_breaks_its_promise_is_told_which(fault, message):
    z = torch.randn(4, 2)
    check_likelihood(Unsound("none"), z)
    with pytest.raises(ValueError, match=message):
        check_likelihood(Unsound(fault), z)


@pytest.mark.parametrize(
    "law", [dist.Poisson, dist.Exponential, lambda rate: dist.Gamma(2.0, rate)]
)
def test_laws_on_half_a_line_keep_the_contract(law):
    class Rate(likelihoods.Likelihood):
        def forward(self, z, *context):
            return law(self.network(z).exp()).to_event(1)

    check_likelihood(Rate(MLP(2, [8], 3)), torch.randn(4, 2))


class Uncertain(posteriors.Posterior):
    """A posterior with one fault."""

    def __init__(self, fault):
        super().__init__(MLP(4, [8], (2, 2)))
        self.fault = fault

    def forward(self, x, *context):
        loc, log_scale = self.network(x).unbind(-2)
        law = UNCERTAIN.get(self.fault, dist.Normal)(loc, log_scale.exp())
        return law if self.fault == "event" else law.to_event(1)


class Unpathed(dist.Normal):
    """Draws that are right, whose path loses half of the location's gradient."""

    def rsample(self, sample_shape=()):
        loc = (self.loc + self.loc.detach()) / 2
        return dist.Normal(loc, self.scale).rsample(sample_shape)


class Blocked(dist.Normal):
    has_rsample = False


UNCERTAIN = {"path": Unpathed, "blocked": Blocked, "misdrawn": Misdrawn}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("event", r"has batch shape \(3, 2\) and event shape \(\)"),
        ("blocked", "no gradient flows through the draws"),
        ("misdrawn", "draws do not follow the density"),
        ("path", "rsample and log_prob differ"),
    ],
)
def test_a_posterior_that_breaks_its_promise_is_told_which(fault, message):
    x = torch.randn(3, 4)
    check_posterior(Uncertain("none"), x)
    with pytest.raises(ValueError, match=message):
        check_posterior(Uncertain(fault), x)


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
