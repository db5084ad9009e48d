"""Side networks for images: any size, nothing at the start, and drifts of controls that add up."""

import pytest
import torch

from ctrl_rl import keys
from ctrl_rl.controls import Categorical
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import rollout
from ctrl_rl.errors import ConfigError
from ctrl_rl.networks.convolutional import ModulatedImageNetwork
from ctrl_rl.policies import PriorPolicy, SideImagePolicy
from ctrl_rl.runs.loaded import make_process


def network(shape: tuple[int, ...], blocks: int = 1) -> ModulatedImageNetwork:
    torch.manual_seed(0)
    return ModulatedImageNetwork(
        shape=shape,
        outputs=2,
        num_steps=3,
        controls={"hat": Categorical.of(2)},
        width=16,
        depth=1,
        channels=8,
        blocks=blocks,
    )


def inputs(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 1, 2, 2]), {"hat": torch.tensor([0, 1, 2, 0])}


@pytest.mark.parametrize("shape", [(4, 5, 7), (4, 8, 8), (6, 16, 16), (4, 64, 40), (1, 1, 1)])
@pytest.mark.parametrize("blocks", [0, 2])
def test_images_of_any_size_start_at_0(shape: tuple[int, ...], blocks: int) -> None:
    result = network(shape, blocks)(*inputs(shape))
    assert result.shape == (4, 2, *shape[1:])
    assert not result.any()


@pytest.mark.parametrize("side", [16, 64])
def test_every_pixel_sees_every_other(side: int) -> None:
    shape = (2, side, side)
    drift = network(shape)
    for parameter in drift.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(2))
    x, step, control = inputs(shape)
    x.requires_grad_()
    drift(x, step, control)[:, 0, 0, 0].sum().backward()
    assert (x.grad[:, :, -1, -1] != 0).all()


def test_labels_and_steps_change_what_is_drawn() -> None:
    drift = network((2, 8, 8))
    for parameter in drift.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(2))
    x = torch.randn(1, 2, 8, 8).expand(4, -1, -1, -1)
    _, step, control = inputs((2, 8, 8))
    drawn = drift(x, step, control).flatten(1)
    assert (torch.cdist(drawn, drawn)[~torch.eye(4, dtype=torch.bool)] > 1e-3).all()


@pytest.fixture(scope="module")
def process() -> DenoisingProcess:
    return make_process("faces", ["kernel.num_steps=4"])


def policy(process: DenoisingProcess, *, random: bool) -> SideImagePolicy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = SideImagePolicy(
            prior=process.prior, kernel=process.kernel, controls=process.controls, width=16, depth=1
        )
        if random:
            for parameter in made.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
    return made


def drifts(made: SideImagePolicy, process: DenoisingProcess, **asked: str) -> torch.Tensor:
    """Drifts [B, K, *S] in standard deviations along one path of the prior, whatever is asked."""
    env = LatentEnv(process, num_envs=3, seed=7)
    path = rollout(env, PriorPolicy(process.kernel))
    x, prior_loc = path[keys.X].flatten(0, 1), path[keys.PRIOR_LOC].flatten(0, 1)
    step = path[keys.STEP].flatten()
    control = process.check_control(asked, len(x))
    loc = made.loc(x, step, control, prior_loc)
    scale = process.kernel.scale[step][:, None, None, None]
    return ((loc - prior_loc) / scale).unflatten(0, path.shape)


@torch.no_grad()
def test_drifts_of_controls_add_up_and_a_null_label_adds_exactly_nothing(
    process: DenoisingProcess,
) -> None:
    made = policy(process, random=True)
    both = drifts(made, process, glasses="yes", hat="no")
    glasses, hat = drifts(made, process, glasses="yes"), drifts(made, process, hat="no")
    assert glasses.abs().mean() > 0.01 and hat.abs().mean() > 0.01
    torch.testing.assert_close(both, glasses + hat, rtol=1e-4, atol=2e-5)
    assert not drifts(made, process).any()


@torch.no_grad()
def test_asking_for_nothing_draws_the_prior_bit_for_bit(process: DenoisingProcess) -> None:
    made, nothing = policy(process, random=True), {"glasses": "any", "hat": "any"}
    drawn, prior = (
        rollout(LatentEnv(process, num_envs=4, seed=3), each, control=nothing)[keys.SAMPLE]
        for each in (made, PriorPolicy(process.kernel))
    )
    assert torch.equal(drawn, prior)


@torch.no_grad()
def test_clean_estimates_of_other_episodes_have_mean_0_and_spread_1(
    process: DenoisingProcess,
) -> None:
    made = policy(process, random=False)
    path = rollout(LatentEnv(process, num_envs=128, seed=11), PriorPolicy(process.kernel))
    for k in range(process.num_steps):
        x, prior_loc, step = (path[key][:, k] for key in (keys.X, keys.PRIOR_LOC, keys.STEP))
        estimate = made.standard(process.kernel.denoised(x, prior_loc, step), step)
        # Each mean of 64 episodes is off by an eighth of the spread, that of 128 by an eleventh.
        assert estimate.mean(0).square().mean().sqrt() < 0.25
        assert 0.85 < estimate.var(0).mean().sqrt() < 1.15


def test_a_task_without_controls_has_one_network(process: DenoisingProcess) -> None:
    made = SideImagePolicy(
        prior=process.prior, kernel=process.kernel, controls={}, width=16, depth=1
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, *process.shape)
    assert len(made.drifts) == 1
    assert (made.loc(x, torch.tensor([0, 3]), {}, x) != x).all()


def test_vectors_are_refused() -> None:
    plane = make_process("mixture2d")
    with pytest.raises(ConfigError, match="policy=side_network"):
        SideImagePolicy(prior=plane.prior, kernel=plane.kernel, controls=plane.controls)
