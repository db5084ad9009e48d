"""The pretrained diffusion model as the rest of the project sees it.

One convention: a denoiser maps a noisy latent to its estimate of the clean one,
``denoised = denoiser(x, timestep, embedding)``. Its network may predict noise, velocity or the
sample itself; the conversion happens here, once, and nothing downstream branches on it.

Any network becomes a prior in three lines::

    class MyNetwork(nn.Module):
        def forward(self, x, timestep, embedding):  # embedding: [B, E] or None
            return self.net(x, timestep)            # what the scheduler's prediction_type says

    prior = Prior(NetworkDenoiser(MyNetwork(), scheduler_config), scheduler_config, shape=(1, 8, 8))
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ctrl_rl.gaussian import expand_to
from ctrl_rl.kernels.accepted import FLOW
from ctrl_rl.kernels.levels import noise_levels
from ctrl_rl.kernels.settings import scheduler_settings
from ctrl_rl.networks.execution import Execution, FixedPrecision, in_parts


class Denoiser(FixedPrecision, ABC):
    """Noisy latent in, estimate of the clean latent out.

    Attributes:
        embedding_features: E, width of the control embedding that it accepts; 0 for none.
        execution: how the network runs.
        calls: evaluations so far, counted in samples.
    """

    embedding_features: int = 0

    def __init__(self) -> None:
        super().__init__()
        self.execution = Execution()
        self.calls = 0

    @abstractmethod
    def denoise(
        self, x: Tensor, timestep: Tensor, embedding: Tensor | None, prompt: Tensor | None
    ) -> Tensor:
        """Estimate the clean latent; shapes as in `forward`."""

    def compile_network(self, backend: str) -> bool:
        """Compile the network with `torch.compile`; returns whether this denoiser owns one.

        Args:
            backend: of `torch.compile`.
        """
        del backend
        return False

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        embedding: Tensor | None = None,
        prompt: Tensor | None = None,
    ) -> Tensor:
        """Estimate the clean latent.

        Args:
            x: [B, *S] noisy latent.
            timestep: [B] training timestep, int64, or float32 if between two.
            embedding: [B, E] control embedding, or None for the unchanged pretrained model.
            prompt: [B] int64 indices of the prior's prompts, or None for a prior without prompts.

        Returns:
            [B, *S] float32.
        """
        self.calls += len(x)
        given = (x, timestep, embedding, prompt)
        how = self.execution
        return in_parts(self.denoise, *given, rows=how.microbatch, recompute=how.checkpointing)


class NetworkDenoiser(Denoiser):
    """A network with a diffusers prediction type as a denoiser.

    Args:
        network: called as ``network(x, timestep, embedding)``, with a fourth argument ``prompt``
            if the prior has prompts; returns [B, *S].
        scheduler_config: a diffusers scheduler's config: betas and `prediction_type`
            (`epsilon`; `v_prediction`, Salimans and Ho 2022, app. D; `sample`; or
            `flow_prediction`, noise less clean latent).
        embedding_features: width of the control embedding that the network accepts; 0 for none.

    Raises:
        ConfigError: a scheduler that is not read, see `ctrl_rl.kernels.settings`.
    """

    def __init__(
        self,
        network: nn.Module,
        scheduler_config: Mapping[str, Any],
        *,
        embedding_features: int = 0,
    ) -> None:
        super().__init__()
        self.network = network
        self.embedding_features = embedding_features
        settings = scheduler_settings(scheduler_config)
        self.prediction_type = settings.get("prediction_type", "epsilon")
        self.levels = noise_levels(settings)
        self.compiled = False
        # Inputs in another memory order are multiplied differently by trained weights than by
        # frozen ones, and on some processors rounded differently: a policy's copy would not equal
        # the prior bit for bit.
        for module in network.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(_contiguous)

    def compile_network(self, backend: str) -> bool:
        """Compile the network; its weights and their names stay the same."""
        # Whole, or an error: torch would run uncompiled what it cannot compile, and what has more
        # variants than its limit of eight. There are more: without and with adapters, every agent's
        # and average's own, with gradients or not, for one sample or more.
        self.network.compile(
            backend=backend, fullgraph=True, recompile_limit=64, isolate_recompiles=True
        )
        self.compiled = True
        return True

    def denoise(
        self, x: Tensor, timestep: Tensor, embedding: Tensor | None, prompt: Tensor | None
    ) -> Tensor:
        """Run the network and convert its prediction to the clean latent, in float32."""
        weights = next(self.network.parameters(), x)
        given: list[Tensor | None] = [x.to(weights.dtype), timestep, embedding]
        if prompt is not None:  # networks without prompts need not know of them
            given.append(prompt)
        if self.compiled:
            given = [None if each is None else _of_any_batch(each) for each in given]
        output = self.network(*given)
        prediction = output.float()
        if self.prediction_type == "sample":
            return prediction
        signal, noise = (expand_to(level, x) for level in self.levels(timestep))
        if self.prediction_type == FLOW:
            return x.float() - noise * prediction
        if self.prediction_type == "v_prediction":
            return signal * x.float() - noise * prediction
        return (x.float() - noise * prediction) / signal


def _contiguous(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    del module
    return tuple(tensor.contiguous() for tensor in given)


def _of_any_batch(tensor: Tensor) -> Tensor:
    """A tensor whose first size and strides need no separate graph in `torch.compile`."""
    tensor = tensor.clone(memory_format=torch.contiguous_format)  # expanded ones have stride 0
    torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return tensor


@dataclass(frozen=True)
class Prompts:
    """The prior's prompts: what it was trained to draw.

    Attributes:
        training: drawn for the episodes of training, all equally often.
        evaluation: used in evaluations.
    """

    training: tuple[str, ...]
    evaluation: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        """Every prompt once, in the order of their indices; the index after the last is none."""
        return tuple(dict.fromkeys((*self.training, *self.evaluation)))


class Prior(nn.Module):
    """The frozen pretrained model: denoiser, scheduler config, latent shape and decoder.

    Args:
        denoiser: frozen on construction (no gradient to its weights, evaluation mode).
        scheduler_config: config of the diffusers scheduler that it was trained with.
        shape: shape of one latent, without the batch.
        decoder: latent to sample, differentiable; None if latents are samples.
        prompts: the prior's prompts c; None if it has none.

    Attributes:
        execution: how its networks run, and all that share them.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler_config: Mapping[str, Any],
        *,
        shape: tuple[int, ...],
        decoder: nn.Module | None = None,
        prompts: Prompts | None = None,
    ) -> None:
        super().__init__()
        self.denoiser, self.execution = denoiser, denoiser.execution
        self.prompts = prompts
        self.scheduler_config = dict(scheduler_config)
        self.shape = tuple(shape)
        self.decoder = nn.Identity() if decoder is None else decoder
        # Weights mapped from a safetensors file lie at odd addresses, where MKL rounds matrix
        # products differently: a policy's copy would not equal the prior bit for bit.
        for weight in self.parameters():
            weight.data = weight.data.clone()
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Prior":
        """Stay in evaluation mode: dropout in the reference would make the initial KL non-zero."""
        return super().train(False)

    def decode(self, latent: Tensor) -> Tensor:
        """Latent [B, *S] to sample [B, *D]; recomputes activations if the denoiser does."""
        how = self.execution
        saving = how.checkpointing or how.microbatch is not None
        # One by one: the backward pass then holds the activations of a single sample.
        rows = 1 if saving and torch.is_grad_enabled() else how.microbatch
        return in_parts(self.decoder, latent, rows=rows, recompute=saving)
