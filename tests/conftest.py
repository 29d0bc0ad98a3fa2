"""Fixtures: a seed for every test, and the folder of downloaded data where there is one."""

import os
import signal
from pathlib import Path

import pyro
import pytest
import torch

from pyro_vae import MLP, VAE, data, likelihoods, posteriors, priors

torch.set_num_threads(1)  # the models here are too small to share a step out


@pytest.fixture(autouse=True)
def seeded():
    """Every test begins with an empty param store and the same random state."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


@pytest.fixture(autouse=True)
def heard():
    """SIGINT as in a terminal, also where a job in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def data_dir():
    """The folder of named data sets; tests of downloaded data skip without it."""
    folder = os.environ.get("PYRO_VAE_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("PYRO_VAE_DATA names no folder with downloaded data")
    return Path(folder)


@pytest.fixture(scope="session")
def digits():
    """The embedded digits, binarised anew each time they are seen."""
    return data.load("digits", view=data.dynamic)


@pytest.fixture
def vae():
    """A small VAE for the digits."""
    return VAE(
        prior=priors.Normal(2),
        likelihood=likelihoods.Bernoulli(MLP(2, [32], (1, 8, 8))),
        posterior=posteriors.Normal(MLP((1, 8, 8), [32], (2, 2))),
    )
