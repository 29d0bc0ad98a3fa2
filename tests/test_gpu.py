"""Steps on a GPU: CUDA graphs, and what is asked of a program before it becomes one."""

import math
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import test_svi
import torch
from pyro.infer import Trace_ELBO
from test_svi import ELBOS, ILL, PROGRAMS, STEP, Noisy, X, _store
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pyro_vae import (
    MLP,
    VAE,
    CompiledSVI,
    capture,
    data,
    fit,
    likelihoods,
    posteriors,
    priors,
    training,
)
from pyro_vae.capture import _dense
from pyro_vae.capture import capture as captured
from pyro_vae.objectives import IWAE, BetaELBO
from pyro_vae.replay import replayed

assert _store  # which empties the param store around each test

NO_GPU = not torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(NO_GPU, reason="needs a GPU")


@pytest.fixture
def gpu(monkeypatch):
    """All tensors on the GPU, those of the programs included."""
    monkeypatch.setattr(test_svi, "X", X.cuda())
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@pytest.fixture
def replays(monkeypatch):
    """What becomes of each function that was to be recorded."""
    found = []

    def counted(*arguments):
        found.append(replayed(*arguments))
        return found[-1]

    monkeypatch.setattr(capture, "replayed", counted)
    return found


def stepped(program, elbo, mode, *, seed=1):
    """Losses, first gradients, parameters and the next random number of a few steps."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    svi = CompiledSVI(*program(), STEP, elbo(), mode=mode)
    x = X.cuda()
    losses = [svi.loss_and_grads(x).item()]
    gradients = [p.grad if p.grad is None else p.grad.clone() for p in svi._parameters.values()]
    losses += [svi.step(x + shift).item() for shift in (0.0, 1.0, -1.0)]
    losses.append(svi.evaluate_loss(x).item())
    assert svi.mode == mode
    return losses, gradients, list(svi._parameters.values()), torch.rand(1).item()


@needs_gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_replayed_program_has_the_numbers_of_pyro(program, elbo, replays, monkeypatch):
    if (program, elbo) in ILL:
        pytest.skip("no objective for this program")
    make = partial(stepped, PROGRAMS[program], ELBOS[elbo])
    ours = make("captured")
    assert replays  # all that are on the GPU are looked at
    truth = make("eager")
    monkeypatch.setattr(capture, "replayed", lambda *_: None)
    single = make("captured")
    for one, other in ((ours, single), (single, truth)):
        for mine, theirs in zip([*one[1], *one[2]], [*other[1], *other[2]], strict=True):
            if mine is None or theirs is None:
                assert mine is theirs
            else:  # sums over blocks of threads may be in another order
                assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)
        assert one[0] == pytest.approx(other[0], rel=1e-5, abs=1e-4)
        assert one[3] == other[3]  # as many random numbers were drawn


def vae():
    return VAE(
        priors.Normal(2),
        likelihoods.Bernoulli(MLP(2, [16], (1, 8, 8))),
        posteriors.Normal(MLP((1, 8, 8), [16], (2, 2))),
    )


def normalised():
    pair = VAE(
        priors.Normal(2), likelihoods.Normal(Noisy(2, 3)), posteriors.Normal(Noisy(3, 2, 2))
    )
    return pair.cuda()


@needs_gpu
@pytest.mark.parametrize("mode", ["captured", "compiled"])
def test_a_replay_changes_the_buffers_once_for_each_step(mode, replays):
    ends = []
    for each in (mode, "eager"):
        pyro.set_rng_seed(0)
        pair = normalised()
        svi = CompiledSVI(pair.model, pair.guide, STEP, Trace_ELBO(max_plate_nesting=1), mode=each)
        for shift in range(4):
            svi.step(X.cuda() + shift)
        ends.append(dict(pair.named_buffers()))
    assert all(replays)
    for name, value in ends[0].items():
        assert torch.allclose(value, ends[1][name], rtol=1e-4, atol=1e-5), name


@needs_gpu
def test_a_pair_that_went_elsewhere_and_came_back_is_read_where_it_is():
    pair = vae().cuda()
    svi = CompiledSVI(
        pair.model, pair.guide, STEP, Trace_ELBO(max_plate_nesting=1), mode="captured"
    )
    x = torch.ones(5, 1, 8, 8, device="cuda")
    svi.evaluate_loss(x)
    pair.cpu()
    torch.ones(10**6, device="cuda")  # where it lay
    pair.cuda()
    with torch.no_grad():
        for each in pair.parameters():
            each.zero_()
    # Of probabilities one half, with q = p.
    assert svi.evaluate_loss(x).item() == pytest.approx(5 * 64 * math.log(2), rel=1e-5)


@needs_gpu
@pytest.mark.parametrize("mode", ["captured", "compiled"])
def test_numbers_on_the_cpu_are_looked_at_before_each_replay(mode, replays):
    ends = []
    for each in (mode, "eager"):
        pyro.set_rng_seed(0)
        pair, objective = vae().cuda(), BetaELBO(1.0)
        svi = CompiledSVI(pair.model, pair.guide, STEP, objective, mode=each)
        losses = []
        for weight in (1.0, 0.5, 4.0):
            objective.weight.fill_(weight)
            losses.append(svi.step(torch.full((5, 1, 8, 8), 1.0, device="cuda")).item())
        ends.append(losses)
    assert replays[0]
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


@needs_gpu
@pytest.mark.usefixtures("gpu")
def test_floats_and_written_down_tensors_are_no_copies(replays):
    def model(x, weight):
        mean = pyro.param("mean", torch.zeros(3)) + torch.tensor([0.0, 1.0, 2.0], device="cuda")
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=weight):
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    ends = []
    for mode in ("captured", "compiled", "eager"):
        pyro.clear_param_store()
        svi = CompiledSVI(model, lambda *_: None, STEP, Trace_ELBO(max_plate_nesting=1), mode=mode)
        ends.append([svi.step(X.cuda(), weight).item() for weight in (1.0, 0.25, 3.0)])
        assert len(svi._runs) <= 1 or mode == "eager"
    assert len(replays) == 2
    assert all(replays)
    assert ends[0] == pytest.approx(ends[2], rel=1e-5)
    assert ends[1] == pytest.approx(ends[2], rel=1e-5)


@needs_gpu
@pytest.mark.parametrize("particles", [1, 5])
def test_no_step_of_an_epoch_waits_for_the_gpu(particles, digits, monkeypatch):
    epochs = []

    def begin(self):
        original(self)
        epochs.append(self)
        if len(epochs) > 2:  # the first makes the graphs
            with warnings.catch_warnings():  # that it is a prototype
                warnings.simplefilter("ignore")
                torch.cuda.set_sync_debug_mode("error")

    def check(self, *arguments):
        torch.cuda.set_sync_debug_mode("default")
        checked(self, *arguments)

    original, checked = training._Watch.begin, training._Watch.check
    monkeypatch.setattr(training._Watch, "begin", begin)
    monkeypatch.setattr(training._Watch, "check", check)
    try:
        rows = fit(
            vae().cuda(), digits, epochs=4, batch_size=100, mode="captured", clip=10.0,
            progress=False, objective=IWAE(particles) if particles > 1 else None,
        )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(epochs) == 5
    assert rows[-1]["loss"] < rows[0]["loss"]


@needs_gpu
def test_a_run_on_a_gpu_goes_on_bit_for_bit(digits, tmp_path):
    options = {"batch_size": 100, "mode": "captured", "progress": False}
    ends = []
    for name, parts in (("whole", [4]), ("broken", [2, 4])):
        pyro.set_rng_seed(0)
        pair = vae().cuda()
        for epochs in parts:
            fit(
                pair, digits.viewed(data.dynamic), epochs=epochs, warmup=0.0,
                run=tmp_path / name, resume=epochs != parts[0], **options,
            )  # fmt: skip
        ends.append(pair.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


# What a CPU can show


def faked(function, *values, held=None):
    """The graph of a function of tensors on a GPU that need not be there."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = [torch.zeros(each, device="cuda") for each in values]
        tensors = held() if held else ()
        return captured(lambda *inputs: function(*inputs, *tensors), given, [])


def on_gpu():
    with torch.device("cuda"):
        return [nn.Linear(4, 3)]


@pytest.mark.parametrize(
    ("function", "whole"),
    [
        (lambda x: x.sum() * 2, True),
        (lambda x: x.sum() * torch.tensor(2.0), True),
        (lambda x: x.sum() * (1 - torch.tensor([1.0, 2.0]).double().sum()), True),
        (lambda x: x.sum() * torch.zeros(()), True),
        (lambda x: x.sum() * torch.rand(()), False),
        (lambda x: x.sum() + torch.ones(3).bernoulli(0.5).sum(), False),
        (lambda x: x.sum() * x.cpu().sum(), False),
    ],
)
def test_numbers_written_down_leave_a_program_on_its_gpu(function, whole):
    assert (faked(function, (5, 4)).gpu == torch.device("cuda:0")) is whole


def test_a_number_held_on_the_cpu_has_a_copy_on_the_gpu():
    weight, several = torch.tensor(0.5), torch.ones(3)
    graph = faked(lambda x, layer: (layer(x) * (1 - weight)).sum(), (5, 4), held=on_gpu)
    assert [each is weight for each, _ in graph.copied] == [True]
    assert graph.gpu == torch.device("cuda:0")
    assert faked(lambda x: x.sum() * (1 - several).sum(), (5, 4)).gpu is None

    def counts(x):
        weight.add_(1)
        return x.sum() * weight

    assert faked(counts, (5, 4)).gpu is None


def test_a_program_on_the_cpu_is_on_no_gpu_and_has_no_copies():
    weight = torch.tensor(0.5)
    graph = captured(lambda x: (x * weight).sum(), [X], [])
    assert graph.gpu is None
    assert not graph.copied
    assert graph.interpreted([X])(X)[0] == X.sum() / 2


def test_inputs_that_share_memory_are_not_recorded():
    assert replayed(torch.sum, [torch.zeros(()).expand(3)], [], torch.device("cuda")) is None


def test_outputs_lie_in_memory_as_those_of_the_graph():
    graph = captured(lambda x: x.T.contiguous().sum(0, keepdim=True) * x, [torch.ones(4, 4)], [])
    function = _dense(lambda x: [torch.cat([x, x], 1)[:, :4]], graph.module)
    x = torch.randn(4, 4)
    (found,) = function(x)
    assert torch.equal(found, x)
    assert found.stride() == (4, 1)


def test_what_is_written_down_is_brought_to_its_place_once():
    def function(x):
        own = torch.tensor([1.0, 2.0, 3.0]).double()
        own.add_(1)  # of this run's alone
        return (x * own).sum()

    graph = captured(function, [X], [])
    assert torch.ops.aten._to_copy.default not in {n.target for n in graph.module.graph.nodes}
    run = graph.interpreted([X])
    for _ in range(2):
        assert torch.equal(run(X)[0], (X * torch.tensor([2.0, 3.0, 4.0]).double()).sum())
