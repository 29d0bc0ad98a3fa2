"""The same models in pythae, by its own models, data set and trainer."""

import contextlib
import io
import logging
import tempfile

import torch
from pythae.data.datasets import BaseDataset
from pythae.models import IWAE, VAE, IWAEConfig, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig

from contenders.programs import SHAPE, OnTorch, images, pool, threads
from contenders.with_torch import encoder_and_decoder

__all__ = ["Pythae", "threads"]


class Encoder(BaseEncoder):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        mean, log_variance = self.network(x).chunk(2, -1)
        return ModelOutput(embedding=mean, log_covariance=log_variance)


class Decoder(BaseDecoder):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, z):
        probabilities = self.network(z).sigmoid()
        return ModelOutput(reconstruction=probabilities.reshape(-1, *SHAPE))


class Pythae(OnTorch):
    """A bare step is its model and its optimiser's step; an epoch is its trainer's `train_step`.

    Data are floats in its data set, binarised beforehand. Its trainer chooses the device: a GPU
    where there is one.
    """

    def __init__(self, size, directory, device):
        super().__init__(size, directory, device)
        logging.disable(logging.INFO)
        torch.manual_seed(0)
        split = images(size, directory).train
        x = (split.x > 127).float()
        self.pool = pool(split, size).to(device)
        nets = encoder_and_decoder(size)
        encoder, decoder = Encoder(nets[0]), Decoder(nets[1])
        options = {
            "input_dim": SHAPE, "latent_dim": size.latent, "reconstruction_loss": "bce"
        }  # fmt: skip
        if size.particles > 1:
            config = IWAEConfig(**options, number_samples=size.particles)
            model = IWAE(config, encoder, decoder)
        else:
            model = VAE(VAEConfig(**options), encoder, decoder)
        self.folder = tempfile.TemporaryDirectory()
        training = BaseTrainerConfig(
            output_dir=self.folder.name,
            per_device_train_batch_size=size.batch,
            learning_rate=1e-3,
            no_cuda=device == "cpu",
        )
        dataset = BaseDataset(x, torch.zeros(len(x)))
        self.trainer = BaseTrainer(model, dataset, training_config=training)
        self.trainer.prepare_training()

    def step(self, x):
        output = self.trainer.model({"data": x})
        self.trainer._optimizers_step(output)
        return len(x) * output.loss.detach()

    def one_pass(self):
        with contextlib.redirect_stderr(io.StringIO()):  # its bars, which are drawn all the same
            self.trainer.train_step(1)
