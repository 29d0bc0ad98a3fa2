"""Networks: their maps against torch's own, under any leading dimensions."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from pyro_vae.networks import MLP, ConvDecoder, ConvEncoder

IMAGES = [(1, 28, 28), (1, 28, 20), (3, 8, 8), (2, 7, 5)]


def test_mlp_is_the_composition_of_its_layers():
    network = MLP((2, 3), [5], (2, 4), context=2, activation=nn.Tanh)
    x, c = torch.randn(7, 2, 3), torch.randn(7, 2)
    (first, _), last = network.hidden, network.last
    hidden = torch.tanh(torch.cat([x.reshape(7, 6), c], 1) @ first.weight.T + first.bias)
    assert torch.allclose(network(x, c), (hidden @ last.weight.T + last.bias).reshape(7, 2, 4))


def test_convolutional_encoder_is_the_composition_of_its_layers():
    network = ConvEncoder((1, 9, 6), [3], (2, 4), hidden=5)
    x = torch.randn(2, 1, 9, 6)
    convolution = network.convolutions[0]
    features = functional.conv2d(x, convolution.weight, convolution.bias, stride=2, padding=1)
    assert features.shape == (2, 3, 5, 3)
    assert torch.allclose(network(x), network.dense(features.relu().flatten(1)))


@pytest.mark.parametrize("shape", IMAGES)
def test_convolutional_decoder_restores_every_size(shape):
    network = ConvDecoder(3, [6, 5], (2, *shape))
    assert network(torch.randn(4, 3)).shape == (4, 2, *shape)


NETWORKS = [
    (MLP((1, 8, 8), [16], (2, 3), context=2), (1, 8, 8)),
    (ConvEncoder((1, 8, 8), [4, 5], (2, 3), context=2), (1, 8, 8)),
    (ConvDecoder(3, [5, 4], (1, 8, 8), context=2), (3,)),
]


@pytest.mark.parametrize(("network", "shape"), NETWORKS)
@pytest.mark.parametrize("lead", [(), (5,), (4, 5), (2, 1, 5)])
def test_leading_dimensions_are_a_loop(network, shape, lead):
    x, context = torch.randn(*lead, *shape), torch.randn(*lead, 2)
    flat = x.reshape(-1, *shape), context.reshape(-1, 2)
    one_by_one = torch.stack([network(row, c) for row, c in zip(*flat, strict=True)])
    together = network(x, context)
    assert torch.allclose(together.reshape(one_by_one.shape), one_by_one, atol=1e-6)
    assert together.shape[: len(lead)] == lead


@pytest.mark.parametrize(("network", "shape"), NETWORKS)
def test_context_is_broadcast_over_particles(network, shape):
    x, context = torch.randn(4, 5, *shape), torch.randn(5, 2)
    assert torch.equal(network(x, context), network(x, context.expand(4, 5, 2)))


@pytest.mark.parametrize(("network", "shape"), NETWORKS)
def test_wrong_shapes_are_named(network, shape):
    with pytest.raises(ValueError, match=r"takes inputs of shape .* and got"):
        network(torch.randn(5, 9), torch.randn(5, 2))
    with pytest.raises(ValueError, match="context=2 was given 0 context features"):
        network(torch.randn(5, *shape))


@pytest.mark.parametrize(("network", "shape"), [NETWORKS[0], NETWORKS[2]])
def test_output_bias_is_the_output_at_zero_weights(network, shape):
    value = torch.full(network.output, 0.25)
    network.set_bias(value)
    last = network.last if isinstance(network, MLP) else network.convolutions[-1]
    nn.init.zeros_(last.weight)
    assert torch.equal(
        network(torch.randn(3, *shape), torch.randn(3, 2)), value.expand(3, *value.shape)
    )


def test_a_convolution_of_vectors_is_refused():
    with pytest.raises(ValueError, match="use an MLP"):
        ConvEncoder((64,), [4], (2, 3))
