"""The sizes as this package's programs, and their data."""

import torch
from torch import nn

from contenders import Contender, mnist
from pyro_vae import (
    MLP,
    VAE,
    ConvDecoder,
    ConvEncoder,
    HierarchicalVAE,
    data,
    likelihoods,
    posteriors,
    priors,
)
from pyro_vae.networks import BFloat16
from pyro_vae.objectives import IWAE, Trace_ELBO

SHAPE = (1, 28, 28)
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


def pair(size, *, bfloat16=False):
    """The model/guide pair of a size, its networks trained in bfloat16 or not."""
    options = {"activation": ACTIVATIONS[size.activation]}
    if size.kind == "conv":
        options["hidden"] = size.hidden
        encoder = ConvEncoder(SHAPE, size.channels, (2, size.latent), **options)
        decoder = ConvDecoder(size.latent, size.channels[::-1], SHAPE, **options)
    else:
        encoder = MLP(SHAPE, [size.hidden], (2, size.latent), **options)
        decoder = MLP(size.latent, [size.hidden], SHAPE, **options)
    if bfloat16:
        encoder, decoder = BFloat16(encoder), BFloat16(decoder)
    likelihood, posterior = likelihoods.Bernoulli(decoder), posteriors.Normal(encoder)
    if not size.above:
        return VAE(priors.Normal(size.latent), likelihood, posterior)
    return HierarchicalVAE(
        [
            priors.Normal(size.above),
            posteriors.Normal(MLP(size.above, [100], (2, size.latent), **options)),
        ],
        likelihood,
        [posteriors.Normal(MLP(size.latent, [100], (2, size.above), **options)), posterior],
        bottom_up=True,
    )


def objective(size):
    """The bound of a size."""
    return IWAE(size.particles) if size.particles > 1 else Trace_ELBO(max_plate_nesting=1)


def images(size, directory):
    """The images of MNIST that an epoch of a size is timed on, bytes binarised at one half."""
    x = torch.from_numpy(mnist(directory)[: size.rows, None])
    train = data.Split(x, top=255.0, view=data.threshold)
    return data.Data(train, train[:0], train[:0], "mnist")


def pool(split, size, count=20):
    """Batches that are ready ``(count, batch, 1, 28, 28)``, for steps without data handling."""
    count = max(min(count, len(split) // size.batch), 1)
    (x,) = split[: count * size.batch].batch()
    return x.unflatten(0, (count, -1)).contiguous()


def threads(count):
    torch.set_num_threads(count)


class OnTorch(Contender):
    """A contender on torch: it has a `step` and a `pool` of batches that are ready."""

    def step(self, x):
        """Take a step on one batch, and return its loss, summed over the batch."""
        raise NotImplementedError

    def steps(self, count):
        total = 0.0
        for index in range(count):
            total = total + self.step(self.pool[index % len(self.pool)])
        return float(total) / (count * self.size.batch)

    def wait(self):
        if self.device == "cuda":
            torch.cuda.synchronize()

    def device_memory(self):
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None
