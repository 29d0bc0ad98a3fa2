"""Figure 5 of Auto-Encoding Variational Bayes: samples of MNIST with 2, 5, 10 and 20 latents.

    python examples/paper/figure5_samples.py --data-dir DATA

Shown is the mean of p(x|z) at draws of p(z). Weights that `figure2_lower_bound.py` has kept
for so many samples are used, and else trained.
"""

import protocol
import pyro
import reporting

from pyro_vae import plots

LATENTS, HIDDEN, SIDE = [2, 5, 10, 20], 500, 10


def main():
    options = protocol.ready(protocol.arguments(__doc__, 1e7))
    for latent in [] if options.report else LATENTS:
        hidden = 32 if options.small else HIDDEN
        panel = f"MNIST Nz={latent}"
        vae = protocol.trained(latent, hidden, options, panel=panel, binarisation="static")
        pyro.set_rng_seed(options.seed)
        picture = plots.grid(vae.sample(SIDE**2, mean=True), columns=SIDE)
        plots.save(picture, reporting.file_of(f"figure5_{latent}", options))
    drawn = {k: reporting.file_of(f"figure5_{k}", options) for k in LATENTS}
    drawn = {k: file.name for k, file in drawn.items() if file.exists()}
    head = " | ".join(f"{k} latents" for k in drawn)
    cells = " | ".join(f"![{k} latents](results/{name})" for k, name in drawn.items())
    lines = [f"| {head} |", "|---" * len(drawn) + "|", f"| {cells} |"]
    reporting.write("figure5", "\n".join(lines) if drawn else "", options)


if __name__ == "__main__":
    main()
