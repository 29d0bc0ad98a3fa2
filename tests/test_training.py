"""Training: what the loop optimises, keeps, reports and refuses."""

import copy
import json
import math
import statistics
from functools import partial

import pyro
import pytest
import torch
from linear import exact_halves, linear_vae
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.optim import LBFGS, SGD, Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from pyro_vae import MLP, VAE, bound, data, fit, likelihoods, posteriors, priors, restore
from pyro_vae.networks import BFloat16
from pyro_vae.objectives import BetaELBO
from pyro_vae.training import _Watch

quiet = partial(fit, progress=False, batch_size=30)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def normal_data(rows=40, validation=0.25):
    return data.split(torch.randn(rows, 4), validation=validation, test=0)


def test_it_is_pyros_svi():
    vae, twin = (linear_vae(4, 2) for _ in range(2))
    twin.load_state_dict(vae.state_dict())
    rows = normal_data(validation=0)
    pyro.set_rng_seed(1)
    quiet(vae, rows, epochs=3, batch_size=16, warmup=0, seed=5, optimizer=partial(Adam, lr=0.01))
    pyro.set_rng_seed(1)
    svi = SVI(twin.model, twin.guide, pyro.optim.Adam({"lr": 0.01}), loss=Trace_ELBO())
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        for batch in rows.train.batches(16, generator, shuffle=True):
            svi.step(*batch)
    for ours, theirs in zip(vae.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_seed_fixes_the_run(vae, digits):
    results = []
    for _ in range(2):
        twin = copy.deepcopy(vae)
        pyro.set_rng_seed(2)
        results.append((quiet(twin, digits, epochs=2, seed=3), twin.state_dict()))
    (first, weights), (second, others) = results
    assert [row["elbo"] for row in first] == [row["elbo"] for row in second]
    assert all(torch.equal(weights[key], others[key]) for key in weights)


def test_the_kl_is_warmed_up_from_zero_to_one(monkeypatch):
    weights = []
    loss_and_grads = BetaELBO.loss_and_grads

    def spied(self, *args):
        weights.append(float(self.weight))
        return loss_and_grads(self, *args)

    monkeypatch.setattr(BetaELBO, "loss_and_grads", spied)
    rows = quiet(linear_vae(4, 2), normal_data(), epochs=10, batch_size=10, warmup=0.4)
    # 30 rows in batches of 10, 10 epochs: a rehearsal and 30 steps, of which 12 warm up.
    assert weights[1:] == pytest.approx([min(step / 12, 1) for step in range(30)])
    assert [row["weight"] for row in rows] == pytest.approx(
        [1 / 12, 4 / 12, 7 / 12, 10 / 12] + [1] * 6
    )


def test_metrics_are_those_of_the_validation_split(vae, digits, tmp_path):
    rows = quiet(vae, digits, epochs=4, run=tmp_path, warmup=0)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert [row["samples"] for row in rows] == [1437, 2874, 4311, 5748]
    assert rows[-1]["loss"] < rows[0]["loss"]
    best = max(rows, key=lambda row: row["elbo"])
    values = [
        bound(
            vae.eval(), digits.validation.batches(50, torch.Generator().manual_seed(s))
        ).summary()
        for s in range(20)
    ]
    for key in ("elbo", "reconstruction", "kl"):
        drawn = torch.tensor([value[key] for value in values])
        # Five standard deviations between one estimate and the mean of 20 others.
        assert abs(drawn.mean() - best[key]) < 5 * drawn.std() * (1 + 1 / 20) ** 0.5


def test_it_ends_with_the_best_weights_and_keeps_the_last(tmp_path):
    vae, rows = linear_vae(4, 2), normal_data()
    metrics = quiet(vae, rows, epochs=30, run=tmp_path, optimizer=partial(Adam, lr=1.0), warmup=0)
    best = max(range(30), key=lambda index: metrics[index]["elbo"])
    assert best < 29
    last, chosen = linear_vae(4, 2), linear_vae(4, 2)
    restore(last, tmp_path / "last.safetensors")
    restore(chosen, tmp_path / "best.safetensors")
    for ours, kept in zip(vae.parameters(), chosen.parameters(), strict=True):
        assert torch.equal(ours, kept)
    assert any(
        not torch.equal(p, q) for p, q in zip(vae.parameters(), last.parameters(), strict=True)
    )


def test_patience_begins_after_the_warm_up():
    options = {"epochs": 40, "optimizer": partial(SGD, lr=1e-12), "batch_size": 30}
    stopped = {
        warmup: len(quiet(linear_vae(4, 2), normal_data(), warmup=warmup, patience=3, **options))
        for warmup in (0, 0.5)
    }
    assert stopped[0] < 20
    assert 23 <= stopped[0.5] < 40


def test_gradients_are_clipped_together():
    vae, x = linear_vae(4, 2), torch.randn(32, 4)
    before = nn.utils.parameters_to_vector(vae.parameters()).detach()
    rows = data.split(x, validation=0, test=0)
    quiet(vae, rows, epochs=1, batch_size=32, clip=0.5, optimizer=partial(SGD, lr=1.0), warmup=0)
    moved = nn.utils.parameters_to_vector(vae.parameters()).detach() - before
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-4)


def test_the_schedule_advances_each_epoch():
    rows = quiet(
        linear_vae(4, 2),
        normal_data(),
        epochs=4,
        batch_size=30,
        optimizer=partial(Adam, lr=0.8),
        schedule=partial(StepLR, step_size=1, gamma=0.5),
    )
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.8, 0.4, 0.2, 0.1])


def test_the_objective_is_the_one_given():
    x = 3 * torch.randn(64, 4)
    kls = []
    for weight in (0.1, 10.0):
        vae = linear_vae(4, 2)
        rows = data.split(x, validation=0, test=0)
        quiet(vae, rows, epochs=150, batch_size=64, objective=BetaELBO(weight), warmup=0.1,
              optimizer=partial(Adam, lr=0.03))  # fmt: skip
        kls.append(float(exact_halves(vae, x)[1].mean().detach()))
    assert kls[0] > 5 * kls[1]


def test_frozen_parts_stay(vae, digits):
    vae.likelihood.requires_grad_(False)
    kept = copy.deepcopy(vae.likelihood.state_dict())
    quiet(vae, digits, epochs=1)
    assert all(torch.equal(value, kept[key]) for key, value in vae.likelihood.state_dict().items())


class Bomb(nn.Module):
    """An identity that returns NaN from a certain training step on."""

    def __init__(self, step):
        super().__init__()
        self.calls, self.step = 0, step

    def forward(self, x):
        self.calls += self.training and torch.is_grad_enabled()
        return x * float("nan") if self.calls > self.step else x


def test_a_nan_names_its_place_and_keeps_the_weights_before(tmp_path):
    vae = linear_vae(4, 2)
    vae.likelihood.network.hidden = Bomb(9 + 7)  # nine runs are counted before the first step
    with pytest.raises(FloatingPointError, match=r"epoch 3, step 8.* site 'x' in the model"):
        quiet(vae, normal_data(), epochs=5, batch_size=10, run=tmp_path)
    assert all(parameter.isfinite().all() for parameter in vae.parameters())
    kept = linear_vae(4, 2)
    restore(kept, tmp_path / "last.safetensors")
    for ours, theirs in zip(vae.parameters(), kept.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


class Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


class Poisoned(nn.Module):
    """The identity, whose gradient is no number from some run on."""

    def __init__(self, after):
        super().__init__()
        self.runs, self.after = 0, after

    def forward(self, x):
        self.runs += self.training
        return Poison.apply(x) if self.training and self.runs > self.after else x


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("clip", [math.inf, 1.0])
def test_a_gradient_that_is_nan_spoils_nothing(waits, clip, monkeypatch):
    """On a device that waits, and on one that is asked once an epoch."""
    init = _Watch.__init__
    monkeypatch.setattr(_Watch, "__init__", lambda self, *p, **_: init(self, *p, waits=waits))
    vae = linear_vae(4, 2)
    vae.likelihood.network.hidden = Poisoned(after=12)
    with pytest.raises(FloatingPointError, match="the loss or a gradient is NaN"):
        quiet(vae, normal_data(), epochs=9, batch_size=10, clip=clip)
    assert all(parameter.isfinite().all() for parameter in vae.parameters())


def test_an_interrupt_keeps_what_was_finished(tmp_path, monkeypatch):
    def interrupted(self, *args, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(self, *args)

    step = SGD.step
    monkeypatch.setattr(SGD, "step", interrupted)
    vae = linear_vae(4, 2)
    with pytest.raises(KeyboardInterrupt):
        quiet(vae, normal_data(), epochs=5, batch_size=10, run=tmp_path,
              optimizer=partial(SGD, lr=1e-3))  # fmt: skip
    kept = linear_vae(4, 2)
    restore(kept, tmp_path / "last.safetensors")
    for ours, theirs in zip(vae.parameters(), kept.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "at least 1 epoch, not 0"),
        ({"batch_size": 31}, "31 does not fit the 30 training data; give 1 to 30"),
        ({"batch_size": 0}, "a batch has at least 1 datum, not 0"),
        ({"warmup": 1.0}, "fraction of the budget"),
        ({"warmup": -0.1}, "fraction of the budget"),
        ({"patience": 0}, "at least 1 epoch, not 0"),
        ({"clip": 0.0}, "a norm above 0, not 0"),
        ({"mode": "fast"}, "no mode 'fast'; there are eager, captured, compiled"),
        ({"epochs": 2.0}, "epochs must be a whole number, not 2.0"),
        ({"batch_size": 10.0}, "batch_size must be a whole number, not 10.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_written(
    options, message, tmp_path
):
    with pytest.raises(ValueError, match=message):
        quiet(linear_vae(4, 2), normal_data(), run=tmp_path, **{"batch_size": 10, **options})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": partial(LBFGS, lr=0.1)}, "LBFGS cannot train here.* needs closure"),
        ({"schedule": ReduceLROnPlateau}, "ReduceLROnPlateau cannot train.* needs metrics"),
    ],
)
def test_steps_that_need_more_are_refused_before_anything_is_written(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        quiet(linear_vae(4, 2), normal_data(), run=tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_no_gradient_is_left_behind():
    vae = linear_vae(4, 2)
    quiet(vae, normal_data(), epochs=1)
    assert all(each.grad is None for each in vae.parameters())


@pytest.mark.parametrize("warmup", [0.0, 0.5])
@pytest.mark.parametrize("mode", ["eager", "captured"])
def test_a_schedule_of_the_objectives_own_takes_a_step_with_each_batch(mode, warmup):
    objective = BetaELBO(start=0.0, steps=8)
    quiet(linear_vae(4, 2), normal_data(), epochs=2, batch_size=10, objective=objective,
          warmup=warmup, mode=mode)  # fmt: skip
    assert float(objective.step) == 6


def test_patience_without_a_validation_split_is_refused():
    with pytest.raises(ValueError, match="patience needs a validation split"):
        quiet(linear_vae(4, 2), normal_data(validation=0), patience=3)


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="every parameter is frozen"):
        quiet(linear_vae(4, 2).requires_grad_(False), normal_data())


def test_rows_far_into_the_data_are_checked_too():
    x = torch.zeros(9000, 4)
    x[8999, 0] = math.pi
    rows = data.split(x, validation=0, test=0)
    vae = linear_vae(4, 2)
    vae = VAE(vae.prior, likelihoods.Bernoulli(MLP(2, [], 4)), vae.posterior)
    with pytest.raises(ValueError, match=r"outside the support of Bernoulli, 3\.14159 for one"):
        quiet(vae, rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": torch.randn(40, 4)}, "data in splits, as from data.load or data.split"),
        ({"objective": Trace_ELBO}, r"the objective must be an ELBO, such as Trace_ELBO\(\)"),
        ({"optimizer": pyro.optim.Adam({"lr": 1e-3})}, "a function of the parameters"),
    ],
)
def test_arguments_of_another_kind_are_named(options, message):
    with pytest.raises(TypeError, match=message):
        quiet(**{"pair": linear_vae(4, 2), "data": normal_data(), **options})


def test_a_folder_of_another_run_is_refused(tmp_path):
    quiet(linear_vae(4, 2), normal_data(), epochs=1, run=tmp_path / "new" / "run")
    kept = contents(tmp_path / "new" / "run")
    with pytest.raises(FileExistsError, match="holds another run"):
        quiet(linear_vae(4, 2), normal_data(), epochs=1, run=tmp_path / "new" / "run")
    assert kept == contents(tmp_path / "new" / "run")


def test_a_bound_that_is_nan_on_validation_data_stops():
    class Stumbling(nn.Module):
        def forward(self, x):
            return x if self.training else x * float("nan")

    vae = linear_vae(4, 2)
    vae.posterior.network.hidden = Stumbling()
    with pytest.raises(FloatingPointError, match="bound on the validation data is NaN in epoch 1"):
        quiet(vae, normal_data(), epochs=2)


@pytest.mark.parametrize("mode", ["eager", "captured"])
def test_steps_are_left_out_where_a_program_is_prepared_anew(mode, vae):
    """Captured, the smaller last batch is; Pyro's validation would refuse its scales."""
    grey = data.load("digits", validation=0, view=data.threshold)  # 1437 rows
    optimizer = partial(SGD, lr=1e6)
    rows = quiet(vae, grey, epochs=1, batch_size=500, mode=mode, optimizer=optimizer,
                 skip_nonfinite=9, warmup=0)  # fmt: skip
    assert rows[0]["skipped"] >= 1


def test_networks_in_bfloat16_train_as_well(digits):
    def end(wrap, seed):
        pyro.set_rng_seed(seed)
        vae = VAE(
            priors.Normal(2),
            likelihoods.Bernoulli(wrap(MLP(2, [64], (1, 8, 8)))),
            posteriors.Normal(wrap(MLP((1, 8, 8), [64], (2, 2)))),
        )
        how = {"batch_size": 100, "optimizer": partial(Adam, lr=3e-3), "progress": False}
        return fit(vae, digits, epochs=10, mode="captured", **how)[-1]["elbo"]

    exact, rough = ([end(wrap, k) for k in range(4)] for wrap in (lambda net: net, BFloat16))
    assert all(one != other for one, other in zip(exact, rough, strict=True))
    # Less is lost on average than another seed gains or loses.
    assert statistics.mean(exact) - statistics.mean(rough) < statistics.stdev(exact)
