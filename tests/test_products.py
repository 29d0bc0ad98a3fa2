"""Products by oneDNN against those in 64 bits, and the pages that a step asks for."""

import os
import platform
import subprocess
import sys
from functools import partial

import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import SGD

from pyro_vae import MLP, VAE, CompiledSVI, likelihoods, posteriors, priors, products
from pyro_vae.state import precision

onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")

SIZES = (300, 400, 500)  # 60 million multiplications


def matrices():
    """Pairs of matrices that lie in memory in every way that a graph may hold them."""
    m, k, n = SIZES
    return {
        "one row after the other": (torch.randn(m, k), torch.randn(k, n)),
        "one column after the other": (torch.randn(k, m).t(), torch.randn(n, k).t()),
        "first transposed": (torch.randn(k, m).t(), torch.randn(k, n)),
        "second transposed": (torch.randn(m, k), torch.randn(n, k).t()),
        "one column repeated": (torch.randn(m, 1).expand(m, k), torch.randn(k, n)),
        "one row repeated": (torch.randn(1, k).expand(m, k), torch.randn(1, n).expand(k, n)),
        "every other number": (torch.randn(2 * m, 2 * k)[::2, ::2], torch.randn(k, 2 * n)[:, ::2]),
        "a part": (torch.randn(m, k + 1)[:, 1:], torch.randn(k + 1, n)[1:]),
    }


BIASES = {
    "none": lambda n: None,
    "one after the other": torch.randn,
    "one repeated": lambda n: torch.randn(1).expand(n),
    "every other number": lambda n: torch.randn(2 * n)[::2],
}


@onednn
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("layout", matrices())
def test_a_product_is_that_of_64_bits_to_rounding(layout, bias):
    torch.manual_seed(0)
    a, b = matrices()[layout]
    c = BIASES[bias](b.shape[1])
    check(torch.ops.pyro_vae.onednn_product(a, b, c), a, b, c)


def check(found, a, b, c):
    """That a product is right to rounding, and lies one row after the other."""
    expected, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    if c is not None:
        expected, size = expected + c.double(), size + c.double().abs()
    # A sum of k + 1 terms in any order is off by (k + 1) u of the sum of their sizes at most, to
    # first order in the unit roundoff u (Higham 2002, Accuracy and Stability, equation 3.5).
    unit = torch.finfo(torch.float32).eps / 2
    assert ((found.double() - expected).abs() <= 1.01 * (a.shape[1] + 1) * unit * size).all()
    assert found.stride() == (found.shape[1], 1)


@onednn
@pytest.mark.parametrize("by", ["oneDNN", "torch"])
def test_compiled_products_are_right_and_called_from_cpp(by, monkeypatch):
    import torch._inductor as inductor

    lowered = []
    original = products._by_onednn

    def noted(*args):
        if by == "torch":
            raise AttributeError("as where inductor is made otherwise")
        lowered.append(original(*args))
        return lowered[-1]

    monkeypatch.setattr(products, "_by_onednn", noted)
    monkeypatch.setattr(products, "_pays", lambda: True)
    torch.manual_seed(0)
    cases = [(a, b, c(SIZES[-1])) for a, b in matrices().values() for c in BIASES.values()]

    def multiplied(*given):
        rest = iter(given)
        return [
            torch.mm(next(rest), next(rest))
            if c is None
            else torch.addmm(next(rest), next(rest), next(rest))
            for _, _, c in cases
        ]

    given = [each for a, b, c in cases for each in ((a, b) if c is None else (c, a, b))]
    trace = make_fx(multiplied, decomposition_table=products.fast_products(), tracing_mode="fake")
    graph = trace(*given)
    operation = torch.ops.pyro_vae.onednn_product.default
    assert sum(node.target is operation for node in graph.graph.nodes) == len(cases)
    # Its cache knows the graph and not how an operation is lowered.
    options = {"cpp_wrapper": True, "fx_graph_cache": False}
    run = inductor.compile(graph, given, options)
    with torch.profiler.profile() as seen:
        found = run(*given)
    for product, case in zip(found, cases, strict=True):
        check(product, *case)
    assert len(lowered) == (len(cases) if by == "oneDNN" else 0)
    assert "pyro_vae::onednn_product" not in {each.name for each in seen.events()}


@onednn
def test_a_product_is_an_operation_that_torch_can_trace():
    a, b = torch.randn(30, 20), torch.randn(10, 20).t()
    for bias in (None, torch.randn(10)):
        torch.library.opcheck(torch.ops.pyro_vae.onednn_product.default, (a, b, bias))


@onednn
@pytest.mark.parametrize(
    ("known", "used"),
    [
        ({"cpu_name": "AMD EPYC 9755", "avx512_f": True}, True),
        ({"cpu_name": "AMD EPYC 7763", "avx512_f": False}, False),
        ({"cpu_name": "Intel(R) Xeon(R) Platinum 8480+", "avx512_f": True}, False),
        ({"cpu_name": "Neoverse V2"}, False),
        ({}, False),
    ],
)
def test_only_where_the_other_library_leaves_half_of_the_processor_idle(known, used, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    products._pays.cache_clear()
    try:
        assert bool(products.fast_products()) is used
        before = precision()  # a part of what a graph is kept by
        torch._C._set_mkldnn_enabled(False)
        assert products.fast_products() == {}
        assert precision() != before
    finally:
        torch._C._set_mkldnn_enabled(True)
        products._pays.cache_clear()


def test_without_knowledge_of_the_processor_products_are_torchs(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    products._pays.cache_clear()
    try:
        assert products.fast_products() == {}
    finally:
        products._pays.cache_clear()


@onednn
def test_what_is_small_or_of_other_numbers_is_left_to_torch():
    a, b, row = torch.zeros(300, 400), torch.zeros(400, 500), torch.zeros(500)
    assert products._mm(a, b) is not NotImplemented
    assert products._addmm(row, a, b) is not NotImplemented
    for left in (
        products._mm(a[:20], b[:, :20]),
        products._mm(torch.zeros(5000, 10_000), torch.zeros(10_000, 1)),
        products._mm(a.to_sparse(), b),
        products._mm(a.double(), b.double()),
        products._mm(a.bfloat16(), b.bfloat16()),
        products._mm(a.to("meta"), b.to("meta")),
        products._addmm(row, a, b, beta=2),
        products._addmm(row, a, b, alpha=0.5),
        products._addmm(torch.zeros(300, 500), a, b),
        products._addmm(torch.zeros(1), a, b),
        products._addmm(torch.zeros(300, 1), a, b),
    ):
        assert left is NotImplemented


def large():
    """784-400-20: five products of 40 million multiplications, and three of 2 that are wide."""
    torch.manual_seed(0)
    likelihood = likelihoods.Bernoulli(MLP(20, [400], (1, 28, 28)))
    posterior = posteriors.Normal(MLP((1, 28, 28), [400], (2, 20)))
    return VAE(priors.Normal(20), likelihood, posterior)


@onednn
def test_a_compiled_step_has_its_large_products_from_there(monkeypatch):
    seen = []

    def noted(name):
        whole = getattr(products, name)

        def product(*args):
            result = whole(*args)
            seen.append(result is not NotImplemented)
            return result

        return product

    for name in ("_mm", "_addmm"):
        monkeypatch.setattr(products, name, noted(name))
    monkeypatch.setattr(products, "_pays", lambda: True)
    x = (torch.rand(128, 1, 28, 28) > 0.7).float()
    gradients = {}
    for mode in ("compiled", "eager"):
        pair = large()
        objective = Trace_ELBO(max_plate_nesting=1)
        svi = CompiledSVI(pair.model, pair.guide, partial(SGD, lr=0.0), objective, mode=mode)
        torch.manual_seed(1)
        svi.loss_and_grads(x)
        assert svi.mode == mode
        gradients[mode] = [each.grad for each in pair.parameters()]
    assert sum(seen) == 8
    assert len(seen) == 11
    for one, other in zip(gradients["compiled"], gradients["eager"], strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


CHURN = """
import resource, torch
from pyro import distributions, sample
from pyro.infer import Trace_ELBO
from torch.optim import SGD
from pyro_vae import CompiledSVI

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        blocks = [torch.zeros(25_000) for _ in range(300)]  # of 100,000 bytes
        del blocks
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 50

def model(x):
    sample("x", distributions.Normal(0.0, 1.0), obs=x)

print(pages())
svi = CompiledSVI(model, lambda x: None, SGD, Trace_ELBO(), mode="captured")
svi.evaluate_loss(torch.zeros(()))
print(pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the memory of GNU's C library")
def test_what_a_step_frees_is_not_asked_of_the_system_again():
    resource = pytest.importorskip("resource")
    command, set_here = [sys.executable, "-c", CHURN], ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    env = {key: value for key, value in os.environ.items() if not key.startswith(set_here)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    before, after = map(float, done.stdout.split())
    many = 300 * 100_000 / resource.getpagesize() / 2
    if before < many:
        pytest.skip("this system's memory comes in larger pages, or is kept anyway")
    assert after < many / 5
