"""Figure 3 of Auto-Encoding Variational Bayes: the marginal likelihood, with Monte Carlo EM.

    python examples/paper/figure3_marginal_likelihood.py --data-dir DATA

MNIST with 100 hidden units and 3 latents, 1,000 and 50,000 training images, by AEVB, wake-sleep
and Monte Carlo EM (Appendix E). log p(x) is estimated by Appendix D (`hmc_likelihood`) on 1,000
training and 1,000 test images drawn at random, chains of 4 leapfrog steps. On some test images
of every trained model, quadrature stands beside it in `results/figure3_quadrature.json`.

Appendix E leaves open where chains begin and what counts as a sample. Here each training image has
a chain, which begins at a draw of p(z) and goes on whenever a minibatch has the image, and each of
the 5 updates of the weights counts 100 samples. The 4 chains that an image has in the curves can
all miss a mode of its posterior, and the estimate is too low by the mass of that mode; the
quadrature is held against these as well as against the 16 chains that `hmc_likelihood` has.
"""

from functools import partial

import protocol
import pyro
import reporting
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from pyro_vae import VAE, priors
from pyro_vae.annealing import hmc_likelihood
from pyro_vae.checkpoints import save
from pyro_vae.evaluation import quadrature

LATENT, HIDDEN, ROWS = 3, 100, [1000, 50_000]
POINTS = [1_000_000, 2_000_000, 5_000_000, 10_000_000, 20_000_000, 40_000_000, 60_000_000]
LEAPFROG, UPDATES, ACCEPTANCE = 10, 5, 0.9  # of Appendix E


def score(vae, x, z):
    """``log p(x,z)`` of each datum."""
    return vae.prior().log_prob(z) + vae.decode(z).log_prob(x)


def slope(vae, x, z):
    """``log p(x,z)`` and its gradient in z."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = score(vae, x, z)
        return value.detach(), torch.autograd.grad(value.sum(), z)[0]


def moved(vae, x, z, step):
    """Latents after one Hamiltonian move under p(z|x), and its mean acceptance."""
    momentum = torch.randn_like(z)
    new, (value, gradient) = z, slope(vae, x, z)
    before = value - momentum.square().sum(-1) / 2
    for _ in range(LEAPFROG):
        momentum = momentum + step / 2 * gradient
        new = new + step * momentum
        value, gradient = slope(vae, x, new)
        momentum = momentum + step / 2 * gradient
    chance = (value - momentum.square().sum(-1) / 2 - before).exp().clamp(max=1)
    accepted = torch.rand_like(chance) < chance
    return torch.where(accepted[:, None], new, z), float(chance.mean())


def monte_carlo_em(vae, _, split, *, samples, lr, seed, points, title, begun=None):
    """Appendix E: move the latents of a minibatch, then update the weights at them."""
    optimizer = protocol.adagrad(vae.likelihood.parameters(), len(split), lr)
    x, order = split.batch()[0], torch.Generator().manual_seed(seed)
    if begun:
        seen, step, chains, queue = (begun[key] for key in ("seen", "step", "chains", "queue"))
        chains = chains.to(x.device)
        optimizer.load_state_dict(begun["optimizer"])
        order.set_state(begun["order"])
    else:
        seen, step, chains = 0, 0.1, torch.randn(len(split), LATENT, device=x.device)
        queue = torch.empty(0, dtype=torch.long)
    with protocol.progress(samples, title, seen) as bar, pyro.validation_enabled(False):
        for point in protocol.ends(samples, points, seen):
            while seen < point:
                if not len(queue):
                    queue = torch.randperm(len(split), generator=order)
                rows, queue = queue[: protocol.BATCH], queue[protocol.BATCH :]
                chains[rows], accepted = moved(vae, x[rows], chains[rows], step)
                step *= 1 + 0.05 * (accepted - ACCEPTANCE)
                for _ in range(UPDATES):
                    optimizer.zero_grad()
                    (-score(vae, x[rows], chains[rows]).sum()).backward()
                    optimizer.step()
                seen += UPDATES * protocol.BATCH
                bar.update(UPDATES * protocol.BATCH)
            state = {"seen": seen, "step": step, "chains": chains, "queue": queue}
            yield seen, {**state, "order": order.get_state(), "optimizer": optimizer.state_dict()}


def make(method, shape, scale):
    """A VAE; for Monte Carlo EM, which has no encoder, with p(z) where its chains begin."""
    vae = protocol.build("static", shape, LATENT, HIDDEN, scale)
    return VAE(vae.prior, vae.likelihood, priors.Normal(LATENT)) if method == "MCEM" else vae


def estimate(count, vae, split):
    """Appendix D on some data: mean and standard error over these."""
    found = protocol.appendix_d(vae, protocol.some(split, count))
    return float(found.mean()), float(found.std() / count**0.5)


def held_against(vae, split, count):
    """Appendix D beside quadrature on some data."""
    batch = protocol.some(split, count).batch()
    truth = quadrature(vae, batch, tolerance=1e-2)
    found = hmc_likelihood(vae, batch, samples=200)
    apart = found.log_likelihood - truth.log_likelihood
    return {
        "checked": len(apart),
        "value_nats": float(truth.log_likelihood.mean()),
        "appendix_d": float(found.log_likelihood.mean()),
        "as_in_curves": float(protocol.appendix_d(vae, batch).mean()),
        "monte_carlo_error": float(found.monte_carlo_error.square().sum().sqrt() / len(apart)),
        "within_3_errors": float(
            (apart.abs() < 3 * found.monte_carlo_error + 0.01).double().mean()
        ),
    }


def report(results, checks, options):
    """The picture, and the tables."""
    chosen = reporting.chosen(results.rows, options)
    if not chosen:
        reporting.write("figure3", "", options)
        return
    panels = {row["panel"]: (row["panel"], "static") for row in chosen}
    picture = reporting.draw(chosen, panels, figure="3", columns=2)
    FigureCanvasAgg(picture).print_png(str(reporting.file_of("figure3", options)))
    parts = [
        f"*{split}*\n\n{reporting.table(results.rows, figure='3', at=POINTS, split=split)}"
        for split in ("test", "train")
    ]
    lines = [
        "| model | quadrature | Appendix D | its error | within 3 errors | as in the curves |",
        "|---|---|---|---|---|---|",
    ]
    for row in reporting.chosen(checks.rows, options):
        lines.append(
            f"| {row['panel']}, {row['method']} | {row['value_nats']:.2f} "
            f"| {row['appendix_d']:.2f} | {row['monte_carlo_error']:.2f} "
            f"| {row['within_3_errors']:.0%} of {row['checked']} "
            f"| {reporting.number(row.get('as_in_curves'), 2)} |"
        )
    parts += [reporting.ordered(chosen, figure="3", primary=["static"])]
    parts += ["\n".join(lines)] if len(lines) > 2 else []
    reporting.write("figure3", "\n\n".join(part for part in parts if part), options)


def main():
    parser = protocol.arguments(__doc__, 6e7)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="training images")
    methods = [*protocol.OBJECTIVES, "MCEM"]
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--images", type=int, default=1000, help="for an estimate of log p(x)")
    parser.add_argument("--checked", type=int, default=10, help="images for the quadrature")
    options = protocol.ready(parser)
    protocol.OBJECTIVES["MCEM"] = lambda: None
    results = protocol.Results(options.out / "figure3.json")
    checks = protocol.Results(options.out / "figure3_quadrature.json")
    if min(options.rows) < protocol.BATCH:
        parser.error(f"--rows must be a minibatch of {protocol.BATCH} or more")
    cases = [(rows, method) for rows in options.rows for method in options.methods]
    for rows, method in [] if options.report else cases:
        about = {"figure": "3", "panel": f"Ntrain={rows}", "binarisation": "static"}
        key = {**about, "method": method, **protocol.asked(options)}
        if results.has(**key, budget=options.samples):
            continue
        data = protocol.load("static", options)
        if rows > len(data.train) and not options.small:
            parser.error(f"there are {len(data.train):,} training images, and no {rows:,}")
        splits = {"train": protocol.some(data.train, rows), "test": data.test}
        file = protocol.weights(options, about["panel"], method, "static")

        def keep(curve, vae, key=key, test=data.test, file=file):
            save(vae, file)
            check = held_against(vae, test, options.checked)
            checks.add([{**key, **check, "budget": round(options.samples)}])
            results.add(curve)

        how = {"value": partial(estimate, options.images), "points": POINTS, "keep": keep}
        how["run"] = monte_carlo_em if method == "MCEM" else protocol.train
        begin = partial(make, method, data.shape, options.initial_scale)
        protocol.curve(begin, method, splits, options, about=about, **how)
    report(results, checks, options)


if __name__ == "__main__":
    main()
