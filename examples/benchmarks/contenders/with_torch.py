"""The same models in PyTorch alone, as one writes them by hand, and as pytorch/examples does."""

import math

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from contenders.programs import ACTIVATIONS, OnTorch, images, pool, threads

__all__ = ["DataLoaded", "Handwritten", "encoder_and_decoder", "threads"]


def dense(input, hidden, output, activation):
    return nn.Sequential(nn.Linear(input, hidden), activation(), nn.Linear(hidden, output))


def encoder_and_decoder(size):
    """From images ``(n, 1, 28, 28)`` to 2 x latent numbers, and from z to 784 logits."""
    activation = ACTIVATIONS[size.activation]
    if size.kind != "conv":
        encoder = nn.Sequential(nn.Flatten(), dense(784, size.hidden, 2 * size.latent, activation))
        return encoder, dense(size.latent, size.hidden, 784, activation)
    first, second = size.channels
    encoder = nn.Sequential(
        nn.Conv2d(1, first, 3, stride=2, padding=1),
        activation(),
        nn.Conv2d(first, second, 3, stride=2, padding=1),
        activation(),
        nn.Flatten(),
        dense(second * 7 * 7, size.hidden, 2 * size.latent, activation),
    )
    decoder = nn.Sequential(
        dense(size.latent, size.hidden, second * 7 * 7, activation),
        nn.Unflatten(1, (second, 7, 7)),
        activation(),
        nn.ConvTranspose2d(second, first, 3, stride=2, padding=1, output_padding=1),
        activation(),
        nn.ConvTranspose2d(first, 1, 3, stride=2, padding=1, output_padding=1),
        nn.Flatten(),
    )
    return encoder, decoder


class GaussianVAE(nn.Module):
    """A VAE whose loss is minus the bound, the KL in closed form."""

    def __init__(self, size):
        super().__init__()
        self.encoder, self.decoder = encoder_and_decoder(size)

    def forward(self, x):
        mean, log_variance = self.encoder(x).chunk(2, -1)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        logits = self.decoder(z)
        reconstruction = F.binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="sum")
        kl = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
        return reconstruction + kl


class IWAE(GaussianVAE):
    """The importance-weighted bound of several draws."""

    def __init__(self, size):
        super().__init__(size)
        self.particles = size.particles

    def forward(self, x):
        mean, log_scale = self.encoder(x).chunk(2, -1)
        noise = torch.randn(self.particles, *mean.shape, device=x.device)
        z = mean + log_scale.exp() * noise
        logits = self.decoder(z)
        target = x.flatten(1).expand_as(logits)
        log_likelihood = -F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(
            -1
        )
        # The constants of both Gaussians cancel.
        log_ratio = (0.5 * noise.square() - 0.5 * z.square() + log_scale).sum(-1)
        log_weights = log_likelihood + log_ratio
        return -(log_weights.logsumexp(0) - math.log(self.particles)).sum()


class TwoLayers(nn.Module):
    """p(z1) p(z2|z1) p(x|z2), inferred as q(z2|x) q(z1|z2)."""

    def __init__(self, size):
        super().__init__()
        self.encoder, self.decoder = encoder_and_decoder(size)
        activation = ACTIVATIONS[size.activation]
        self.up = dense(size.latent, 100, 2 * size.above, activation)
        self.down = dense(size.above, 100, 2 * size.latent, activation)

    def forward(self, x):
        mean2, log_scale2 = self.encoder(x).chunk(2, -1)
        noise2 = torch.randn_like(mean2)
        z2 = mean2 + log_scale2.exp() * noise2
        mean1, log_scale1 = self.up(z2).chunk(2, -1)
        noise1 = torch.randn_like(mean1)
        z1 = mean1 + log_scale1.exp() * noise1
        mean_p, log_scale_p = self.down(z1).chunk(2, -1)
        reconstruction = F.binary_cross_entropy_with_logits(
            self.decoder(z2), x.flatten(1), reduction="sum"
        )
        # log q - log p at the draws, in which the constants cancel.
        kl1 = 0.5 * (z1.square() - noise1.square()) - log_scale1
        standardised = (z2 - mean_p) * (-log_scale_p).exp()
        kl2 = 0.5 * (standardised.square() - noise2.square()) + log_scale_p - log_scale2
        return reconstruction + kl1.sum() + kl2.sum()


class Handwritten(OnTorch):
    """The usual loop; an epoch takes rows of a binarised float tensor that stays in memory.

    Args:
        compiled: Whether the loss goes through `torch.compile`; autograd follows it there.
        fused: Whether Adam updates all parameters in one kernel, which is not its default.
    """

    def __init__(self, size, directory, device, *, compiled=False, fused=False):
        super().__init__(size, directory, device)
        torch.manual_seed(0)
        split = images(size, directory).train.to(device)
        self.x = (split.x > 127).float()
        self.pool = pool(split, size)
        family = TwoLayers if size.above else IWAE if size.particles > 1 else GaussianVAE
        model = family(size).to(device)
        self.loss = torch.compile(model) if compiled else model
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused or None)

    def step(self, x):
        self.optimizer.zero_grad()
        loss = self.loss(x)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def one_pass(self):
        order = torch.randperm(len(self.x), device=self.device)
        for rows in order.split(self.size.batch):
            self.step(self.x[rows])


class ExampleVAE(nn.Module):
    """The network of pytorch/examples: separate heads, and probabilities rather than logits."""

    def __init__(self, size):
        super().__init__()
        self.hidden = nn.Linear(784, size.hidden)
        self.mean = nn.Linear(size.hidden, size.latent)
        self.log_variance = nn.Linear(size.hidden, size.latent)
        self.from_latent = nn.Linear(size.latent, size.hidden)
        self.pixels = nn.Linear(size.hidden, 784)
        self.activation = ACTIVATIONS[size.activation]()

    def forward(self, x):
        h = self.activation(self.hidden(x.view(-1, 784)))
        mean, log_variance = self.mean(h), self.log_variance(h)
        z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        y = torch.sigmoid(self.pixels(self.activation(self.from_latent(z))))
        return y, mean, log_variance


class DataLoaded(Handwritten):
    """A `DataLoader` over `torchvision.datasets.MNIST` with `ToTensor`, as in pytorch/examples.

    Its grey levels are scored as they come, which spares it the binarisation; the loss is read
    in every step, as there.
    """

    def __init__(self, size, directory, device):
        OnTorch.__init__(self, size, directory, device)
        torch.manual_seed(0)
        split = images(size, directory).train
        self.pool = pool(split, size).to(device)
        self.model = ExampleVAE(size).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        train = datasets.MNIST(str(directory), train=True, transform=transforms.ToTensor())
        train = (
            torch.utils.data.Subset(train, range(size.rows)) if size.rows < len(train) else train
        )
        workers = {"num_workers": 1, "pin_memory": True} if device == "cuda" else {}
        self.loader = DataLoader(train, batch_size=size.batch, shuffle=True, **workers)

    def loss(self, x):
        y, mean, log_variance = self.model(x)
        reconstruction = F.binary_cross_entropy(y, x.view(-1, 784), reduction="sum")
        kl = -0.5 * torch.sum(1 + log_variance - mean.pow(2) - log_variance.exp())
        return reconstruction + kl

    def one_pass(self):
        total = 0.0
        for x, _ in self.loader:
            total += self.step(x.to(self.device)).item()
        return total
