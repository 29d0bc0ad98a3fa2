import contextlib
import copy
import math
import warnings
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributions.constraints as constraints
from pyro import poutine
from pyro.infer import (
    SVI,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.optim import SGD, Adam
from torch.utils import _pytree as pytree

from pyro_vae import (
    MLP,
    VAE,
    CompiledSVI,
    HierarchicalVAE,
    bound,
    likelihoods,
    posteriors,
    priors,
)
from pyro_vae.capture import _log1p
from pyro_vae.objectives import IWAE, BetaELBO, FreeBits, Renyi, WakeSleep
from pyro_vae.optimizers import optimizer_of, update
from pyro_vae.svi import mode_for
from pyro_vae.vae import declare

X = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.2, -0.3], [0.1, 0.9, -1.2], [2.0, 0.3, 0.7]])
STEP = partial(SGD, lr=1e-3)


@pytest.fixture(autouse=True)
def _store():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


# Programs of every kind: each makes a model and a guide over X, from the present random state.


def plain_vae():
    vae = VAE(
        priors.Normal(2),
        likelihoods.Normal(MLP(2, [5], 3)),
        posteriors.Normal(MLP(3, [5], (2, 2))),
    )
    return vae.model, vae.guide


def vamp():
    posterior = posteriors.FullRankNormal(MLP(3, [5], posteriors.FullRankNormal.outputs(2)))
    vae = VAE(
        priors.VampPrior(posterior, X, components=3),
        likelihoods.StudentT(MLP(2, [5], 3)),
        posterior,
    )
    return vae.model, vae.guide


def flows():
    encoder = MLP(3, [5], posteriors.Flow.outputs(2, features=4))
    vae = VAE(
        priors.Flow(2, transforms=1, hidden=[8]),
        likelihoods.Laplace(MLP(2, [5], 3)),
        posteriors.Flow(encoder, 2, features=4, hidden=[8]),
    )
    return vae.model, vae.guide


def two_layers():
    vae = HierarchicalVAE(
        [priors.Normal(2), posteriors.Normal(MLP(2, [4], (2, 3)))],
        likelihoods.Normal(MLP(3, [5], 3)),
        [
            posteriors.Normal(MLP(3, [4], (2, 2))),
            posteriors.Normal(MLP(3, [4], (2, 3), context=2)),
        ],
    )
    return vae.model, vae.guide


class Noisy(nn.Module):
    """A network with batch normalisation and dropout."""

    def __init__(self, inputs, *output):
        super().__init__()
        self.before, self.norm = nn.Linear(inputs, 6), nn.BatchNorm1d(6)
        self.drop, self.after = nn.Dropout(0.3), nn.Linear(6, math.prod(output))
        self.output = output

    def forward(self, x):
        return self.after(self.drop(self.norm(self.before(x)).relu())).unflatten(-1, self.output)


def noisy():
    vae = VAE(priors.Normal(2), likelihoods.Normal(Noisy(2, 3)), posteriors.Normal(Noisy(3, 2, 2)))
    return vae.model, vae.guide


def stored_modules():
    encoder, decoder = nn.Linear(3, 4), nn.Linear(2, 3)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


def constrained():
    def model(x):
        scale = pyro.param("scale", torch.ones(3), constraint=constraints.positive)
        simplex = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
        mean = pyro.sample("mean", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            law = dist.Normal(mean * simplex, scale / (1 + rate)).to_event(1)
            pyro.sample("x", law, obs=x)

    def guide(x):
        loc = pyro.param("loc", lambda: torch.randn(3))
        shape = pyro.param("shape", torch.tensor(2.0), constraint=constraints.greater_than(1))
        pyro.sample("mean", dist.Normal(loc, 0.3).to_event(1))
        pyro.sample("rate", dist.LogNormal(shape.log(), 0.2))

    return model, guide


def discrete():
    def model(x):
        probs = pyro.param("probs", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
        means = pyro.param("means", torch.tensor([[-1.0, 0.0, 1.0], [1.0, 0.5, 0.0]]))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(probs))
            pyro.sample("x", dist.Normal(means[k], 1.0).to_event(1), obs=x)

    def guide(x):
        logits = pyro.param("logits", torch.zeros(3, 2))
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=x @ logits))

    return model, guide


def subsampled():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", 3, dim=-1), pyro.plate("data", len(x), 2, dim=-2) as rows:
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[rows])

    def guide(x):
        mean = pyro.param("mean", torch.tensor(0.3))
        pyro.sample("loc", dist.Normal(mean, 0.5))
        pyro.plate("data", len(x), 2, dim=-2)

    return model, guide


def masked():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        half, some = pyro.poutine.scale(scale=0.5), pyro.poutine.mask(mask=x[:, 0] > 0.3)
        with pyro.plate("data", len(x)), half, some:
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x):
        mean = pyro.param("mean", torch.zeros(3))
        pyro.sample("loc", dist.Normal(mean, 0.5).to_event(1))

    return model, guide


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.weights = PyroSample(dist.Normal(torch.zeros(2), 1.0).to_event(1))
        self.scale = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def forward(self, x):
        mean = x[:, :2] @ self.weights
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, self.scale), obs=x[:, 2])


def pyro_module():
    model = Regression()
    return model, AutoDiagonalNormal(model)


PROGRAMS = {
    each.__name__: each
    for each in (
        plain_vae, vamp, flows, two_layers, noisy, stored_modules, constrained, discrete,
        subsampled, masked, pyro_module,
    )
}  # fmt: skip
ELBOS = {
    "Trace_ELBO": lambda: Trace_ELBO(max_plate_nesting=2),
    "Trace_ELBO, 3 in turn": lambda: Trace_ELBO(3, max_plate_nesting=2),
    "TraceGraph_ELBO": lambda: TraceGraph_ELBO(max_plate_nesting=2),
    "TraceMeanField_ELBO": lambda: TraceMeanField_ELBO(max_plate_nesting=2),
    "BetaELBO": lambda: BetaELBO(2.0, start=0.0, steps=2),
    "FreeBits": lambda: FreeBits(0.3),
    "IWAE": lambda: IWAE(4),
    "IWAE, doubly": lambda: IWAE(4, doubly_reparameterised=True),
    "Renyi": lambda: Renyi(0.5, particles=3),
    "WakeSleep": lambda: WakeSleep(particles=2, max_plate_nesting=2),
}
# Objectives for which a program is none, by their own words.
ILL = {
    ("discrete", "TraceMeanField_ELBO"), ("discrete", "FreeBits"), ("discrete", "IWAE, doubly"),
    ("noisy", "IWAE"), ("noisy", "IWAE, doubly"), ("noisy", "Renyi"),  # batch norm's dimensions
    ("stored_modules", "IWAE, doubly"), ("subsampled", "FreeBits"), ("subsampled", "IWAE"),
    ("subsampled", "IWAE, doubly"), ("subsampled", "Renyi"), ("subsampled", "BetaELBO"),
    ("constrained", "IWAE, doubly"), ("masked", "IWAE, doubly"), ("pyro_module", "IWAE, doubly"),
    ("vamp", "IWAE, doubly"),
}  # fmt: skip


def trained(program, elbo, mode, *, seed=1, steps=3):
    """Losses of some steps, gradients of the first, and parameters after them."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, guide = PROGRAMS[program]()
    svi = CompiledSVI(model, guide, STEP, ELBOS[elbo](), mode=mode)
    losses = [svi.loss_and_grads(X)]
    gradients = [p.grad for p in svi._parameters.values()]
    gradients = [None if g is None else g.clone() for g in gradients]
    losses += [svi.step(X) for _ in range(steps)]
    losses.append(svi.evaluate_loss(X))
    assert svi.mode == mode
    return [loss.item() for loss in losses], gradients, list(svi._parameters.values())


@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_captured_program_has_the_numbers_of_pyro(program, elbo):
    if (program, elbo) in ILL:
        pytest.skip("no objective for this program")
    seed = sum(map(ord, program + elbo))  # another one for each pair
    ours, gradients, parameters = trained(program, elbo, "captured", seed=seed)
    losses, expected, truth = trained(program, elbo, "eager", seed=seed)
    assert len(gradients) == len(expected) > 0
    for one, other in zip([*gradients, *parameters], [*expected, *truth], strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    # Rounding of sums of a few dozen float32 terms, of which the largest is about 100.
    assert ours == pytest.approx(losses, rel=1e-6, abs=1e-4)


@pytest.mark.parametrize(
    ("program", "elbo"), [("noisy", "Trace_ELBO"), ("discrete", "TraceGraph_ELBO")]
)
def test_a_compiled_program_has_them_to_rounding(program, elbo):
    ours, gradients, parameters = trained(program, elbo, "compiled")
    losses, expected, truth = trained(program, elbo, "eager")
    for one, other in zip([*gradients, *parameters], [*expected, *truth], strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)
    assert ours == pytest.approx(losses, rel=1e-5)


def begun(program):
    """A program whose parameters are there, so that the first step draws none of them."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide = program()
    for each in (guide, model):
        each(X)
    pyro.set_rng_seed(3)
    return model, guide


@pytest.mark.parametrize("mode", ["captured", "compiled"])
def test_a_tensor_given_twice_is_two_arguments(mode):
    def model(x, y):
        pyro.sample(
            "x", dist.Normal(2 * x.sum() - 3 * y.sum() + held.sum(), 1.0), obs=torch.ones(())
        )

    def guide(x, y):
        pyro.param("loc", torch.zeros(()))

    held, other = torch.ones(3), torch.zeros(3)
    pyro.clear_param_store()
    svi = CompiledSVI(model, guide, STEP, Trace_ELBO(max_plate_nesting=1), mode=mode)
    for x, y in ((held, held), (held, other), (other, held)):  # of one graph
        mean = 2 * x.sum() - 3 * y.sum() + held.sum()
        truth = -dist.Normal(mean, 1.0).log_prob(torch.ones(())).item()
        assert svi.evaluate_loss(x, y).item() == pytest.approx(truth, rel=1e-6)
    assert len(svi._runs) == 1


@pytest.mark.parametrize("mode", ["eager", "captured", "compiled"])
def test_one_gradient_of_two_parameters_is_two_tensors(mode):
    def model(x):
        loc = pyro.param("one", torch.zeros(3)) + pyro.param("other", torch.ones(3))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    svi = CompiledSVI(model, nothing, STEP, Trace_ELBO(max_plate_nesting=1), mode=mode)
    svi.loss_and_grads(X)
    one, other = (each.grad for each in svi._parameters.values())
    assert torch.equal(one, (1 - X).sum(0))
    one.zero_()  # as clipping writes to it
    assert torch.equal(other, (1 - X).sum(0))


@pytest.mark.parametrize("mode", ["eager", "captured"])
def test_its_steps_are_those_of_pyro(mode):
    ends = []
    for make in (SVI, partial(CompiledSVI, mode=mode)):
        svi = make(
            *begun(constrained), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(max_plate_nesting=1)
        )
        losses = [float(svi.step(X)) for _ in range(20)]
        ends.append((losses, {name: p.detach() for name, p in pyro.get_param_store().items()}))
    # One fused Adam rounds otherwise than one for each parameter.
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4)
    assert ends[0][1].keys() == ends[1][1].keys()
    for name, value in ends[0][1].items():
        assert torch.allclose(value, ends[1][1][name], rtol=1e-4, atol=1e-5)


def test_runs_end_within_the_noise_of_seeds(digits):
    """Five epochs of the digits, of pyro.infer.SVI and captured, from five seeds each."""

    def end(make, seed):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        vae = VAE(
            priors.Normal(2),
            likelihoods.Bernoulli(MLP(2, [32], (1, 8, 8))),
            posteriors.Normal(MLP((1, 8, 8), [32], (2, 2))),
        )
        adam = pyro.optim.Adam({"lr": 3e-3})
        svi = make(vae.model, vae.guide, adam, Trace_ELBO(max_plate_nesting=1))
        for _ in range(5):
            for batch in digits.train.batches(128, shuffle=True):
                svi.step(*batch)
        fixed = digits.validation.batches(180, torch.Generator().manual_seed(0))
        return float(bound(vae, fixed, particles=10).elbo.mean())

    truth = torch.tensor([end(SVI, seed) for seed in range(5)])
    ours = torch.tensor([end(partial(CompiledSVI, mode="captured"), s) for s in range(5, 10)])
    # A t statistic of 8 degrees of freedom: above 5.04 with probability 1e-3.
    error = ((truth.var() + ours.var()) / 5).sqrt()
    assert abs(truth.mean() - ours.mean()) < 5.04 * error


# What is an input of a graph, and what is not


def weighted(x, weight, flip=False, name="x"):
    with pyro.plate("data", len(x)):
        mean = pyro.param("mean", torch.zeros(3))
        mean = -mean if flip else mean
        with pyro.poutine.scale(scale=weight):
            pyro.sample(name, dist.Normal(mean + 1, 1.0).to_event(1), obs=x)


def nothing(*_, **__):
    """A guide without latents."""


def both(model, guide, calls, mode="captured"):
    """Losses of calls, captured and eager, and the captured one's number of graphs."""
    losses = []
    for each in (mode, "eager"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = CompiledSVI(model, guide, STEP, Trace_ELBO(max_plate_nesting=1), mode=each)
        losses.append([svi.step(*args, **kwargs).item() for args, kwargs in calls])
        if each == mode:
            graphs, mode = len(svi._runs), svi.mode
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert mode == "captured"
    return graphs


def test_floats_are_inputs_of_one_graph():
    assert both(weighted, nothing, [((X, weight), {}) for weight in (1.0, 0.5, 2.0)]) == 1
    assert both(weighted, nothing, [((X,), {"weight": w}) for w in (1.0, 0.5)]) == 1


def test_other_values_have_graphs_of_their_own():
    calls = [((X, 1.0, flip), {"name": name}) for flip in (False, True) for name in "ab"]
    assert both(weighted, nothing, calls * 2) == 4


def test_shapes_types_and_strides_have_graphs_of_their_own():
    batches = [X, X[:2], X.double(), X.T.contiguous().T, X]
    assert both(weighted, nothing, [((x, 1.0), {}) for x in batches]) == 4


def test_the_last_batch_of_an_epoch_is_captured_once():
    vae = VAE(*vae_parts())
    svi = CompiledSVI(vae.model, vae.guide, STEP, Trace_ELBO(max_plate_nesting=1), mode="captured")
    for _ in range(3):
        for x in torch.cat([X, X[:1]]).split(3):
            svi.step(x)
    assert len(svi._runs) == 2


@pytest.mark.filterwarnings("ignore:each of the last")
def test_only_the_last_graphs_are_kept():
    pyro.clear_param_store()
    svi = CompiledSVI(weighted, nothing, STEP, Trace_ELBO(max_plate_nesting=1), mode="captured")
    for size in range(1, 13):
        svi.step(torch.ones(size, 3), 1.0)
    assert len(svi._runs) == 8


def vae_parts():
    return (
        priors.Normal(2),
        likelihoods.Normal(Noisy(2, 3)),
        posteriors.Normal(MLP(3, [5], (2, 2))),
    )


def test_training_and_evaluation_are_told_apart():
    vae = VAE(*vae_parts())
    svi = CompiledSVI(vae.model, vae.guide, STEP, Trace_ELBO(max_plate_nesting=1), mode="captured")
    norm = vae.likelihood.network.norm
    svi.step(X)
    assert norm.num_batches_tracked == 1
    before = norm.running_mean.clone()
    vae.eval()
    torch.manual_seed(0)
    ours = svi.evaluate_loss(X).item()
    torch.manual_seed(0)
    assert ours == pytest.approx(Trace_ELBO(max_plate_nesting=1).loss(vae.model, vae.guide, X))
    assert torch.equal(norm.running_mean, before)
    vae.train()
    svi.step(X)
    assert norm.num_batches_tracked == 2
    assert not torch.equal(norm.running_mean, before)


def test_frozen_parameters_stay_and_may_be_freed():
    vae = VAE(*vae_parts())
    decoder = vae.likelihood.network.after.weight
    decoder.requires_grad_(False)
    svi = CompiledSVI(vae.model, vae.guide, STEP, Trace_ELBO(max_plate_nesting=1), mode="captured")
    first = decoder.clone()
    svi.step(X)
    assert torch.equal(decoder, first)
    decoder.requires_grad_(True)
    svi.step(X)
    assert not torch.equal(decoder, first)
    _, late = svi.optimizer.param_groups
    assert late["params"][0] is decoder


def test_replaced_parameters_are_refused_until_recaptured():
    vae = VAE(*vae_parts())
    svi = CompiledSVI(vae.model, vae.guide, STEP, Trace_ELBO(max_plate_nesting=1), mode="captured")
    svi.step(X)
    vae.posterior = posteriors.Normal(MLP(3, [5], (2, 2)))
    with pytest.raises(ValueError, match=r"'posterior.network.* was replaced.*recapture\(\)"):
        svi.step(X)
    svi.recapture()
    before = [p.clone() for p in vae.posterior.parameters()]
    svi.step(X)
    assert not any(map(torch.equal, before, vae.posterior.parameters()))
    stepped = [p for group in svi.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in stepped} == {id(p) for p in vae.parameters()}


def swap(vae):
    vae.posterior.network.activation = nn.Tanh()


def hook(vae):
    vae.likelihood.network.register_forward_hook(lambda *_: 3 * _[-1])


def hook_before(vae):
    vae.likelihood.network.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))


@pytest.mark.parametrize("change", [swap, hook, hook_before])
def test_a_network_that_was_changed_is_captured_anew(change):
    ends = []
    for mode in ("eager", "captured"):
        pyro.set_rng_seed(0)
        vae = VAE(*vae_parts())
        vae.posterior.network.activation = nn.ReLU()
        network = vae.posterior.network
        network.register_forward_hook(lambda *_, network=network: network.activation(_[-1]))
        svi = CompiledSVI(vae.model, vae.guide, STEP, Trace_ELBO(max_plate_nesting=1), mode=mode)
        losses = [float(svi.step(X))]
        change(vae)
        losses += [float(svi.step(X)) for _ in range(2)]
        ends.append(losses)
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)


def test_a_prior_of_a_weight_that_was_replaced_is_captured_anew():
    def run(mode):
        pyro.set_rng_seed(0)

        class Drawn(PyroModule):
            def __init__(self):
                super().__init__()
                self.w = PyroSample(dist.Normal(0.0, 1.0))

            def forward(self, x):
                pyro.sample("x", dist.Normal(self.w, 1.0).expand([4, 3]).to_event(2), obs=x)

        def guide(x):
            pyro.sample("w", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 0.1))

        pyro.clear_param_store()
        model = Drawn()
        svi = CompiledSVI(model, guide, STEP, Trace_ELBO(), mode=mode)
        losses = [float(svi.step(X))]
        model.w = PyroSample(dist.Normal(3.0, 0.1))
        return [*losses, float(svi.step(X))]

    assert run("captured") == pytest.approx(run("eager"), rel=1e-6)


class Switched(nn.Module):
    """A model whose path or number is read from a buffer."""

    def __init__(self, read):
        super().__init__()
        self.read, self.value = read, nn.Buffer(torch.tensor(1.0))
        self.loc = nn.Parameter(torch.tensor(0.1))

    def model(self, x):
        declare(self)
        law = dist.Normal(self.loc + torch.as_tensor(self.read(self.value)), 1.0)
        pyro.sample("x", law.expand([4, 3]).to_event(2), obs=x)


@pytest.mark.parametrize(
    "read",
    [
        lambda v: 1.0 if v > 1 else 0.0,
        lambda v: v.item(),
        float,
        int,
        lambda v: v.tolist(),
        lambda v: [5.0, 6.0, 7.0][v.long()],
        lambda v: 1.0 if (v - 1).is_nonzero() else 0.0,
        lambda v: 1.0 if torch.is_nonzero(v - 1) else 0.0,
    ],
    ids=["if", "item", "float", "int", "tolist", "index", "nonzero", "torch.is_nonzero"],
)
def test_a_tensor_that_is_read_as_a_number_is_never_a_constant(read):
    ends = []
    for mode in ("eager", "captured"):
        pair = Switched(read)
        svi = CompiledSVI(pair.model, nothing, STEP, Trace_ELBO(), mode=mode)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            losses = [float(svi.step(X))]
            pair.value.fill_(2.0)
            ends.append([*losses, float(svi.step(X))])
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)
    assert ends[0][0] != pytest.approx(ends[0][1], rel=1e-3)
    assert any("cannot be captured and runs eagerly" in str(each.message) for each in said)


def test_handlers_around_a_step_are_heard():
    ends = []
    for mode in ("eager", "captured"):
        pyro.set_rng_seed(0)
        vae = VAE(*vae_parts())
        svi = CompiledSVI(vae.model, vae.guide, STEP, Trace_ELBO(max_plate_nesting=1), mode=mode)
        losses = []
        for scale in (1.0, 0.5, 1.0, 0.1):
            around = poutine.scale(scale=scale) if scale < 1 else contextlib.nullcontext()
            with around:
                losses.append(float(svi.step(X)))
        ends.append(losses)
        assert svi.mode == mode
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)


@pytest.mark.parametrize("make", [np.int64, np.bool_, int])
def test_numbers_of_numpy_are_known_again(make):
    def model(x, count):
        mean = pyro.param("mean", torch.zeros(3))
        pyro.sample("x", dist.Normal(mean, 1.0 + int(count)).expand([4, 3]).to_event(2), obs=x)

    svi = CompiledSVI(model, nothing, STEP, Trace_ELBO(), mode="captured")
    for _ in range(3):
        svi.step(X, make(3))
    assert len(svi._runs) == 1


def test_an_entry_of_the_param_store_that_has_the_name_of_a_weight_is_let_be():
    vae = VAE(*vae_parts())
    name, weight = next(iter(vae.named_parameters()))
    pyro.param(name, torch.full_like(weight, 7.0))
    svi = CompiledSVI(vae.model, vae.guide, STEP, Trace_ELBO(max_plate_nesting=1), mode="captured")
    svi.step(X)
    assert (pyro.param(name) == 7).all()
    assert svi.mode == "captured"


def test_a_wrong_batch_leaves_gradients_as_they_were():
    vae = VAE(*vae_parts())
    for each in vae.parameters():
        each.grad = torch.ones_like(each)
    svi = CompiledSVI(vae.model, vae.guide, STEP, Trace_ELBO(max_plate_nesting=1))
    with pytest.raises(ValueError, match="takes inputs of shape"):
        svi.evaluate_loss(X[:, :2])
    assert all((each.grad == 1).all() for each in vae.parameters())


def test_an_argument_may_be_computed():
    weight = torch.ones(3, requires_grad=True)
    vae = VAE(*vae_parts())
    svi = CompiledSVI(vae.model, vae.guide, STEP, Trace_ELBO(max_plate_nesting=1), mode="eager")
    assert math.isfinite(svi.evaluate_loss(X * weight))


@pytest.mark.filterwarnings("ignore:the program cannot be captured")  # of an array
@pytest.mark.parametrize("make", [np.float32, lambda value: np.array(value, dtype="float32")])
def test_an_argument_of_any_kind_counts_anew_in_each_step(make):
    def model(x, scale):
        mean = pyro.param("mean", torch.zeros(3))
        law = dist.Normal(mean, torch.as_tensor(scale, dtype=torch.float32))
        pyro.sample("x", law.expand([4, 3]).to_event(2), obs=x)

    ends = []
    for mode in ("eager", "captured"):
        pyro.clear_param_store()
        svi = CompiledSVI(model, nothing, STEP, Trace_ELBO(), mode=mode)
        ends.append([float(svi.step(X, make(1.0 + count / 4))) for count in range(12)])
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)


class Called:
    """Programs that are no functions, with a module in sight of nothing but themselves."""

    def __init__(self, net):
        self.net = net

    def __call__(self, x):
        net = pyro.module("net", self.net)
        pyro.sample("x", dist.Normal(net(x), 1.0).to_event(2), obs=x)


def within(net):
    def model(x):
        def mean(x):
            return pyro.module("net", net)(x)

        pyro.sample("x", dist.Normal(mean(x), 1.0).to_event(2), obs=x)

    return model


def listed(net):
    nets = {"only": net}

    def model(x):
        pyro.sample("x", dist.Normal(pyro.module("net", nets["only"])(x), 1.0).to_event(2), obs=x)

    return model


@pytest.mark.parametrize("make", [Called, within, listed])
def test_modules_are_found_wherever_a_program_has_them(make):
    def run(mode):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        svi = CompiledSVI(make(net), nothing, STEP, Trace_ELBO(), mode=mode)
        losses = [float(svi.step(X)) for _ in range(2)]
        seen = int(net[1].num_batches_tracked)
        net.eval()
        return [seen, *losses, float(svi.step(X))]

    assert run("captured")[0] == run("eager")[0] == 2
    assert run("captured") == pytest.approx(run("eager"), rel=1e-5)


def test_a_first_run_leaves_gradients_as_they_were():
    vae = VAE(*vae_parts())
    vae.extra = nn.Parameter(torch.ones(2))
    vae.extra.grad = torch.ones(2)
    svi = CompiledSVI(vae.model, vae.guide, STEP, Trace_ELBO(max_plate_nesting=1), mode="eager")
    svi.evaluate_loss(X)
    assert torch.equal(vae.extra.grad, torch.ones(2))


class Counted(nn.Module):
    """A model that counts its runs in an element of a buffer."""

    def __init__(self):
        super().__init__()
        self.counts = nn.Buffer(torch.zeros(2))
        self.loc = nn.Parameter(torch.tensor(0.1))

    def model(self, x):
        declare(self)
        self.counts[0] += 1
        self.counts.view(2)[1:].add_(2).mul_(1.0)
        pyro.sample("x", dist.Normal(self.loc, 1.0).expand([4, 3]).to_event(2), obs=x)


@pytest.mark.parametrize("mode", ["eager", "captured", "compiled"])
def test_a_part_of_a_buffer_is_changed_once_a_step(mode):
    pair = Counted()
    svi = CompiledSVI(pair.model, nothing, STEP, Trace_ELBO(), mode=mode)
    for _ in range(2):
        svi.step(X)
    assert pair.counts.tolist() == [2, 4]
    assert svi.mode == mode


@pytest.mark.parametrize("mode", ["eager", "captured"])
def test_a_schedule_within_two_objectives_advances_once_a_step(mode):
    vae = VAE(*vae_parts())
    inner = BetaELBO(start=0.0, steps=10)
    svi = CompiledSVI(vae.model, vae.guide, STEP, BetaELBO(elbo=BetaELBO(elbo=inner)), mode=mode)
    for _ in range(3):
        svi.step(X)
    assert float(inner.step) == 3
    assert float(inner.weight) == pytest.approx(0.2)
    assert svi.mode == mode


@pytest.mark.filterwarnings("ignore:the program cannot be captured")
@pytest.mark.parametrize("mode", ["eager", "captured"])
def test_averages_in_the_param_store_are_those_of_pyro(mode):
    def model(x):
        weight = torch.tensor([1.0, 2.0])
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample(
                "x", dist.Normal(weight[z.long()][:, None], 1.0).expand([4, 3]).to_event(1), obs=x
            )

    def guide(x):
        logits = pyro.param("logits", torch.zeros(4))
        with pyro.plate("data", len(x)):
            infer = {"baseline": {"use_decaying_avg_baseline": True}}
            pyro.sample("z", dist.Bernoulli(logits=logits), infer=infer)

    ends = []
    for ours in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = TraceGraph_ELBO()
        if ours:
            svi = CompiledSVI(model, guide, pyro.optim.SGD({"lr": 0.1}), loss, mode=mode)
        else:
            svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.1}), loss)
        losses = [float(svi.step(X)) for _ in range(3)]
        store = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
        ends.append((losses, store))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-6)
    assert ends[0][1].keys() == ends[1][1].keys()
    for name, value in ends[0][1].items():
        assert torch.allclose(value, ends[1][1][name]), name
    assert len(svi._parameters) == 1


def test_recapture_sees_what_python_alone_knows():
    held = {"loc": 1.0}

    def model(x):
        mean = pyro.param("mean", torch.zeros(3))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean + held["loc"], 1.0).to_event(1), obs=x)

    frozen = partial(SGD, lr=0.0)
    svi = CompiledSVI(model, nothing, frozen, Trace_ELBO(max_plate_nesting=1), mode="captured")
    first = svi.step(X).item()
    held["loc"] = 3.0
    assert svi.step(X).item() == first
    svi.recapture()
    assert svi.step(X).item() == pytest.approx(
        Trace_ELBO(max_plate_nesting=1).loss(model, nothing, X)
    )


# Before the first step


def test_a_wrong_program_fails_with_pyros_message_and_changes_nothing():
    net, norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(norm(net(x)), -1.0).to_event(1), obs=x)

    before, state = net.weight.clone(), torch.get_rng_state()
    for mode in ("eager", "captured"):
        svi = CompiledSVI(model, nothing, STEP, Trace_ELBO(max_plate_nesting=1), mode=mode)
        with pytest.raises(ValueError, match="parameter scale"):
            svi.step(X)
    assert torch.equal(net.weight, before)
    assert norm.num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_but_a_step_moves_the_random_state():
    model, guide = noisy()
    torch.manual_seed(5)
    CompiledSVI(model, guide, STEP, Trace_ELBO(max_plate_nesting=1), mode="captured").step(X)
    captured = torch.get_rng_state()
    pyro.clear_param_store()
    torch.manual_seed(5)
    SVI(model, guide, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO(max_plate_nesting=1)).step(X)
    assert torch.equal(captured, torch.get_rng_state())


def test_a_step_returns_a_number_that_nothing_waits_for():
    model, guide = plain_vae()
    for mode in ("eager", "captured"):
        svi = CompiledSVI(model, guide, STEP, Trace_ELBO(max_plate_nesting=1), mode=mode)
        for loss in (svi.step(X), svi.evaluate_loss(X)):
            assert loss.shape == ()
            assert not loss.requires_grad
        assert all(p.grad is None for p in svi._parameters.values())


# Programs without a graph


def branching(x):
    mean = pyro.param("mean", torch.zeros(3))
    if x.sum() > 0:  # on data
        mean = mean + 1
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


def test_a_branch_on_data_is_told_of_by_its_line_and_runs_eagerly():
    svi = CompiledSVI(branching, nothing, STEP, Trace_ELBO(max_plate_nesting=1), mode="captured")
    with pytest.warns(UserWarning, match=r"runs eagerly: line \d+ of .*`if x.sum\(\) > 0:"):
        first = svi.step(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = svi.step(-X)
    assert svi.mode == "eager"
    truth = Trace_ELBO(max_plate_nesting=1).loss(branching, nothing, -X)
    assert second.item() == pytest.approx(truth, rel=0.02)  # a step of 1e-3 away
    assert first.item() != second.item()


def test_enumeration_runs_eagerly():
    model, _ = discrete()

    @config_enumerate
    def guide(x):
        logits = pyro.param("logits", torch.zeros(3, 2))
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=x @ logits))

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    svi = CompiledSVI(model, guide, partial(SGD, lr=0.0), elbo, mode="captured")
    with contextlib.suppress(UserWarning), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = svi.step(X)
    assert loss.item() == pytest.approx(float(elbo.loss(model, guide, X)), rel=1e-5)


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_state_in_attributes_that_changes_with_every_run_is_noticed(kind):
    class Counting(nn.Module):
        calls = 0
        mean = None

        def __init__(self):
            super().__init__()
            self.calls = 0
            self.loc = nn.Parameter(torch.zeros(3))
            self.weight = torch.ones(3)

        def model(self, x):
            loc = pyro.param("loc", self.loc)
            if kind == "number":
                self.calls += 1
            else:
                self.weight = 0.9 * self.weight
            scale = (1.0 + self.calls) * self.weight
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)

    losses = []
    for mode in ("captured", "eager"):
        pyro.clear_param_store()
        module = Counting()
        svi = CompiledSVI(module.model, nothing, STEP, Trace_ELBO(max_plate_nesting=1), mode=mode)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            losses.append([svi.step(X).item() for _ in range(3)])
        assert svi.mode == "eager"
        assert bool(said) == (mode == "captured")
        assert type(module.weight) is torch.Tensor
    assert losses[0] == pytest.approx(losses[1])


def test_without_a_compiler_programs_are_captured(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    model, guide = plain_vae()
    if not torch.cuda.is_available():
        assert CompiledSVI(model, guide, STEP, Trace_ELBO()).mode == "captured"
    assert mode_for(10**6) == ("compiled" if torch.cuda.is_available() else "captured")

    def refused(*_):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("pyro_vae.capture.Graph.compiled", refused)
    svi = CompiledSVI(model, guide, STEP, Trace_ELBO(max_plate_nesting=1), mode="compiled")
    with pytest.warns(UserWarning, match="captured and not compiled: .* no compiler here"):
        loss = svi.step(X)
    assert svi.mode == "captured"
    assert loss.isfinite()


def test_few_steps_are_taken_eagerly():
    assert [mode_for(steps) for steps in (1, 499, 500, 9_999)] == [
        "eager", "eager", "captured", "captured",
    ]  # fmt: skip


# Optimisers


@pytest.mark.parametrize(
    "optim",
    [
        pyro.optim.Adam({"lr": 0.01, "betas": (0.8, 0.9)}),
        pyro.optim.AdamW({"lr": 0.01}),
        pyro.optim.SGD({"lr": 0.01, "momentum": 0.5}),
        partial(Adam, lr=0.01),
    ],
    ids=["Adam", "AdamW", "SGD", "torch's Adam"],
)
def test_plain_optimisers_run_as_one_fused_one(optim):
    svi = CompiledSVI(*constrained(), optim, Trace_ELBO(max_plate_nesting=1), mode="captured")
    svi.step(X)
    (group,) = svi.optimizer.param_groups
    assert group["fused"]
    assert group["lr"] == 0.01
    assert len(group["params"]) == 4


def test_the_state_of_pyros_optimiser_is_the_fused_ones():
    optim = pyro.optim.Adam({"lr": 0.01})
    svi = CompiledSVI(*constrained(), optim, Trace_ELBO(max_plate_nesting=1), mode="captured")
    for _ in range(3):
        svi.step(X)
    state = optim.get_state()
    assert state.keys() == {"scale", "weights", "loc", "shape"}
    loc = dict(pyro.get_param_store().named_parameters())["loc"]
    for key in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(state["loc"]["state"][0][key], svi.optimizer.state[loc][key])
    # Another optimiser of Pyro's goes on from it, called as it is.
    later = pyro.optim.Adam({"lr": 0.01})
    later.set_state(state)
    resumed = CompiledSVI(svi.model, svi.guide, later, svi.loss, mode="captured")
    resumed.step(X)
    assert resumed.optimizer is None
    assert later.get_state()["loc"]["state"][0]["step"] == 4


def test_the_state_of_parameters_without_a_name_is_refused():
    model, guide = plain_vae()
    optim = pyro.optim.Adam({"lr": 0.01})
    svi = CompiledSVI(model, guide, optim, Trace_ELBO(max_plate_nesting=1), mode="captured")
    svi.step(X)
    with pytest.raises(ValueError, match=r"not there: take svi.optimizer.state_dict\(\)"):
        optim.get_state()


@pytest.mark.parametrize(
    "make",
    [
        lambda: pyro.optim.ClippedAdam({"lr": 0.01, "clip_norm": 1.0}),
        lambda: pyro.optim.Adam({"lr": 0.01}, {"clip_norm": 0.1}),
        lambda: pyro.optim.Adam(lambda name: {"lr": 0.1 if name == "loc" else 0.001}),
        lambda: pyro.optim.StepLR(
            {"optimizer": Adam, "optim_args": {"lr": 0.01}, "step_size": 1, "gamma": 0.5}
        ),
    ],
    ids=["ClippedAdam", "clipped", "by name", "scheduled"],
)
def test_other_optimisers_of_pyro_are_called_as_they_are(make):
    ends = []
    for kind in (SVI, partial(CompiledSVI, mode="captured")):
        svi = kind(*begun(constrained), make(), Trace_ELBO(max_plate_nesting=1))
        for _ in range(4):
            svi.step(X)
        ends.append({name: p.detach() for name, p in pyro.get_param_store().items()})
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name])


def test_a_parameter_with_two_names_counts_once():
    net = nn.Linear(3, 3)

    def model(x):
        pyro.module("one", net)
        loc = pyro.param("two", net.weight)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(net(x) + loc.sum(), 1.0).to_event(1), obs=x)

    svi = CompiledSVI(model, nothing, STEP, Trace_ELBO(max_plate_nesting=1), mode="captured")
    svi.step(X)
    assert len(svi._parameters) == 2
    assert svi.optimizer.param_groups[0]["params"][0] is net.weight


# Wrong use


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": 3}, "the model must be a function, not 3"),
        ({"guide": None}, "the guide must be a function"),
        ({"loss": nn.MSELoss()}, "the loss must be an ELBO"),
        ({"optim": SGD([torch.zeros(1, requires_grad=True)], lr=1.0)}, "a function of the par"),
        ({"optim": {"lr": 1.0}}, "must be one of pyro.optim"),
        ({"mode": "fast"}, "no mode 'fast'; there are eager, captured, compiled"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    given = {"model": weighted, "guide": nothing, "optim": STEP, "loss": Trace_ELBO(), **change}
    with pytest.raises((TypeError, ValueError), match=message):
        CompiledSVI(**given)


def test_a_batch_on_another_device_is_refused():
    model, guide = plain_vae()
    svi = CompiledSVI(model, guide, STEP, Trace_ELBO(max_plate_nesting=1), mode="captured")
    with pytest.raises(ValueError, match="a batch on 'meta' does not fit parameters on 'cpu'"):
        svi.step(X.to("meta"))


def test_a_program_without_parameters_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)

    svi = CompiledSVI(model, nothing, STEP, Trace_ELBO(max_plate_nesting=1), mode="captured")
    with pytest.raises(ValueError, match="there is nothing to train"):
        svi.step(X)
    assert svi.evaluate_loss(X).isfinite()


def test_losses_in_several_parts_are_refused():
    elbo = ReweightedWakeSleep(num_particles=2, max_plate_nesting=1)
    svi = CompiledSVI(*discrete(), STEP, elbo, mode="captured")
    with pytest.raises(TypeError, match=r"losses of ReweightedWakeSleep are several"):
        svi.step(X)


def test_log1p_is_as_precise_as_torchs():
    x = torch.cat([torch.logspace(-30, 30, 400), -torch.logspace(-30, 0, 200)[:-1]])
    x = torch.cat([x, torch.tensor([0.0, -0.0, -1.0, -2.0, math.inf, math.nan, 3e38])])
    truth = x.double().log1p()
    ours = _log1p(x).double()
    finite = truth.isfinite()
    assert torch.equal(ours.isnan(), truth.isnan())
    assert torch.equal(ours[~finite].nan_to_num(), truth[~finite].nan_to_num())
    # Four units in the last place of float32: logarithm, quotient and sum are each rounded.
    assert ((ours - truth).abs() <= 4 * 2**-24 * truth.abs())[finite].all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["captured", "compiled"])
def test_a_gpu_has_the_numbers_of_pyro(mode):
    ends = []
    for each in (mode, "eager"):
        pyro.set_rng_seed(0)
        vae = VAE(*vae_parts()).cuda()
        svi = CompiledSVI(vae.model, vae.guide, STEP, Trace_ELBO(max_plate_nesting=1), mode=each)
        ends.append([svi.step(X.cuda()).item() for _ in range(4)])
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "maximize": True}])
def test_an_update_is_the_step_of_the_optimiser(make, options):
    torch.manual_seed(0)
    starts = [torch.randn(5, 3), torch.randn(3), torch.randn(2)]
    ends = []
    for step in (lambda optimizer: optimizer.step(), update):
        parameters = [each.clone().requires_grad_() for each in starts]
        optimizer = optimizer_of(partial(make, lr=0.1, **options), parameters)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        draws = torch.Generator().manual_seed(1)
        for count in range(5):
            for each in parameters:
                each.grad = torch.randn(each.shape, generator=draws)
            if count % 2:
                parameters[-1].grad = None  # on which nothing depends this time
            step(optimizer)
            schedule.step()
        ends.append([*parameters, *pytree.tree_leaves(optimizer.state_dict()["state"])])
    assert all(map(torch.equal, *map(pytree.tree_leaves, ends)))


def reloaded(optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def renewed(optimizer):
    """The state of the first parameter begins anew, in the same optimiser."""
    first = optimizer.param_groups[0]["params"][0]
    optimizer.state[first] = {key: value * 0 for key, value in optimizer.state[first].items()}


def doubled(optimizer):
    (*_, last) = optimizer.state.values()
    last["exp_avg"] = last["exp_avg"] * 2
    last["step"] = last["step"] + 5


def extended(optimizer):
    extra = torch.ones(2, requires_grad=True)
    extra.grad = torch.ones(2)
    optimizer.add_param_group({"params": [extra], "lr": 0.3})


def shortened(optimizer):
    optimizer.param_groups[0]["params"].pop().grad = None


def unfused(optimizer):
    optimizer.param_groups[0]["amsgrad"] = True
    for state in optimizer.state.values():
        state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])


def stepped(optimizer):
    optimizer.step()


CHANGES = [reloaded, renewed, doubled, extended, shortened, unfused, stepped]


@pytest.mark.parametrize("change", CHANGES)
def test_an_update_sees_what_was_changed_since_the_last(change):
    torch.manual_seed(0)
    starts = [torch.randn(5, 3), torch.randn(3), torch.randn(2)]
    ends = []
    for step in (lambda optimizer: optimizer.step(), update):
        parameters = [each.clone().requires_grad_() for each in starts]
        optimizer = optimizer_of(partial(torch.optim.Adam, lr=0.1), parameters)
        draws = torch.Generator().manual_seed(1)
        for count in range(6):
            for each in parameters:
                each.grad = torch.randn(each.shape, generator=draws)
            if count == 3:
                change(optimizer)
            step(optimizer)
        ends.append([*parameters, *pytree.tree_leaves(list(optimizer.state.values()))])
    assert len(ends[0]) == len(ends[1])
    assert all(map(torch.equal, *ends))


def test_an_update_calls_the_hooks_of_a_step():
    weight = torch.zeros(1, requires_grad=True)
    optimizer = optimizer_of(partial(torch.optim.Adam, lr=0.1), [weight])
    called = []
    for hooked in (False, True, True):
        weight.grad = torch.ones(1)
        if hooked and not called:
            optimizer.register_step_post_hook(lambda *_: called.append(1))
        update(optimizer)
    assert called == [1, 1]
    assert optimizer.state[weight]["step"] == 3
