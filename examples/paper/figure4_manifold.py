"""Figure 4 of Auto-Encoding Variational Bayes: the manifolds of Frey Face and MNIST.

    python examples/paper/figure4_manifold.py --data-dir DATA

Two latents by AEVB; a grid on the unit square goes through the inverse of the Gaussian's
distribution function to latents, and these to the means of p(x|z). Weights
that were kept for so many samples are used, and else trained.
"""

import protocol
import reporting
import torch

from pyro_vae import plots

CASES = {
    "FreyFace Nz=2": ("none, random split", 200, 10),
    "MNIST Nz=2": ("static", 500, 20),
}


def square(side):
    """Latents ``(side^2, 2)`` at the quantiles of the prior, the first from left to right."""
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(side) + 0.5) / side)
    down, right = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    return torch.stack([right, down], -1).flatten(0, 1)


def main():
    options = protocol.ready(protocol.arguments(__doc__, 1e7))
    for panel, (binarisation, hidden, side) in {} if options.report else CASES.items():
        hidden = 32 if options.small else hidden
        vae = protocol.trained(2, hidden, options, panel=panel, binarisation=binarisation)
        with torch.no_grad():
            means = vae.decode(square(side)).mean
        file = reporting.file_of(f"figure4_{panel.split()[0]}", options)
        plots.save(plots.manifold(means, side), file)
    files = {panel: reporting.file_of(f"figure4_{panel.split()[0]}", options) for panel in CASES}
    pictures = [
        f"![{panel}](results/{file.name})" for panel, file in files.items() if file.exists()
    ]
    reporting.write("figure4", "\n".join(pictures), options)


if __name__ == "__main__":
    main()
