"""What an agent asks of the trainer, as data, so that the trainer has no special cases."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from ctrl_rl.errors import ConfigError, check_choice

GRAPHS = ("pathwise", "score")
BEHAVIOURS = ("policy", "prior")
ADDITIONS = ("lean_adjoint", "balance_gradients", "condition_rewards", "forward_process")

Part = TypeVar("Part")


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What an agent with networks of its own must know of the task.

    Attributes:
        shape: shape S of one latent.
        num_steps: K.
        controls: number of labels of each named control, without the null label.
    """

    shape: tuple[int, ...]
    num_steps: int
    controls: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class RolloutPlan:
    """What an agent asks of its rollouts, as data.

    Attributes:
        gradients: which graph the rollout keeps. "pathwise": actions are functions of the
            parameters, from the first step through the chain to the reward. "score": the latents
            are constants and only `loc` of every step is a function of the parameters, so that
            `action_log_prob`, `log_ratio` and `kl` can be differentiated step by step. None keeps
            no graph.
        checkpointing: recompute activations in the backward pass: memory falls from all of a
            network's activations per step to one latent per step, for one more forward pass.
        truncation: pathwise gradients flow through the last `truncation` steps only, the earlier
            ones are sampled without a graph; None for the whole chain, "uniform" for a length
            drawn uniformly from 1 .. K per rollout.
        epochs: passes over every rollout, not for "pathwise".
        minibatches: optimizer steps per pass, not for "pathwise". With "score" every one evaluates
            the policy anew on its part of the episodes, so that `loc` and all that follows from it
            are the present policy's.
        step_chunks: pieces along time that are differentiated one after the other before a single
            optimizer step, "score" only. Memory then holds one piece; the agent's loss must be a
            sum over steps.
        replay: how many past episodes are kept and drawn from, "score" only; 0 is on-policy.
        behaviour: who acts. With "prior", not for "pathwise", the episodes are the pretrained
            model's. With "score", `loc` and all that follows from it are the policy's at their
            latents; without gradients the policy is not evaluated at all. The reward and KL that a
            run logs are then of those episodes too.
        adds: names of what is computed once per rollout and added to it:
            "lean_adjoint": the reward's gradient carried back along the prior's chain
            (`ctrl_rl.adjoints`); needs a differentiable reward.
            "balance_gradients": `reward_gradient` and `log_ratio_gradient`, what detailed balance
            of gradients is made of; needs a differentiable reward.
            "condition_rewards": `condition_rewards`, what the clean sample would have been worth
            under every condition, not only its own (`ctrl_rl.condition_rewards`).
            "forward_process", for "score" only: `forward`, noisy copies of the rollout's clean
            sample (`ctrl_rl.forward_process`). The agent puts them in the place of the latents that
            led to the sample, and the policy is evaluated anew at what the batches hold.
        one_step_of: "pathwise" only: the rollout keeps no graph; one step, drawn uniformly from the
            last `one_step_of`, is taken once more with a graph and its clean estimate rewarded, see
            `ctrl_rl.branches`. None for no such branch.
        renoise: the same with the last step, from this many noisy copies of the rollout's clean
            sample; 0 for no such branch.
        anchor: add `anchor_kl`, the KL of one of the steps that `truncation`, `one_step_of` or
            `renoise` keeps out of sight, with a graph: without it a network that steps share
            carries its drift there free of charge.

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
    adds: tuple[str, ...] = ()
    one_step_of: int | None = None
    renoise: int = 0
    anchor: bool = False

    def __post_init__(self) -> None:
        """Refuse what is out of range or contradicts itself."""
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
        if self.one_step_of is not None and not self.one_step_of >= 1:
            raise ConfigError(f"agent.one_step_of={self.one_step_of} must be 1 or more")
        if not self.renoise >= 0:
            raise ConfigError(f"agent.renoise={self.renoise} must be 0 or more")
        if self.one_step_of is not None and self.renoise:
            raise ConfigError("a plan has one branch; use agent.one_step_of or agent.renoise")
        if self.branches and (self.gradients != "pathwise" or self.truncation is not None):
            raise ConfigError("a plan with a branch has pathwise gradients and no truncation")
        for name in self.adds:
            check_choice("addition to an agent's plan", name, ADDITIONS)
        if "forward_process" in self.adds and self.gradients != "score":
            raise ConfigError(
                "a plan with the forward process evaluates the policy on noisy copies, which loses "
                f"{self.gradients} gradients; use gradients='score'"
            )
        if self.anchor and not (self.branches or isinstance(self.truncation, int)):
            raise ConfigError("a plan with an anchor needs a fixed truncation or a branch")

    def steps_in_sight(self, num_steps: int) -> int:
        """How many of the last of K steps can get a gradient from the reward."""
        if self.branches:
            return min(self.one_step_of or 1, num_steps)
        return min(self.truncation, num_steps) if isinstance(self.truncation, int) else num_steps

    @property
    def branches(self) -> bool:
        """Whether a single step off the rollout has the graph instead of the rollout itself."""
        return self.one_step_of is not None or self.renoise > 0

    @property
    def cuts(self) -> bool:
        """Whether losses see a rollout in parts, or past ones, instead of as it was made."""
        several = self.epochs > 1 or self.minibatches > 1 or self.step_chunks > 1
        return several or self.replay > 0 or "forward_process" in self.adds

    @property
    def recomputes(self) -> bool:
        """Whether losses see the policy evaluated anew instead of the rollout's own graph."""
        return self.cuts and self.gradients is not None


def at_progress(starts: Mapping[float, Part], progress: float) -> Part:
    """What is in force.

    Args:
        starts: by the share of training at which each begins; one begins at 0.
        progress: share of training that is done, 0 .. 1.
    """
    return starts[max(start for start in starts if start <= progress)]
