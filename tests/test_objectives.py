"""Objectives against the closed form of a linear VAE."""

import pyro
import pytest
import torch
from linear import FALSE_ALARM, exact_halves, linear_vae
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from scipy import stats

from pyro_vae.objectives import BetaELBO


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
