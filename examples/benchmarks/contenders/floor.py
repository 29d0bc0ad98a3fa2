"""The floor: only the large products of a step, nothing between them."""

import torch
from torch import nn

from contenders.programs import SHAPE, OnTorch, objective, pair, threads
from pyro_vae.capture import keep_freed_memory

__all__ = ["Floor", "threads"]


class Floor(OnTorch):
    """The products that any implementation of the same networks has to compute.

    One forward and backward pass of this package's program is watched. Each fully connected or
    convolutional layer that it passes stands for

    - forward, ``y = x W'``,
    - the gradient in the weights, ``W' = y' x``,
    - and the gradient in its input, ``x' = y' W``, where the input has one: x itself has none,

    with as many rows as the layer was given (for IWAE the encoder has one for each datum and the
    decoder one for each draw). Layers with fewer than a tenth of the multiplications per row of
    the largest are left out. For 784-400-20-400-784 that leaves five products: the first and
    the last layer forward, both gradients in their weights, and the last layer's in its input.
    Results go to memory that is reused; no bias, activation, loss or optimiser is in it.
    With `onednn` the products of fully connected layers are not torch's own but oneDNN's, which
    takes new memory for them each time.
    """

    def __init__(self, size, directory, device, onednn=False):
        super().__init__(size, directory, device)
        if onednn:
            keep_freed_memory()  # that of the results
        calls = layers(size, device, by_onednn if onednn else torch.mm)
        largest = max(work for _, work in calls)
        self.products = [
            product for kept, work in calls if work >= largest / 10 for product in kept
        ]

    @torch.no_grad()
    def steps(self, count):
        for _ in range(count):
            for product in self.products:
                product()

    def epoch(self):
        return None

    def trained(self, count):
        return self.steps(count)


def layers(size, device, product=torch.mm):
    """Of every layer that a step passes: its products, and its multiplications per row."""
    program, bound = pair(size).to(device), objective(size)
    seen = []

    def note(module, inputs, output):
        seen.append((module, inputs[0].detach(), inputs[0].requires_grad, output.detach()))

    for module in program.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_hook(note)
    bound.loss_and_grads(
        program.model, program.guide, torch.zeros(size.batch, *SHAPE, device=device)
    )
    return [linear(*each, product) if isinstance(each[0], nn.Linear) else convolution(*each)
            for each in seen]  # fmt: skip


def by_onednn(a, b, out):
    """The product ``a b``; `out` is left alone, since oneDNN's has no such argument."""
    return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")


def linear(layer, x, differentiated, y, product):
    """The products of a fully connected layer."""
    x, y = x.reshape(-1, x.shape[-1]).clone(), torch.randn_like(y).reshape(-1, y.shape[-1])
    weight, out = layer.weight.detach().clone(), torch.empty_like(y)
    in_weight, in_x = torch.empty_like(weight), torch.empty_like(x)
    products = [
        lambda: product(x, weight.T, out=out),
        lambda: product(y.T, x, out=in_weight),
    ]
    if differentiated:
        products.append(lambda: product(y, weight, out=in_x))
    return products, weight.numel()


def convolution(layer, x, differentiated, y):
    """Those of a convolution or a transposed one, by torch's own kernels."""
    transposed = isinstance(layer, nn.ConvTranspose2d)
    x, y, weight = x.clone(), torch.randn_like(y), layer.weight.detach().clone()
    padding = layer.output_padding if transposed else (0, 0)
    how = (layer.stride, layer.padding, layer.dilation, transposed, padding, layer.groups)
    wanted = (differentiated, True, False)
    backward = torch.ops.aten.convolution_backward
    places = (x if transposed else y)[0, 0].numel()  # at which the kernel is applied
    return [
        lambda: torch.ops.aten.convolution(x, weight, None, *how),
        lambda: backward(y, x, weight, None, *how, wanted),
    ], weight.numel() * places
