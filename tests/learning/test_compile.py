"""Networks that `torch.compile` has compiled: the same numbers, few graphs, whole runs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import TINY_SCHEDULER
from contract_tasks import Made
from running import metrics, summary, train
from torch import Tensor, nn
from torch._dynamo.utils import counters

from ctrl_rl import keys
from ctrl_rl.agents.parts.returns import mean_soft_return
from ctrl_rl.agents.plan import RolloutPlan
from ctrl_rl.cli.main import main
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import check_invariants, rollout
from ctrl_rl.kernels import ddpm_kernel
from ctrl_rl.policies import FineTunedPolicy
from ctrl_rl.priors import NetworkDenoiser, Prior
from ctrl_rl.rewards import FunctionReward


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    """Counts of this test alone."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


class SmallNetwork(nn.Module):
    """What inductor compiles in seconds, where a UNet takes minutes on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor, embedding: Tensor | None) -> Tensor:
        hidden = self.inner(x) + (timestep / 1000)[:, None, None, None]
        if embedding is not None:
            hidden = hidden + embedding[:, :, None, None]
        return self.outer(nn.functional.silu(nn.functional.group_norm(hidden, 2)))


def brightness(sample: Tensor, control: dict[str, Tensor]) -> Tensor:
    return sample.mean((1, 2, 3)) * (1 - 2 * control["shade"])


def process_and_policy() -> tuple[DenoisingProcess, FineTunedPolicy]:
    denoiser = NetworkDenoiser(SmallNetwork(), TINY_SCHEDULER, embedding_features=8)
    prior = Prior(denoiser, TINY_SCHEDULER, shape=(1, 4, 4))
    process = DenoisingProcess(
        prior=prior,
        kernel=ddpm_kernel(scheduler_config=TINY_SCHEDULER, num_steps=3),
        reward=FunctionReward(function=brightness, controls={"shade": 2}, differentiable=True),
    )
    controls = process.controls
    return process, FineTunedPolicy(prior=prior, kernel=process.kernel, controls=controls)


def test_inductor_gives_the_same_rollouts_and_gradients() -> None:
    plan = RolloutPlan(gradients="pathwise")
    found = []
    for backend in (None, "inductor"):
        process, policy = process_and_policy()
        if backend is not None:
            assert process.compile_network(backend) and policy.compile_network(backend)
        check_invariants(
            rollout(LatentEnv(process, num_envs=6), policy, plan=plan), plan, tolerance=1e-5
        )
        with torch.no_grad():
            for table in policy.embedding.parameters():
                table[:-1].copy_(torch.linspace(-1, 1, 16).reshape(2, 8))
        episode = rollout(LatentEnv(process, num_envs=6, seed=3), policy, plan=plan)
        mean_soft_return(episode).backward()
        for number in (1, 4, 7):  # batches of other sizes
            rollout(LatentEnv(process, num_envs=number), policy)
        found.append((episode, [p.grad for p in policy.parameters() if p.grad is not None]))
    (eager, eager_grads), (compiled, compiled_grads) = found
    assert eager[keys.KL].max() > 0.01
    for key in (keys.LOC, keys.KL, keys.LOG_RATIO, keys.NEXT_REWARD):
        torch.testing.assert_close(eager[key], compiled[key], rtol=1e-3, atol=1e-5)
    assert len(eager_grads) == len(compiled_grads) > 0
    for one, other in zip(eager_grads, compiled_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    _check_graphs()


def _check_graphs() -> None:
    """One for every use (prior, policy, gradients, a single sample), none for a size of a batch."""
    assert 2 <= counters["stats"]["unique_graphs"] <= 12
    assert not counters["graph_break"]


@pytest.mark.science  # a minute each; networks and gradients are checked above
@pytest.mark.parametrize(
    "of_agent",
    [
        ["agent=ctrl", "agent.checkpointing=true", "trainer.ema_decay=0.9"],
        ["agent=ppo", "trainer.microbatch=4"],
    ],
)
def test_compiled_run_equals_the_eager_one(of_agent: list[str], made: Made, tmp_path: Path) -> None:
    words = [
        *("env=sd_compressibility", f"reward.classifiers.size.folder={made('sizes4')}"),
        *(f"prior.path={made('sd')}", "prior.prompts=[a cat,a dog]", "kernel.num_steps=2"),
        *("prior.evaluation_prompts=[a fox]", "~evaluation.heldout.size"),
        *("trainer.updates=4", "trainer.batch_size=6", "evaluation.batch_size=5", *of_agent),
    ]
    # The backend "eager" traces as inductor does and runs what was traced as it is.
    eager = train(tmp_path, "plain", *words)
    compiled = train(tmp_path, "compiled", *words, "compile=eager")
    _check_graphs()
    for one, other in zip(metrics(eager), metrics(compiled), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
    gap = summary(eager)["gap_nats"]
    assert summary(compiled)["gap_nats"] == pytest.approx(gap, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["compile=inducter"], "did you mean 'inductor'?"),
        (["compile=true"], "compile=True must be text"),
        (["compile=eager"], "neither this prior nor this policy"),
    ],
)
def test_refusals(words: list[str], says: str, tmp_path: Path, capsys) -> None:
    assert main(["train", "env=gaussian", f"run.root={tmp_path}", *words]) != 0
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_refused(dtype: str, made: Made, tmp_path: Path, capsys) -> None:
    words = [
        *("prior=diffusers", f"prior.path={made('sd')}", "prior.prompts=[a cat]", "kernel=ddim"),
        *("policy=low_rank", f"prior.dtype={dtype}", f"run.root={tmp_path}", "compile=eager"),
    ]
    assert main(["train", "env=gaussian", "reward=jpeg", "agent=ppo", *words]) == 2
    assert "use prior.dtype=float32, or compile=null" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_pictures_are_drawn_by_a_compiled_prior(tmp_path: Path) -> None:
    words = ["dataset", "env=digits", "kernel.num_steps=2", "n=6", "batch_size=3"]
    for backend, folder in (("null", "plain"), ("eager", "compiled")):
        assert main([*words, f"compile={backend}", f"out={tmp_path / folder}"]) == 0
    assert counters["stats"]["unique_graphs"] == 1
    plain, compiled = (tmp_path / name / "metadata.csv" for name in ("plain", "compiled"))
    assert plain.read_text() == compiled.read_text()
