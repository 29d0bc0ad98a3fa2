"""Programs of users, beyond this package's: each steps as `pyro.infer.SVI` steps it."""

import copy
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.utils.checkpoint import checkpoint

from pyro_vae import CompiledSVI
from pyro_vae.objectives import BetaELBO

ROWS = 32  # from 16 numbers on, other types draw other numbers
X = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def standard(x, *_, **__):
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def centred(x, *_, **__):
    loc = pyro.param("loc", torch.zeros(3))
    pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))


def decoded(x, network, decode=None):
    """A model with a network, which is registered, and how it is called."""
    pyro.module("network", network)
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal((decode or network)(z), 1.0).to_event(1), obs=x)


def local(given):
    """A program of one latent for each datum, whose guide's loc is multiplied by a number."""

    def model(x, *_):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[:, None], 1.0).to_event(1), obs=x)

    def guide(x, *number):
        loc = pyro.param("loc", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc * given(x, *number), 0.5))

    return model, guide


# Of each kind: makes a program and what is done before a step, perhaps; the arguments of steps.


def a_float():
    return *local(lambda x, number: number), None, [(X, 0.5 + i / 10) for i in range(4)]


def a_float_read_from_data():
    return *local(lambda x: x.std().item()), None, [(X + i,) for i in range(4)]


def recurrent():
    network = nn.LSTM(3, 3)

    def model(x):
        decoded(x, network, lambda z: network(z.expand(2, 3))[0][-1])

    return model, centred, None, [(X,)] * 3


def reading(read):
    """A scale that is read from a buffer, which every step has another value of."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("n", torch.tensor(0))
            self.register_buffer("ones", torch.ones(5))

        def model(self, x):
            with poutine.scale(scale=float(read(self))):
                standard(x)

        def guide(self, x):
            centred(x)

    def make():
        pair = Scaled()
        return pair.model, pair.guide, lambda i, _: pair.n.fill_(i), [(X,)] * 4

    return make


def reached_through(holder, change):
    """A network that the program finds somewhere, and that changes after two steps."""

    def make():
        network = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        place = SimpleNamespace(network=network)

        class Plain:
            def __init__(self):
                self.network = network

            def model(self, x):
                decoded(x, self.network)

        class OfClass:
            held = network

            def model(self, x):
                decoded(x, self.held)

        def by_default(x, network=network):
            decoded(x, network)

        plain, nested = Plain(), {"a": {"b": network}}
        model = {
            "an object": lambda x: decoded(x, place.network),
            "a method of one": lambda x: plain.model(x),
            "nested dicts": lambda x: decoded(x, nested["a"]["b"]),
            "a class": OfClass().model,
            "a default": by_default,
        }[holder]
        return model, centred, lambda i, _: change(network) if i == 2 else None, [(X,)] * 4

    return make


def checkpointed():
    network = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 3))

    def model(x):
        decoded(x, network, lambda z: checkpoint(network, z, use_reentrant=False))

    return model, centred, None, [(X,)] * 3


def seeded():
    return standard, poutine.seed(centred, 3), None, [(X,)] * 3


def one_at_a_time():
    networks = {name: nn.Linear(3, 3) for name in ("a", "b")}

    def model(x, name):
        for each in networks:
            pyro.module(each, networks[each])
        decoded(x, networks[name])

    return model, centred, None, [(X, name) for name in "abab"]


def in_place():
    def model(x):
        standard(x.div_(10.0))

    return model, centred, None, [(X.clone(),) for _ in range(3)]


def counting(base):
    """An attribute that counts the runs."""

    class Counting(base):
        def __init__(self):
            super().__init__()
            self.n = 0

        def model(self, x):
            self.n += 1
            with poutine.scale(scale=self.n):
                standard(x)

    return lambda: (Counting().model, centred, None, [(X,)] * 4)


def a_buffer_of_numpys():
    buffer = np.array(X)

    def fill(i, _):
        buffer[:] = X.numpy() + i

    def model(x):
        standard(torch.tensor(x))

    return model, centred, fill, [(buffer,)] * 4


def an_object():
    batch = SimpleNamespace(x=X)

    def fill(i, _):
        batch.x = X + i

    return lambda each: standard(each.x), centred, fill, [(batch,)] * 4


def another_tensor_in_a_module():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.mask = torch.ones(ROWS, dtype=torch.bool)

        def model(self, x):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("data", len(x)), poutine.mask(mask=self.mask):
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    module = Masked()

    def change(i, _):
        module.mask = torch.arange(ROWS) % (i + 1) == 0

    return module.model, centred, change, [(X,)] * 4


def another_weight():
    def change(i, elbo):
        elbo.weight = torch.tensor(1.0 + i)

    return standard, centred, change, [(X,)] * 4


def frozen_in_the_store():
    def guide(x):
        scale = pyro.param("scale", torch.ones(3))
        loc = pyro.param("loc", torch.zeros(3))
        pyro.sample("z", dist.Normal(loc + scale, 0.5).to_event(1))

    def change(i, _):
        if i == 2:
            pyro.get_param_store()._params["scale"].requires_grad_(False)

    return standard, guide, change, [(X,)] * 4


def scripted():
    network = torch.jit.script(nn.Linear(3, 3))
    return lambda x: decoded(x, network), centred, None, [(X,)] * 3


def lazy_statistics():
    network = nn.Sequential(nn.Linear(3, 3), nn.LazyBatchNorm1d())

    def model(x):
        mean = network(x)  # which sets it up
        pyro.module("network", network)
        standard(x - mean.detach())

    return model, centred, None, [(X,)] * 3


def sparse_argument():
    return lambda x: standard(x.to_dense()), lambda x: centred(x), None, [(X.to_sparse_csr(),)] * 3


def sparse_gradients():
    table = nn.Embedding(4, 3, sparse=True)

    def model(x):
        decoded(x, table, lambda z: z + table(torch.tensor([1, 2])).sum(0))

    return model, centred, None, [(X,)] * 3


def no_number_in_an_attribute():
    network = nn.Linear(3, 3)
    network.best = float("nan")
    return lambda x: decoded(x, network), centred, None, [(X,)] * 3


HOLDERS = ("an object", "a method of one", "nested dicts", "a class", "a default")
CHANGES = {
    "evaluates": lambda network: network.eval(),
    "is frozen": lambda network: network.requires_grad_(False),
}
READS = {
    "branch": lambda each: 1.0 if each.n + 1 > 2 else 0.1,
    "item": lambda each: (each.n + 1).item(),
    "int": lambda each: int(each.n.float() + 1),
    "equal": lambda each: 2.0 if torch.equal(each.n, torch.tensor(1)) else 1.0,
    "slice": lambda each: each.ones[each.n :].numel(),
}
CAPTURED = {  # with words for those that have no graph
    "a float": (a_float, None),
    "a float read from data": (a_float_read_from_data, None),
    "another tensor in a module": (another_tensor_in_a_module, None),
    "another weight": (another_weight, None),
    "frozen in the store": (frozen_in_the_store, None),
    "in place": (in_place, None),
    "lazy statistics": (lazy_statistics, None),
    "no number in an attribute": (no_number_in_an_attribute, None),
    "one at a time": (one_at_a_time, None),
    "scripted": (scripted, None),
    "sparse argument": (sparse_argument, None),
    "a buffer of NumPy's": (a_buffer_of_numpys, "an argument of type ndarray is no tensor"),
    "an object": (an_object, "an argument of type SimpleNamespace is no tensor"),
    "checkpointed": (checkpointed, "setting the random state"),
    "counting, an object": (counting(object), "attribute 'n' changes"),
    "counting, a module": (counting(nn.Module), "attribute 'n' changes"),
    "recurrent": (recurrent, "its graph does not run"),
    "seeded": (seeded, "setting the random state"),
    "sparse gradients": (sparse_gradients, "is sparse"),
    **{f"reads: {name}": (reading(read), "line") for name, read in READS.items()},
    **{
        f"{holder}, {name}": (reached_through(holder, change), None)
        for holder in HOLDERS
        for name, change in CHANGES.items()
    },
}


def stepped(kind, make, optim):
    """Losses and parameters, from one random stream."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, between, calls = make()
    pyro.set_rng_seed(1)
    elbo = BetaELBO(elbo=Trace_ELBO(max_plate_nesting=1))
    svi = kind(model, guide, optim(), elbo)
    losses = []
    for step, arguments in enumerate(calls):
        if between:
            between(step, elbo)
        losses.append(float(svi.step(*arguments)))
    store = pyro.get_param_store()
    return losses, {name: each.detach().clone() for name, each in store.named_parameters()}, svi


OPTIMISERS = {
    "SGD": lambda: pyro.optim.SGD({"lr": 1e-2}),
    "momentum": lambda: pyro.optim.SGD({"lr": 1e-2, "momentum": 0.9}),
    "Adam": lambda: pyro.optim.Adam({"lr": 1e-2}),
}


def compare(name, mode, optim):
    make, reason = CAPTURED[name]
    losses, truth, _ = stepped(SVI, make, optim)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours, parameters, svi = stepped(partial(CompiledSVI, mode=mode), make, optim)
    # Rounding of sums of 96 float32 terms, of which the largest is about 10.
    assert ours == pytest.approx(losses, rel=1e-5)
    assert parameters.keys() == truth.keys()
    for each in truth:
        assert torch.allclose(parameters[each], truth[each], rtol=1e-5, atol=1e-6)
    eagerly = [str(each.message) for each in said if "runs eagerly" in str(each.message)]
    if mode == "captured":
        assert svi.mode == ("eager" if reason else "captured")
        assert bool(eagerly) == bool(reason)
        assert all(reason in each for each in eagerly)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["eager", "captured"])
@pytest.mark.parametrize("name", CAPTURED)
def test_a_program_steps_as_with_pyro(name, mode):
    compare(name, mode, OPTIMISERS["SGD"])


@pytest.mark.parametrize("mode", ["eager", "captured"])
@pytest.mark.parametrize("optim", OPTIMISERS)
def test_parameters_without_a_gradient_step_as_with_pyro(optim, mode):
    compare("one at a time", mode, OPTIMISERS[optim])


@pytest.mark.parametrize("mode", ["eager", "captured"])
def test_a_loss_is_that_of_the_parameters_that_are_there(mode):
    pyro.set_rng_seed(0)
    svi = CompiledSVI(standard, centred, OPTIMISERS["SGD"](), Trace_ELBO(), mode=mode)
    for loc in (0.0, 5.0):
        pyro.get_param_store()["loc"] = torch.full((3,), loc)
        pyro.set_rng_seed(1)
        ours = svi.evaluate_loss(X).item()
        pyro.set_rng_seed(1)
        truth = SVI(standard, centred, OPTIMISERS["SGD"](), Trace_ELBO()).evaluate_loss(X)
        assert ours == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("mode", ["eager", "captured"])
@pytest.mark.parametrize("after", ["CompiledSVI", "SVI"])
def test_another_goes_on_with_an_optimiser_that_was_fused(after, mode):
    ends = []
    for kind in (SVI, partial(CompiledSVI, mode=mode)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        optim = OPTIMISERS["Adam"]()
        first = kind(standard, centred, optim, Trace_ELBO())
        second = (SVI if after == "SVI" else kind)(standard, centred, optim, Trace_ELBO())
        for each in (first, first, second, first):
            each.step(X)
        ends.append(pyro.param("loc").detach().clone())
    # Adam's steps of 0.01, which its kernels round otherwise.
    assert torch.allclose(*ends, rtol=0, atol=1e-7)


@pytest.mark.parametrize("mode", ["eager", "captured"])
def test_a_saved_state_is_gone_back_to(mode):
    ends = []
    for kind in (SVI, partial(CompiledSVI, mode=mode)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        optim, store = OPTIMISERS["Adam"](), pyro.get_param_store()
        svi = kind(standard, centred, optim, Trace_ELBO())
        for _ in range(3):
            svi.step(X)
        before = copy.deepcopy((store.get_state(), optim.get_state()))
        for _ in range(3):
            svi.step(X)
        store.set_state(before[0])
        optim.set_state(before[1])
        if kind is not SVI:
            svi.recapture()
        svi.step(X)
        ends.append(pyro.param("loc").detach().clone())
        assert optim.get_state()["loc"]["state"][0]["step"] == 4
    assert torch.allclose(*ends, rtol=0, atol=1e-7)


@pytest.mark.parametrize("mode", ["eager", "captured"])
def test_a_step_without_gradients_is_forgotten_after_it(mode):
    ends = []
    for kind in (SVI, partial(CompiledSVI, mode=mode)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = kind(standard, centred, OPTIMISERS["SGD"](), Trace_ELBO())
        with torch.no_grad():
            svi.step(X)
        svi.step(X)
        ends.append(pyro.param("loc").detach().clone())
    assert torch.allclose(*ends, rtol=1e-6, atol=1e-7)
    assert ends[0].abs().max() > 0


def test_gradients_take_the_place_of_all_earlier_ones():
    def guide(x, name):
        loc = pyro.param(name, torch.zeros(3))
        pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))

    svi = CompiledSVI(standard, guide, OPTIMISERS["SGD"](), Trace_ELBO(), mode="captured")
    for name in ("a", "b"):
        svi.step(X, name)
    before = pyro.param("a").detach().clone()
    svi.loss_and_grads(X, "a")
    svi.step(X, "b")
    assert torch.equal(pyro.param("a"), before)


def test_a_parameter_that_only_a_later_run_makes_is_no_fake():
    runs = []

    def guide(x):
        runs.append(x)
        loc = pyro.param(f"loc{min(len(runs), 3)}", torch.zeros(3))
        pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))

    svi = CompiledSVI(standard, guide, OPTIMISERS["SGD"](), Trace_ELBO(), mode="captured")
    with pytest.warns(UserWarning, match="'loc2' is not made by the first run"):
        svi.step(X)
    assert {type(each) for each in pyro.get_param_store().values()} == {torch.Tensor}


def test_a_graph_for_every_call_is_told_of():
    svi = CompiledSVI(standard, centred, OPTIMISERS["SGD"](), Trace_ELBO(), mode="captured")
    for rows in range(2, 10):
        svi.step(X[:rows])
    with pytest.warns(UserWarning, match="each of the last 8 calls has captured"):
        svi.step(X[:10])
    for rows in (11, 9, 12):  # eagerly, from a graph, and captured again
        svi.step(X[:rows])
    assert len(svi._runs) == 8
    assert svi.mode == "captured"


class Counter(nn.Module):
    """It counts its runs, and makes a child in the first one."""

    def __init__(self, n):
        super().__init__()
        self.n = n

    def forward(self, x):
        if not hasattr(self, "late"):
            self.late = nn.Identity()
        self.n += 1
        return self.late(x)


@pytest.mark.filterwarnings("ignore:the program cannot be captured")
@pytest.mark.parametrize("mode", ["eager", "captured"])
def test_counters_have_counted_the_steps_alone(mode):
    both = nn.Sequential(Counter(0), Counter(100))
    svi = CompiledSVI(
        lambda x: standard(both(x)), centred, OPTIMISERS["SGD"](), Trace_ELBO(), mode=mode
    )
    svi.step(X)
    assert [each.n for each in both] == [1, 101]
    assert not hasattr(both[1].late, "n")


def test_a_first_run_that_fails_leaves_attributes_as_they_were():
    counter = Counter(0)

    def model(x):
        counter(x)
        raise RuntimeError("no such model")

    svi = CompiledSVI(model, centred, OPTIMISERS["SGD"](), Trace_ELBO(), mode="captured")
    with pytest.raises(RuntimeError, match="no such model"):
        svi.step(X)
    assert counter.n == 0


def test_a_buffer_that_overlaps_itself_is_let_be():
    hidden = SimpleNamespace(networks={"a": [nn.Linear(3, 3)]})
    hidden.networks["a"][0].register_buffer("wide", torch.zeros(1).expand(3))

    def model(x):
        decoded(x, hidden.networks["a"][0])

    svi = CompiledSVI(model, centred, OPTIMISERS["SGD"](), Trace_ELBO(), mode="captured")
    assert svi.step(X).isfinite()
