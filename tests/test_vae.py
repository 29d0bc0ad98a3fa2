"""The VAE as a Pyro program: its bound, gradient and posterior against closed forms."""

import copy
import subprocess
import sys

import numpy as np
import pyro
import pytest
import torch
import zuko
from linear import FALSE_ALARM, exact_halves, linear_vae
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from scipy import stats
from sklearn.decomposition import PCA
from torch import nn
from torch.distributions import kl_divergence

from pyro_vae import MLP, VAE, ConvDecoder, ConvEncoder, data, fit, likelihoods, posteriors, priors
from pyro_vae.testing import check_pair
from pyro_vae.vae import as_pyro


def gradients(vae, objective, x):
    vae.zero_grad()
    objective.loss_and_grads(vae.model, vae.guide, x)
    return torch.cat([p.grad.flatten() for p in vae.parameters()])


@pytest.mark.parametrize("family", [Trace_ELBO, TraceMeanField_ELBO])
def test_bound_and_gradient_of_a_linear_vae_are_exact_in_expectation(family):
    vae, x = linear_vae(4, 2).double(), torch.randn(5, 4, dtype=torch.float64)
    reconstruction, kl = exact_halves(vae, x)
    exact = -(reconstruction - kl).sum()
    slopes = torch.autograd.grad(exact, list(vae.parameters()))
    truth = torch.cat([exact.detach()[None], *(slope.flatten() for slope in slopes)])

    objective = family(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    draws = torch.stack(
        [
            torch.cat([torch.tensor([objective.loss(vae.model, vae.guide, x)]), gradient])
            for gradient in (gradients(vae, objective, x) for _ in range(400))
        ]
    )
    error = draws.std(0) / len(draws) ** 0.5
    known = error < 1e-12  # parts without noise, such as the gradient of an analytic KL
    assert torch.allclose(draws.mean(0)[known], truth[known])
    z = (draws.mean(0) - truth)[~known] / error[~known]
    assert z.abs().max() < stats.t.isf(FALSE_ALARM / (2 * len(z)), len(draws) - 1)


def test_reparameterised_gradient_is_the_slope_under_common_random_numbers(vae):
    vae, x = vae.double(), torch.bernoulli(torch.full((6, 1, 8, 8), 0.5, dtype=torch.float64))
    objective, step = Trace_ELBO(), 1e-5

    def loss():
        pyro.set_rng_seed(1)
        return objective.loss(vae.model, vae.guide, x)

    pyro.set_rng_seed(1)
    gradient = gradients(vae, objective, x)
    direction = torch.randn_like(gradient)
    values = []
    for sign in (1, -1):
        moved = copy.deepcopy(vae.state_dict())
        start = nn.utils.parameters_to_vector(vae.parameters()).detach()
        nn.utils.vector_to_parameters(start + sign * step * direction, vae.parameters())
        values.append(loss())
        vae.load_state_dict(moved)
    # A central difference errs by step^2 times a third derivative: about 1e-8 of the slope.
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx(float(gradient @ direction), rel=1e-5)


def test_trained_linear_vae_reaches_the_optimum_of_probabilistic_pca():
    x = data.load("digits").train.x.flatten(1)
    optimum = PCA(3).fit(x.numpy()).score(x.numpy())
    vae = linear_vae(64, 3)
    vae.likelihood.centre(x.mean(0))
    nn.init.zeros_(vae.likelihood.log_scale)  # 800 steps are too few from a narrow start
    fit(
        vae,
        data.split(x, validation=0, test=0),
        objective=TraceMeanField_ELBO(max_plate_nesting=1),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.03),
        schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800),
        epochs=800,
        batch_size=len(x),
        warmup=0,
        progress=False,
    )
    with torch.no_grad():
        reconstruction, kl = exact_halves(vae, x)
    # The bound is tight at the optimum (Lucas et al., 2019). The noise of 800 stochastic steps
    # leaves about .02 nat to it, and scikit-learn's divisor N - 1 moves it by D/2N = .02.
    assert float((reconstruction - kl).mean()) == pytest.approx(optimum, abs=0.05)


def test_nuts_on_the_model_finds_the_posterior_of_a_linear_vae():
    vae, x = linear_vae(4, 2, scale=0.5), torch.tensor([[1.0, -1.0, 0.5, 2.0]])
    weight, bias = (each.detach().double() for each in vae.likelihood.network.last.parameters())
    precision = torch.eye(2) + weight.T @ weight / 0.25
    mean = torch.linalg.solve(precision, weight.T @ (x[0].double() - bias) / 0.25)
    chain = MCMC(NUTS(vae.model), num_samples=600, warmup_steps=200, disable_progbar=True)
    chain.run(x)
    z = chain.get_samples()["z"][:, 0].double()
    error = (torch.linalg.inv(precision).diagonal() / 100).sqrt()  # at least 100 effective draws
    assert ((z.mean(0) - mean) / error).abs().max() < stats.norm.isf(FALSE_ALARM / 4)


def test_predictive_without_data_draws_from_the_prior_and_with_data_from_the_posterior(vae):
    x = torch.ones(5, 1, 8, 8)
    prior = Predictive(vae.model, num_samples=2000)(size=5)["z"]
    assert stats.kstest(prior.flatten().numpy(), "norm").pvalue > FALSE_ALARM
    free = poutine.uncondition(vae.model)
    drawn = Predictive(free, guide=vae.guide, num_samples=400)(x)
    q = vae.encode(x)
    z = (drawn["z"] - q.mean) / q.stddev
    assert stats.kstest(z.detach().flatten().numpy(), "norm").pvalue > FALSE_ALARM
    assert not torch.equal(drawn["x"][0], x)


def test_a_draw_of_the_vae_is_a_draw_of_its_decoder():
    vae = linear_vae(3, 2, scale=0.7)
    x = vae.sample(20_000).double()
    weight, bias = (each.detach().double() for each in vae.likelihood.network.last.parameters())
    law = stats.multivariate_normal(bias, weight @ weight.T + 0.49 * torch.eye(3))
    whitened = np.linalg.solve(np.linalg.cholesky(law.cov), (x - bias).numpy().T)
    assert stats.kstest(whitened.flatten(), "norm").pvalue > FALSE_ALARM


def moves(vae, objective=None, **batch):
    """Whether each parameter changes under one step of Pyro's own SVI."""
    x = batch.get("x", torch.ones(4, 1, 8, 8))
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    optimizer = pyro.optim.Adam({"lr": 1e-2})
    SVI(vae.model, vae.guide, optimizer, loss=objective or Trace_ELBO()).step(x)
    return {name for name, p in vae.named_parameters() if not torch.equal(p, before[name])}


def everything(vae):
    return {name for name, _ in vae.named_parameters()}


def test_a_second_vae_in_the_process_trains(vae):
    other = copy.deepcopy(vae)
    nn.init.normal_(other.posterior.network.last.weight)
    assert moves(vae) == everything(vae)
    assert moves(other) == everything(other)


def test_a_copy_trains_by_itself(vae):
    moves(vae)
    twin = copy.deepcopy(vae)
    kept = {name: p.detach().clone() for name, p in vae.named_parameters()}
    assert moves(twin) == everything(twin)
    assert all(torch.equal(p, kept[name]) for name, p in vae.named_parameters())


def test_assigned_weights_train(vae):
    moves(vae)
    vae.load_state_dict({k: v.clone() for k, v in vae.state_dict().items()}, assign=True)
    assert moves(vae) == everything(vae)


def test_a_frozen_network_stays_and_the_rest_trains(vae):
    vae.likelihood.requires_grad_(False)
    assert moves(vae) == {name for name in everything(vae) if name.startswith("posterior")}
    assert not any(p.requires_grad for p in vae.likelihood.parameters())


def test_weights_that_are_not_contiguous_train():
    vae = VAE(
        prior=priors.Normal(2),
        likelihood=likelihoods.Bernoulli(ConvDecoder(2, [6, 5], (1, 8, 8))),
        posterior=posteriors.Normal(ConvEncoder((1, 8, 8), [5, 6], (2, 2))),
    ).to(memory_format=torch.channels_last)
    weight = vae.posterior.network.convolutions[2].weight
    assert not weight.is_contiguous()
    assert moves(vae) == everything(vae)


def test_the_param_store_stays_empty(vae):
    moves(vae)
    assert not dict(pyro.get_param_store().items())


def test_a_pyro_module_is_refused_by_name(vae):
    network = PyroModule[nn.Linear](2, 64)
    with pytest.raises(TypeError, match=r"'likelihood.network' is a PyroModule"):
        VAE(vae.prior, likelihoods.Bernoulli(network), vae.posterior)


def test_a_part_that_returns_no_distribution_is_refused(vae):
    with pytest.raises(TypeError, match="must return a distribution, not a Tensor"):
        VAE(nn.Identity(), vae.likelihood, vae.posterior).sample(1, torch.zeros(1, 2))


@pytest.mark.parametrize("family", ["Normal", "Laplace"])
def test_coerced_distributions_keep_value_and_analytic_kl(family):
    q, p = (getattr(torch.distributions, family)(torch.randn(3), scale) for scale in (0.5, 2.0))
    coerced = as_pyro(q), as_pyro(p)
    assert torch.equal(kl_divergence(*coerced), kl_divergence(q, p))
    assert type(coerced[0]).__name__ == family
    assert as_pyro(coerced[0]) is coerced[0]


def test_a_zuko_flow_is_a_prior_as_it_is():
    flow = zuko.flows.NSF(2, transforms=1, hidden_features=[8])
    vae = VAE(flow, likelihoods.Normal(MLP(2, [], 4), scale=1.0), linear_vae(4, 2).posterior)
    x = torch.randn(6, 4)
    check_pair(vae, x)
    assert moves(vae, x=x) == everything(vae)
    chain = MCMC(NUTS(vae.model), num_samples=2, warmup_steps=2, disable_progbar=True)
    chain.run(x[:1])
    assert chain.get_samples()["z"].isfinite().all()
    # A draw is scored as the flow scores it, whether or not the draw was its own.
    own = as_pyro(flow())
    z = own()
    assert torch.allclose(own.log_prob(z), flow().log_prob(z.clone()), atol=1e-4)


def test_context_reaches_all_three_parts():
    class ByLabel(priors.Prior):
        def forward(self, label):
            return torch.distributions.Independent(
                torch.distributions.Normal(label[:, :2] * 3, 1.0), 1
            )

    vae = VAE(
        prior=ByLabel(),
        likelihood=likelihoods.Normal(MLP(2, [], 4, context=3), scale=0.1),
        posterior=posteriors.Normal(MLP(4, [], (2, 2), context=3)),
    )
    label = torch.eye(3).repeat(2, 1)
    x = vae.sample(6, label)
    trace = poutine.trace(poutine.replay(vae.model, poutine.trace(vae.guide).get_trace(x, label)))
    nodes = trace.get_trace(x, label).nodes
    assert torch.equal(nodes["z"]["fn"].base_dist.loc, label[:, :2] * 3)
    assert torch.equal(nodes["x"]["fn"].mean, vae.decode(nodes["z"]["value"], label).mean)
    assert moves_with_context(vae, x, label)


def moves_with_context(vae, x, label):
    before = vae.likelihood.network.last.weight[:, 2:].detach().clone()
    SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO()).step(x, label)
    return bool((vae.likelihood.network.last.weight[:, 2:] != before).all())


def test_reconstruction_is_the_mean_of_the_decoder_at_a_draw_of_the_encoder(vae):
    x = torch.ones(3, 1, 8, 8)
    pyro.set_rng_seed(5)
    made = vae.reconstruct(x)
    pyro.set_rng_seed(5)
    assert torch.equal(made, vae.decode(vae.encode(x).sample()).mean)


@pytest.mark.parametrize("particles", [1, 7])
def test_vectorised_and_looped_particles_agree_in_expectation(vae, particles):
    x = torch.bernoulli(torch.full((4, 1, 8, 8), 0.5))
    losses = []
    for vectorized in (False, True):
        objective = Trace_ELBO(
            num_particles=particles, vectorize_particles=vectorized, max_plate_nesting=1
        )
        losses.append([objective.loss(vae.model, vae.guide, x) for _ in range(300)])
    assert stats.ttest_ind(*losses).pvalue > FALSE_ALARM


def test_import_changes_no_global_state():
    program = """
import numpy, pyro, random, torch
def state():
    return (
        torch.distributions.Distribution._validate_args,
        pyro.distributions.is_validation_enabled(),
        torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(),
        torch.random.get_rng_state().tolist(), random.getstate(),
        numpy.random.get_state()[1].tolist(), list(pyro.get_param_store().keys()),
        torch.backends.mkldnn.enabled, torch.get_float32_matmul_precision(),
        list(pyro.poutine.runtime._PYRO_STACK), pyro.settings.get(),
    )
before = state()
import pyro_vae, pyro_vae.cli
assert state() == before
"""
    subprocess.run([sys.executable, "-c", program], check=True)
