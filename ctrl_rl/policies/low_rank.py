"""Low-rank adapters on the prior's own network: no second copy, for networks of any size."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ctrl_rl.controls import Control
from ctrl_rl.errors import ConfigError, check_sizes
from ctrl_rl.kernels import TransitionKernel
from ctrl_rl.policies.embedded import EmbeddedPolicy
from ctrl_rl.priors import Denoiser, Prior

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # what diffusers calls the four projections


class LowRankPolicy(EmbeddedPolicy):
    """The prior's network with adapters switched on, and a zero-initialised embedding of y.

    Every adapted layer computes W x + (alpha / rank) B A x with B = 0 at the start (Hu et al.,
    "LoRA", ICLR 2022, arXiv 2106.09685), using peft. The reference is the same network with the
    adapters off. They are off whenever this policy does not run, so other callers of the prior see
    nothing of them. At initialisation both outputs are equal bit for bit. Several policies can
    share one prior.

    Args:
        prior: the pretrained model; its denoiser must accept an embedding.
        kernel: the transition kernel.
        controls: the task's controls by name.
        rank: of every adapter.
        alpha: adapters are multiplied by alpha / rank; None for alpha = rank.
        targets: endings of the names of layers to adapt, linear or convolutional.

    Raises:
        ConfigError: peft is not installed, no layer of that name, a size below 1, or no input for
            an embedding.
    """

    denoiser: "AdaptedDenoiser"

    def __init__(
        self,
        *,
        prior: Prior,
        kernel: TransitionKernel,
        controls: Mapping[str, Control],
        rank: int = 4,
        alpha: int | None = None,
        targets: Sequence[str] = ATTENTION,
    ) -> None:
        check_sizes("policy", rank=rank)
        super().__init__(
            prior=prior,
            kernel=kernel,
            controls=controls,
            make_denoiser=partial(
                AdaptedDenoiser, rank=rank, alpha=rank if alpha is None else alpha, targets=targets
            ),
        )


class SwitchedDenoiser(Denoiser):
    """A denoiser whose low-rank adapters are on only while it runs; the network is the prior's.

    Args:
        denoiser: the prior's.
        name: of the adapters, which are in its network.
        layers: peft's layers that have them.
    """

    def __init__(self, denoiser: Denoiser, name: str, layers: Iterable[Any]) -> None:
        super().__init__()
        self.execution = denoiser.execution
        self._denoiser = [denoiser]  # in a list: the prior is no part of this module
        self.name, self._layers = name, list(layers)
        self._switch(on=False)

    def denoise(
        self, x: Tensor, timestep: Tensor, embedding: Tensor | None, prompt: Tensor | None
    ) -> Tensor:
        """Run the prior's network with the adapters on."""
        self._switch(on=True)
        try:
            return self._denoiser[0].denoise(x, timestep, embedding, prompt)
        finally:
            self._switch(on=False)

    def _switch(self, *, on: bool) -> None:
        """Turn on these adapters and no others, or turn all off.

        It sets peft's fields: peft's methods would also freeze the adapters, and those of other
        policies.
        """
        for layer in self._layers:
            layer._active_adapter, layer._disable_adapters = [self.name], not on


class AdaptedDenoiser(SwitchedDenoiser):
    """A denoiser with low-rank adapters that are on only while it runs.

    Its parameters and its state are those of the adapters, in float32; the network stays the
    prior's.

    Args:
        denoiser: the prior's; adapters are put into its network.
        rank: of every adapter.
        alpha: adapters are multiplied by alpha / rank.
        targets: endings of the names of layers to adapt.

    Raises:
        ConfigError: peft is not installed, or no layer of that name.
    """

    def __init__(
        self, denoiser: Denoiser, *, rank: int, alpha: int, targets: Sequence[str]
    ) -> None:
        before = {p for p in denoiser.parameters() if p.requires_grad}
        name, layers = _inject(denoiser, rank=rank, alpha=alpha, targets=targets)
        for parameter in before:  # peft has frozen the adapters of other policies
            parameter.requires_grad_(True)
        super().__init__(denoiser, name, layers.values())
        self._settings: dict[str, Any] = {"rank": rank, "alpha": alpha, "targets": tuple(targets)}
        self.adapters = nn.ModuleDict(
            {
                path.replace(".", "/"): nn.ModuleDict(
                    {"down": layer.lora_A[self.name], "up": layer.lora_B[self.name]}
                )
                for path, layer in layers.items()
            }
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "AdaptedDenoiser":
        """New adapters with the same values on the same network: a moving average needs no more."""
        copy = AdaptedDenoiser(self._denoiser[0], **self._settings)
        copy.load_state_dict(self.state_dict())
        memo[id(self)] = copy
        return copy

    def adapter_weights(self) -> dict[str, Tensor]:
        """The adapters by peft's names, with alpha / rank multiplied into B."""
        weights: dict[str, Tensor] = {}
        for path, layer in zip(self.adapters, self._layers, strict=True):
            name, down, up = path.replace("/", "."), layer.lora_A, layer.lora_B
            weights[f"{name}.lora_A.weight"] = down[self.name].weight.detach().clone()
            weights[f"{name}.lora_B.weight"] = (
                up[self.name].weight.detach() * layer.scaling[self.name]
            )
        return weights


def adapted_layers(network: nn.Module, name: str | None = None) -> dict[str, Any]:
    """Layers with adapters by path: all of a network, or those with the adapters of a name."""
    from peft.tuners.lora import LoraLayer

    layers = {k: m for k, m in network.named_modules() if isinstance(m, LoraLayer)}
    return {k: m for k, m in layers.items() if name is None or name in m.lora_A}


def new_name(network: nn.Module, user: str) -> str:
    """A name that no adapters of a network have.

    Raises:
        ConfigError: peft, which `user` needs, is not installed.
    """
    try:
        layers = adapted_layers(network)
    except ImportError as error:
        raise ConfigError(
            f'{user} needs a package that is not here: pip install "ctrl-rl[pipelines]"'
        ) from error
    return f"policy{len({name for layer in layers.values() for name in layer.lora_A})}"


def _inject(
    denoiser: Denoiser, *, rank: int, alpha: int, targets: Sequence[str]
) -> tuple[str, dict[str, Any]]:
    """Put adapters into a network; returns their name, and the layers by path."""
    name = new_name(denoiser, "policy=low_rank")
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # another policy's
            inject_adapter_in_model(config, denoiser, adapter_name=name)
    except ValueError as error:
        kinds = (nn.Linear, nn.Conv2d)
        ends = {k.rsplit(".", 1)[-1] for k, m in denoiser.named_modules() if isinstance(m, kinds)}
        raise ConfigError(
            f"policy.targets={list(targets)}: the prior's network has no such layer; its linear "
            f"and convolutional layers end in {', '.join(sorted(ends)) or '(there are none)'}"
        ) from error
    layers = adapted_layers(denoiser, name)
    for layer in layers.values():  # peft casts to the network's type, in which AdamW's steps vanish
        layer.lora_A[name].float()
        layer.lora_B[name].float()
    return name, layers
