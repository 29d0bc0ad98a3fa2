"""The contract of parts: silence for a sound one, and the sentence for each broken promise."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_vae import MLP, likelihoods, posteriors, priors
from pyro_vae.testing import check_likelihood, check_posterior, check_prior


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
