"""Networks: tensor to tensor, under any leading dimensions; no probability in here."""

from __future__ import annotations

__all__ = ["MLP", "BFloat16", "ConvDecoder", "ConvEncoder", "fill"]

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

Shape = int | Sequence[int]
Activation = Callable[[], nn.Module]
Transform = Callable[[Tensor], Tensor]


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
        gated: Make every hidden layer ``activation(W h + b) * sigmoid(V h + c)``, the gated
            linear units of Dauphin et al. (2017), Language Modeling with Gated Convolutional
            Networks; Tomczak & Welling (2018), VAE with a VampPrior, have them with
            ``activation=nn.Identity``.
        transform: Applied to an input before anything else, such as `torch.log1p` to counts.

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
        gated: bool = False,
        transform: Transform | None = None,
    ) -> None:
        super().__init__()
        self.input, self.output, self.context = _shape(input), _shape(output), context
        self.transform = transform
        widths = [math.prod(self.input) + context, *hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            if gated:
                layers.append(_Gated(before, after, activation))
            else:
                layers += [nn.Linear(before, after), activation()]
        self.hidden = nn.Sequential(*layers)
        self.last = nn.Linear(widths[-1], math.prod(self.output))

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """Map ``(..., *input)`` and contexts ``(..., features)`` to ``(..., *output)``.

        Raises:
            ValueError: The input or the context has another shape than the network's.
        """
        x = x if self.transform is None else self.transform(x)
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
        blocks: Residual blocks after each convolution, ``x + conv(act(conv(act(x))))``: He et
            al. (2016), Identity Mappings in Deep Residual Networks, without normalisation.
        transform: Applied to an image before anything else, such as `torch.log1p` to counts.

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
        blocks: int = 0,
        transform: Transform | None = None,
    ) -> None:
        super().__init__()
        self.input, self.output, self.context = _image(input), _shape(output), context
        self.transform = transform
        widths = [self.input[0], *channels]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers.append(nn.Conv2d(before, after, 3, stride=2, padding=1))
            layers += [_Residual(after, activation) for _ in range(blocks)]
            layers.append(activation())
        self.convolutions = nn.Sequential(*layers)
        features = widths[-1] * math.prod(_sizes(self.input[1:], len(channels))[-1])
        self.dense = MLP(features, [hidden], self.output, context=context, activation=activation)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """Map ``(..., *input)`` and contexts ``(..., features)`` to ``(..., *output)``."""
        x = x if self.transform is None else self.transform(x)
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
        blocks: Residual blocks before each transposed convolution, as in `ConvEncoder`.

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
        blocks: int = 0,
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
            layers += [_Residual(before, activation) for _ in range(blocks)]
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


class BFloat16(nn.Module):
    """A network that is trained in bfloat16, and evaluated as it is.

    In training its matrix products and convolutions are in bfloat16, by torch's automatic mixed
    precision, and so is what it keeps between them. Weights, gradients and outputs stay in
    float32, so that the parameters of distributions, their draws and log-densities do:
    Micikevicius et al. (2018), Mixed Precision Training, with a type that needs no scaling of the
    loss. On a GPU products of thousands of columns are faster by it; small ones gain nothing.

    Args:
        network: The network, in float32.

    Example:
        >>> encoder = BFloat16(MLP((1, 28, 28), [400], (2, 20)))
        >>> encoder(torch.zeros(5, 1, 28, 28)).dtype
        torch.float32
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """What the network maps its inputs to, in float32."""
        if not self.training:
            return cast("Tensor", self.network(x, *context))
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            output: Tensor = self.network(x, *context)
        return output.float() if output.dtype == torch.bfloat16 else output

    def set_bias(self, value: Tensor) -> None:
        """Set the output's bias of the network to `value`.

        Raises:
            TypeError: It has none that can be set.
        """
        set_bias = getattr(self.network, "set_bias", None)
        if set_bias is None:
            raise TypeError(f"a {type(self.network).__name__} decoder has no method set_bias")
        set_bias(value)


def fill(x: Tensor, *, dims: int) -> Tensor:
    """Return x with 0 where it is missing (NaN), joined to the mask of what was observed.

    How an encoder sees incomplete data: zeros as in Nazabal et al. (2020), Handling Incomplete
    Heterogeneous Data using VAEs, and the mask, by which it tells them from zeros that were
    observed. As a `transform` it is ``functools.partial(fill, dims=3)`` for images.

    Args:
        x: Data ``(..., c, *rest)``, NaN where an element is missing.
        dims: Number of dimensions of one datum; values and mask, 1 where an element was
            observed, are joined along the first of them, to ``(..., 2c, *rest)``.

    Example:
        >>> fill(torch.tensor([[3.0, torch.nan]]), dims=1)
        tensor([[3., 0., 1., 0.]])
    """
    missing = x.isnan()
    return torch.cat([x.masked_fill(missing, 0), (~missing).to(x.dtype)], -dims)


class _Gated(nn.Module):
    """A layer ``activation(W h + b) * sigmoid(V h + c)``."""

    def __init__(self, before: int, after: int, activation: Activation) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(before, after), nn.Linear(before, after)
        self.activation = activation()

    def forward(self, h: Tensor) -> Tensor:
        return self.activation(self.value(h)) * self.gate(h).sigmoid()


class _Residual(nn.Module):
    """A block ``x + conv(act(conv(act(x))))`` of 3 x 3 convolutions."""

    def __init__(self, channels: int, activation: Activation) -> None:
        super().__init__()
        first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.change = nn.Sequential(activation(), first, activation(), second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.change(x)


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
    """Concatenate features ``(..., f)`` and contexts ``(..., c)``, broadcast to one batch."""
    given = sum(c.shape[-1] for c in context)
    if given != width:
        raise ValueError(
            f"a network built with context={width} was given {given} context features"
        )
    if not context:
        return features
    batch = torch.broadcast_shapes(features.shape[:-1], *(c.shape[:-1] for c in context))
    wide = [each.to(features.dtype).expand(*batch, -1) for each in (features, *context)]
    return torch.cat(wide, -1)
