"""What networks read of controls: nothing of null values, and functions of numbers."""

import math

import pytest
import torch

from ctrl_rl.controls import Categorical, Continuous, Control
from ctrl_rl.networks.embeddings import ControlEmbedding, NumberFeatures, NumberTable, table_of
from ctrl_rl.networks.perceptrons import ModulatedPerceptron

MEAN = Continuous(-1.0, 3.0)
CONTROLS: dict[str, Control] = {"hat": Categorical(("no", "yes")), "mean": MEAN}


def test_features_of_numbers():
    values = torch.tensor([-1.0, 0.0, 1.0, 3.0, math.nan])
    features = NumberFeatures(MEAN)(values)
    u = torch.tensor([-1.0, -0.5, 0.0, 1.0])
    waves = [math.pi / 2 * u * 2**octave for octave in range(4)]
    expected = [torch.ones(4), u, *(w.sin() for w in waves), *(w.cos() for w in waves)]
    torch.testing.assert_close(features[:4], torch.stack(expected, 1))
    assert (features[4] == 0).all() and features.shape == (5, NumberFeatures.COUNT)


def test_a_null_value_adds_exactly_nothing_and_learns_nothing():
    embedding = ControlEmbedding(CONTROLS, 4)
    hat, mean = torch.tensor([0, 2, 2]), torch.tensor([0.5, math.nan, 1.0])
    assert (embedding({"hat": hat, "mean": mean}) == 0).all(), "at the start"
    (embedding({"hat": hat, "mean": mean}) - 1).square().sum().backward()
    for parameter in embedding.parameters():
        assert torch.isfinite(parameter.grad).all() and (parameter.grad != 0).any()
        parameter.data -= parameter.grad
    nothing = embedding({"hat": torch.tensor([2]), "mean": torch.tensor([math.nan])})
    assert (nothing == 0).all()
    values = embedding({"hat": hat, "mean": mean})
    alone = embedding({"hat": hat, "mean": torch.full((3,), math.nan)})
    assert torch.equal(values[1], alone[1]) and not torch.equal(values[0], alone[0])


@pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS)
def test_tables_in_one_are_tables_apart(control: Control):
    torch.manual_seed(0)
    many = table_of(control, 3, 5)
    torch.nn.init.normal_(many.weight)
    values = torch.tensor([0, 1]).to(control.dtype)
    for place in range(5):
        one = table_of(control, 3)
        rows = many.weight.detach().reshape(5, *one.weight.shape[-2:])[place]
        one.weight.data = rows.reshape(one.weight.shape)
        torch.testing.assert_close(many(values, torch.full((2,), place)), one(values))


def test_a_number_fits_what_varies_smoothly():
    """A parabola and a wave, both to a hundredth of their spread, by least squares."""
    values = torch.linspace(-1, 3, 400)
    features = NumberTable(MEAN, 1).read(values).double()
    for target in ((values - 0.7) ** 2, (3 * values).sin()):
        target = target.double()
        fit = features @ torch.linalg.lstsq(features, target[:, None]).solution
        assert (fit[:, 0] - target).std() < 0.01 * target.std()


def test_a_perceptron_learns_what_a_number_multiplies():
    torch.manual_seed(0)
    network = ModulatedPerceptron(
        inputs=2, outputs=2, num_steps=3, controls={"mean": MEAN}, width=16, depth=1
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(300):
        x, step, mean = torch.randn(64, 2), torch.arange(64) % 3, torch.rand(64) * 4 - 1
        loss = (network(x, step, {"mean": mean}) - x.tanh() * mean[:, None]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    grid = torch.linspace(-1, 3, 9)
    x = torch.full((9, 2), 0.5)
    found = network(x, torch.zeros(9).long(), {"mean": grid})[:, 0]
    assert (found - math.tanh(0.5) * grid).abs().max() < 0.4
