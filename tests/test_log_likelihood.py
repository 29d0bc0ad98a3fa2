"""Estimates of log p(x) against closed forms, exact sums and scikit-learn."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear import FALSE_ALARM, linear_vae
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA, FactorAnalysis
from torch import nn
from torch.nn import functional

from pyro_vae import MLP, VAE, data, likelihoods, posteriors, priors
from pyro_vae.annealing import annealed_importance_sampling
from pyro_vae.diagnostics import calibration, decompose, inference_gap
from pyro_vae.distributions import Bernoulli
from pyro_vae.evaluation import Estimate, _pareto_k, _tail, bound, log_likelihood, quadrature
from pyro_vae.scoring import Programs, batches

pytestmark = pytest.mark.filterwarnings("ignore:the importance weights")


class Exact(nn.Module):
    """x ~ N(Wz + b, diag s^2), z ~ N(0, I), q the exact posterior with its covariance scaled."""

    def __init__(self, weight, loc, scale, inflation=1.5):
        super().__init__()
        self.weight, self.loc, self.scale = map(torch.as_tensor, (weight, loc, scale))
        latent = self.weight.shape[1]
        precision = torch.eye(latent) + (self.weight.T / self.scale**2) @ self.weight
        self.covariance = torch.linalg.inv(precision)
        self.gain = self.covariance @ (self.weight.T / self.scale**2)
        self.tril = torch.linalg.cholesky(inflation * self.covariance)

    def model(self, x):
        zero = x.new_zeros(self.weight.shape[1])
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
            mean = functional.linear(z, self.weight) + self.loc
            return pyro.sample("x", dist.Normal(mean, self.scale).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc = (x - self.loc) @ self.gain.T
            return pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=self.tril))


@pytest.fixture(scope="module")
def pixels():
    x = load_digits().data
    return torch.as_tensor(x[:, x.std(0) > 0] / 16)


def pca_pair(x, latent, inflation=1.5):
    """Probabilistic PCA by scikit-learn, and its log-density of each datum."""
    fitted = PCA(latent).fit(x)
    noise = fitted.noise_variance_
    spread = (fitted.explained_variance_ - noise) ** 0.5
    scale = torch.full((x.shape[1],), noise**0.5, dtype=torch.float64)
    pair = Exact(fitted.components_.T * spread, fitted.mean_, scale, inflation)
    return pair, torch.as_tensor(fitted.score_samples(x))


def factor_pair(x, latent, inflation=1.5):
    """Factor analysis by scikit-learn, and its log-density of each datum."""
    fitted = FactorAnalysis(latent, random_state=0).fit(x)
    pair = Exact(fitted.components_.T, fitted.mean_, fitted.noise_variance_**0.5, inflation)
    return pair, torch.as_tensor(fitted.score_samples(x))


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def agrees(estimate, truth):
    """Each datum's estimate within errors of the truth, Bonferroni, and the mean within 0.05."""
    z = (estimate.log_likelihood - truth) / estimate.monte_carlo_error
    assert z.abs().max() < stats.norm.isf(FALSE_ALARM / (2 * len(z)))
    assert abs(estimate.mean - float(truth.mean())) < 0.05


@pytest.mark.parametrize("fit", [pca_pair, factor_pair])
def test_scikit_learns_models_are_recovered_with_an_inexact_posterior(fit, pixels):
    pair, truth = fit(pixels, 5)
    estimate = log_likelihood(pair, pixels[:100], samples=5000)
    agrees(estimate, truth[:100])
    # The errors of importance sampling are tiny beside those over the data, which hide anything.
    assert estimate.mean_error < 0.01 < estimate.standard_error


@pytest.mark.parametrize("latent", [1, 2, 3])
def test_quadrature_is_exact(latent, pixels):
    pair, truth = pca_pair(pixels, latent)
    integral = quadrature(pair, pixels[:2])
    assert torch.allclose(integral.log_likelihood, truth[:2], atol=1e-3)
    assert (integral.error < 1e-3).all()


def test_a_posterior_that_is_exact_leaves_no_error(pixels):
    pair, truth = pca_pair(pixels, 5, inflation=1.0)
    estimate = log_likelihood(pair, pixels[:10], samples=50)
    assert torch.allclose(estimate.log_likelihood, truth[:10])
    assert estimate.monte_carlo_error.max() < 1e-6
    assert torch.allclose(estimate.effective_sample_size, torch.tensor(50.0))


def test_k_hat_flags_a_posterior_that_was_spoiled(pixels):
    fine, _ = pca_pair(pixels, 5)
    spoiled, truth = pca_pair(pixels, 5, inflation=0.2)
    assert not log_likelihood(fine, pixels[:50], samples=2000).unreliable.any()
    with pytest.warns(UserWarning, match=r"of the data have a Pareto k-hat above 0\.70"):
        estimate = log_likelihood(spoiled, pixels[:50], samples=2000)
    assert estimate.unreliable.double().mean() > 0.8
    assert estimate.mean < float(truth[:50].mean())


def test_the_estimate_grows_with_draws_and_stays_below(pixels):
    pair, truth = pca_pair(pixels, 5, inflation=0.4)
    means = [log_likelihood(pair, pixels[:300], samples=k).mean for k in (1, 10, 100, 1000)]
    assert means == sorted(means)
    assert means[-1] < float(truth[:300].mean())


class Mixed(nn.Module):
    """A linear decoder under a mixture of two normals, its component summed out or drawn."""

    def __init__(self, discrete):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.discrete = discrete
        self.weight = torch.randn(4, 2, generator=generator)
        self.loc = 2 * torch.randn(3, 2, generator=generator)
        self.probs = torch.tensor([0.2, 0.5, 0.3])

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            if self.discrete:
                c = pyro.sample("c", dist.Categorical(self.probs))
                law = dist.Normal(self.loc[c], 0.7).to_event(1)
            else:
                parts = dist.Normal(self.loc, 0.7).to_event(1)
                law = dist.MixtureSameFamily(dist.Categorical(self.probs), parts)
            z = pyro.sample("z", law)
            pyro.sample("x", dist.Normal(z @ self.weight.T, 0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            if self.discrete:
                c = pyro.sample("c", dist.Categorical(torch.ones(3) / 3))
            loc = x @ torch.linalg.pinv(self.weight).T
            loc = loc + 0.1 * self.loc[c] if self.discrete else loc
            pyro.sample("z", dist.Normal(loc, 0.6).to_event(1))

    def truth(self, x):
        covariance = 0.49 * self.weight @ self.weight.T + 0.25 * torch.eye(4)
        law = dist.MultivariateNormal(self.loc @ self.weight.T, covariance)
        return (law.log_prob(x[:, None]) + self.probs.log()).logsumexp(1)


@pytest.mark.parametrize("discrete", [False, True])
def test_mixtures_and_discrete_latents_agree_with_exact_sums(discrete):
    pair, x = Mixed(discrete), 2 * torch.randn(30, 4)
    agrees(log_likelihood(pair, x, samples=20000), pair.truth(x))


def test_quadrature_of_a_mixture_is_exact():
    pair, x = Mixed(False), 2 * torch.randn(5, 4)
    truth = pair.truth(x)
    assert torch.allclose(quadrature(pair, x).log_likelihood, truth, atol=1e-3)


class Counting(Exact):
    """Counts the draws that are decoded."""

    decoded = 0

    def model(self, x):
        z = pyro.poutine.trace(super().model).get_trace(x)
        self.decoded += z.nodes["z"]["value"].shape[:-1].numel()


@pytest.mark.parametrize("chunk", [1, 7, 64, 100_000])
def test_exactly_the_draws_asked_for_whatever_the_chunk(chunk, pixels):
    pair, truth = pca_pair(pixels, 2)
    x = pixels[:13]
    counted = Counting(pair.weight, pair.loc, pair.scale)
    Programs(counted, (x,))
    tried, counted.decoded = counted.decoded, 0
    estimate = log_likelihood(counted, x, samples=23, chunk=chunk)
    assert counted.decoded == 13 * 23 + tried
    agrees(log_likelihood(pair, x, samples=1000, chunk=chunk * 50), truth[:13])
    assert (estimate.effective_sample_size <= 23).all()


def test_the_running_sums_are_those_of_all_weights_at_once(pixels):
    pair, _ = pca_pair(pixels, 3, inflation=0.5)
    x = pixels[:4]
    pyro.set_rng_seed(1)
    estimate = log_likelihood(pair, x, samples=400, chunk=4 * 20)
    pyro.set_rng_seed(1)
    programs = Programs(pair, (x,))
    with torch.no_grad():
        log_w = torch.cat(
            [programs.weights((x[n : n + 1],), 80) for n in range(4) for _ in "12345"]
        )
    log_w = log_w.reshape(4, 400).T
    weights = (log_w - log_w.max(0).values).exp()
    effective = weights.sum(0) ** 2 / (weights**2).sum(0)
    assert torch.allclose(estimate.log_likelihood, log_w.logsumexp(0) - math.log(400))
    assert torch.allclose(estimate.effective_sample_size, effective)
    k = _pareto_k(log_w.sort(0, descending=True).values[:61], 60)
    assert torch.allclose(estimate.pareto_k, k)


@pytest.mark.parametrize("shape", [-0.3, 0.2, 0.5, 0.8, 1.2])
def test_k_hat_finds_the_shape_of_a_generalised_pareto_tail(shape):
    size = 40_000
    draws = stats.genpareto(shape).rvs((size, 20), random_state=0)
    log_w = torch.as_tensor(draws).log()
    tail = _tail(size)
    largest = log_w.topk(tail + 1, 0).values
    # Its standard deviation is about (1 + k) / sqrt(600), and the prior draws it to 1/2.
    expected = (tail * shape + 5) / (tail + 10)
    error = (1 + abs(shape)) / math.sqrt(tail * 20)
    assert abs(float(_pareto_k(largest, tail).mean()) - expected) < 4 * error + 0.01


def test_k_hat_of_equal_weights_and_of_few():
    assert (_pareto_k(torch.zeros(11, 3), 10) == -math.inf).all()
    assert _tail(24) == 5
    assert _tail(20) == 0
    assert _pareto_k(torch.zeros(1, 3), 0).isnan().all()


class Sharp(nn.Module):
    """z ~ N(0, 1), x ~ N(z, scale^2), and q is the prior."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, self.scale).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    def truth(self, x):
        return dist.Normal(0.0, math.sqrt(1 + self.scale**2)).log_prob(x.double())[:, 0]


class Urns(nn.Module):
    """A latent of few values with probabilities p, drawn by q, and an x that shows nothing."""

    def __init__(self, p, q):
        super().__init__()
        self.p, self.q = torch.tensor(p), torch.tensor(q)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Categorical(self.p))
            pyro.sample("x", dist.Normal(torch.zeros(1), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Categorical(self.q))


def test_weights_beside_which_all_others_vanish_are_not_trusted():
    # Log-weights of draws differ by thousands, so that of 1,000 one is all.
    with pytest.warns(UserWarning, match=r"weights of 100\.0% of the data"):
        found = log_likelihood(Sharp(1e-3), torch.tensor([[0.5], [-1.0]]), samples=1000)
    assert (found.effective_sample_size < 3).all()
    assert (found.pareto_k == math.inf).all()


def test_few_values_of_weights_are_judged_by_how_many_draws_count():
    x = torch.zeros(3, 1)
    even = log_likelihood(Urns([0.97, 0.03], [0.98, 0.02]), x, samples=5000)
    assert (even.pareto_k == -math.inf).all()
    # One value has half of the mass and about one draw in 2,000.
    rare = log_likelihood(Urns([0.5, 0.5], [0.9995, 0.0005]), x, samples=5000)
    assert (rare.pareto_k == math.inf).all()


def test_one_draw_knows_nothing_of_its_error():
    found = log_likelihood(Sharp(1.0), torch.zeros(2, 1), samples=1)
    assert found.monte_carlo_error.isnan().all()


def test_quadrature_goes_where_no_draw_has_been():
    x = torch.tensor([[0.0], [7.0], [-9.0], [30.0]])
    pair = Sharp(0.1)
    found = quadrature(pair, x)
    assert torch.allclose(found.log_likelihood, pair.truth(x), atol=2e-3)
    assert (found.error <= 1e-3).all()


@pytest.mark.parametrize("latent", [1, 2])
def test_quadrature_keeps_to_the_peak_of_a_heavy_tail(latent):
    vae = VAE(
        priors.StudentT(latent, df=3),
        likelihoods.Bernoulli(MLP(latent, [], 5)),
        posteriors.Normal(MLP(5, [], (2, latent))),
    )
    for each in vae.likelihood.parameters():
        nn.init.zeros_(each)
    x = torch.ones(2, 5, dtype=torch.get_default_dtype())
    truth = torch.full((2,), -5 * math.log(2), dtype=torch.float64)
    # The tails beyond the draws that the grid begins from have less than a hundredth of the mass.
    assert torch.allclose(quadrature(vae, x).log_likelihood, truth, atol=1e-2)


def test_quadrature_of_counts_is_that_of_real_latents():
    encoder = MLP(1, [], (2, 1), transform=lambda x: x.double().log1p())
    vae = VAE(priors.Normal(1), likelihoods.Poisson(nn.Linear(1, 1)), posteriors.Normal(encoder))
    counts = torch.tensor([[3], [0]])
    z = torch.linspace(-9, 9, 20_001, dtype=torch.float64)[:, None, None]
    with torch.no_grad():
        scores = vae.prior().log_prob(z) + vae.decode(z).log_prob(counts.to(z))
    truth = torch.trapezoid(scores.exp(), z[:, 0], dim=0).log()
    assert torch.allclose(quadrature(vae, counts).log_likelihood, truth, atol=2e-3)


class Rigid(nn.Module):
    """A decoder that takes matrices only."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, z):
        if z.dim() != 2:
            raise RuntimeError("a matrix, please")
        return self.inner(z)


class Normalized(nn.Module):
    """Batch normalisation over features, which takes a third dimension for the features."""

    def __init__(self, width, inner):
        super().__init__()
        self.norm, self.inner = nn.BatchNorm1d(width), inner
        self.norm.running_mean = torch.linspace(-1, 1, width)

    def forward(self, z):
        return self.inner(self.norm(z))


@pytest.mark.parametrize("wrap", [Rigid, lambda inner: Normalized(2, inner)])
def test_networks_that_reject_particles_take_them_one_by_one(wrap):
    vae, x = linear_vae(4, 2, scale=1.0), torch.randn(3, 4)
    vae = vae.double()
    vae.likelihood.network = wrap(vae.likelihood.network)
    vae.eval()
    assert not Programs(vae, (x,)).vectorized
    estimate = log_likelihood(vae, x, samples=300)
    programs = Programs(vae, (x,))
    with torch.no_grad():
        w = torch.cat([programs.weights((x,), 1) for _ in range(300)])
    other = w.logsumexp(0) - math.log(300)
    error = (2 * estimate.monte_carlo_error**2).sqrt()
    assert ((other - estimate.log_likelihood).abs() < 4.5 * error).all()


class Global(Exact):
    """The same with a latent for all data that changes nothing."""

    def model(self, x):
        pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        return super().model(x)

    def guide(self, x):
        pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        return super().guide(x)


def test_a_latent_for_all_data_that_does_nothing_changes_nothing(pixels):
    pair, truth = pca_pair(pixels, 3)
    same = Global(pair.weight, pair.loc, pair.scale)
    agrees(log_likelihood(same, pixels[:20], samples=3000), truth[:20])
    with pytest.raises(ValueError, match="'w' is one for all: use log_likelihood"):
        quadrature(same, pixels[:2])


class Level(nn.Module):
    """w ~ N(0, 1) for all data, x_n ~ N(w, 1), and the exact posterior of w."""

    def model(self, x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide(self, x):
        precision = 1 + len(x)
        pyro.sample("w", dist.Normal(x.sum() / precision, precision**-0.5))


class Summed(nn.Module):
    """x_n ~ N(0, 1), and a factor of all data."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        pyro.factor("all", x.sum())

    def guide(self, x):
        pass


def test_what_lies_outside_the_plate_is_of_the_whole_batch():
    x = torch.randn(100) + 1.5
    law = dist.MultivariateNormal(torch.zeros(100), torch.eye(100) + 1)
    summed = (x + dist.Normal(0.0, 1.0).log_prob(x)).sum()
    for pair, truth in ((Level(), law.log_prob(x)), (Summed(), summed)):
        for found in (bound(pair, x).elbo, log_likelihood(pair, x, samples=3).log_likelihood):
            assert float(found.mean()) == pytest.approx(float(truth) / 100, abs=1e-6)


def test_data_come_as_splits_tensors_batches_or_many(pixels):
    pair, truth = pca_pair(pixels, 3, inflation=1.0)
    x = pixels[:6]
    split = data.split(x, validation=0, test=0).train
    for given in (split, x, (x,), [(x[:4],), (x[4:],)], iter([(x,)])):
        found = log_likelihood(pair, given, samples=2).log_likelihood
        order = split.x.double() if given is split else x
        rows = [int((x - row).abs().sum(1).argmin()) for row in order]
        assert torch.allclose(found, truth[rows], atol=1e-4)


def test_a_bound_takes_data_as_estimates_do(pixels):
    x, pair = pixels[:8].clone(), pca_pair(pixels, 2)[0]
    split = data.split(x, validation=0, test=0)
    torch.manual_seed(0)
    expected = bound(pair, [(x,)]).elbo
    for given in (x, (x,), iter([(x,)])):
        torch.manual_seed(0)
        assert torch.equal(bound(pair, given).elbo, expected)
    for given in (split.train, [(x[:4],), (x[4:],)]):
        assert bound(pair, given).elbo.shape == (8,)
    for estimate in (bound, log_likelihood):
        for given, kind in ((split, "Data"), (3, "int")):
            with pytest.raises(TypeError, match=rf"one split, such as data.test, .* not a {kind}"):
                estimate(pair, given)


def test_batches_may_be_of_x_alone(pixels):
    pair, truth = pca_pair(pixels, 3, inflation=1.0)
    x = pixels[:6]
    for size in (1, 4):
        loader = torch.utils.data.DataLoader(x, batch_size=size)
        assert torch.allclose(log_likelihood(pair, loader, samples=2).log_likelihood, truth[:6])


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (torch.tensor(1.0), "tensor of one number"),
        ((torch.ones(4, 2), torch.tensor(1.0)), "tensor of one number"),
        ((torch.ones(4, 2), None), "NoneType"),
        (torch.ones(4, 2).numpy(), "ndarray"),
        ([torch.ones(4, 2), {"x": torch.ones(4, 2)}], "dict"),
        ({"x": torch.ones(4, 2)}, "str"),
        ([()], "tuple"),
    ],
)
def test_batches_that_are_no_tensors_get_a_sentence(given, kind):
    with pytest.raises(TypeError, match=rf"a batch is a tensor or .* and here is a {kind}"):
        list(batches(given))


def test_bits_are_for_discrete_data_only():
    vae = VAE(
        priors.Normal(2),
        likelihoods.Bernoulli(MLP(2, [], (1, 3, 3))),
        posteriors.Normal(MLP((1, 3, 3), [], (2, 2))),
    )
    x = (torch.rand(5, 1, 3, 3) > 0.5).double()
    estimate = log_likelihood(vae, x, samples=30)
    assert estimate.bits_per_dimension == pytest.approx(-estimate.mean / 9 / math.log(2))
    vae.likelihood = likelihoods.Bernoulli(vae.likelihood.network, greyscale=True)
    assert log_likelihood(vae, x, samples=30).bits_per_dimension is None


def test_there_are_no_bits_where_any_datum_is_incomplete():
    encoder = MLP(9, [], (2, 2), transform=torch.nan_to_num)
    likelihood = likelihoods.Missing(likelihoods.Bernoulli(MLP(2, [], 9)))
    vae = VAE(priors.Normal(2), likelihood, posteriors.Normal(encoder))
    x = (torch.rand(6, 9) > 0.5).double()
    assert log_likelihood(vae, x, samples=30).dimensions == 9
    x[5, 3] = math.nan
    for given in (x, [(x[:4],), (x[4:],)]):
        assert log_likelihood(vae, given, samples=30).bits_per_dimension is None
    parts = [log_likelihood(vae, part, samples=30) for part in (x[:4], x[4:])]
    assert Estimate.joined(parts).bits_per_dimension is None


class Noted(nn.Module):
    """x ~ Poisson(exp z) beside a note of its mean and a label, both seen before it."""

    def model(self, x, label):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            mean = pyro.deterministic("mean", z.exp(), event_dim=1)
            pyro.sample("label", dist.Bernoulli(logits=z[..., 0]), obs=label)
            pyro.sample("x", dist.Poisson(mean).to_event(1), obs=x)

    def guide(self, x, label):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))


def test_x_is_what_is_drawn_and_scored_whatever_else_is_noted_or_observed():
    x, label = torch.tensor([[3.0], [0.0]]), torch.ones(2)
    noted = Programs(Noted(), (x, label))
    assert noted.observed["name"] == "x"
    drawn, _ = noted.simulate((x, label))
    assert torch.equal(drawn[0], drawn[0].round())
    assert log_likelihood(Noted(), (x, label), samples=30).bits_per_dimension is None


def test_bits_of_dequantised_levels_bound_those_of_the_levels():
    # Levels of one pixel with known probabilities, under the density that is uniform in each.
    stored = torch.randint(0, 256, (400, 3), dtype=torch.uint8)
    part = data.split(stored, validation=0, test=0, view=data.dequantised).train
    x = part.batch()[0]
    assert torch.equal((256 * x).floor(), part.x.to(x.dtype))
    noise = (256 * x % 1).flatten()
    assert stats.kstest(noise.numpy(), "uniform").pvalue > FALSE_ALARM
    assert ((x > 0) & (x < 1)).all()

    class Uniform(nn.Module):
        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("x", dist.Uniform(x.new_zeros(3), 1.0).to_event(1), obs=x)

        def guide(self, x):
            pass

    assert log_likelihood(Uniform(), part, samples=2).bits_per_dimension == pytest.approx(8)
    assert log_likelihood(Uniform(), x, samples=2).bits_per_dimension is None
    given = log_likelihood(Uniform(), x, samples=2, level=1 / 256)
    assert given.bits_per_dimension == pytest.approx(8)
    # The Frey Face example: 1201 nats of 560 pixels scaled to [0, 1] are 4.90 bits.
    one = torch.ones(1)
    frey = Estimate(1201 * one, one, one, one, 1, dimensions=560, level=1 / 255)
    assert frey.bits_per_dimension == pytest.approx(4.90, abs=0.005)


def test_labels_that_are_missing_are_said_in_a_sentence():
    vae = VAE(
        prior=priors.Normal(2),
        likelihood=likelihoods.Bernoulli(MLP(2, [8], 9, context=3)),
        posterior=posteriors.Normal(MLP(9, [8], (2, 2), context=3)),
    )
    x, said = (
        torch.ones(5, 9),
        "guide cannot run on .*: a network built with context=3 was given 0",
    )
    for call in (log_likelihood, quadrature, decompose, calibration, inference_gap):
        with pytest.raises(ValueError, match=said):
            call(vae, x)
    with pytest.raises(ValueError, match=said):
        bound(vae, [(x,)])
    few = torch.eye(3)[[0, 1, 2, 0]]
    with pytest.raises(ValueError, match="x has 5 rows and its context 4: give a row of context"):
        log_likelihood(vae, (x, few))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: log_likelihood(None, x, samples=2.5), "samples"),
        (lambda x: log_likelihood(None, x, chunk=2.5), "chunk"),
        (lambda x: bound(None, [(x,)], particles=2.5), "particles"),
        (lambda x: annealed_importance_sampling(None, x, distributions=2.5), "distributions"),
        (lambda x: decompose(None, x, draws=2.5), "draws"),
        (lambda x: inference_gap(None, x, steps=2.5), "steps"),
        (lambda x: calibration(None, x, simulations=2.5), "simulations"),
    ],
)
def test_numbers_of_draws_are_whole(call, name):
    with pytest.raises(ValueError, match=f"{name} must be a whole number, not 2.5"):
        call(torch.ones(2, 3))
    assert log_likelihood(linear_vae(4, 2), torch.randn(3, 4), samples=5).dimensions is None


def test_no_gradients_are_kept_and_summaries_are_numbers(pixels):
    vae = linear_vae(4, 2)
    estimate = log_likelihood(vae, torch.randn(7, 4), samples=40)
    assert not estimate.log_likelihood.requires_grad
    assert estimate.summary()["L_40"] == pytest.approx(float(estimate.log_likelihood.mean()))
    assert estimate.standard_error == pytest.approx(stats.sem(estimate.log_likelihood.numpy()))
    assert isinstance(Estimate.joined([estimate, estimate]), Estimate)


class Lonely(nn.Module):
    """z ~ N(0, 1), x ~ N(z, 1) with its posterior, and a latent that one program lacks."""

    def __init__(self, *, place, program):
        super().__init__()
        self.place, self.program = place, program

    def other(self, place, program):
        if (place, program) == (self.place, self.program):
            pyro.sample("other", dist.Normal(0.0, 0.01))

    def model(self, x):
        self.other("outside", "model")
        with pyro.plate("data", len(x), dim=-1):
            self.other("inside", "model")
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x):
        self.other("outside", "guide")
        with pyro.plate("data", len(x), dim=-1):
            self.other("inside", "guide")
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)).to_event(1))


@pytest.mark.parametrize("place", ["outside", "inside"])
@pytest.mark.parametrize("estimate", [bound, log_likelihood, annealed_importance_sampling])
def test_a_latent_that_only_one_program_has_is_refused_as_in_training(estimate, place):
    x = torch.zeros(2, 1)
    said = {
        "model": "the guide draws no site 'other', which is latent in the model",
        "guide": "the guide draws a site 'other' that is not latent in the model",
    }
    for program, words in said.items():
        with pytest.raises(ValueError, match=words):
            estimate(Lonely(place=place, program=program), x)


class Unseen(nn.Module):
    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = model


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: log_likelihood(linear_vae(4, 2), torch.randn(3, 4), samples=0),
            "at least 1 of its samples, not 0",
        ),
        (lambda: log_likelihood(linear_vae(4, 2), torch.randn(3, 5)), r"on data of shape \(5,\)"),
        (lambda: log_likelihood(linear_vae(4, 2), torch.randn(0, 4)), "no data to evaluate"),
        (lambda: log_likelihood(Unseen(), torch.randn(3)), "none of its sites has obs=x"),
        (
            lambda: quadrature(linear_vae(5, 4), torch.randn(3, 5)),
            "at most 3 latents .* are 4: use",
        ),
        (
            lambda: quadrature(Mixed(True), torch.randn(3, 4)),
            "'c' is discrete: use log_likelihood",
        ),
    ],
)
def test_bad_input_gets_a_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("shape", [(3,), (1, 28, 28), (230,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bernoullis_scored_together_are_those_scored_one_by_one(shape, dtype):
    logits = 5 * torch.randn(4, 6, *shape, dtype=dtype)
    logits[0, 0] *= 100
    x = (torch.rand(6, *shape) > 0.5).to(dtype)
    law = Bernoulli(logits=logits).to_event(len(shape))
    with torch.no_grad():
        fast = law.log_prob(x)
    slow = law.log_prob(x)
    assert fast.shape == slow.shape == (4, 6)
    assert torch.allclose(fast, slow, rtol=1e-5, atol=1e-4)
    assert law.expand((2, 4, 6)).log_prob(x).shape == (2, 4, 6)
