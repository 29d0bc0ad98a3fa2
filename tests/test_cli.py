"""The command line: what every command of `commands` and `runs` does, and how it refuses."""

import contextlib
import errno
import importlib.util
import inspect
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from functools import partial

import numpy as np
import pyro
import pytest
import torch
import yaml
from PIL import Image
from scipy.stats import norm
from torch.nn.functional import one_hot

from pyro_vae import bound, checkpoints, commands, data, fit, load, objectives, plots, runs
from pyro_vae.cli import COMMANDS, main
from pyro_vae.parts import Blueprint, Part
from pyro_vae.progress import Standing

QUICK = "train --epochs 1 --hidden 32 --latent 2"
PICTURES = ["curves.png", "samples.png", "reconstructions.png", "strip.png"]
FILES = ["config.yaml", "model.json", "metrics.jsonl", "best.safetensors", "last.safetensors"]
MY_FILE = """
import math

import pyro.distributions as dist
import torch
from pyro_vae.priors import Prior


class MyPrior(Prior):
    def __init__(self, latent: int, width: float = 1.0) -> None:
        super().__init__()
        self.latent, self.width = latent, width

    def forward(self, *context):
        return dist.Normal(torch.zeros(self.latent), self.width).to_event(1)


class Spoiling(MyPrior):
    def forward(self, *context):
        self.width = math.nan if self.training and self.calls > 25 else 1.0
        self.calls += self.training
        return super().forward(*context)

    calls = 0


class Stumbling(MyPrior):
    def forward(self, *context):
        grad = self.training and torch.is_grad_enabled()
        self.calls += grad
        width = math.nan if grad and self.calls in (15, 25) else 1.0
        return dist.Normal(torch.zeros(self.latent), torch.tensor(width)).to_event(1)

    calls = 0


class Untyped(MyPrior):
    def __init__(self, latent, size):
        super().__init__(latent)


class Named(MyPrior):
    def __init__(self, latent: int, name: str) -> None:
        super().__init__(latent)
        self.name = name


class Mistaken(MyPrior):
    def forward(self, *context):
        return self.nothing


class Stopping(torch.optim.SGD):
    calls = 0

    def step(self, closure=None):
        self.calls += 1
        if self.calls > 20:
            raise KeyboardInterrupt
        return super().step(closure)


def decay(epoch: int) -> float:
    return 0.9**epoch
"""
INTRUDER = """
from pathlib import Path
from pyro_vae.objectives import Trace_ELBO

Path("marker").touch()


class Objective(Trace_ELBO):
    pass


def decay(epoch):
    return 1.0
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A current folder without a file; the module path is put back at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    return tmp_path


@pytest.fixture
def my_file(here):
    """A module of the user's own in the current folder."""
    (here / "my_file.py").write_text(MY_FILE)
    yield
    sys.modules.pop("my_file", None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains once for each line of options; its folder and what it printed."""
    runs = {}

    def train(options):
        if options not in runs:
            folder = tmp_path_factory.mktemp("runs") / "run"
            with contextlib.redirect_stdout(io.StringIO()) as output:
                assert main([*QUICK.split(), *options.split(), "--out", str(folder)]) == 0
            runs[options] = folder, output.getvalue()
        return runs[options]

    return train


@pytest.fixture
def run(trained):
    """The folder of a run with two latents on binarised digits."""
    return trained("")[0]


@pytest.fixture
def grey(trained):
    """The folder of a run with three latents on grey digits."""
    return trained("--likelihood Normal --latent 3")[0]


@pytest.fixture
def labelled(trained):
    """The folder of a conditional run."""
    return trained("--conditional")[0]


@pytest.fixture
def drawn(monkeypatch):
    """What the commands hand to the pictures, by the name of the function."""
    seen = {}

    def draw(name, true, *arguments):
        seen[name] = arguments
        return true(*arguments)

    for name in ("grid", "strip", "manifold"):
        monkeypatch.setattr(plots, name, partial(draw, name, getattr(plots, name)))
    return seen


def call(line, **places):
    """Run a command line, words in braces replaced by their places."""
    return main([word.format(**places) for word in line.split()])


def refusal(status, line, capsys, **places):
    """The one sentence on stderr of a command line that fails with this status."""
    capsys.readouterr()
    assert call(line, **places) == status
    lines = capsys.readouterr().err.removesuffix("\n").split("\n")
    (said,) = (line for line in lines if "img/s" not in line)  # the progress bar aside
    assert said.startswith("pyro-vae: ")
    return said


def opened(folder, seed=0):
    """The VAE of a run, with all random generators seeded afterwards."""
    vae = load(folder)
    pyro.set_rng_seed(seed)
    return vae


def weights(folder, name="last"):
    return (folder / f"{name}.safetensors").read_bytes()


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def configuration(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


def readable(path):
    with Image.open(path) as image:
        image.load()
        return image.format == "PNG" and min(image.size) > 1


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What training leaves behind


def test_training_leaves_a_whole_run(trained):
    folder, output = trained("")
    pictures = [*PICTURES, "manifold.png"]
    assert {*FILES, *pictures} <= {path.name for path in folder.iterdir()}
    assert output.splitlines()[-6:] == ["pictures:", *(f"  {folder / name}" for name in pictures)]
    assert all(readable(folder / name) for name in pictures)
    (row,) = metrics(folder)
    assert row["samples"] == 1437
    assert row["elbo"] == pytest.approx(row["reconstruction"] - row["kl"])


def test_runs_are_numbered_in_the_current_folder(here):
    for _ in range(2):
        assert call(f"{QUICK} --latent 3 --test 0 --validation 0") == 0
    assert {path.name for path in (here / "runs").iterdir()} == {"digits-1", "digits-2"}
    assert all(readable(here / "runs" / "digits-2" / name) for name in PICTURES)
    assert "elbo" not in metrics(here / "runs" / "digits-1")[0]


@pytest.mark.parametrize("options", ["", "--conditional"])
def test_a_run_repeats_bit_for_bit_from_its_configuration(options, trained, here):
    folder, _ = trained(options)
    assert call("train --config {run}/config.yaml --out again", run=folder) == 0
    assert weights(here / "again") == weights(folder)
    assert weights(here / "again", "best") == weights(folder, "best")
    again, first = (configuration(run) for run in (here / "again", folder))
    assert {**again, "out": None} == {**first, "out": None}


@pytest.mark.parametrize(
    "line",
    [
        "--config {run}/config.yaml --epochs 2 --prior.learned true",
        "--epochs 2 --prior.learned true --config {run}/config.yaml",
        "--epochs 2 --config={run}/config.yaml --prior.learned true",
    ],
)
def test_options_count_more_than_the_configuration_wherever_they_stand(line, run, capsys):
    with pytest.raises(SystemExit):
        call(f"train {line} --print_config", run=run)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["epochs"], printed["hidden"]) == (2, [32])
    assert printed["prior"]["init_args"] == {"learned": True}


@pytest.mark.parametrize(
    ("kind", "name", "option", "own"),
    [
        ("optimizer", "AdamW", "weight_decay", 0.01),
        ("optimizer", "Adagrad", "eps", 1e-10),
        ("objective", "IWAE", "vectorize_particles", True),
    ],
)
def test_a_class_that_is_named_has_its_own_defaults(kind, name, option, own, here, capsys):
    for line in (f"--{kind} {name}", f"--{kind}={name}"):
        with pytest.raises(SystemExit):
            call(f"{QUICK} {line} --print_config")
        assert yaml.safe_load(capsys.readouterr().out)[kind]["init_args"][option] == own
    assert call(f"{QUICK} --{kind} {name} --out run") == 0
    assert (
        yaml.safe_load((here / "run" / "config.yaml").read_text())[kind]["init_args"][option]
        == own
    )


@pytest.mark.parametrize(
    "line",
    [
        "--optimizer AdamW --optimizer.eps 1e-3",
        "--optimizer.eps 1e-3 --optimizer AdamW",
        '--optimizer.eps=1e-3 --lr 0.1 --optimizer={"class_path":"torch.optim.AdamW"}',
        "--optimizer.eps 1e-3 --optimizer AdamW --config config.yaml",
    ],
)
def test_a_class_may_be_named_after_its_options(line, here):
    had = {"class_path": "torch.optim.Adam", "init_args": {"weight_decay": 0.2}}
    (here / "config.yaml").write_text(yaml.safe_dump({"optimizer": had}))
    assert main([*QUICK.split(), *line.split(), "--out", "run"]) == 0
    found = yaml.safe_load((here / "run" / "config.yaml").read_text())["optimizer"]["init_args"]
    assert (found["eps"], found["weight_decay"]) == (1e-3, 0.01)


def test_another_class_than_the_configurations_has_none_of_its_options(here):
    def prior(line):
        assert call(f"train --config config.yaml {line}") == 0
        return yaml.safe_load((here / line.split()[-1] / "config.yaml").read_text())["prior"]

    had = {"class_path": "pyro_vae.priors.StudentT", "init_args": {"df": 9.0, "scale": 3.0}}
    content = {"epochs": 1, "hidden": [32], "latent": 2, "prior": had}
    (here / "config.yaml").write_text(yaml.safe_dump(content))
    assert prior("--prior Laplace --out other")["init_args"] == {"scale": 1.0}
    assert prior("--prior StudentT --prior.df 4 --out same")["init_args"]["scale"] == 3.0


@pytest.mark.parametrize(
    ("options", "parts", "settings"),
    [
        ("--objective TraceMeanField_ELBO", {}, {"objective": objectives.TraceMeanField_ELBO()}),
        (
            "--objective BetaELBO --objective.weight 4 --warmup 0 --clip 9",
            {},
            {"objective": objectives.BetaELBO(4.0), "warmup": 0.0, "clip": 9.0},
        ),
        (
            "--optimizer SGD --optimizer.momentum 0.9 --lr 1e-4",
            {},
            {"optimizer": partial(torch.optim.SGD, lr=1e-4, momentum=0.9)},
        ),
        ("--likelihood Normal", {"likelihood": Part("Normal")}, {}),
        (
            "--likelihood Normal --likelihood.per_element true --likelihood.bounded true",
            {"likelihood": Part("Normal", {"per_element": True, "bounded": True})},
            {},
        ),
        ("--prior Normal --prior.learned true", {"prior": Part("Normal", {"learned": True})}, {}),
        ("--channels 3 5 --batch-size 200", {"channels": (3, 5)}, {"batch_size": 200}),
        ("--channels 3 --blocks 2", {"channels": (3,), "blocks": 2}, {}),
        ("--gated --activation Identity", {"gated": True, "activation": "Identity"}, {}),
        ("--missing", {"missing": True}, {}),
    ],
)
def test_options_train_as_the_library_does(options, parts, settings, here):
    assert call(f"{QUICK} --latent 3 {options} --out run") == 0
    pyro.set_rng_seed(0)
    vae = Blueprint((1, 8, 8), latent=3, hidden=(32,), rows=1437, **parts).build()
    view = data.plain if "likelihood" in parts else data.dynamic
    fit(vae, data.load("digits", view=view), epochs=1, progress=False, **settings)
    opened = load(here / "run").state_dict()
    assert all(torch.equal(opened[key], value) for key, value in vae.state_dict().items())


# Grey levels, counts, missing values


@pytest.mark.parametrize(
    ("options", "view"),
    [
        ("--likelihood DiscretizedLogistic", "levels"),
        ("--likelihood DiscretizedLogistic --missing", "levels"),
        ("--likelihood Categorical --hidden 4", "levels"),
        ("--likelihood Categorical --likelihood.levels 17 --top 0.0625", "none"),
        ("--likelihood DiscretizedLogistic --binarisation dynamic", "dynamic"),
        ("--likelihood Poisson --binarisation levels", "levels"),
        ("--missing", "dynamic"),
        ("--likelihood Normal --missing", "none"),
    ],
)
def test_the_view_of_data_is_that_of_their_likelihood(options, view, here):
    assert call(f"{QUICK} {options} --out run") == 0
    assert configuration(here / "run")["binarisation"] == view
    assert all(readable(here / "run" / name) for name in PICTURES)


def test_integers_up_to_255_are_levels_as_they_are(here):
    np.save("x.npy", np.random.default_rng(0).integers(0, 256, (60, 5)))
    line = (
        "train --data x.npy --likelihood DiscretizedLogistic --epochs 1 --batch-size 48 --out run"
    )
    assert call(line) == 0
    assert configuration(here / "run")["binarisation"] == "none"


def test_levels_are_drawn_from_black_to_white(trained, drawn):
    folder, _ = trained("--likelihood DiscretizedLogistic --output-bias")
    assert call("reconstruct {run} --count 6 --out a.png --split validation", run=folder) == 0
    (rows,) = drawn["strip"]
    x = data.load("digits", view=data.levels).validation.batch()[0]
    shown = 255 * rows["data"]
    assert all(torch.isclose(x, each, atol=1e-3).flatten(1).all(1).any() for each in shown)
    reconstruction = opened(folder).reconstruct(shown.round())
    assert torch.allclose(255 * rows["reconstruction"], reconstruction, atol=1e-3)
    assert call("sample {run} --count 9 --out a.png", run=folder) == 0
    assert torch.equal(drawn["grid"][0], opened(folder).sample(9, mean=True) / 255)


def test_values_without_bounds_are_drawn_over_the_range_of_the_data(here, drawn):
    x = np.random.default_rng(0).normal(size=(60, 4, 4))
    np.save("x.npy", x)
    options = "--data x.npy --batch-size 10 --likelihood Normal --epochs 1 --latent 2"
    assert call(f"train {options} --out run") == 0
    assert call("reconstruct run --count 6 --out a.png") == 0
    (rows,) = drawn["strip"]
    given = data.load("x.npy").test.batch()[0]
    low, high = given.min(), given.max()
    assert sorted(((high - low) * rows["data"] + low).flatten().tolist()) == pytest.approx(
        sorted(given.flatten().tolist()), abs=1e-5
    )
    means = opened("run").reconstruct((high - low) * rows["data"] + low)
    assert torch.allclose((high - low) * rows["reconstruction"] + low, means, atol=1e-4)


def test_counts_of_images_are_drawn_up_to_the_greatest(trained, drawn):
    folder, _ = trained("--likelihood Poisson --top 0.0625")
    assert call("reconstruct {run} --count 6 --out a.png", run=folder) == 0
    (rows,) = drawn["strip"]
    assert max(float(x.max()) for x in rows.values()) == 1.0
    x = data.load("digits", top=0.0625).test.batch()[0]
    top = max(float(opened(folder).reconstruct(x).max()), 16.0)
    assert 0.2 < 16 / top <= float(rows["data"].max()) <= 1.0


def test_an_output_bias_of_levels_starts_at_their_training_mean(here):
    assert call(f"{QUICK} --likelihood DiscretizedLogistic --output-bias --lr 0 --out run") == 0
    mean = data.load("digits", view=data.levels).train.mean()
    loc = load(here / "run").likelihood.network.last.bias.unflatten(0, (2, 64))[0]
    assert torch.allclose(127.5 * (1 + loc), mean.flatten(), atol=1e-3)


def said(part, folder):
    """What `evaluate` should print of a split."""
    batches = part.batches(1000, torch.Generator().manual_seed(0))
    values = bound(opened(folder), batches, particles=10).summary()
    return f"ELBO {values['elbo']:.2f} ± {values['standard_error']:.2f}"


@pytest.fixture
def cells(here):
    """A file of counts with labels, one with size factors as context, and their arrays."""
    random = np.random.default_rng(0)
    counts, labels = random.poisson(random.gamma(2.0, 2.0, (150, 6))), np.arange(150) % 3
    np.savez("cells.npz", x=counts, labels=labels)
    np.savez("own.npz", x=counts, context=np.arange(1.0, 151.0))
    return counts, labels


SIZED = "--likelihood NegativeBinomial --likelihood.size_factor true --batch-size 60"


def test_counts_with_a_size_factor_train_and_are_sampled_at_sizes_of_training(
    cells, drawn, here, capsys
):
    assert call(f"{QUICK} --data cells.npz {SIZED} --out run") == 0
    assert all(readable(here / "run" / name) for name in [*PICTURES, "manifold.png"])
    loaded = data.load("cells.npz").sized()
    assert said(loaded.test, "run") in capsys.readouterr().out
    assert call("evaluate run --samples 0") == 0
    assert said(loaded.test, "run") in capsys.readouterr().out
    assert call("sample run --count 5 --out a.png") == 0
    rows = torch.randint(len(loaded.train), [5], generator=torch.Generator().manual_seed(0))
    expected = opened("run").sample(5, loaded.train.context[0][rows], mean=True)
    assert torch.equal(drawn["grid"][0], expected)
    for line in ("reconstruct run --count 5", "interpolate run --count 2", "encode run"):
        assert call(line) == 0


def test_a_conditional_run_has_its_size_factor_last(cells, drawn, here, capsys):
    assert call(f"{QUICK} --data cells.npz {SIZED} --conditional --out run") == 0
    loaded = data.load("cells.npz").conditioned().sized()
    assert said(loaded.test, "run") in capsys.readouterr().out
    assert checkpoints.blueprint("run").context == 4
    rows = torch.randint(len(loaded.train), [6], generator=torch.Generator().manual_seed(0))
    sizes = loaded.train.context[1][rows]
    for option, labels, columns in (("", [0, 1, 2] * 2, 3), ("--label 2", [2] * 6, None)):
        assert call(f"sample run --count 6 --out a.png {option}") == 0
        codes = one_hot(torch.tensor(labels), 3).float()
        assert torch.equal(drawn["grid"][0], opened("run").sample(6, codes, sizes, mean=True))
        assert drawn["grid"][1] == columns
    assert call("manifold run --side 3 --label 1 --out a.png") == 0
    assert "they are 0 to 2" in refusal(2, "sample run --label 3", capsys)


def test_a_context_of_the_datas_own_is_that_of_training_data_in_samples(
    cells, drawn, here, capsys
):
    assert call(f"{QUICK} --data own.npz {SIZED} --out run") == 0
    loaded = data.load("own.npz")
    assert said(loaded.test, "run") in capsys.readouterr().out
    assert call("sample run --count 5 --out a.png") == 0
    rows = torch.randint(len(loaded.train), [5], generator=torch.Generator().manual_seed(0))
    context = loaded.train.context[0][rows]
    assert torch.equal(drawn["grid"][0], opened("run").sample(5, context, mean=True))
    assert "is not conditional" in refusal(2, "sample run --label 1", capsys)
    line = f"{QUICK} --data own.npz {SIZED} --conditional --out new"
    assert "'own' has a context of its own; leave out --conditional" in refusal(2, line, capsys)


def test_an_empty_row_has_no_size_factor(here, capsys):
    np.save("x.npy", np.zeros((50, 4), int))
    line = f"{QUICK} --data x.npy {SIZED} --out run"
    assert "row 0 of the training split of 'x' has a total of 0" in refusal(2, line, capsys)


@pytest.fixture
def gaps(here):
    """A file of the digits of which 30 % of the pixels are missing."""
    x = data.load("digits", validation=0, test=0).train.x.numpy().copy()
    x[np.random.default_rng(0).random(x.shape) < 0.3] = np.nan
    np.save("gaps.npy", x)
    return x


@pytest.mark.parametrize("likelihood", ["Bernoulli", "DiscretizedLogistic", "Normal"])
def test_data_with_missing_values_train(likelihood, gaps, drawn, here, capsys):
    assert call(f"{QUICK} --data gaps.npy --missing --likelihood {likelihood} --out run") == 0
    output = capsys.readouterr().out
    assert "shape 1x8x8, 30.0% of their values missing, binarisation" in output
    view = runs.VIEWS[configuration(here / "run")["binarisation"]]
    loaded = data.load("gaps.npy", missing=True, view=view)
    assert said(loaded.test, "run") in output
    assert call("evaluate run --samples 0") == 0
    assert said(loaded.test, "run") in capsys.readouterr().out
    assert call("sample run --count 4 --out values.npy") == 0
    assert np.isfinite(np.load("values.npy")).all()
    assert call("reconstruct run --count 4 --out a.png") == 0
    (rows,) = drawn["strip"]
    assert rows["data"].isnan().float().mean() == pytest.approx(0.3, abs=0.1)
    assert rows["reconstruction"].isfinite().all()
    for line in ("interpolate run --count 2", "encode run", "manifold run --side 3"):
        assert call(line) == 0


def test_missing_values_are_told_by_how_to_accept_them(gaps, capsys):
    said = refusal(2, f"{QUICK} --data gaps.npy --out run", capsys)
    assert f"{np.isnan(gaps).sum()} NaN or infinite values" in said
    assert "accept NaN for what was not observed by --missing" in said
    assert call("data gaps.npy") == 0
    assert "30.0% of their values missing" in capsys.readouterr().out


def test_a_run_from_before_its_later_options_opens(run, here, capsys):
    shutil.copytree(run, here / "run")
    settings = configuration(run)
    for key in ("gated", "blocks", "bfloat16", "missing"):
        del settings[key]
    (here / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    for place in (run, "run"):
        assert call(f"evaluate {place} --samples 0") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


# More of what training leaves behind


def test_a_schedule_sets_the_learning_rate_of_each_epoch(here):
    options = "--schedule CosineAnnealingLR --schedule.T_max 3 --epochs 3 --lr 0.01 --out run"
    assert call(f"{QUICK} {options}") == 0
    rates = [row["learning_rate"] for row in metrics(here / "run")]
    assert rates == pytest.approx(0.005 * (1 + np.cos(np.pi * np.arange(3) / 3)))


def test_an_output_bias_starts_at_the_training_mean(here):
    assert call(f"{QUICK} --output-bias --lr 0 --out run") == 0
    mean = data.load("digits").train.mean().clamp(1e-3, 1 - 1e-3)
    bias = load(here / "run").likelihood.network.last.bias
    assert torch.allclose(bias.sigmoid(), mean.flatten(), atol=1e-5)


def test_a_file_of_vectors_trains_and_is_found_again_from_elsewhere(here, monkeypatch, capsys):
    np.save("points.npy", np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32))
    assert call("train --data points.npy --likelihood Normal --epochs 1 --out run") == 0
    assert all(readable(here / "run" / name) for name in PICTURES)
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert call("evaluate ../run --samples 0 --split train") == 0
    assert "160 data" in capsys.readouterr().out.splitlines()[-1]


def test_the_folder_of_named_data_is_remembered(here, monkeypatch, capsys):
    rows = np.random.default_rng(0).integers(0, 2, (60, 784), np.uint8)
    (here / "sets").mkdir()
    np.savez("sets/binarized_mnist.npz", train=rows[:40], valid=rows[40:50], test=rows[50:])
    options = "--data binarized-mnist --data-dir sets --batch-size 40 --out run"
    assert call(f"{QUICK} {options}") == 0
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    for options in ("", "--data binarized-mnist", "--data-dir ../sets"):
        assert call(f"evaluate ../run --samples 0 {options}") == 0
        assert "10 data" in capsys.readouterr().out.splitlines()[-1]


# What the other commands do with a run


@pytest.mark.parametrize(("split", "particles"), [("test", 10), ("train", 2)])
def test_evaluate_prints_the_bound_of_the_vae_that_load_gives(split, particles, run, capsys):
    assert (
        call(f"evaluate {{run}} --split {split} --particles {particles} --samples 0", run=run) == 0
    )
    part = getattr(data.load("digits", view=data.dynamic), split)
    batches = part.batches(1000, torch.Generator().manual_seed(0))
    values = bound(opened(run), batches, particles=particles).summary()
    assert capsys.readouterr().out == (
        f"{split}: ELBO {values['elbo']:.2f} ± {values['standard_error']:.2f}, reconstruction "
        f"{values['reconstruction']:.2f}, KL {values['kl']:.2f} "
        f"(nats, per datum, mean and standard error over {len(part):,} data)\n"
    )


def test_evaluate_takes_other_weights_and_other_data(trained, here, capsys):
    folder, _ = trained("--likelihood Normal --latent 3")
    np.save("black.npy", np.zeros((50, 8, 8), np.float32))
    for options in ("", "--weights last", "--data black.npy", "--seed 1"):
        assert call(f"evaluate {{run}} --samples 0 {options}", run=folder) == 0
    first, last, black, other = capsys.readouterr().out.splitlines()
    assert first == last  # of a single epoch
    assert black.endswith("5 data)")
    assert len({first, black, other}) == 3


def test_sample_draws_means_and_values(run, drawn, here, capsys):
    assert call("sample {run} --count 9 --out means.png", run=run) == 0
    assert call("sample {run} --count 9 --out values.npy --seed 1", run=run) == 0
    assert capsys.readouterr().out == "pictures:\n  means.png\nvalues.npy\n"
    assert torch.equal(drawn["grid"][0], opened(run).sample(9, mean=True))
    assert readable(here / "means.png")
    assert np.array_equal(np.load("values.npy"), opened(run, seed=1).sample(9).numpy())


@pytest.mark.parametrize(
    ("options", "labels", "columns"),
    [("", [*range(10), *range(5)], 10), ("--label 3", [3] * 15, None)],
)
def test_sample_draws_the_label_or_each_in_turn(options, labels, columns, labelled, drawn):
    assert call(f"sample {{run}} --count 15 --out a.png {options}", run=labelled) == 0
    codes = one_hot(torch.tensor(labels), 10).float()
    assert torch.equal(drawn["grid"][0], opened(labelled).sample(15, codes, mean=True))
    assert drawn["grid"][1] == columns


def test_reconstruct_draws_data_above_their_reconstructions(grey, drawn, here):
    assert call("reconstruct {run} --count 6 --out a.png --split validation", run=grey) == 0
    (rows,) = drawn["strip"]
    assert list(rows) == ["data", "reconstruction"]
    given = data.load("digits").validation.batch()[0]
    assert all((given == x).flatten(1).all(1).any() for x in rows["data"])
    assert torch.equal(rows["reconstruction"], opened(grey).reconstruct(rows["data"]))
    assert readable(here / "a.png")


@torch.no_grad()
def test_interpolate_draws_straight_lines_between_codes_of_data(grey, drawn, here):
    assert call("interpolate {run} --count 3 --steps 5 --out a.png", run=grey) == 0
    means, steps = drawn["grid"]
    vae = load(grey)
    z = vae.encode(data.load("digits").test.batch()[0]).mean
    ends = vae.decode(z).mean.flatten(1)
    for row in means.flatten(1).reshape(3, steps, -1):
        first, last = (z[torch.cdist(end[None], ends).argmin()] for end in (row[0], row[-1]))
        line = torch.stack([first + (last - first) * step / 4 for step in range(5)])
        assert torch.allclose(row, vae.decode(line).mean.flatten(1), atol=1e-5)
    assert readable(here / "a.png")


@torch.no_grad()
def test_a_manifold_spans_the_quantiles_of_the_prior(run, drawn, here):
    assert call("manifold {run} --side 4 --out a.png", run=run) == 0
    x, side = drawn["manifold"]
    quantiles = norm.ppf((np.arange(4) + 0.5) / 4)
    z = [(right, up) for up, right in itertools.product(quantiles[::-1], quantiles)]
    expected = load(run).decode(torch.tensor(z, dtype=torch.float32)).mean
    assert side == 4
    assert torch.allclose(x, expected, atol=1e-6)
    assert readable(here / "a.png")


def test_a_manifold_shows_the_label(labelled, drawn):
    shown = []
    for options in ("", "--label 0", "--label 7"):
        assert call(f"manifold {{run}} --side 3 --out a.png {options}", run=labelled) == 0
        shown.append(drawn["manifold"][0])
    assert torch.equal(shown[0], shown[1])
    assert not torch.equal(shown[0], shown[2])


def test_encode_writes_codes_scales_and_labels(grey, here, capsys):
    assert call("encode {run} --out codes.npz", run=grey) == 0
    test = data.load("digits").test
    q = load(grey).encode(test.batch()[0])
    with np.load("codes.npz") as codes:
        assert set(codes) == {"z", "scale", "labels"}
        assert codes["z"].shape == codes["scale"].shape == (180, 3)
        np.testing.assert_allclose(codes["z"], q.mean.detach(), atol=1e-6)
        np.testing.assert_allclose(codes["scale"], q.stddev.detach(), atol=1e-6)
        np.testing.assert_array_equal(codes["labels"], test.labels)
    assert capsys.readouterr().out == "codes.npz: z (180, 3), scale (180, 3), labels (180,)\n"


def test_codes_of_a_posterior_without_a_mean_are_said_to_be_draws(trained, here, capsys):
    folder, _ = trained("--posterior Flow")
    capsys.readouterr()
    assert call("encode {run} --seed 3 --out codes.npz", run=folder) == 0
    said = "z is one draw of q(z|x), by seed 3, where that has no mean"
    assert capsys.readouterr().out.splitlines()[1:] == [said]
    assert call("encode {run} --seed 3 --out again.npz", run=folder) == 0
    with np.load("codes.npz") as codes, np.load("again.npz") as again:
        np.testing.assert_array_equal(codes["z"], again["z"])


@pytest.mark.parametrize("command", ["sample", "reconstruct", "interpolate", "encode"])
def test_a_run_that_is_not_there_is_no_folder_to_make(command, capsys):
    said = "'nowhere' is no run: there is no file 'model.json' in it"
    assert said in refusal(2, f"{command} nowhere", capsys)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("sample", "samples.png"),
        ("reconstruct", "reconstructions.png"),
        ("interpolate", "interpolations.png"),
        ("manifold", "manifold.png"),
        ("encode", "codes.npz"),
    ],
)
def test_a_command_writes_into_the_run_by_default(command, name, labelled, capsys):
    (labelled / name).unlink(missing_ok=True)
    assert call(f"{command} {{run}}", run=labelled) == 0
    assert str(labelled / name) in capsys.readouterr().out
    assert name.endswith(".npz") or readable(labelled / name)


def test_data_says_what_there_is(here, capsys):
    np.save("mine.npy", np.zeros((50, 4, 4), np.uint8))
    assert call("data --data-dir nowhere") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(data.SOURCES)
    assert [line.split()[0] for line in lines if "embedded" in line] == ["digits"]
    for name, words in (("digits", "1,437 training"), ("mine.npy", "data of shape 1x4x4")):
        assert call(f"data {name}") == 0
        assert words in capsys.readouterr().out
    assert [path.name for path in here.iterdir()] == ["mine.npy"]


# Classes of the user's own


def test_a_prior_of_ones_own_trains_and_opens_where_it_is_allowed(my_file, here, capsys):
    assert call(f"{QUICK} --prior my_file.MyPrior --prior.width 3 --out run") == 0
    for line in ("sample run", "train --config run/config.yaml --out again"):
        said = refusal(2, line, capsys)
        assert "prior 'my_file.MyPrior' lies outside this package and may run any code" in said
        assert "--allow my_file" in said
    assert call("sample run --allow my_file --out a.png") == 0
    assert call("sample --allow my_file run --out b.png") == 0
    assert readable(here / "a.png")
    assert load("run", allow=["my_file"]).prior().base_dist.scale.unique().item() == 3.0
    assert call("train --config run/config.yaml --allow my_file --out again") == 0
    assert weights(here / "again") == weights(here / "run")


@pytest.mark.parametrize(
    "allow", ["--allow my_file", "--allow=my_file", "--allow other --allow my_file"]
)
def test_modules_are_allowed_by_name(allow, my_file, here, capsys):
    (here / "config.yaml").write_text("prior: {class_path: my_file.MyPrior}\n")
    line = "train --config config.yaml --epochs 0 --out new"
    assert "--allow my_file" in refusal(2, line, capsys)
    assert "training takes at least 1 epoch" in refusal(2, f"{line} {allow}", capsys)


NESTED = "{class_path: intruder.Objective}"
BETA, LAMBDA = "pyro_vae.objectives.BetaELBO", "torch.optim.lr_scheduler.LambdaLR"


@pytest.mark.parametrize(
    "change",
    [
        {"objective": {"class_path": "intruder.Objective"}},
        {"objective": {"class_path": "Trace_ELBO", "dict_kwargs": {"a": "intruder.decay"}}},
        {"objective.class_path": "intruder.Objective"},
        {"objective": "intruder.Objective"},
        {"config": "nested.yaml"},
        {"schedule": {"class_path": LAMBDA, "init_args": {"lr_lambda": "intruder.decay"}}},
        {"schedule": {"class_path": LAMBDA, "init_args": {"lr_lambda": ["intruder.decay"]}}},
        {"schedule": {"class_path": LAMBDA, "init_args": {"lr_lambda": {"intruder.decay"}}}},
        *(
            {"objective": {"class_path": BETA, "init_args": {"elbo": value}}}
            for value in ("intruder.Objective", yaml.safe_load(NESTED), NESTED, "nested")
        ),
    ],
)
def test_a_configuration_imports_nothing_that_is_not_allowed(change, run, here, capsys):
    (here / "intruder.py").write_text(INTRUDER)
    (here / "nested").write_text(NESTED)
    (here / "nested.yaml").write_text(f"objective: {NESTED}\n")
    content = {**configuration(run), **change}
    (here / "config.yaml").write_text(yaml.safe_dump(content))
    said = refusal(2, "train --config config.yaml --out new", capsys)
    assert re.search("lies outside this package|no plain word|has an entry|no configuration", said)
    assert not (here / "marker").exists()
    assert not (here / "new").exists()


def test_every_configuration_is_checked(run, here, capsys):
    (here / "intruder.py").write_text(INTRUDER)
    (here / "more.yaml").write_text(f"objective: {NESTED}\n")
    for line in ("--config {run}/config.yaml --config more.yaml", "--conf more.yaml"):
        assert refusal(2, f"train {line} --out new", capsys, run=run)
    assert not (here / "marker").exists()
    line = (
        "train --config {run}/config.yaml --config more.yaml --allow intruder --epochs 0 --out new"
    )
    assert "training takes at least 1 epoch" in refusal(2, line, capsys, run=run)
    assert (here / "marker").exists()
    del sys.modules["intruder"]


@pytest.mark.parametrize("name", ["my_file.py", "intruder.Objective", "a: b"])
def test_text_for_a_class_of_ones_own_may_be_anything(name, my_file, here, capsys):
    prior = {"class_path": "my_file.Named", "init_args": {"name": name}}
    (here / "config.yaml").write_text(yaml.safe_dump({"prior": prior}))
    with pytest.raises(SystemExit):
        call("train --config config.yaml --allow my_file --print_config")
    assert yaml.safe_load(capsys.readouterr().out)["prior"] == prior


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ("--prior my_file.MyPrior --prior.width x", 2, "--prior.width takes a number, not 'x'"),
        ("--prior my_file.MyPrior --prior.wdth 3", 2, "MyPrior takes no option 'wdth'; it takes"),
        ("--prior my_file.Nope", 2, "prior 'my_file.Nope' cannot be imported"),
        ("--likelihood my_file.MyPrior", 2, "'my_file.MyPrior' is no likelihood"),
        ("--prior my_file.Untyped --prior.size 3", 2, "parameter 'size' of my_file.Untyped must"),
        ("--prior my_file.Mistaken", 1, "AttributeError: 'Mistaken' object has no attribute"),
        ("--schedule LambdaLR --schedule.lr_lambda my_file.decay", 2, "numbers, words and lists"),
    ],
)
def test_what_is_wrong_with_a_class_of_ones_own_is_said(
    options, status, words, my_file, here, capsys
):
    assert words in refusal(status, f"{QUICK} {options} --out run", capsys)
    assert not (here / "run").exists()


def test_no_file_of_the_current_folder_stands_in_for_an_installed_module(my_file, here):
    (here / "wave.py").write_text("raise RuntimeError('this is not the standard library')\n")
    assert main(["--version"]) == 0
    assert importlib.util.find_spec("wave").origin != str(here / "wave.py")
    assert importlib.util.find_spec("my_file").origin == str(here / "my_file.py")


# Misuse: one sentence, status 2, nothing written

MISUSE = {
    "trian": "unknown command 'trian'; did you mean 'train'?",
    "help": "unknown command 'help'; there are train, evaluate",
    "train --epohcs 1": "'train' has no option '--epohcs'; did you mean '--epochs'?",
    "train digits": "'train' has no option 'digits'; see `pyro-vae train --help`",
    "train --epochs": "--epochs needs a value",
    "train --epochs 1.5": "--epochs takes a whole number, not '1.5'",
    "train --hidden 3 x": "--hidden takes a whole number, not 'x'",
    "train --lr fast": "--lr takes a number, not 'fast'",
    "train --ordered=maybe": "--ordered takes no value; there is --no-ordered",
    "train --activation RelU": "--activation takes one of ELU, GELU, Identity, LeakyReLU",
    "train --binarisation nne": "--binarisation takes one of dynamic, threshold, levels, deq",
    "train --data digist": "unknown data set 'digist': did you mean 'digits'?",
    "train --data no.npy": "there is no file or folder 'no.npy'",
    "train --prior Norml": "unknown prior 'Norml': did you mean 'Normal'?",
    "train --likelihood Bernouli": "did you mean 'Bernoulli'?",
    "train --posterior Normel": "unknown posterior 'Normel': did you mean 'Normal'?",
    "train --objective Trace_ELB": "did you mean 'Trace_ELBO'?",
    "train --optimizer Adm": "unknown optimizer 'Adm': did you mean 'Adam'?",
    "train --schedule StepLr": "unknown schedule 'StepLr': did you mean 'StepLR'?",
    "train --optimizer Optimizer": "unknown optimizer 'Optimizer'",
    "train --prior no_file.Mine": "prior 'no_file.Mine' cannot be imported: No module named",
    "train --prior os.system": "'os.system' is no prior: it must be a subclass of",
    "train --prior pyro_vae.posteriors.Normal": "is no prior: it must be a subclass of",
    "train --prior Normal --prior.width 3": "Normal takes no option 'width'; it takes learned",
    "train --prior.width 3": "prior Normal takes no option 'width'; it takes learned",
    "train --prior.learned maybe": "--prior.learned takes true or false, not 'maybe'",
    "train --optimizer.betas 3": "--optimizer.betas takes a list, not '3'",
    "train --schedule MultiStepLR --schedule.milestones 1 2": (
        "--schedule.milestones takes a list such as [1,2], not '1'"
    ),
    "train --schedule StepLR": "schedule StepLR needs step_size: give it by --schedule.step_size",
    "train --schedule StepLR --schedule.step_size x": "--schedule.step_size takes a whole number",
    "train --schedule.step_size 3": "give the schedule by --schedule before its options",
    "train --objective BetaELBO --objective.elbo Trace": "unknown objective 'Trace'",
    "train --objective BetaELBO --objective.elbo.num_particles 3": "the class of --objective.elbo",
    "train --objective BetaELBO --objective.weight -1": "the weight of the KL is finite and at",
    "train --likelihood Normal --likelihood.scale -1": "the scale of a Normal must be positive",
    "train --optimizer SGD --optimizer.momentum -1": "Invalid momentum value: -1.0",
    "train --optimizer LBFGS": "LBFGS cannot train here, since its step needs closure",
    "train --latent 0": "a latent vector has at least 1 dimension, not 0",
    "train --hidden 0": "a layer is at least 1 wide",
    "train --batch-size 1438": "a batch size of 1438 does not fit the 1437 training data",
    "train --epochs 0": "training takes at least 1 epoch, not 0",
    "train --epochs 0 --out new/folder": "training takes at least 1 epoch, not 0",
    "train --out {run}": "exists and is no empty folder",
    "train --device cuda:99": "there is no device 'cuda:99' here; use --device cpu",
    "train --binarisation none": "lie outside the support of Bernoulli",
    "train --config": "--config needs a value",
    "train --gated --channels 3": "gated layers are those of MLPs",
    "train --blocks 1": "residual blocks are those of a convolutional pair: give its channels",
    "train --blocks -1 --channels 3": "there are 0 residual blocks or more, not -1",
    "train --likelihood Missing": "name that one and give --missing",
    "train --likelihood Multinomial --missing": "flatten the data",
    "train --likelihood Poisson": "lie outside the support of Poisson",
    "train --likelihood.size_factor true": "likelihood Bernoulli takes no option 'size_factor'",
    "train --likelihood Normal --binarisation levels --top 0.5": "the view levels needs values",
    "train --config no.yaml": "there is no configuration file 'no.yaml'",
    "train --config {run}/model.json": "is no configuration of a run: it has an entry 'format'",
    "train --config {run}/best.safetensors": "is no configuration of a run",
    "train --resume nowhere": "'nowhere' is no run to go on with: there is no file 'config.yaml'",
    "train --resume": "--resume needs a value",
    "train --checkpoint -1": "the minutes between checkpoints are 0 or more, not -1",
    "train --skip-nonfinite -1": "the steps that may be left out are 0 or more, not -1",
    "evaluate": "'evaluate' needs RUN: the folder of a run, written by train",
    "evaluate nowhere": "'nowhere' is no run: there is no file 'model.json' in it",
    "evaluate {run} --wieghts last": "did you mean '--weights'?",
    "evaluate {run} --split tst": "--split takes one of train, validation, test, not 'tst'",
    "evaluate {run} --particles 0": "a bound takes at least 1 particle, not 0",
    "evaluate {run} --device cuda:99": "there is no device 'cuda:99' here",
    "sample {run} --count 0": "there is nothing to draw with a count of 0",
    "sample {run} --label 3": "is not conditional: it has no --label to choose",
    "sample {labelled} --label 10": "there is no label 10; they are 0 to 9",
    "sample {run} --out a.jpg": "a name that ends in .png or .npy, not 'a.jpg'",
    "sample {run} --out no/a.png": "there is no folder 'no' to write to",
    "reconstruct {run} --count 181": "the split has 180 data, too few to draw 181",
    "interpolate {run} --steps 1": "a line has at least 2 steps, not 1",
    "manifold {grey}": "a manifold needs 2 latents and '{grey}' has 3; try interpolate",
    "encode {run} --out codes.npy": "a name that ends in .npz, not 'codes.npy'",
    "data digist": "unknown data set 'digist': did you mean 'digits'?",
    "data no.npy": "there is no file or folder 'no.npy'",
}


@pytest.mark.parametrize("line", MISUSE)
def test_misuse_is_one_sentence_and_leaves_nothing(line, run, grey, labelled, here, capsys):
    places = {"run": run, "grey": grey, "labelled": labelled}
    before = contents(run)
    assert MISUSE[line].format(**places) in refusal(2, line, capsys, **places)
    assert not list(here.iterdir())
    assert contents(run) == before


def test_a_run_of_python_is_told_from_others(here, vae, digits, capsys):
    fit(vae, digits, epochs=1, run="own", progress=False)
    before = contents(here)
    for command in ("evaluate", "sample", "reconstruct", "interpolate", "manifold", "encode"):
        said = refusal(2, f"{command} own", capsys)
        assert said.endswith("by pyro_vae.restore(vae, 'own/best.safetensors')")
    assert "no config.yaml, which names its data, since it was" in refusal(
        2, "compare own own", capsys
    )
    said = refusal(2, "train --resume own", capsys)
    assert said.endswith("go on with it there, by fit(..., run='own', resume=True)")
    assert contents(here) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--epochs 0", "training takes at least 1 epoch, not 0"),
        ("--batch-size 0", "a batch has at least 1 datum, not 0"),
        ("--warmup 2", "the warm-up is a fraction of the budget, 0 to below 1, not 2"),
        ("--clip 0", "gradients are clipped to a norm above 0, not 0"),
        ("--patience 0", "patience is at least 1 epoch, not 0"),
        ("--checkpoint -1", "the minutes between checkpoints are 0 or more, not -1"),
        ("--skip-nonfinite -1", "the steps that may be left out are 0 or more, not -1"),
        ("--threads 0", "a command takes at least 1 thread, not 0"),
    ],
)
def test_settings_are_refused_before_data_are_read(options, words, monkeypatch, capsys):
    monkeypatch.setattr(commands, "dataset_of", lambda settings: pytest.fail("data were read"))
    assert words in refusal(2, f"train {options}", capsys)


def test_a_refused_run_leaves_the_empty_folder_that_was_there(here, capsys):
    (here / "mine").mkdir()
    refusal(2, "train --epochs 0 --out mine", capsys)
    assert [path.name for path in here.iterdir()] == ["mine"]
    assert not list((here / "mine").iterdir())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.json", "{", "model.json' is damaged"),
        ("model.json", None, "there is no file 'model.json' in it"),
        ("best.safetensors", "hello", "best.safetensors' is damaged"),
        ("best.safetensors", None, "there are no weights at"),
        ("config.yaml", None, "has no config.yaml, which names its data"),
        ("config.yaml", "", "config.yaml' is damaged"),
        ("config.yaml", "[", "config.yaml' is damaged"),
        ("config.yaml", "words", "config.yaml' is damaged"),
        ("config.yaml", "binarisation: dynamic", "config.yaml' is damaged"),
    ],
)
def test_a_damaged_run_is_refused_by_its_file(name, content, words, run, here, capsys):
    shutil.copytree(run, here / "run")
    (here / "run" / name).unlink()
    if content is not None:
        (here / "run" / name).write_text(content)
    assert words in refusal(2, "evaluate run", capsys)


def test_data_of_another_shape_are_refused(run, capsys):
    np.save("small.npy", np.zeros((50, 4, 4), np.float32))
    said = refusal(2, "evaluate {run} --data small.npy", capsys, run=run)
    assert "was trained on data of shape (1, 8, 8) and 'small' has (1, 4, 4)" in said


def test_a_run_without_a_test_split_says_so(here, capsys):
    assert call(f"{QUICK} --test 0 --out run") == 0
    assert "has no test data here; choose another --split" in refusal(2, "evaluate run", capsys)


# Failures while running: one sentence, status 1, what was finished is kept


def test_an_interrupt_keeps_metrics_and_weights(my_file, here, capsys):
    line = f"{QUICK} --epochs 5 --optimizer my_file.Stopping --lr 1e-4 --out run"
    assert (
        refusal(130, line, capsys) == "pyro-vae: stopped; what was finished, if anything, is kept"
    )
    assert [row["epoch"] for row in metrics(here / "run")] == [1]
    assert weights(here / "run", "last") != weights(here / "run", "best")
    assert {path.name for path in (here / "run").glob("*.*")} >= set(FILES)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--lr 1e30", r"epoch 1, step 2, first in the (log-density of site|gradient of) '\w+'"),
        ("--prior my_file.Spoiling", r"epoch 2, step \d+, first in .*site 'z' in the model"),
    ],
)
def test_a_loss_that_is_nan_stops_with_the_last_good_weights(
    options, words, my_file, here, capsys
):
    said = refusal(1, f"{QUICK} --epochs 5 {options} --out run", capsys)
    assert re.search(f"the loss or a gradient is NaN or infinite in {words}", said)
    opened = load("run", weights="last", allow=["my_file"])
    assert all(value.isfinite().all() for value in opened.state_dict().values())


def test_a_full_disk_is_one_sentence(here, monkeypatch, capsys):
    def write(path, content):
        if path.name == "best.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(content)

    monkeypatch.setattr(checkpoints, "write", write)
    said = refusal(1, f"{QUICK} --out run", capsys)
    assert said == "pyro-vae: cannot read or write: No space left on device"
    assert len(metrics(here / "run")) == 1


def test_the_trace_of_an_error_is_printed_where_it_is_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("PYRO_VAE_TRACEBACK", "1")
    assert call("evaluate nowhere") == 2
    errors = capsys.readouterr().err
    assert errors.startswith("Traceback (most recent call last)")
    assert errors.splitlines()[-1].startswith("pyro-vae: 'nowhere' is no run")


# Runs that are stopped


LONG = f"{QUICK} --epochs 4"


def stopped(line, step, monkeypatch, capsys, number=signal.SIGTERM):
    """The sentence of a run that gets a signal in a step."""
    count = Standing.count

    def counting(self, weight):
        count(self, weight)
        if self.step == step:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as context:
        context.setattr(Standing, "count", counting)
        return refusal(128 + number, line, capsys)


def timeless(folder):
    return [{**row, "images_per_second": None} for row in metrics(folder)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "options", ["", "--conditional --mode captured --optimizer SGD --lr 1e-4"]
)
def test_a_run_that_is_stopped_goes_on_bit_for_bit(options, number, here, monkeypatch, capsys):
    said = stopped(f"{LONG} {options} --out run", 30, monkeypatch, capsys, number)
    assert "stopped after step 30; go on by `pyro-vae train --resume run`" in said
    assert len(metrics(here / "run")) == 2
    before = (here / "run" / "config.yaml").read_bytes()
    assert call("train --resume run") == 0
    assert call(f"{LONG} {options} --out whole") == 0
    assert timeless(here / "run") == timeless(here / "whole")
    for name in ("best", "last"):
        assert weights(here / "run", name) == weights(here / "whole", name)
    assert (here / "run" / "config.yaml").read_bytes() == before
    assert all(readable(here / "run" / name) for name in PICTURES)


@pytest.mark.filterwarnings("default")
def test_warnings_are_sentences_without_a_place_in_the_code(here, monkeypatch, capsys):
    stopped(f"{LONG} --mode eager --out run", 30, monkeypatch, capsys)
    old, new = sorted((here / "run" / "checkpoints").iterdir())
    new.write_bytes(new.read_bytes()[:-1] + b"?")
    shown = warnings.showwarning
    assert call("train --resume run") == 0
    assert warnings.showwarning is shown
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line and "img/s" not in line]
    path = f"run/checkpoints/{new.name}"
    words = f"it is put aside, and '{old.name}' before it is taken"
    assert errors == [f"pyro-vae: '{path}' is damaged: its checksum differs; {words}"]


def test_more_epochs_are_remembered_by_the_checkpoint(here, monkeypatch, capsys):
    assert call(f"{LONG} --out run") == 0
    stopped("train --resume run --epochs 6", 60, monkeypatch, capsys)
    assert call("train --resume run") == 0
    assert [row["epoch"] for row in metrics(here / "run")] == [1, 2, 3, 4, 5, 6]
    assert "has 6 epochs, more than 5" in refusal(2, "train --resume run --epochs 5", capsys)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", "4 epochs; `pyro-vae train --resume run --epochs N` extends it to N of them"),
        ("--patience 1 --lr 0 --warmup 0", "a patience of 1 ended it after {} epochs"),
    ],
)
def test_a_run_that_is_finished_says_so(options, words, here, capsys):
    assert call(f"{LONG} {options} --out run") == 0
    before, last = metrics(here / "run"), weights(here / "run")
    shown = capsys.readouterr().out.splitlines()
    assert call("train --resume run") == 0
    again = capsys.readouterr()
    said = again.out.splitlines()
    assert [*said[:2], *said[3:]] == shown
    assert said[2].startswith("'run' is finished: ")
    assert said[2].endswith(words.format(len(before)))
    assert ("img/s" in again.err) == (len(before) < 4) == bool(options)
    assert (metrics(here / "run"), weights(here / "run")) == (before, last)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--lr 0.1", "cannot go on with another --lr: it was 0.001 and is 0.1; train anew by"),
        (
            "--latent 3 --clip 1",
            "another --latent: it was 2 and is 3, another --clip: it was None and is 1.0; train",
        ),
        ("--prior.learned true", "cannot go on with another --prior: it was {'class_path'"),
        ("--device cpu", "cannot go on with another --device: it was None and is cpu"),
        ("--threads 2", "cannot go on with another --threads: it was 1 and is 2"),
        ("--data-dir . --seed 1", "cannot go on with another --seed: it was 0 and is 1"),
        ("--out other", "--resume goes on in 'run'; leave out --out"),
        ("--config run/config.yaml", "takes the configuration of its run; leave out --config"),
        ("--data other.npy", "'run' cannot go on with other data"),
    ],
)
def test_a_resume_that_would_be_another_run_is_refused(options, words, here, monkeypatch, capsys):
    stopped(f"{LONG} --out run", 3, monkeypatch, capsys)
    np.save("other.npy", np.zeros((1797, 8, 8), np.float32))
    before = contents(here)
    assert words in refusal(2, f"train --resume run {options}", capsys)
    assert contents(here) == before


def test_a_run_of_earlier_versions_is_evaluated_and_not_gone_on_with(run, here, capsys):
    shutil.copytree(run, here / "old")
    shutil.rmtree(here / "old" / "checkpoints")
    header, _, config = (here / "old" / "config.yaml").read_text().partition("\n")
    assert header == "# A run of pyro_vae, format 1"
    settings = yaml.safe_load(config)
    for key in ("checkpoint", "skip_nonfinite"):
        del settings[key]
    (here / "old" / "config.yaml").write_text(yaml.safe_dump(settings))
    assert call("evaluate old --samples 0") == 0
    assert "has no checkpoint to go on from; train anew" in refusal(
        2, "train --resume old", capsys
    )
    assert call("train --config old/config.yaml --out new") == 0
    assert weights(here / "new") == weights(run)


def test_files_of_a_later_version_say_to_upgrade(run, here, capsys):
    shutil.copytree(run, here / "run")
    path = here / "run" / "config.yaml"
    path.write_text(path.read_text().replace("format 1", "format 2", 1))
    for line in ("evaluate run", "train --config run/config.yaml --out new", "train --resume run"):
        said = refusal(2, line, capsys)
        assert "has format 2 and this version reads formats up to 1; upgrade pyro_vae" in said


def test_a_run_that_was_stopped_before_its_first_step_begins(run, here):
    (here / "run").mkdir()
    shutil.copy(run / "config.yaml", here / "run")
    assert call("train --resume run") == 0
    assert weights(here / "run") == weights(run)
    assert call("evaluate run --samples 0") == 0


def test_a_resumed_run_imports_nothing_that_is_not_allowed(my_file, here, monkeypatch, capsys):
    said = stopped(f"{LONG} --prior my_file.MyPrior --out run", 3, monkeypatch, capsys)
    assert "go on by `pyro-vae train --resume run --allow my_file`, in Python" in said
    assert "run `pyro-vae evaluate run --allow my_file --split test`" in refusal(
        2, "compare run", capsys
    )
    assert "--allow my_file" in refusal(2, "train --resume run", capsys)
    assert call("train --resume run --allow my_file") == 0


@pytest.mark.parametrize("entry", ["out: ../elsewhere", "resume: run", "out: /tmp/elsewhere"])
def test_a_configuration_does_not_say_where_to_write(entry, here, capsys):
    (here / "config.yaml").write_text(f"epochs: 1\n{entry}\n")
    assert "it says where to write; take out" in refusal(2, "train --config config.yaml", capsys)
    assert [path.name for path in here.iterdir()] == ["config.yaml"]


def test_a_folder_that_two_runs_take_at_once_is_one_runs(here, monkeypatch, capsys):
    (here / "run").mkdir()
    monkeypatch.setattr(checkpoints, "create", lambda run: (run / "config.yaml").write_text("x"))
    assert "another run has just begun in 'run'" in refusal(2, f"{QUICK} --out run", capsys)
    assert (here / "run" / "config.yaml").read_text() == "x"


def test_steps_that_are_left_out_are_counted(my_file, here):
    line = f"{QUICK} --epochs 2 --prior my_file.Stumbling --mode eager --skip-nonfinite 3"
    assert call(f"{line} --out run") == 0
    assert sum(row["skipped"] for row in metrics(here / "run")) == 2


# Help


def test_the_module_runs_and_names_every_command():
    command = [sys.executable, "-m", "pyro_vae", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not done.stderr
    assert re.findall(r"^  (\w+) ", done.stdout, re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_says_what_each_command_does(arguments, capsys):
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert all(command.__doc__.splitlines()[0] in output for command in COMMANDS.values())
    assert "`python -m pyro_vae` is the same as `pyro-vae`" in " ".join(output.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_names_every_option(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    output = " ".join(capsys.readouterr().out.split())
    options = list(inspect.signature(COMMANDS[name]).parameters)
    if "run" in options:
        options += inspect.signature(runs.Run).parameters
    positional = {"run", "runs", "name"}
    for option in options:
        named = option if option in positional else f"--{option.replace('_', '-')}"
        assert re.search(rf"(^| ){named}[ ,]", output)


def test_the_configuration_that_is_printed_trains(here, capsys):
    with pytest.raises(SystemExit):
        call(f"{QUICK} --prior.learned true --print_config")
    (here / "config.yaml").write_text(capsys.readouterr().out)
    assert call("train --config config.yaml --out run") == 0
    assert load(here / "run").prior.loc.requires_grad
    assert len(metrics(here / "run")) == 1


def test_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"pyro-vae \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize(("option", "used"), [([], 1), (["--threads", "2"], 2)])
def test_a_small_model_trains_in_one_thread_unless_told_otherwise(
    option, used, tmp_path, monkeypatch
):
    seen = []
    monkeypatch.setattr(
        commands, "fit", lambda *a, **k: seen.append(torch.get_num_threads()) or 1 / 0
    )
    before = torch.get_num_threads()
    assert main(["train", "--out", str(tmp_path / "run"), *option]) == 1
    assert seen == [used]
    assert torch.get_num_threads() == before


def test_no_threads_are_refused(tmp_path, capsys):
    assert main(["train", "--out", str(tmp_path / "run"), "--threads", "0"]) == 2
    assert "at least 1 thread, not 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_objective_that_is_no_bound_is_labelled(tmp_path, capsys):
    options = ["train", "--epochs", "1", "--objective", "Renyi", "--latent", "2"]
    assert main([*options, "--objective.alpha", "-1", "--out", str(tmp_path / "below")]) == 0
    assert "this Renyi is no lower bound on log p(x)" in capsys.readouterr().out
    config = ["train", "--config", str(tmp_path / "below" / "config.yaml")]
    assert main([*config, "--out", str(tmp_path / "again")]) == 0  # a class of this package
    assert "this Renyi is no lower bound on log p(x)" in capsys.readouterr().out
    assert main([*options, "--objective.alpha", "0.5", "--out", str(tmp_path / "above")]) == 0
    assert "no lower bound" not in capsys.readouterr().out
