"""Posteriors against SciPy's densities."""

import torch
from linear import FALSE_ALARM
from scipy import stats

from pyro_vae import MLP, posteriors


def test_normal_has_the_location_and_scale_of_its_encoder():
    posterior = posteriors.Normal(MLP(4, [8], (2, 3))).double()
    x, z = torch.randn(6, 4).double(), torch.randn(5, 6, 3).double()
    loc, log_scale = posterior.network(x).detach().unbind(-2)
    truth = stats.norm(loc, log_scale.exp()).logpdf(z).sum(-1)
    assert torch.allclose(posterior(x).log_prob(z), torch.as_tensor(truth))


def test_draws_follow_the_density():
    posterior = posteriors.Normal(MLP(4, [8], (2, 3)))
    q = posterior(torch.randn(1, 4))
    z = (q.sample([5000]) - q.mean) / q.stddev
    assert stats.kstest(z.detach().flatten().numpy(), "norm").pvalue > FALSE_ALARM
