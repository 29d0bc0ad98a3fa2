"""Priors against SciPy's densities."""

import pytest
import torch
from scipy import stats

from pyro_vae import priors


def test_normal_is_standard_by_default():
    z = torch.randn(50, 3)
    truth = stats.norm.logpdf(z.numpy()).sum(-1)
    assert torch.allclose(
        priors.Normal(3)().log_prob(z), torch.as_tensor(truth).float(), atol=1e-5
    )
    assert not list(priors.Normal(3).parameters())


def test_learned_normal_has_its_location_and_scale():
    prior = priors.Normal(2, learned=True).double()
    with torch.no_grad():
        prior.loc.copy_(torch.tensor([1.0, -2.0]))
        prior.log_scale.copy_(torch.tensor([0.5, -1.0]))
    z = torch.randn(50, 2, dtype=torch.float64)
    truth = stats.norm([1, -2], torch.tensor([0.5, -1.0]).exp()).logpdf(z.numpy()).sum(-1)
    assert torch.allclose(prior().log_prob(z), torch.as_tensor(truth))
    prior().log_prob(z).sum().backward()
    assert all(parameter.grad.abs().min() > 0 for parameter in prior.parameters())


def test_no_latents_are_refused():
    with pytest.raises(ValueError, match="at least 1 dimension, not 0"):
        priors.Normal(0)
