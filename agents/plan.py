"""What an agent asks of the trainer, as data: the trainer has no special cases."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from ctrl_rl.controls import Control
from ctrl_rl.errors import ConfigError, check_choice

GRAPHS = ("pathwise", "score")
BEHAVIOURS = ("policy", "prior")

Part = TypeVar("Part")


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What an agent with its own networks must know about the task.

    Attributes:
        shape: shape S of one latent.
        num_steps: K.
        controls: what can be asked for, by name, prompts included.
    """

    shape: tuple[int, ...]
    num_steps: int
    controls: Mapping[str, Control]


@dataclass(frozen=True, kw_only=True)
class RolloutPlan:
    """What an agent asks of its rollouts, as data.

    Attributes:
        gradients: which graph the rollout keeps. "pathwise": actions are functions of the
            parameters, from the first step through the chain to the reward. "score": the latents
            are constants and only `loc` of every step is a function of the parameters;
            `action_log_prob`, `log_ratio` and `kl` can be differentiated step by step. None keeps
            no graph.
        checkpointing: recompute activations in the backward pass: memory falls from all of a
            network's activations per step to one latent per step, for one extra forward pass.
        truncation: pathwise gradients flow through the last `truncation` steps only, the earlier
            ones are sampled without a graph; None for the whole chain, "uniform" for a length
            drawn uniformly from 1 .. K per rollout.
        epochs: passes over every rollout, not for "pathwise".
        minibatches: optimizer steps per pass, not for "pathwise". With "score" each one reevaluates
            the policy on its part of the episodes: `loc` and everything derived from it are the
            present policy's.
        step_chunks: pieces along time that are differentiated one after the other before a single
            optimizer step, "score" only. Memory then holds one piece; the agent's loss must be a
            sum over steps.
        replay: how many past episodes are kept and drawn from, "score" only; 0 is on-policy.
        behaviour: who acts. With "prior", not for "pathwise", the episodes are the pretrained
            model's. With "score", `loc` and everything derived from it are the policy's at their
            latents; without gradients the policy is not evaluated at all. The reward and KL that a
            run logs are then those of these episodes too.
        reevaluate: "score" only: reevaluate the policy on the result of `prepare` even where the
            rollout is not cut, because its latents are not those the policy went through.

    Raises:
        ConfigError: a value out of range, or one that does not go with `gradients`.
    """

    gradients: Literal["pathwise", "score"] | None
    checkpointing: bool = False
    truncation: int | str | None = None
    epochs: int = 1
    minibatches: int = 1
    step_chunks: int = 1
    replay: int = 0
    behaviour: Literal["policy", "prior"] = "policy"
    reevaluate: bool = False

    def __post_init__(self) -> None:
        """Refuse values that are out of range or contradict each other."""
        if self.gradients is not None:
            check_choice("gradients of an agent's plan", self.gradients, GRAPHS)
        whole = isinstance(self.truncation, int) and self.truncation >= 1
        if not (self.truncation is None or self.truncation == "uniform" or whole):
            raise ConfigError(
                f"agent.truncation={self.truncation!r} is not a number of steps; "
                "use null for the whole chain, 1 or more, or uniform"
            )
        for name, least in {"epochs": 1, "minibatches": 1, "step_chunks": 1, "replay": 0}.items():
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= least):
                raise ConfigError(f"agent.{name}={value!r} must be a whole number from {least}")
            without = () if name in ("step_chunks", "replay") else (None,)
            if value > least and self.gradients not in ("score", *without):
                raise ConfigError(
                    f"agent.{name}={value} evaluates the policy on stored latents, which loses "
                    f"{self.gradients} gradients; use {least}"
                )
        check_choice("behaviour of an agent's plan", self.behaviour, BEHAVIOURS)
        if self.behaviour == "prior" and self.gradients == "pathwise":
            raise ConfigError(
                "a plan whose episodes are the prior's has no pathwise gradients of the policy; "
                "use gradients='score' or null, or behaviour='policy'"
            )
        if self.reevaluate and self.gradients != "score":
            raise ConfigError(
                "a plan that evaluates the policy anew on other latents loses "
                f"{self.gradients} gradients; use gradients='score'"
            )

    @property
    def makes_batches(self) -> bool:
        """Whether losses see parts of a rollout, or past ones, instead of the whole rollout."""
        several = self.epochs > 1 or self.minibatches > 1 or self.step_chunks > 1
        return several or self.replay > 0 or self.reevaluate

    @property
    def reevaluates_policy(self) -> bool:
        """Whether losses see the policy reevaluated instead of the rollout's own graph."""
        return self.makes_batches and self.gradients is not None


def in_force(starts: Mapping[float, Part], progress: float) -> Part:
    """The part in force.

    Args:
        starts: parts by the share of training at which each begins; one begins at 0.
        progress: share of training that is done, 0 .. 1.
    """
    return starts[max(start for start in starts if start <= progress)]
