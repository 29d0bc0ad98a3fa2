"""Laws of our own against quadrature, SciPy and closed forms."""

import numpy as np
import pytest
import torch
from scipy import stats

from pyro_vae.distributions import Bernoulli, ContinuousBernoulli

SIZES = [0.0, 1e-4, 1e-2, 0.1999, 0.2001, 1.0, 5.0, 15.0, 20.0, 30.0, 100.0, 1000.0]
LOGITS = [sign * size for size in SIZES for sign in (1, -1)]
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def truncated(logit):
    """SciPy's law of the same density: an exponential cut off at 1, or its mirror image."""
    return stats.truncexpon(abs(logit), scale=1 / abs(logit))


def nodes(logit):
    """Gauss-Legendre nodes and weights on [0, 1], dense at the likelier edge."""
    point, weight = (torch.as_tensor(each) for each in np.polynomial.legendre.leggauss(400))
    edge = torch.tensor([0.0, *torch.logspace(-3, 0, 7).tolist()]).double()
    width = edge.diff()
    x = (edge[:-1, None] + width[:, None] * (point + 1) / 2).flatten()
    return (1 - x if logit > 0 else x), (width[:, None] * weight / 2).flatten()


@BOTH
@pytest.mark.parametrize("logit", LOGITS)
def test_a_continuous_bernoulli_has_the_mass_and_mean_of_quadrature(logit, dtype):
    x, weight = nodes(logit)
    law = ContinuousBernoulli(torch.tensor(logit, dtype=dtype))
    density = law.log_prob(x.to(dtype)).double().exp() * weight
    # Where x is rounded to single precision, its density is off by a factor of l times 6e-8.
    close = 1e-12 if dtype == torch.float64 else 3e-6 + abs(logit) * 6e-8
    assert float(density.sum()) == pytest.approx(1, abs=close)
    assert float(law.mean) == pytest.approx(float((density * x).sum()), abs=close)
    variance = float((density * (x - law.mean.double()) ** 2).sum())
    assert float(law.variance) == pytest.approx(variance, rel=max(1e-9, 20 * close))


@BOTH
@pytest.mark.parametrize("logit", [each for each in LOGITS if abs(each) >= 1])
def test_a_continuous_bernoulli_is_a_truncated_exponential(logit, dtype):
    x = torch.linspace(0, 1, 65, dtype=dtype)
    y = 1 - x if logit > 0 else x
    truth = torch.as_tensor(truncated(logit).logpdf(y.double()))
    score = ContinuousBernoulli(torch.tensor(logit, dtype=dtype)).log_prob(x)
    assert score.dtype == dtype
    assert torch.allclose(score.double(), truth, rtol=1e-6, atol=1e-6)


@BOTH
@pytest.mark.parametrize("logit", LOGITS)
def test_the_gradient_of_a_continuous_bernoulli_is_x_minus_its_mean(logit, dtype):
    """The law is an exponential family in its logit, at every size of it and at 0."""
    x = torch.linspace(0, 1, 65, dtype=dtype)
    logits = torch.full((65,), logit, dtype=dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(ContinuousBernoulli(logits).log_prob(x).sum(), logits)
    mean = 0.5 + logit / 12
    if abs(logit) >= 0.1:
        mean = truncated(logit).mean()
        mean = 1 - mean if logit > 0 else mean
    close = 1e-8 if dtype == torch.float64 else 2e-6
    assert torch.allclose(slope.double(), x.double() - mean, rtol=0, atol=close)


@BOTH
def test_draws_of_a_continuous_bernoulli_follow_it(dtype):
    """One of 24 Kolmogorov-Smirnov tests of each precision fails with a chance of 1e-4."""
    torch.manual_seed(0)
    draws = ContinuousBernoulli(torch.tensor(LOGITS, dtype=dtype)).sample((4000,))
    assert draws.dtype == dtype
    assert draws.min() >= 0
    assert draws.max() <= 1
    for logit, column in zip(LOGITS, draws.double().unbind(1), strict=True):
        law = stats.uniform() if abs(logit) <= 1e-4 else truncated(logit)
        y = 1 - column if logit > 0 else column
        assert stats.kstest(y, law.cdf).pvalue > 1e-4 / len(LOGITS), logit


@BOTH
def test_draws_of_a_continuous_bernoulli_carry_the_gradient_of_its_mean(dtype):
    """The slope of each draw averages to the variance, the slope of the mean; 4e-5 each fail."""
    torch.manual_seed(0)
    logits = torch.tensor(LOGITS, dtype=dtype)
    each = logits.expand(20000, -1).clone().requires_grad_()
    (slope,) = torch.autograd.grad(ContinuousBernoulli(each).rsample().sum(), each)
    error = slope.std(0) / len(slope) ** 0.5
    distance = (slope.mean(0) - ContinuousBernoulli(logits).variance).abs()
    assert (distance < 4.1 * error + 1e-6).all()


def test_draws_of_a_continuous_bernoulli_do_not_jump_with_its_logit():
    logits = torch.tensor([-0.2001, -0.1999, -1e-9, 0.0, 1e-9, 0.1999, 0.2001]).double()
    for noise in range(20):
        draws = []
        for logit in logits:
            torch.manual_seed(noise)
            draws.append(float(ContinuousBernoulli(logit).rsample()))
        assert np.abs(np.diff(draws)).max() < 0.05
        assert sorted(draws) == draws


@BOTH
def test_a_bernoulli_draws_ones_as_often_as_it_says_and_no_number_from_none(dtype):
    probs = torch.tensor([0.0, 0.001, 0.3, 0.9, 1.0, torch.nan], dtype=dtype)
    drawn = Bernoulli(probs, validate_args=False).to_event(1).sample((40_000,))
    assert drawn.dtype == dtype
    assert drawn[:, 5].isnan().all()
    assert set(drawn[:, :5].unique().tolist()) == {0.0, 1.0}
    ones = drawn[:, :5].sum(0).tolist()
    assert ones[0] == 0
    assert ones[4] == 40_000
    # Three two-sided tests at 1e-6 each, of one seed.
    for count, prob in zip(ones[1:4], probs[1:4].tolist(), strict=True):
        assert stats.binomtest(int(count), 40_000, prob).pvalue > 1e-6
