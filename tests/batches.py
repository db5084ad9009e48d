"""Training in a few lines, for tests that need no run folder."""

from functools import partial
from typing import cast

from tensordict import TensorDict

from ctrl_rl.agents.agent import Chain, Phase
from ctrl_rl.agents.plan import in_force
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import RolledChain, rollout
from ctrl_rl.learning.learner import Learner
from ctrl_rl.learning.replay import Replay
from ctrl_rl.learning.update import update
from ctrl_rl.policies import DenoisingPolicy
from ctrl_rl.runs import build
from ctrl_rl.runs.compose import compose

# For agents that ask nothing of the chain in `prepare`.
NO_CHAIN = cast(Chain, None)


def prepared(env: LatentEnv, policy: DenoisingPolicy, phase: Phase) -> TensorDict:
    """A rollout under the phase's plan with what its `prepare` adds."""
    return phase.prepare(rollout(env, policy, plan=phase.plan), RolledChain(env, policy))


def first_batch(env: LatentEnv, policy: DenoisingPolicy, phase: Phase) -> TensorDict:
    """The first piece that the phase's loss would see in a run."""
    episode = prepared(env, policy, phase)
    return next(next(Replay(phase.plan, env.generator).batches(episode, policy)))


def learn(env: LatentEnv, learner: Learner, updates: int) -> DenoisingPolicy:
    """Updates as the trainer makes them."""
    phases = learner.agent.phases
    replays = {start: Replay(phase.plan, env.generator) for start, phase in phases.items()}
    for done in range(updates):
        progress = done / updates
        phase, replay = in_force(phases, progress), in_force(replays, progress)
        update(env, learner, phase, replay, step=partial(learner.step, done))
    return learner.result


def trained(task: str, agent: str, *words: str) -> tuple[DenoisingPolicy, DenoisingProcess]:
    """Train with the task's own yaml, as `ctrl-rl train` would."""
    config = compose("train", [f"env={task}", f"agent={agent}", *words])
    process = build.build_process(config)
    settings = build.build_trainer_config(config)
    policy, built = build.build_policy(config, process), build.build_agent(config, process)
    env = LatentEnv(process, num_envs=settings.batch_size, seed=config.seed)
    return learn(env, Learner(policy, built, settings), settings.updates), process
