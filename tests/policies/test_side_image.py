"""The network for images: any size, the whole image in sight, nothing at the start."""

import pytest
import torch

from ctrl_rl.image_nets import ModulatedImageNetwork


def network(shape: tuple[int, ...], blocks: int = 1) -> ModulatedImageNetwork:
    torch.manual_seed(0)
    return ModulatedImageNetwork(
        shape=shape,
        outputs=2,
        num_steps=3,
        controls={"hat": 2},
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
