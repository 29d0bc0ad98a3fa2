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
from pyro_vae.objectives import IWAE, BetaELBO, FreeBits, Renyi, WakeSleep


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


@pytest.mark.parametrize("dim", [-1, -2])
def test_free_bits_have_no_floor_for_data_that_are_masked(dim):
    vae, x = uneven(), torch.randn(4, 3).double()
    seen = torch.tensor([True, True, True, False])  # the last, which draws after all others

    def program(mask, x, *, modelled=True):
        x = x if dim == -1 else x[:, None]
        with pyro.plate("data", len(x), dim=dim), poutine.mask(mask=mask):
            z = pyro.sample("z", vae.prior() if modelled else vae.posterior(x))
            pyro.sample("x", vae.likelihood(z), obs=x) if modelled else None

    losses = []
    for mask, rows in ((seen if dim == -1 else seen[:, None], x), (True, x[:3])):
        pyro.set_rng_seed(2)
        model, guide = partial(program, mask), partial(program, mask, modelled=False)
        losses.append(FreeBits(0.3, max_plate_nesting=-dim).loss(model, guide, rows))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


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


def test_averaged_weights_of_a_weighted_kl_exceed_the_likelihood():
    """``E_q[w] = E_p[p(x|z) (p(z)/q(z))^(b-1)]``, here above p(x): why it is called no bound."""
    vae, x = linear_vae(1, 1, scale=1.0), torch.full((1, 1), 0.5)
    with torch.no_grad():
        vae.likelihood.network.last.weight.fill_(0.3)
        vae.likelihood.network.last.bias.fill_(0.0)
        vae.posterior.network.last.weight.fill_(0.0)
        vae.posterior.network.last.bias.copy_(torch.tensor([0.0, math.log(0.6)]))
    objective = BetaELBO(2.0, elbo=IWAE(50))
    values = [-objective.loss(vae.model, vae.guide, x) for _ in range(300)]
    exact = dist.Normal(0.0, 1.09**0.5).log_prob(x).item()
    assert sum(values) / 300 - 5 * stats.sem(values) > exact


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
        (BetaELBO(2.0, elbo=IWAE(1)), True),
        (BetaELBO(2.0, elbo=IWAE(5)), False),
        (BetaELBO(2.0, elbo=Renyi(1.0)), True),
    ],
)
def test_an_objective_knows_whether_it_is_a_bound(objective, bound):
    assert objective.is_bound == bound


# Wake-sleep


def dreamt_exactly(vae, rows):
    """E[log q(z|x)] under p(z) p(x|z) of a linear VAE, whose moments are known."""
    decoder, encoder = vae.likelihood.network.last, vae.posterior.network.last
    w, b = decoder.weight.detach(), decoder.bias.detach()
    noise = vae.decode(torch.zeros(1, w.shape[1]).to(w)).base_dist.variance[0].detach()
    latent = w.shape[1]
    v, (c, log_scale) = encoder.weight[:latent], encoder.bias.unflatten(0, (2, latent))
    # z - Vx - c = (I - VW) z - (Vb + c) - V e, with independent z and e.
    mixed = torch.eye(latent).to(w) - v @ w
    squares = mixed.square().sum(-1) + (v @ b + c) ** 2 + (v**2 * noise).sum(-1)
    score = squares / (2 * log_scale).exp() + math.log(2 * math.pi) + 2 * log_scale
    return -0.5 * rows * score.sum()


def test_wake_and_sleep_gradients_are_exact_in_expectation():
    vae, x = linear_vae(3, 2, scale=0.7).double(), torch.randn(4, 3, dtype=torch.float64)
    decoder, encoder = vae.likelihood.network.last, vae.posterior.network.last
    reconstruction, kl = exact_halves(vae, x)
    exact = [(kl - reconstruction).sum().detach()[None]]
    exact += torch.autograd.grad(-reconstruction.sum(), [decoder.weight, decoder.bias])
    exact += torch.autograd.grad(-dreamt_exactly(vae, 4), [encoder.weight, encoder.bias])
    exact[3] = exact[3][:2]  # of the means: the moments above are those of a constant scale
    rows = []
    for _ in range(2000):
        vae.zero_grad()
        loss = WakeSleep().loss_and_grads(vae.model, vae.guide, x)
        slopes = [decoder.weight, decoder.bias, encoder.weight, encoder.bias]
        slopes = [each.grad for each in slopes]
        slopes[2] = slopes[2][:2]
        rows.append(torch.cat([torch.tensor([loss]), *[each.flatten() for each in slopes]]))
    assert agree(torch.stack(rows), torch.cat([each.flatten() for each in exact]))


def test_both_phases_are_those_written_by_hand_from_the_same_draws():
    vae, x = (
        VAE(
            priors.Normal(2, learned=True),
            likelihoods.Normal(MLP(2, [5], 3), scale=0.5),
            posteriors.Normal(MLP(3, [5], (2, 2))),
        ),
        torch.randn(40, 3),
    )
    pyro.set_rng_seed(1)
    loss = WakeSleep().loss_and_grads(vae.model, vae.guide, x)
    found = [each.grad for each in vae.parameters()]

    def score(value, loc, scale):
        return torch.distributions.Normal(loc, scale).log_prob(value).sum()

    pyro.set_rng_seed(1)
    prior, decoder, encoder = vae.prior().base_dist, vae.likelihood.network, vae.posterior.network
    loc, log_scale = encoder(x).unbind(-2)
    z = (loc + log_scale.exp() * torch.randn(40, 2)).detach()
    awake = score(z, prior.loc, prior.scale) + score(x, decoder(z), 0.5)
    bound = awake.detach() - score(z, loc, log_scale.exp()).detach()
    with torch.no_grad():
        z = prior.loc + prior.scale * torch.randn(40, 2)
        dream = decoder(z) + 0.5 * torch.randn(40, 3)
    loc, log_scale = encoder(dream).unbind(-2)
    asleep = score(z, loc, log_scale.exp())
    truth = torch.autograd.grad(-awake - asleep, list(vae.parameters()))
    assert loss == pytest.approx(-bound.item(), rel=1e-5)
    for one, other in zip(found, truth, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)  # float32 sums of 40 data


def test_the_value_of_wake_sleep_is_that_of_the_bound():
    vae, x = linear_vae(3, 2), torch.randn(4, 3)
    values = []
    for objective in (Trace_ELBO(2), WakeSleep(particles=2)):
        pyro.set_rng_seed(3)
        values.append(objective.loss(vae.model, vae.guide, x))
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_a_latent_for_all_data_enters_as_in_the_elbo_and_is_dreamt_with():
    x = torch.randn(30)
    named = {"m": 0.3, "s": -0.5, "a": 0.4, "c": 0.1, "d": -0.2}
    values = {name: nn.Parameter(torch.tensor(value)) for name, value in named.items()}

    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        m, s, a, c, d = (pyro.param(name, value) for name, value in values.items())
        pyro.sample("w", dist.Normal(m, s.exp()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(a * x + c, d.exp()))

    pyro.set_rng_seed(1)
    WakeSleep().loss_and_grads(model, guide, x)
    store = pyro.get_param_store()
    found = [store[name].unconstrained().grad for name in named]

    pyro.set_rng_seed(1)
    law = torch.distributions.Normal
    m, s, a, c, d = values.values()
    w = m + s.exp() * torch.randn(())
    z = (a * x + c + d.exp() * torch.randn(30)).detach()
    total = law(0, 1).log_prob(w) - law(m, s.exp()).log_prob(w) + law(w, 1).log_prob(z).sum()
    dreamt = w.detach() + torch.randn(30)
    x = dreamt + torch.randn(30)
    total = total + law(a * x + c, d.exp()).log_prob(dreamt).sum()
    truth = torch.autograd.grad(-total, list(values.values()))
    assert torch.allclose(torch.stack(found), torch.stack(truth), rtol=1e-4, atol=1e-4)


class Watching(nn.Module):
    """A linear encoder that keeps what it saw last."""

    def __init__(self):
        super().__init__()
        self.inner, self.seen = nn.Linear(3, 4), None

    def forward(self, x):
        self.seen = x
        return self.inner(x.nan_to_num()).unflatten(-1, (2, 2))


def test_a_dream_has_holes_where_the_data_have_them():
    vae = VAE(
        priors.Normal(2),
        likelihoods.Missing(likelihoods.Normal(MLP(2, [], 3), scale=1.0)),
        posteriors.Normal(Watching()),
    )
    x = torch.tensor([[1.0, torch.nan, 2.0], [torch.nan, torch.nan, 0.5]])
    WakeSleep().loss_and_grads(vae.model, vae.guide, x)
    seen = vae.posterior.network.seen
    assert torch.equal(seen.isnan(), x.isnan())
    assert (seen != x).all()  # what is there was dreamt


@pytest.mark.parametrize(("weight", "scale"), [(0.0, 1.0), (3.0, 1.0), (1.0, 2.5)])
def test_sleep_counts_data_by_their_scale_and_knows_no_weight(weight, scale):
    vae, x = linear_vae(3, 2), torch.randn(4, 3)

    def model(x):
        with pyro.poutine.scale(scale=scale):
            return vae.model(x)

    def guide(x):
        with pyro.poutine.scale(scale=scale):
            return vae.guide(x)

    slopes = []
    for objective, programs in (
        (WakeSleep(), (vae.model, vae.guide)),
        (BetaELBO(weight, elbo=WakeSleep()), (model, guide)),
    ):
        vae.zero_grad()
        pyro.set_rng_seed(1)
        objective.loss_and_grads(*programs, x)
        slopes.append(vae.posterior.network.last.weight.grad)
    assert torch.allclose(scale * slopes[0], slopes[1], rtol=1e-5)


def test_wake_sleep_refuses_what_it_cannot_dream():
    def observes(*names, width=4):
        def model(x):
            with pyro.plate("data", width):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                for name in names:
                    pyro.sample(name, dist.Normal(z, 1.0), obs=x[:width])

        return model

    def guide(x, *more, width=4):
        with pyro.plate("data", width):
            for name in ("z", *more):
                pyro.sample(name, dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    x = torch.randn(4)
    with pytest.raises(ValueError, match="observes 'x', 'y': hand anything else on as context"):
        WakeSleep().loss_and_grads(observes("x", "y"), guide, x)
    with pytest.raises(ValueError, match="observes 'images'"):
        WakeSleep().loss_and_grads(observes("images"), guide, x)
    with pytest.raises(ValueError, match=r"of shape \(2,\) where the data have \(4,\)"):
        WakeSleep().loss_and_grads(observes("x", width=2), partial(guide, width=2), x)
    with (
        pytest.raises(ValueError, match="'u' is one of the guide alone"),
        pytest.warns(UserWarning, match="vars in guide but not model"),
    ):
        WakeSleep().loss_and_grads(observes("x"), lambda x: guide(x, "u"), x)
