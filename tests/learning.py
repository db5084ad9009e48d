"""Training in a few lines, for tests that need no run folder."""

from tensordict import TensorDict

from ctrl_rl import build
from ctrl_rl.agents.agent import Agent
from ctrl_rl.composition import compose
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.process import DenoisingProcess
from ctrl_rl.learner import Learner
from ctrl_rl.plans import RolloutPlan, at_progress
from ctrl_rl.policies import DenoisingPolicy
from ctrl_rl.replay import Replay
from ctrl_rl.rollouts import rollout


def first_batch(
    env: LatentEnv, policy: DenoisingPolicy, agent: Agent, plan: RolloutPlan | None = None
) -> TensorDict:
    """The first piece that the agent's loss would see in a run, of `agent.plan` unless told."""
    plan = plan or agent.plan
    episode = agent.prepare(rollout(env, policy, plan=plan))
    return next(next(Replay(plan, env.generator).batches(episode, policy)))


def learn(env: LatentEnv, learner: Learner, updates: int) -> DenoisingPolicy:
    """Updates as the trainer makes them."""
    policy, agent = learner.policy, learner.agent
    replays = {start: Replay(plan, env.generator) for start, plan in agent.plans.items()}
    for update in range(updates):
        replay = at_progress(replays, update / updates)
        episode = agent.prepare(rollout(env, policy, plan=replay.plan))
        for pieces in replay.batches(episode, policy):
            for piece in pieces:
                learner.backward(agent.loss(piece))
            learner.step(update)
    return learner.result


def trained(task: str, agent: str, *words: str) -> tuple[DenoisingPolicy, DenoisingProcess]:
    """Train with the task's own yaml, as `ctrl-rl train` would."""
    config = compose("train", [f"env={task}", f"agent={agent}", *words])
    process = build.build_process(config)
    settings = build.build_trainer_config(config)
    policy, built = build.build_policy(config, process), build.build_agent(config, process)
    env = LatentEnv(process, num_envs=settings.batch_size, seed=config.seed)
    return learn(env, Learner(policy, built, settings), settings.updates), process
