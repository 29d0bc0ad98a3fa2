"""The contract of parts: silence for a sound one, and the sentence for each broken promise."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_vae import MLP, distributions, likelihoods, posteriors, priors
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


class Forgotten(priors.Prior):
    """A mixture whose centres, drawn when it is made, are kept out of its state."""

    def __init__(self, register):
        super().__init__()
        self.label = torch.ones(2)  # on which nothing depends
        centres = 2 * torch.randn(5, 2)
        if register:
            self.register_buffer("centres", centres)
        else:
            self.centres = centres

    def forward(self):
        weights = dist.Categorical(torch.ones_like(self.centres[:, 0]))
        return dist.MixtureSameFamily(weights, dist.Normal(self.centres, 1.0).to_event(1))


def test_a_tensor_that_is_in_no_state_is_told_by_name():
    check_prior(Forgotten(register=True))
    with pytest.raises(ValueError, match=r"depends on 'centres', a tensor that is no parameter"):
        check_prior(Forgotten(register=False))


def test_a_class_in_place_of_a_module_is_refused():
    with pytest.raises(
        TypeError, match=r"a prior is checked as a module that was made, such as p"
    ):
        check_prior(priors.Normal)
    with pytest.raises(TypeError, match=r"a posterior is checked as a module that was made"):
        check_posterior(posteriors.Normal, torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"a likelihood is checked as a module that was made"):
        check_likelihood(likelihoods.Bernoulli, torch.zeros(2, 3))


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
        if self.fault == "cut":
            loc = self.network(z.detach())
        if self.fault == "half cut":
            loc = self.network(torch.stack([z[..., 0], z[..., 1].detach()], -1))
        if self.fault == "half trained":
            loc = (loc + loc.detach()) / 2
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
        (
            "cut",
            r"direction in z the log-density changes at a rate of .*, and its gradient gives 0:",
        ),
        ("half cut", "direction in z the log-density changes at a rate of"),
        ("half trained", "direction in the parameters the log-density changes at a rate of"),
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


class Vectors(likelihoods.Likelihood):
    """A likelihood of dependent counts with one fault."""

    def __init__(self, fault, words=3):
        super().__init__(MLP(2, [8], words))
        self.fault = fault

    def forward(self, z, *context):
        return BAGS[self.fault](4, logits=self.network(z))


class Uncounted(distributions.Multinomial):
    """The product of probabilities without the number of orders."""

    def log_prob(self, value):
        return (value * self.logits).sum(-1)


class Heavier(distributions.Multinomial):
    def log_prob(self, value):
        return super().log_prob(value) + 0.1


class Reversed(distributions.Multinomial):
    """Draws of other probabilities."""

    def sample(self, sample_shape=()):
        return super().sample(torch.Size(sample_shape)).flip(-1)


class Shorter(distributions.Multinomial):
    """Draws of another support."""

    def sample(self, sample_shape=()):
        return super().sample(torch.Size(sample_shape)) - 1


class Smoothed(distributions.Multinomial):
    """Draws of almost the right probabilities."""

    def sample(self, sample_shape=()):
        flat = distributions.Multinomial(self.total_count, probs=0.8 * self.probs + 0.2 / 3)
        return flat.sample(torch.Size(sample_shape))


class Forgetful(distributions.Multinomial):
    """A third of the draws is always the same."""

    def sample(self, sample_shape=()):
        draws = super().sample(torch.Size(sample_shape))
        same = torch.tensor([4.0, 0.0, 0.0])
        return torch.where(torch.rand(draws.shape[:-1])[..., None] < 0.3, same, draws)


BAGS = {
    "none": distributions.Multinomial,
    "uncounted": Uncounted,
    "heavier": Heavier,
    "reversed": Reversed,
    "shorter": Shorter,
    "smoothed": Smoothed,
    "forgetful": Forgetful,
}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("uncounted", r"law of datum 0 has a mass of 0\.\d+ over values that make up 1 of its"),
        ("heavier", r"law of datum 0 has a mass of 1\.10\d over values that make up 1 of its"),
        ("reversed", r"draws of datum \d do not follow its law"),
        ("smoothed", r"draws of datum \d do not follow its law"),
        ("forgetful", r"draws of datum \d do not follow its law"),
        ("shorter", "a draw lies outside the support"),
    ],
)
def test_a_likelihood_of_dependent_counts_that_breaks_its_promise_is_told(fault, message):
    z = torch.randn(4, 2)
    check_likelihood(Vectors("none"), z)
    with pytest.raises(ValueError, match=message):
        check_likelihood(Vectors(fault), z)


def test_a_law_of_too_many_values_is_beyond_the_check_which_says_so():
    with pytest.raises(ValueError, match="has too many values to compare each"):
        check_likelihood(likelihoods.Multinomial(MLP(2, [8], 50)), torch.randn(2, 2))


def test_dependent_continuous_elements_are_beyond_the_check_which_says_so():
    class Dependent(likelihoods.Likelihood):
        def forward(self, z, *context):
            return dist.MultivariateNormal(self.network(z), torch.eye(3))

    with pytest.raises(NotImplementedError, match="are continuous and not independent"):
        check_likelihood(Dependent(MLP(2, [8], 3)), torch.randn(2, 2))


def test_a_missing_element_has_density_one():
    class Imputed(likelihoods.Missing):
        def forward(self, z, *context):
            return Filled(super().forward(z).base_dist.base_dist, 0.0).to_event(1)

    class Filled(distributions.Observed):
        def log_prob(self, value):
            return self.base_dist.log_prob(value.nan_to_num(0.0))

    complete = likelihoods.Normal(MLP(2, [8], 3))
    check_likelihood(likelihoods.Missing(complete), torch.randn(4, 2))
    with pytest.raises(ValueError, match="an element that is missing is scored"):
        check_likelihood(Imputed(complete), torch.randn(4, 2))


class Rare(likelihoods.Likelihood):
    """Elements that are 1 once in ten thousand draws."""

    def __init__(self, family=dist.Bernoulli):
        super().__init__(nn.Linear(2, 200))
        self.family = family
        nn.init.zeros_(self.network.weight)
        nn.init.constant_(self.network.bias, -9.2)

    def forward(self, z, *context):
        return self.family(logits=self.network(z)).to_event(1)


class Often(dist.Bernoulli):
    def sample(self, sample_shape=()):
        return dist.Bernoulli(logits=self.logits + 5).sample(sample_shape)


def test_rare_values_raise_no_false_alarm_and_are_not_ignored():
    """Each of 4000 tests would fail by chi-squared at 5 such draws, with a chance of 2e-4."""
    for seed in range(5):
        check_likelihood(Rare(), torch.zeros(4, 2), seed=seed)
    with pytest.raises(ValueError, match="do not follow its law"):
        check_likelihood(Rare(Often), torch.zeros(4, 2))


class Uncertain(posteriors.Posterior):
    """A posterior with one fault."""

    def __init__(self, fault):
        super().__init__(MLP(4, [8], (2, 2)))
        self.fault = fault

    def forward(self, x, *context):
        loc, log_scale = self.network(x).unbind(-2)
        loc = loc.detach() if self.fault == "location" else loc
        log_scale = log_scale.detach() if self.fault == "scale" else log_scale
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
        ("location", "direction in the parameters the log-density changes at a rate of"),
        ("scale", "direction in the parameters the log-density changes at a rate of"),
    ],
)
def test_a_posterior_that_breaks_its_promise_is_told_which(fault, message):
    x = torch.randn(3, 4)
    check_posterior(Uncertain("none"), x)
    with pytest.raises(ValueError, match=message):
        check_posterior(Uncertain(fault), x)


@pytest.mark.parametrize("fault", ["density", "draws"])
def test_a_datum_that_is_not_its_elements_is_found(fault):
    class Off(torch.distributions.Independent):
        def log_prob(self, value):
            return super().log_prob(value) + (fault == "density")

        def sample(self, shape=()):
            return super().sample(torch.Size(shape)) * (1.5 if fault == "draws" else 1)

    class Whole(likelihoods.Likelihood):
        def forward(self, z, *context):
            return Off(torch.distributions.Normal(self.network(z), 1.0), 1)

    message = "product of those of its elements" if fault == "density" else "do not follow its law"
    with pytest.raises(ValueError, match=message):
        check_likelihood(Whole(MLP(2, [8], 4)), torch.randn(3, 2))


def test_kinks_where_a_network_begins_are_no_false_alarm():
    """Half of the slope lies on either side of a ReLU at 0, and of a clamp at its bound."""

    class Clamped(likelihoods.Likelihood):
        def forward(self, z, *context):
            return dist.Normal(self.network(z.clamp(0, 1)), 1.0).to_event(1)

    network = MLP(2, [64, 64], 3)
    for name, parameter in network.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
    for seed in range(3):
        check_likelihood(likelihoods.Normal(network), torch.zeros(3, 2), seed=seed)
        check_likelihood(Clamped(network), torch.eye(2), seed=seed)


def test_a_density_that_does_not_depend_on_z_is_sound():
    network = MLP(2, [8], 3)
    nn.init.zeros_(network.last.weight)
    check_likelihood(likelihoods.Normal(network), torch.randn(3, 2))


class Of(likelihoods.Likelihood):
    """A likelihood of any law of one number."""

    def __init__(self, law):
        super().__init__(MLP(2, [8], 3))
        self.law = law

    def forward(self, z, *context):
        return self.law(self.network(z)).to_event(1)


class Underdrawn(dist.Binomial):
    def sample(self, sample_shape=()):
        return (super().sample(sample_shape) - 1).clamp(min=0)


class Narrow(dist.Uniform):
    """Draws of the middle alone."""

    def sample(self, sample_shape=()):
        return (self.low + self.high) / 2 + (super().sample(sample_shape) - self.low) / 4


def normals(at):
    mixing = dist.Categorical(torch.ones(*at.shape, 2).to(at))
    return dist.MixtureSameFamily(mixing, dist.Normal(torch.stack([at, at + 3], -1), 1.0))


@pytest.mark.parametrize(
    "law",
    [
        lambda at: dist.Binomial(16, logits=at),
        lambda at: dist.Binomial(torch.tensor([1.0, 4.0, 9.0]).to(at), logits=at),
        lambda at: dist.Uniform(at - 1, at + 1),
        lambda at: dist.Uniform(at - at.exp(), at + 1),
        lambda at: dist.Pareto(at.exp(), 3.0),
        lambda at: dist.Geometric(logits=at),
        normals,
    ],
)
def test_likelihoods_of_any_bounds_keep_the_contract(law):
    check_likelihood(Of(law), torch.randn(3, 2))


@pytest.mark.parametrize(
    "law",
    [lambda at: Underdrawn(16, logits=at), lambda at: Narrow(at - 1, at + 1)],
)
def test_draws_within_bounds_are_held_against_their_law(law):
    with pytest.raises(ValueError, match="do not follow its law"):
        check_likelihood(Of(law), torch.randn(3, 2))


def test_a_support_that_is_beyond_the_check_is_named():
    class _Within(torch.distributions.constraints.Constraint):
        is_discrete, event_dim = False, 0

        def check(self, value):
            return value.abs() <= 5

    class Middling(dist.Uniform):
        support = _Within()

    with pytest.raises(NotImplementedError, match="elements of Middling have the support Within"):
        check_likelihood(Of(lambda at: Middling(at - 1, at + 1)), torch.zeros(3, 2))


class Over(priors.Prior):
    def __init__(self, law):
        super().__init__()
        self.law, self.parameter = law, nn.Parameter(torch.tensor([0.3, 0.8]))

    def forward(self):
        return self.law(self.parameter)


class Overdrawn(dist.Gamma):
    def sample(self, sample_shape=()):
        return 1.2 * super().sample(sample_shape)


def test_priors_over_part_of_the_space_keep_the_contract():
    for law in (
        lambda at: dist.Gamma(2.0, at.exp()).to_event(1),
        lambda at: dist.Uniform(-at.exp(), at.exp()).to_event(1),
        lambda at: dist.Beta(1 + at, 2.0).to_event(1),
    ):
        check_prior(Over(law))
    with pytest.raises(ValueError, match="draws do not follow the density"):
        check_prior(Over(lambda at: Overdrawn(2.0, at.exp()).to_event(1)))


@pytest.mark.parametrize(
    ("law", "message"),
    [
        (lambda at: dist.Dirichlet(at.exp()), "Dirichlet has a support of fewer dimensions"),
        (lambda at: dist.OneHotCategorical(logits=at), "OneHotCategorical is a law of discrete"),
        (lambda at: dist.Poisson(at.exp()).to_event(1), "Poisson is a law of discrete values"),
    ],
)
def test_priors_beyond_the_check_are_named(law, message):
    with pytest.raises(NotImplementedError, match=message):
        check_prior(Over(law))


class Centred(nn.Module):
    """A network whose outputs are centred over the batch, as by a mistaken dimension."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.network = MLP(inputs, [8], outputs)
        self.input, self.output = self.network.input, self.network.output

    def forward(self, x):
        found = self.network(x)
        return found - 0.5 * found.mean(-1 - len(self.output), keepdim=True)


class CentredPrior(priors.Prior):
    def __init__(self):
        super().__init__()
        self.network = Centred(3, (2,))

    def forward(self, context):
        return dist.Normal(self.network(context), 1.0).to_event(1)


@pytest.mark.parametrize(
    "check",
    [
        lambda: check_posterior(posteriors.Normal(Centred(5, (2, 2))), torch.randn(4, 5)),
        lambda: check_likelihood(likelihoods.Normal(Centred(2, (5,))), torch.randn(4, 2)),
        lambda: check_prior(CentredPrior(), torch.randn(4, 3)),
    ],
)
def test_a_law_that_depends_on_other_data_is_told(check):
    with pytest.raises(ValueError, match="depends on the other data of its batch: compute each"):
        check()


class ByLabel(nn.Module):
    """The law of a prior or a posterior whose location is embedded."""

    def __init__(self, encoder=None):
        super().__init__()
        self.encoder, self.table = encoder, nn.Embedding(3, 2)

    def forward(self, *given):
        loc = self.table(given[-1])
        loc = loc + self.encoder(given[0]) if self.encoder else loc
        return dist.Normal(loc, 1.0).to_event(1)


class Ordinal(likelihoods.Likelihood):
    """Draws of a type for whole numbers, as of `torch.distributions.Categorical`."""

    def forward(self, z):
        return dist.Categorical(logits=self.network(z)).to_event(1)


def test_whole_numbers_are_checked_as_they_are():
    labels = torch.tensor([0, 2, 1])
    check_prior(ByLabel(), labels)
    check_posterior(ByLabel(nn.Linear(4, 2)), torch.randn(3, 4), labels)
    check_likelihood(Ordinal(MLP(2, [8], (3, 4))), torch.randn(3, 2))


@pytest.mark.parametrize("seed", [3, 10])
def test_scores_close_to_zero_are_no_others_for_their_rounding(seed):
    """Flows of whose draws some have a log-density of 1e-3, and single precision 1e-5 of it."""
    torch.manual_seed(seed)
    flow = priors.Flow(2, transforms=2, hidden=[16])
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    check_prior(flow, seed=seed)
