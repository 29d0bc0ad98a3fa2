"""Objectives against the closed form of a linear VAE."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear import FALSE_ALARM, exact_halves, linear_vae
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from scipy import stats
from torch import nn

from pyro_vae import MLP, VAE, likelihoods, posteriors, priors
from pyro_vae.objectives import IWAE, BetaELBO, FreeBits, Renyi


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("family", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO])
def test_weighted_bound_and_gradient_are_exact_in_expectation(family, weight):
    vae, x = linear_vae(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
    reconstruction, kl = exact_halves(vae, x)
    exact = -(reconstruction - weight * kl).sum()
    parameter = vae.posterior.network.last.bias
    truth = torch.cat([exact.detach()[None], torch.autograd.grad(exact, parameter)[0]])

    objective = BetaELBO(weight, elbo=family(max_plate_nesting=1))
    draws = []
    for _ in range(600):
        vae.zero_grad()
        loss = objective.loss_and_grads(vae.model, vae.guide, x)
        draws.append(torch.cat([torch.tensor([loss]), parameter.grad]))
    draws = torch.stack(draws)
    z = (draws.mean(0) - truth) / (draws.std(0) / len(draws) ** 0.5)
    assert z.abs().max() < stats.t.isf(FALSE_ALARM / (2 * len(z)), len(draws) - 1)


def test_values_of_loss_and_differentiable_loss_are_one():
    vae, x = linear_vae(3, 2), torch.randn(4, 3)
    objective = BetaELBO(0.5)
    values = []
    for method in (objective.loss, objective.differentiable_loss, objective.loss_and_grads):
        pyro.set_rng_seed(3)
        values.append(float(torch.as_tensor(method(vae.model, vae.guide, x)).detach()))
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_the_weight_can_be_changed_between_steps():
    vae, x = linear_vae(3, 2), torch.randn(4, 3)
    objective = BetaELBO(0.0)
    losses = []
    for weight in (0.0, 1.0):
        objective.weight.fill_(weight)
        pyro.set_rng_seed(3)
        losses.append(objective.loss(vae.model, vae.guide, x))
    pyro.set_rng_seed(3)
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(Trace_ELBO().loss(vae.model, vae.guide, x), rel=1e-6)


def test_it_drops_into_svi():
    vae, x = linear_vae(3, 2), torch.randn(64, 3)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), loss=BetaELBO(2.0))
    losses = [svi.step(x) for _ in range(100)]
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.parametrize("weight", [-0.1, float("inf"), float("nan")])
def test_a_weight_that_makes_no_sense_is_refused(weight):
    with pytest.raises(ValueError, match="finite and at least 0"):
        BetaELBO(weight)


def test_a_schedule_goes_from_start_to_weight_in_its_steps():
    vae, x = linear_vae(3, 2), torch.randn(4, 3)
    scheduled = BetaELBO(2.0, start=0.5, steps=3)
    for step, weight in enumerate((0.5, 1.0, 1.5, 2.0, 2.0, 2.0)):
        losses = []
        for objective in (scheduled, BetaELBO(weight)):
            pyro.set_rng_seed(step)
            losses.append(objective.loss_and_grads(vae.model, vae.guide, x))
        assert scheduled.weight.item() == weight
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        scheduled.loss(vae.model, vae.guide, x)
        scheduled.differentiable_loss(vae.model, vae.guide, x)


def test_a_schedule_may_fall_and_reach_zero():
    vae, x = linear_vae(3, 2), torch.randn(4, 3)
    objective, weights = BetaELBO(0.0, start=1.0, steps=2), []
    for _ in range(4):
        objective.loss_and_grads(vae.model, vae.guide, x)
        weights.append(objective.weight.item())
    assert weights == [1.0, 0.5, 0.0, 0.0]


def test_a_schedule_under_svi_takes_a_step_with_each_of_its():
    vae, x = linear_vae(3, 2), torch.randn(4, 3)
    objective = BetaELBO(1.0, start=0.0, steps=4, elbo=IWAE(2))
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=objective)
    for _ in range(3):
        svi.step(x)
        svi.evaluate_loss(x)
    assert objective.weight.item() == 0.5


@pytest.mark.parametrize(
    ("weight", "schedule", "words"),
    [
        (1.0, {"start": -0.1, "steps": 10}, "finite and at least 0, not -0.1"),
        (-1.0, {"start": 0.0, "steps": 10}, "finite and at least 0, not -1.0"),
        (1.0, {"start": math.nan, "steps": 10}, "finite and at least 0, not nan"),
        (1.0, {"start": 0.0}, "start=0.0 and steps=0"),
        (1.0, {"steps": 10}, "start=None and steps=10"),
        (1.0, {"start": 0.0, "steps": -1}, "start=0.0 and steps=-1"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(weight, schedule, words):
    with pytest.raises(ValueError, match=words):
        BetaELBO(weight, **schedule)


@pytest.mark.parametrize("elbo", [IWAE, "IWAE"])
def test_what_is_no_objective_is_not_weighted(elbo):
    with pytest.raises(TypeError, match=r"weights an objective, such as IWAE\(5\).*, not .*IWAE"):
        BetaELBO(2.0, elbo=elbo)


# Free bits


def divided(vae, x):
    """The exact KL of each datum and dimension of a linear VAE."""
    loc, log_scale = vae.posterior.network(x).unbind(-2)
    return 0.5 * (loc**2 + (2 * log_scale).exp() - 1 - 2 * log_scale)


def losses_and_gradients(objective, vae, x, parameters, count=150):
    rows = []
    for _ in range(count):
        vae.zero_grad()
        loss = objective.loss_and_grads(vae.model, vae.guide, x)
        rows.append(
            torch.cat(
                [
                    torch.tensor([loss], dtype=torch.float64),
                    *[p.grad.flatten() for p in parameters],
                ]
            )
        )
    return torch.stack(rows)


def agree(draws, truth):
    """Whether the means are right, false with a probability of FALSE_ALARM where they are."""
    z = (draws.mean(0) - truth) / (draws.std(0) / len(draws) ** 0.5 + 1e-9)
    return bool(z.abs().max() < stats.t.isf(FALSE_ALARM / (2 * len(z)), len(draws) - 1))


def uneven():
    """A linear VAE whose first latent holds much, and its second little."""
    vae = linear_vae(3, 2, scale=0.7).double()
    encoder = vae.posterior.network.last
    with torch.no_grad():
        encoder.weight[0] *= 3
        encoder.weight[1] *= 0.2
        encoder.bias.copy_(torch.tensor([0.3, 0.1, -1.0, -0.1]))
    return vae


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("nats", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("particles", [1, 2])
def test_free_bits_are_a_floor_under_the_kl_of_each_dimension(nats, weight, particles):
    vae, x = uneven(), torch.randn(4, 3).double()
    kl = divided(vae, x).mean(0)
    assert kl[1] < 0.3 < kl[0] < 5  # the floors lie below, between and above
    exact = -exact_halves(vae, x)[0].sum() + weight * 4 * kl.clamp(min=nats).sum()
    parameters = list(vae.posterior.network.parameters())
    slopes = torch.autograd.grad(exact, parameters)
    truth = torch.cat([exact.detach()[None], *[slope.flatten() for slope in slopes]])
    objective = BetaELBO(weight, elbo=FreeBits(nats, particles=particles))
    assert agree(losses_and_gradients(objective, vae, x, parameters), truth)
    if weight * nats == 5.0:
        unfloored = truth - torch.cat([4 * (5 - kl).sum().detach()[None], torch.zeros(16)])
        assert not agree(losses_and_gradients(objective, vae, x, parameters), unfloored)


def test_no_gradient_of_the_kl_reaches_a_dimension_below_its_floor():
    vae, x = uneven(), torch.randn(4, 3).double()
    with torch.no_grad():
        vae.likelihood.network.last.weight[:, 1] = 0  # no gradient of the reconstruction either
    FreeBits(0.3).loss_and_grads(vae.model, vae.guide, x)
    slope = vae.posterior.network.last.bias.grad
    assert (slope[[1, 3]] == 0).all()
    assert (slope[[0, 2]] != 0).all()


@pytest.mark.parametrize("particles", [1, 3])
def test_without_floor_they_are_the_elbo_with_its_analytic_kl(particles):
    vae, x = uneven(), torch.randn(4, 3).double()
    rows = []
    for objective in (FreeBits(0.0, particles=particles), TraceMeanField_ELBO(particles, 1)):
        pyro.set_rng_seed(2)
        rows.append(losses_and_gradients(objective, vae, x, list(vae.parameters())[1:], 1)[0])
    torch.testing.assert_close(*rows)


def test_gradients_of_free_bits_are_differences_of_values():
    vae, x = uneven(), torch.randn(4, 3).double()
    bias, values = vae.posterior.network.last.bias, []
    pyro.set_rng_seed(2)
    FreeBits(0.3).loss_and_grads(vae.model, vae.guide, x)
    for index in range(4):
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                bias[index] += step
            pyro.set_rng_seed(2)
            values.append(FreeBits(0.3).loss(vae.model, vae.guide, x))
        with torch.no_grad():
            bias[index] += 1e-5
    values = torch.tensor(values, dtype=torch.float64).reshape(4, 2)
    slopes = (values[:, 0] - values[:, 1]) / 2e-5
    torch.testing.assert_close(slopes, bias.grad, rtol=1e-6, atol=1e-6)


def correlated(prior):
    """A VAE with full-rank q(z|x) of one or two dimensions, and a reconstruction of no error."""
    latent = len(prior().sample())
    vae = VAE(
        prior=prior,
        likelihood=likelihoods.Normal(MLP(latent, [], 3), scale=0.7),
        posterior=posteriors.FullRankNormal(MLP(3, [], (1 + latent, latent))),
    ).double()
    with torch.no_grad():
        vae.likelihood.network.last.weight.zero_()
        vae.posterior.network.last.weight.mul_(0.5)
    return vae


def joint_kl(vae, x):
    """KL(q || p) of each datum by quadrature over one latent or, for normals, exactly."""
    q, prior = vae.encode(x), vae.prior()
    if len(prior.event_shape) and prior.event_shape[0] == 2:
        standard = dist.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
        return torch.distributions.kl_divergence(q, standard)
    z = torch.linspace(-100, 100, 100_001).double()[:, None, None]
    log_q = q.log_prob(z)
    return torch.trapezoid(log_q.exp() * (log_q - prior.log_prob(z)), z[:, 0], dim=0)


@pytest.mark.parametrize("prior", [priors.Normal(2), priors.MixtureOfNormals(1, components=2)])
@pytest.mark.parametrize("floor", [0.0, 0.5, 2.0])
def test_where_the_kl_does_not_factorise_the_floor_is_under_the_whole(prior, floor):
    torch.manual_seed(3)
    vae, x = correlated(prior), torch.randn(2, 3).double().repeat(2000, 1)
    kl = joint_kl(vae, x[:2]).mean()
    nats = floor * kl.item()
    # One draw for each of 4,000 data: the mean of their KLs is far from the floor's corner.
    exact = -vae.decode(x.new_zeros(2, *prior().event_shape)).log_prob(x[:2]).mean()
    exact = exact + kl.clamp(min=nats)
    bias = vae.posterior.network.last.bias
    slope = torch.autograd.grad(exact, bias)[0]
    draws = losses_and_gradients(FreeBits(nats), vae, x, [bias], 100) / len(x)
    assert agree(draws, torch.cat([exact.detach()[None], slope]))
    assert (slope == 0).all() == (floor == 2.0)


class Subsampled(nn.Module):
    """``w ~ N(0, 1), z_n ~ N(w, 1), x_n ~ N(z_n, 1)``, some of the data in each step."""

    def __init__(self, size):
        super().__init__()
        self.size, self.x = size, torch.linspace(-2, 3, 10).double()
        self.slope = nn.Parameter(torch.tensor(0.6).double())

    def plate(self):
        return pyro.plate("data", 10, subsample_size=self.size, dim=-1)

    def model(self):
        w = pyro.sample("w", dist.Normal(self.x.new_zeros(()), 1.0))
        with self.plate() as rows:
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=self.x[rows])

    def guide(self):
        w = pyro.sample("w", dist.Normal(self.slope, 0.5))
        with self.plate() as rows:
            z = pyro.sample("z", dist.Normal(self.slope * self.x[rows], 0.7))
        self.drawn = w, z, rows


@pytest.mark.parametrize("size", [10, 3])
@pytest.mark.parametrize("nats", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_free_bits_of_a_subsample_count_for_all_data(size, nats, weight):
    pair = Subsampled(size)
    objective = BetaELBO(weight, elbo=FreeBits(nats))
    for _ in range(5):
        loss = objective.loss(pair.model, pair.guide)
        w, z, rows = pair.drawn
        kl = 0.5 * ((pair.slope * pair.x[rows] - w) ** 2 + 0.49 - 1) - math.log(0.7)
        kl = 10 * kl.mean().clamp(min=nats)
        kl = kl + dist.Normal(pair.slope, 0.5).log_prob(w) - dist.Normal(0, 1).log_prob(w)
        likely = 10 * dist.Normal(z, 1).log_prob(pair.x[rows]).mean()
        assert loss == pytest.approx((weight * kl - likely).item(), rel=1e-6)


def test_free_bits_keep_masks_and_latents_that_only_the_guide_has():
    vae, x = uneven(), torch.randn(4, 3).double()
    mask = torch.tensor([True, True, False, True])
    loc = torch.tensor(0.5).double().requires_grad_()

    def guide(x):
        u = pyro.sample("u", dist.Normal(loc, 1.0), infer={"is_auxiliary": True})
        with poutine.mask(mask=mask):
            vae.guide(x + 0.1 * u)

    values = []
    for objective in (FreeBits(0.0), TraceMeanField_ELBO(1, 1)):
        pyro.set_rng_seed(2)
        loss = objective.loss_and_grads(poutine.mask(vae.model, mask), guide, x)
        values.append([loss, loc.grad.item()])
        loc.grad = None
    assert values[0] == pytest.approx(values[1], rel=1e-9)


@pytest.mark.parametrize("nats", [0.0, 0.3, 5.0])
def test_data_of_free_bits_may_have_weights(nats):
    vae, x = uneven(), torch.randn(4, 3).double()
    weights = torch.tensor([0.5, 0.1, 3.0, 1.0]).double()
    kl = weights @ divided(vae, x)
    assert kl[1] < 0.3 * 4.6 < kl[0] < 5 * 4.6
    exact = -weights @ exact_halves(vae, x)[0] + kl.clamp(min=nats * 4.6).sum()
    bias = vae.posterior.network.last.bias
    truth = torch.cat([exact.detach()[None], torch.autograd.grad(exact, bias)[0]])
    vae.model, vae.guide = (poutine.scale(each, weights) for each in (vae.model, vae.guide))
    assert agree(losses_and_gradients(FreeBits(nats), vae, x, [bias]), truth)


def test_free_bits_need_one_scale_for_each_datum():
    def program(weights, x, *, seen=True):
        with pyro.plate("data", 3, dim=-2), pyro.plate("views", 2, dim=-1):
            with poutine.scale(scale=weights):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x) if seen else None

    free, weights, x = FreeBits(0.3, max_plate_nesting=2), torch.ones(3, 1), torch.ones(3, 2)
    with pytest.raises(ValueError, match="need one scale for each datum, and 'z' has several"):
        free.loss(partial(program, weights), partial(program, weights, seen=False), x)
    free.loss(partial(program, 2.0), partial(program, 2.0, seen=False), x)


def test_free_bits_need_a_plate_named_data():
    def program(x, observed):
        with pyro.plate("batch", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x) if observed else None

    with pytest.raises(ValueError, match="latents in a plate named 'data', and neither"):
        FreeBits(0.3).loss(lambda x: program(x, True), lambda x: program(x, False), torch.ones(3))


class Chain(nn.Module):
    """``z1 ~ N(0, 1), z2 ~ N(z1, 1), x ~ N(z2, 1)``, with a guide in either order."""

    def __init__(self, upwards):
        super().__init__()
        self.upwards = upwards

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(()), 1.0))
            z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
            pyro.sample("x", dist.Normal(z2, 1.0), obs=x)

    def guide(self, x):
        first, second = ("z2", "z1") if self.upwards else ("z1", "z2")
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample(first, dist.Normal(0.5 * x, 0.7))
            pyro.sample(second, dist.Normal(0.8 * z, 0.6))


def test_a_drawn_kl_below_zero_is_no_floor():
    vae, x = correlated(priors.Normal(2)), torch.randn(1, 3).double()
    with torch.no_grad():  # a posterior close to the prior, whose drawn KL has either sign
        vae.posterior.network.last.weight.mul_(0.1)
    signs = set()
    for seed in range(20):
        losses = []
        for objective in (FreeBits(0.0), Trace_ELBO(max_plate_nesting=1)):
            pyro.set_rng_seed(seed)
            losses.append(objective.loss(vae.model, vae.guide, x))
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
        likely = vae.decode(x.new_zeros(1, 2)).log_prob(x).item()  # the same for every z
        signs.add(losses[0] > -likely)
    assert len(signs) == 2


@pytest.mark.parametrize("upwards", [False, True])
def test_the_kl_of_two_latents_is_that_of_the_elbo_in_either_order(upwards):
    pair, x = Chain(upwards), torch.randn(4).double().repeat(500)
    losses = [
        torch.tensor([[objective.loss(pair.model, pair.guide, x)] for _ in range(100)]).double()
        for objective in (FreeBits(0.0), Trace_ELBO(max_plate_nesting=1))
    ]
    error = (losses[0].var() + losses[1].var()).sqrt() / 10
    assert abs(losses[0].mean() - losses[1].mean()) < stats.t.isf(FALSE_ALARM / 2, 99) * error


def test_free_bits_need_reparameterised_latents():
    def program(x, observed=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Poisson(torch.tensor(2.0)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x) if observed is None else None

    with pytest.raises(ValueError, match="FreeBits needs reparameterised draws, which 'z' has"):
        FreeBits().loss(program, lambda x: program(x, False), torch.randn(3))


@pytest.mark.parametrize("nats", [-0.1, math.inf, math.nan])
def test_free_nats_that_make_no_sense_are_refused(nats):
    with pytest.raises(ValueError, match="finite and at least 0"):
        FreeBits(nats)


@pytest.mark.parametrize(
    ("objective", "bound"),
    [
        (BetaELBO(1.0), True),
        (BetaELBO(4.0), True),
        (BetaELBO(0.5), False),
        (BetaELBO(1.0, start=0.0, steps=5), True),
        (BetaELBO(0.5, start=2.0, steps=5), False),
        (BetaELBO(1.0, elbo=Renyi(-1.0)), False),
        (BetaELBO(1.0, elbo=Renyi(0.5)), True),
    ],
)
def test_an_objective_knows_whether_it_is_a_bound(objective, bound):
    assert objective.is_bound == bound
