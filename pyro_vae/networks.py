"""Networks: tensor to tensor, under any leading dimensions; no probability in here."""

from __future__ import annotations

__all__ = ["MLP", "ConvDecoder", "ConvEncoder"]

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

Shape = int | Sequence[int]
Activation = Callable[[], nn.Module]


class MLP(nn.Module):
    """Fully connected network ``h <- activation(W h + b)``, linear in its last layer.

    Appendix C of Auto-Encoding Variational Bayes (Kingma & Welling, 2013), with any
    number of hidden layers.

    Args:
        input: Shape of one input, ``(1, 28, 28)`` or ``20``.
        hidden: Width of each hidden layer; empty for a linear map.
        output: Shape of one output; ``(2, 20)`` gives a posterior its two parameters.
        context: Number of context features, joined to the flattened input.
        activation: Class of the module between layers.

    Example:
        >>> encoder = MLP((1, 28, 28), [400], (2, 20))
        >>> encoder(torch.zeros(5, 7, 1, 28, 28)).shape
        torch.Size([5, 7, 2, 20])
    """

    def __init__(
        self,
        input: Shape,
        hidden: Sequence[int],
        output: Shape,
        *,
        context: int = 0,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        self.input, self.output, self.context = _shape(input), _shape(output), context
        widths = [math.prod(self.input) + context, *hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), activation()]
        self.hidden = nn.Sequential(*layers)
        self.last = nn.Linear(widths[-1], math.prod(self.output))

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """Map ``(..., *input)`` and contexts ``(..., features)`` to ``(..., *output)``.

        Raises:
            ValueError: The input or the context has another shape than the network's.
        """
        _expect(self, x, self.input)
        features = _join(x.flatten(-len(self.input)), context, self.context)
        return self.last(self.hidden(features)).unflatten(-1, self.output)

    @torch.no_grad()
    def set_bias(self, value: Tensor) -> None:
        """Set the output's bias to `value`, of the output's shape or one that expands to it."""
        self.last.bias.copy_(value.expand(self.output).flatten())


class ConvEncoder(nn.Module):
    """Convolutions of stride 2 over an image, then one dense layer: an image to features.

    Args:
        input: Shape ``(channels, height, width)`` of one image, of any height and width.
        channels: Channels after each convolution; each halves height and width.
        output: Shape of one output.
        hidden: Width of the dense layer.
        context: Number of context features, joined before the dense layer.
        activation: Class of the module between layers.

    Example:
        >>> encoder = ConvEncoder((1, 28, 20), [16, 32], (2, 10))
        >>> encoder(torch.zeros(5, 1, 28, 20)).shape
        torch.Size([5, 2, 10])
    """

    def __init__(
        self,
        input: Sequence[int],
        channels: Sequence[int],
        output: Shape,
        *,
        hidden: int = 256,
        context: int = 0,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        self.input, self.output, self.context = _image(input), _shape(output), context
        widths = [self.input[0], *channels]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), activation()]
        self.convolutions = nn.Sequential(*layers)
        features = widths[-1] * math.prod(_sizes(self.input[1:], len(channels))[-1])
        self.dense = MLP(features, [hidden], self.output, context=context, activation=activation)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """Map ``(..., *input)`` and contexts ``(..., features)`` to ``(..., *output)``."""
        _expect(self, x, self.input)
        features = self.convolutions(x.reshape(-1, *self.input)).flatten(1)
        features = features.unflatten(0, x.shape[:-3]) if x.dim() > 3 else features.squeeze(0)
        return self.dense(features, *context)


class ConvDecoder(nn.Module):
    """One dense layer, then transposed convolutions of stride 2: features to an image.

    Args:
        input: Shape of one input, the latent dimension.
        channels: Channels before each transposed convolution; each doubles height and width.
        output: Shape ``(..., channels, height, width)`` of one output, of any height and
            width; ``(2, 1, 28, 28)`` gives every pixel two parameters.
        hidden: Width of the dense layer.
        context: Number of context features, joined to the input.
        activation: Class of the module between layers.

    Example:
        >>> decoder = ConvDecoder(10, [32, 16], (1, 28, 20))
        >>> decoder(torch.zeros(7, 5, 10)).shape
        torch.Size([7, 5, 1, 28, 20])
    """

    def __init__(
        self,
        input: Shape,
        channels: Sequence[int],
        output: Sequence[int],
        *,
        hidden: int = 256,
        context: int = 0,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        self.output = _image(output)
        sizes = _sizes(self.output[-2:], len(channels))[::-1]
        start = (channels[0], *sizes[0])
        self.dense = MLP(input, [hidden], start, context=context, activation=activation)
        widths = [*channels, math.prod(self.output[:-2])]
        layers: list[nn.Module] = []
        for (before, after), (height, width) in zip(pairwise(widths), sizes[1:], strict=True):
            even = (1 - height % 2, 1 - width % 2)
            grow = nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=even)
            layers += [activation(), grow]
        self.convolutions = nn.Sequential(*layers)

    def forward(self, z: Tensor, *context: Tensor) -> Tensor:
        """Map ``(..., *input)`` and contexts ``(..., features)`` to ``(..., *output)``."""
        features = self.dense(z, *context)
        image = self.convolutions(features.reshape(-1, *features.shape[-3:]))
        return image.reshape(*features.shape[:-3], *self.output)

    @torch.no_grad()
    def set_bias(self, value: Tensor) -> None:
        """Set each output channel's bias to the mean over pixels of `value`."""
        means = value.expand(self.output).mean((-2, -1)).flatten()
        cast("nn.Parameter", self.convolutions[-1].bias).copy_(means)


def _shape(shape: Shape) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(shape)


def _image(shape: Sequence[int]) -> tuple[int, ...]:
    if len(shape) < 3:
        raise ValueError(
            f"a convolutional network needs images of shape (channels, height, width), "
            f"not {tuple(shape)}; use an MLP"
        )
    return tuple(shape)


def _sizes(size: Sequence[int], halvings: int) -> list[tuple[int, ...]]:
    """Height and width after 0, 1, ... `halvings` convolutions of stride 2."""
    sizes = [tuple(size)]
    for _ in range(halvings):
        sizes.append(tuple((length + 1) // 2 for length in sizes[-1]))
    return sizes


def _expect(network: nn.Module, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape[-len(shape) :] != shape:
        raise ValueError(
            f"{type(network).__name__} takes inputs of shape (..., {', '.join(map(str, shape))}) "
            f"and got {tuple(x.shape)}"
        )


def _join(features: Tensor, context: Sequence[Tensor], width: int) -> Tensor:
    """Concatenate contexts ``(..., c)`` to features ``(..., f)``, broadcast over the left."""
    given = sum(c.shape[-1] for c in context)
    if given != width:
        raise ValueError(
            f"a network built with context={width} was given {given} context features"
        )
    if not context:
        return features
    wide = [c.to(features.dtype).expand(*features.shape[:-1], -1) for c in context]
    return torch.cat([features, *wide], -1)
