"""The training step in torch, as the reference for tests and benchmarks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import snac
import torch
from flax import nnx
from torch import nn
from torch.nn import functional

import snax
from snax.evaluate.spectra import MEL_SCALES, STFT_WINDOWS, mel_filters
from snax.train.config import TrainConfig
from snax.train.discriminators import BANDS, Discriminators, PeriodDiscriminator, SpectrumDiscriminator
from snax.weights.torch_weights import to_torch

Outputs = list[list[torch.Tensor]]


def reference(model: snax.SNAC) -> snac.SNAC:
    """Convert a model to the reference implementation, with weight norm."""
    torch_model = snac.SNAC(**model.config.to_dict())
    torch_model.load_state_dict({name: torch.tensor(array) for name, array in to_torch(model).items()})
    return torch_model


def magnitude(x: torch.Tensor, window_length: int) -> torch.Tensor:
    window = torch.hann_window(window_length)
    return torch.stft(x[:, 0], window_length, window_length // 4, window=window, return_complex=True).abs()


def log(x: torch.Tensor, power: int) -> torch.Tensor:
    return x.clamp(1e-5).pow(power).log10()


def mel_loss(x: torch.Tensor, y: torch.Tensor, rate: int) -> torch.Tensor:
    loss = torch.zeros(())
    for window_length, bands in MEL_SCALES:
        filters = torch.tensor(mel_filters(rate, window_length, bands)).T
        x_mel, y_mel = (filters @ magnitude(audio, window_length) for audio in (x, y))
        loss = loss + functional.l1_loss(log(x_mel, 1), log(y_mel, 1))
    return loss


def stft_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = torch.zeros(())
    for window_length in STFT_WINDOWS:
        x_magnitude, y_magnitude = (magnitude(audio, window_length) for audio in (x, y))
        loss = loss + functional.l1_loss(log(x_magnitude, 2), log(y_magnitude, 2))
        loss = loss + functional.l1_loss(x_magnitude, y_magnitude)
    return loss


def spectral_convergence_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = torch.zeros(())
    for window_length in STFT_WINDOWS:
        x_magnitude, y_magnitude = (magnitude(audio, window_length) for audio in (x, y))
        distance = torch.linalg.matrix_norm(x_magnitude - y_magnitude)
        loss = loss + (distance / torch.linalg.matrix_norm(y_magnitude).clamp(1)).mean()
    return loss


def quantize(quantizer: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return quantized latents, and the commitment and codebook losses of an earlier version of the reference."""
    residual, quantized = latents, torch.zeros_like(latents)
    commitment = codebook = torch.zeros(())
    for level in quantizer.quantizers:
        z_q, codes = level(residual)
        vectors = level.in_proj(functional.avg_pool1d(residual, level.stride, level.stride))
        rows = level.decode_code(codes)
        commitment = commitment + functional.mse_loss(vectors, rows.detach())
        codebook = codebook + functional.mse_loss(rows, vectors.detach())
        quantized, residual = quantized + z_q, residual - z_q
    return quantized, commitment, codebook


def to_conv2d(layer: nnx.Module, stride: tuple[int, int]) -> nn.Conv2d:
    """Convert a convolution to torch."""
    height, width, in_channels, out_channels = layer.kernel.shape
    conv = nn.Conv2d(in_channels, out_channels, (height, width), stride, (height // 2, width // 2))
    conv.weight.data = torch.tensor(np.asarray(layer.kernel[...]).transpose(3, 2, 0, 1))
    conv.bias.data = torch.tensor(np.asarray(layer.bias[...]))
    return conv


def apply_layers(layers: Sequence[nn.Conv2d], x: torch.Tensor) -> list[torch.Tensor]:
    outputs = []
    for layer in layers:
        x = functional.leaky_relu(layer(x), 0.1)
        outputs.append(x)
    return outputs


class TorchPeriodDiscriminator(nn.Module):
    def __init__(self, model: PeriodDiscriminator):
        super().__init__()
        self.period = model.period
        strides = [(3, 1)] * (len(model.layers) - 1) + [(1, 1)]
        self.layers = nn.ModuleList(
            to_conv2d(layer, stride) for layer, stride in zip(model.layers, strides, strict=True)
        )
        self.conv_post = to_conv2d(model.conv_post, (1, 1))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = functional.pad(x[:, None], (0, self.period - x.shape[1] % self.period), mode="reflect")
        outputs = apply_layers(self.layers, x.unflatten(2, (-1, self.period)))
        return [*outputs, self.conv_post(outputs[-1])]


class TorchSpectrumDiscriminator(nn.Module):
    def __init__(self, model: SpectrumDiscriminator):
        super().__init__()
        self.window_length = model.window_length
        strides = [(1, 1), (1, 2), (1, 2), (1, 2), (1, 1)]
        self.bands = nn.ModuleList(
            nn.ModuleList(to_conv2d(layer, stride) for layer, stride in zip(layers, strides, strict=True))
            for layers in model.bands
        )
        self.conv_post = to_conv2d(model.conv_post, (1, 1))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        hop = self.window_length // 4
        pad = (self.window_length - hop) // 2
        x = functional.pad(x[:, None], (pad, pad + -x.shape[1] % hop), mode="reflect")[:, 0]
        window = torch.hann_window(self.window_length)
        spectrum = torch.stft(x, self.window_length, hop, window=window, return_complex=True)[..., 2:-2]
        parts = torch.view_as_real(spectrum).permute(0, 3, 2, 1)
        bins = self.window_length // 2 + 1
        by_band = [
            apply_layers(layers, parts[..., int(low * bins) : int(high * bins)])
            for (low, high), layers in zip(BANDS, self.bands, strict=True)
        ]
        logits = self.conv_post(torch.cat([outputs[-1] for outputs in by_band], dim=-1))
        return [*(output for outputs in by_band for output in outputs), logits]


class TorchDiscriminators(nn.Module):
    def __init__(self, model: Discriminators):
        super().__init__()
        classes = {
            PeriodDiscriminator: TorchPeriodDiscriminator,
            SpectrumDiscriminator: TorchSpectrumDiscriminator,
        }
        self.all = nn.ModuleList(classes[type(discriminator)](discriminator) for discriminator in model.all)

    def forward(self, x: torch.Tensor) -> Outputs:
        x = x[:, 0] - x[:, 0].mean(dim=1, keepdim=True)
        x = 0.8 * x / (x.abs().max(dim=1, keepdim=True)[0] + 1e-9)
        return [discriminator(x) for discriminator in self.all]


def discriminator_loss(fake: Outputs, real: Outputs) -> torch.Tensor:
    return sum(f[-1].square().mean() + (1 - r[-1]).square().mean() for f, r in zip(fake, real, strict=True))


def adversarial_loss(fake: Outputs) -> torch.Tensor:
    return sum((1 - f[-1]).square().mean() for f in fake)


def feature_matching_loss(fake: Outputs, real: Outputs) -> torch.Tensor:
    pairs = [pair for f, r in zip(fake, real, strict=True) for pair in zip(f[:-1], r[:-1], strict=True)]
    return sum(functional.l1_loss(a, b.detach()) for a, b in pairs)


class Trainer:
    """The training step of `snax.train.step`, without noise and without restarts of dead codes."""

    def __init__(self, model: snax.SNAC, discriminators: Discriminators | None, config: TrainConfig):
        self.model, self.config = reference(model), config
        self.rate = model.config.sampling_rate
        self.discriminators = None if discriminators is None else TorchDiscriminators(discriminators)
        self.optimizer, self.schedule = self._optimizer(self.model)
        if self.discriminators is not None:
            self.discriminator_optimizer, self.discriminator_schedule = self._optimizer(self.discriminators)

    def step(self, audio: torch.Tensor) -> dict[str, float]:
        weights, config = self.config.losses, self.config.optimizer
        latents = self.model.encoder(audio)
        quantized, commitment, codebook = quantize(self.model.quantizer, latents)
        decoded = self.model.decoder(quantized)
        terms = {"commitment": commitment, "codebook": codebook, "mel": mel_loss(decoded, audio, self.rate)}
        if weights.stft:
            terms["stft"] = stft_loss(decoded, audio)
        if weights.spectral_convergence:
            terms["spectral_convergence"] = spectral_convergence_loss(decoded, audio)
        if weights.waveform:
            terms["waveform"] = functional.l1_loss(decoded, audio)
        if self.discriminators is not None:
            loss = discriminator_loss(self.discriminators(decoded.detach()), self.discriminators(audio))
            self.discriminator_optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.discriminators.parameters(), config.max_grad_norm_discriminators)
            self.discriminator_optimizer.step()
            self.discriminator_schedule.step()
            fake, real = self.discriminators(decoded), self.discriminators(audio)
            terms |= {"adversarial": adversarial_loss(fake), "feature_matching": feature_matching_loss(fake, real)}
        total = sum(getattr(weights, name) * term for name, term in terms.items())
        self.optimizer.zero_grad()
        total.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        metrics = {name: term.item() for name, term in terms.items()} | {"loss": total.item(), "grad_norm": norm.item()}
        return metrics if self.discriminators is None else metrics | {"loss_d": loss.item()}

    def _optimizer(self, module: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
        config = self.config.optimizer
        optimizer = torch.optim.AdamW(
            module.parameters(), config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, config.lr_decay)
