"""The check of a pair: what it lets pass, and the sentence for what it does not."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear import linear_vae
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import nn

from pyro_vae import MLP, VAE, ConvEncoder, likelihoods, posteriors, priors
from pyro_vae.distributions import OrMissing
from pyro_vae.objectives import BetaELBO, FreeBits
from pyro_vae.pairs import check_objective, check_pair
from pyro_vae.scoring import validation

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
    ("decoded", "data"),
    [
        ((1, 8, 8), (8, 8)),
        ((8, 8), (1, 8, 8)),
        ((3, 8, 8), (1, 8, 8)),
        ((6,), (1,)),
        ((1,), (4,)),
        ((1, 3), (4, 3)),
        ((4,), (2,)),
    ],
)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_likelihood_of_another_shape_than_the_data_is_refused(decoded, data, count):
    vae = VAE(
        priors.Normal(2),
        likelihoods.Normal(MLP(2, [], decoded)),
        posteriors.Normal(MLP(data, [], (2, 2))),
    )
    message = f"event shape is {decoded} and x has {data}"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_pair(vae, torch.randn(count, *data))


def test_a_value_that_plates_repeat_is_no_other_shape():
    class Pulled(Pair):
        def model(self, x):
            super().model(x)
            data = pyro.plate("rows", len(x), dim=-1)
            with data:
                pyro.factor("pull", torch.tensor(-1.0))
                law = dist.Normal(torch.zeros(2), 1).to_event(1)
                pyro.sample("y", law, obs=torch.zeros(2))
            with pyro.plate("groups", 2, dim=-2), data:
                pyro.sample("w", dist.Normal(0.0, 1.0), obs=torch.zeros(2, 1))

    check_pair(Pulled(), X)


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
    narrow, wide = linear_vae(4, 2), linear_vae(5, 2)
    vae = VAE(narrow.prior, wide.likelihood, narrow.posterior)
    with pytest.raises(ValueError, match=r"the guide cannot run on 2 data: MLP takes inputs"):
        check_pair(vae, torch.randn(6, 5))


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
        with validation(False):
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
    with pytest.raises(ValueError, match=r"outside the support of|a mass over a density"):
        check_pair(VAE(Elsewhere(), vae.likelihood, vae.posterior), X)


def test_a_part_that_was_replaced_by_a_pyro_module_is_refused():
    vae = linear_vae(4, 2)
    vae.prior = PyroModule()
    with pytest.raises(TypeError, match="'prior' is a PyroModule"):
        check_pair(vae, X)


@pytest.mark.parametrize("side", ["model", "guide"])
def test_a_scale_on_one_side_only_is_refused(side):
    class Scaled(Pair):
        def model(self, x):
            with poutine.scale(scale=0.5 if side == "model" else 1.0):
                super().model(x)

        def guide(self, x):
            with poutine.scale(scale=0.5 if side == "guide" else 1.0):
                super().guide(x)

    scales = "0.5 in the model and by 1" if side == "model" else "1 in the model and by 0.5"
    with pytest.raises(ValueError, match=f"latent 'z' is scaled by {scales} in the guide"):
        check_pair(Scaled(), X)


def test_a_scale_on_both_sides_passes():
    class Scaled(Pair):
        def model(self, x):
            with poutine.scale(scale=0.5):
                super().model(x)

        def guide(self, x):
            with poutine.scale(scale=0.5):
                super().guide(x)

    check_pair(Scaled(), X)


def test_a_parameter_that_no_program_uses_is_named():
    vae = linear_vae(4, 2)
    vae.spare = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"parameter 'spare.weight' would never change"):
        check_pair(vae, X)
    vae.spare.requires_grad_(False)
    check_pair(vae, X)


def test_a_parameter_hidden_by_the_param_store_is_named():
    class Stored(PyroModule):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(4))

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(4), 1).to_event(1))
                pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(x + pyro.param("shift", self.shift), 1).to_event(1))

    first, second = Stored(), Stored()
    check_pair(first, X)
    with pytest.raises(ValueError, match=r"'shift' would never change.*param store holds another"):
        check_pair(second, X)


def test_a_discrete_posterior_of_a_continuous_prior_is_refused():
    class OneHot(posteriors.Posterior):
        def forward(self, x):
            return dist.OneHotCategorical(logits=self.network(x))

    vae = linear_vae(4, 2)
    with pytest.raises(ValueError, match=r"continuous in the model \(Normal\) and discrete"):
        check_pair(VAE(vae.prior, vae.likelihood, OneHot(nn.Linear(4, 2))), X)


@pytest.mark.parametrize(
    ("likelihood", "x", "message"),
    [
        (likelihoods.Bernoulli, torch.rand(6, 4), "binarise the data"),
        (likelihoods.Poisson, -torch.ones(6, 4), "24 values of x .* Poisson, -1 for one: remove"),
        (likelihoods.Poisson, torch.ones(6, 4) / 2, "Poisson, 0.5 for one"),
        (likelihoods.Poisson, torch.full([6, 4], torch.nan), "wrap the likelihood as Missing"),
        (
            likelihoods.Multinomial,
            torch.eye(6)[:, :4],
            "2 data .* positive\\), row 4 of a batch for one",
        ),
        (likelihoods.Multinomial, torch.ones(6, 4) / 2, "6 data of x lie outside .* Multinomial"),
    ],
)
def test_data_outside_the_support_are_counted_with_advice(likelihood, x, message):
    class Shifted(nn.Module):  # so that the encoder gives numbers, whatever x is
        def forward(self, x):
            return torch.zeros(*x.shape[:-1], 2, 2)

    vae = VAE(priors.Normal(2), likelihood(MLP(2, [], 4)), posteriors.Normal(Shifted()))
    with pytest.raises(ValueError, match=message):
        check_pair(vae, x)


@pytest.mark.parametrize("family", ["Poisson", "NegativeBinomial", "ZeroInflatedNegativeBinomial"])
def test_a_missing_size_factor_is_named_before_training(family):
    options = {"decoder": MLP(2, [], getattr(likelihoods, family).outputs((4,)))}
    if family != "Poisson":
        options["shape"] = 4
    likelihood = getattr(likelihoods, family)(**options, size_factor=True)
    vae = VAE(priors.Normal(2), likelihood, posteriors.Normal(MLP(4, [], (2, 2))))
    with pytest.raises(ValueError, match=f"a {family} with a size factor takes it as its last"):
        check_pair(vae, torch.ones(6, 4))


def test_an_objective_is_tried_and_left_as_it_was():
    vae = linear_vae(4, 2)
    objective = BetaELBO(1.0, start=0.0, steps=10)
    check_objective(objective, vae, X)
    assert objective.step == 0
    assert all(parameter.grad is None for parameter in vae.parameters())
    state = torch.get_rng_state()
    check_objective(objective, vae, X)
    assert torch.equal(state, torch.get_rng_state())


def test_an_objective_that_cannot_train_is_refused_in_pyros_words():
    class OneHot(nn.Module):
        def __init__(self, network=None):
            super().__init__()
            self.network = network

        def forward(self, *given):
            logits = self.network(given[0]) if self.network else torch.zeros(2)
            return dist.OneHotCategorical(logits=logits)

    vae = VAE(OneHot(), linear_vae(4, 2).likelihood, OneHot(nn.Linear(4, 2)))
    check_pair(vae, X)
    check_objective(Trace_ELBO(), vae, X)
    for objective in (TraceMeanField_ELBO(), FreeBits(0.1)):
        with pytest.raises(ValueError, match=r"cannot train this model and guide: .*reparam"):
            check_objective(objective, vae, X)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda: Trace_ELBO(num_particles=0), "at least 1 particle, not 0"),
        (lambda: negative(), "weight of the KL is at least 0, not -1"),
    ],
)
def test_objectives_that_make_no_sense_are_refused(objective, message):
    with pytest.raises(ValueError, match=message):
        check_objective(objective(), linear_vae(4, 2), X)


def negative():
    objective = BetaELBO(1.0)
    objective.weight.fill_(-1.0)
    return objective


def test_values_that_an_encoder_cannot_take_are_named_all_the_same():
    encoder = MLP(4, [8], (2, 2), transform=torch.log1p)
    vae = VAE(priors.Normal(2), likelihoods.Poisson(MLP(2, [], 4)), posteriors.Normal(encoder))
    with pytest.raises(ValueError, match="outside the support of Poisson, -1 for one"):
        check_pair(vae, -torch.ones(6, 4))


def test_an_encoder_that_sees_nan_is_told_of_fill():
    vae = VAE(
        priors.Normal(2),
        likelihoods.Missing(likelihoods.Normal(MLP(2, [], 4))),
        posteriors.Normal(MLP(4, [8], (2, 2))),
    )
    with pytest.raises(ValueError, match=r"transform=networks.fill"):
        check_pair(vae, X.masked_fill(torch.eye(6, 4).bool(), torch.nan))


def test_a_scale_for_each_datum_is_compared_too():
    class Weighed(Pair):
        def __init__(self, guided):
            super().__init__()
            self.scales = torch.tensor([0.5, 2.0, 1.0]), guided

        def model(self, x):
            with poutine.scale(scale=self.scales[0][: len(x)]):
                super().model(x)

        def guide(self, x):
            with poutine.scale(scale=self.scales[1][: len(x)]):
                super().guide(x)

    check_pair(Weighed(torch.tensor([0.5, 2.0, 1.0])), X)
    with pytest.raises(ValueError, match="scaled by 2 in the model and by 3 in the guide"):
        check_pair(Weighed(torch.tensor([0.5, 3.0, 1.0])), X)


def test_parameters_of_which_none_is_used_are_named():
    pair = Pair()
    pair.spare = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"parameter 'spare.weight' would never change"):
        check_pair(pair, X)


def test_a_schedule_within_an_objective_takes_no_step_in_the_check():
    objective = BetaELBO(1.0, elbo=BetaELBO(1.0, start=0.0, steps=10))
    check_objective(objective, linear_vae(4, 2), X)
    assert objective.elbo.step == 0


@pytest.mark.parametrize("size", [0.0, -2.0, float("nan")])
@pytest.mark.parametrize("missing", [False, True])
def test_a_size_factor_that_is_not_positive_is_named(size, missing):
    likelihood = likelihoods.Poisson(MLP(2, [], 4), size_factor=True)
    vae = VAE(
        priors.Normal(2),
        likelihoods.Missing(likelihood) if missing else likelihood,
        posteriors.Normal(MLP(4, [], (2, 2), context=1)),
    )
    x, sizes = torch.ones(6, 4), torch.ones(6, 1)
    check_pair(vae, x, sizes)
    sizes[4] = size  # beyond the rows on which the programs run
    with pytest.raises(
        ValueError, match=f"1 size factors of Poisson are not .*, {size:g} for one"
    ):
        check_pair(vae, x, sizes)


def test_a_fill_outside_of_the_support_is_told_in_a_whole_sentence():
    x = torch.ones(6, 4)
    x[0, 0] = torch.nan
    encoder = MLP(4, [], (2, 2), transform=torch.nan_to_num)
    vae = VAE(
        priors.Normal(2),
        likelihoods.Missing(likelihoods.Poisson(MLP(2, [], 4)), fill=-3),
        posteriors.Normal(encoder),
    )
    message = r"the fill -3 of Missing lies outside the support of Poisson: give a value within it"
    with pytest.raises(ValueError, match=message):
        check_objective(Trace_ELBO(), vae, x)


class MaskedTooLate(dist.Normal):
    """Scores what is missing and then leaves it out, which leaves its gradient NaN."""

    support = OrMissing(dist.constraints.real)

    def log_prob(self, value):
        return torch.where(value.isnan(), 0.0, super().log_prob(value))


class Late(likelihoods.Likelihood):
    def forward(self, z):
        return MaskedTooLate(self.network(z), 1.0).to_event(1)


def test_a_gradient_that_is_not_finite_is_named():
    encoder = MLP(4, [], (2, 2), transform=torch.nan_to_num)
    vae = VAE(priors.Normal(2), Late(MLP(2, [], 4)), posteriors.Normal(encoder))
    check_pair(vae, X)
    with pytest.raises(ValueError, match=r"network.*gets a NaN or infinite gradient: fill what"):
        check_pair(vae, X.masked_fill(torch.eye(6, 4).bool(), torch.nan))


class Binomial(likelihoods.Likelihood):
    """Whose support has a bound for each element of each datum."""

    def forward(self, z):
        return dist.Binomial(10, logits=self.network(z)).to_event(1)


def test_a_support_of_each_datum_may_have_holes():
    encoder = MLP(4, [], (2, 2), transform=torch.nan_to_num)
    likelihood = likelihoods.Missing(Binomial(MLP(2, [], 4)))
    vae = VAE(priors.Normal(2), likelihood, posteriors.Normal(encoder))
    counts = torch.randint(0, 11, (8, 4)).float().masked_fill(torch.eye(8, 4).bool(), torch.nan)
    check_pair(vae, counts)
    with pytest.raises(ValueError, match="lie outside the support of Binomial"):
        check_pair(vae, 6 * counts)
