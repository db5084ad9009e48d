"""Large networks get a batch in parts: the same numbers, and memory for one part."""

import re

import pytest
import torch
from batches import prepared
from pipelines import MAKERS
from running import contents, interrupt

from ctrl_rl import keys, load_run
from ctrl_rl.cli.main import main
from ctrl_rl.envs.rollout import rollout
from ctrl_rl.errors import ConfigError
from ctrl_rl.learning.learner import Learner
from ctrl_rl.learning.replay import Replay
from ctrl_rl.learning.update import fit_microbatch
from ctrl_rl.networks.execution import in_parts
from ctrl_rl.runs import build
from ctrl_rl.runs.compose import compose

pytest.importorskip("transformers")
B, K = 6, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return MAKERS["sd"](tmp_path_factory.mktemp("pipelines") / "sd")


def words(folder, agent):
    reward = {
        "ctrl": ["reward=clip", "reward.classifiers.text.texts=[a,b]"],
        "ppo": ["reward=jpeg", "reward.classifiers.size.edges=[-0.856]"],
    }
    reward["pcl"] = reward["ppo"]
    common = ["env=digits", "prior=diffusers", f"prior.path={folder}", "prior.prompts=[cat,dog]"]
    common += ["kernel=ddim", f"kernel.num_steps={K}", "policy=low_rank", f"agent={agent}"]
    common += ["trainer.batch_size=6", "~evaluation.heldout.digit", "trainer.updates=2"]
    common += ["evaluation.prior_samples=4", "evaluation.policy_samples=3"]
    return [*common, "evaluation.exact_samples=0", *reward[agent]]


def parts(folder, agent, made):
    extra = [f"reward.classifiers.text.path={made('clip')}"] if agent == "ctrl" else []
    config = compose("train", [*words(folder, agent), *extra])
    process = build.build_process(config)
    built = build.build_agent(config, process)
    learner = Learner(
        build.build_policy(config, process), built, build.build_trainer_config(config)
    )
    return build.build_env(config, process), learner


def gradients(env, learner):
    """The gradients of the first optimizer step of an update."""
    env.set_seed(0)
    agent = learner.agent
    episode = prepared(env, learner.policy, agent)
    for piece in next(iter(Replay(agent.plan, env.generator).batches(episode, learner.policy))):
        learner.backward(agent.loss(piece))
    groups = learner.policy.parameter_groups().values()
    found = [p.grad.clone() for group in groups for p in group]
    learner.optimizer.zero_grad(set_to_none=True)
    return episode, found


def test_a_function_in_parts_is_the_function():
    x = torch.randn(7, 3, requires_grad=True)
    y = torch.randn(7)
    sizes = []

    def function(x, nothing, y):
        sizes.append(len(x))
        assert nothing is None
        return (x * y[:, None]).exp()

    (whole,) = torch.autograd.grad(function(x, None, y).sum(), x)
    sizes.clear()
    result = in_parts(function, x, None, y, rows=3, recompute=False)
    assert sizes == [3, 3, 1] and torch.equal(result, function(x, None, y))
    (found,) = torch.autograd.grad(result.sum(), x)
    assert torch.equal(found, whole)
    assert sorted(sizes) == sorted([3, 3, 1, 7, 3, 3, 1]), "recomputed in the backward pass"


@pytest.mark.parametrize("agent", ["ctrl", "ppo"])
@pytest.mark.parametrize("rows", [1, 4])
def test_an_update_in_parts_is_the_update(agent, rows, folder, made):
    env, learner = parts(folder, agent, made)
    for parameter in learner.policy.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    episode, whole = gradients(env, learner)
    process = env.process
    seen = {"network": [], "decoder": [], "reward": []}
    process.prior.denoiser.network.unet.register_forward_hook(
        lambda *call: seen["network"].append(len(call[2][0]))
    )
    process.prior.decoder.register_forward_hook(lambda *call: seen["decoder"].append(len(call[2])))
    process.reward_model.register_forward_hook(lambda *call: seen["reward"].append(len(call[2])))
    env.process.execution.microbatch = rows
    again, found = gradients(env, learner)
    assert max(seen["network"]) == 2 * rows, "both halves of guidance"
    assert max(seen["reward"]) == rows and max(seen["decoder"]) == (1 if agent == "ctrl" else rows)
    torch.testing.assert_close(again[keys.LOC], episode[keys.LOC], rtol=1e-4, atol=1e-5)
    apart = torch.cat([(one - two).flatten() for one, two in zip(found, whole, strict=True)])
    assert apart.norm() < 1e-3 * torch.cat([each.flatten() for each in whole]).norm()


def test_policy_and_prior_are_cut_alike(folder, made):
    env, learner = parts(folder, "ppo", made)
    env.process.execution.microbatch = 4
    with torch.no_grad():
        assert (rollout(env, learner.policy)[keys.LOG_RATIO] == 0).all()


@pytest.mark.parametrize(("most", "expected"), [(12, None), (7, 3), (2, 1)])
@pytest.mark.parametrize("agent", ["ctrl", "ppo", "pcl"])
def test_the_microbatch_that_fits_is_found(agent, most, expected, folder, made):
    env, learner = parts(folder, agent, made)
    unet = env.process.prior.denoiser.network.unet

    def full(module, given, named):
        if len(given[0]) > most:
            raise torch.OutOfMemoryError("simulated")

    unet.register_forward_pre_hook(full, with_kwargs=True)
    before = env.generator.get_state()
    state = {name: value.clone() for name, value in learner.agent.state_dict().items()}
    assert fit_microbatch(env, learner) == expected
    assert all(torch.equal(learner.agent.state_dict()[n], value) for n, value in state.items())
    assert torch.equal(env.generator.get_state(), before)
    assert env.process.prior_calls == env.process.reward_calls == learner.policy.calls == 0
    assert all(parameter.grad is None for parameter in learner.policy.parameters())
    assert not learner.optimizer.state
    assert env.process.execution.microbatch == expected


def test_what_never_fits_is_refused(folder, made):
    env, learner = parts(folder, "ppo", made)

    def full(*call, **named):
        raise torch.OutOfMemoryError("simulated")

    env.process.prior.denoiser.network.unet.register_forward_pre_hook(full)
    with pytest.raises(ConfigError, match="one sample at a time does not fit"):
        fit_microbatch(env, learner)


def test_runs_keep_and_resume_with_their_microbatch(folder, tmp_path, capsys):
    given = [*words(folder, "ppo"), "trainer.microbatch=4", "trainer.checkpoint_every=1"]
    for name in ("whole", "part"):
        assert main(["train", *given, f"run.root={tmp_path}", f"run.name={name}"]) == 0
    interrupt(tmp_path / "part")
    assert main(["train", f"resume={tmp_path / 'part'}"]) == 0
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")
    loaded = load_run(tmp_path / "whole")
    assert loaded.prior.execution.microbatch == loaded.policy.denoiser.execution.microbatch == 4


def test_a_grid_keeps_the_number_that_was_found(folder, tmp_path, capsys, monkeypatch):
    grid = ["agents=[ppo]", "tasks=[gaussian]", "seeds=[100]", "denoiser_calls=null"]
    grid += ["overrides=['trainer.microbatch=auto','trainer.updates=1']"]
    grid += [f"root={tmp_path / 'runs'}", f"out={tmp_path / 'report'}"]
    assert main(["benchmark", *grid]) == 0
    config = tmp_path / "runs" / "gaussian" / "ppo-s100" / "config.yaml"
    for kept in ("null", "3"):  # as a device would have found it
        text = re.sub(r"microbatch: .*", f"microbatch: {kept}", config.read_text())
        config.write_text(text)
        assert main(["benchmark", *grid]) == 0
    config.write_text(re.sub(r" *microbatch: .*\n", "", config.read_text()))  # an older run
    assert main(["benchmark", *[word.replace("auto", "null") for word in grid]]) == 0
    assert main(["benchmark", *[word.replace("auto", "5") for word in grid]]) == 2
    assert "was made with trainer.microbatch=(missing) instead of 5" in capsys.readouterr().err


def test_auto_is_null_where_memory_is_not_the_devices(tmp_path, capsys):
    given = ["env=gaussian", "trainer.updates=1", "trainer.microbatch=auto", "run.name=run"]
    assert main(["train", *given, f"run.root={tmp_path}"]) == 0
    assert "trainer.microbatch=auto is null: all at once" in capsys.readouterr().err
    assert load_run(tmp_path / "run").config.trainer.microbatch is None
    for wrong in ("atuo", "0"):
        assert main(["train", *given[:2], f"trainer.microbatch={wrong}"]) == 2
        assert f"trainer.microbatch={wrong} must be 1 or more" in capsys.readouterr().err
