"""Densities, ratios and divergences of the steps, against independent calculations."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from ctrl_rl import gaussian


def triple(shape: tuple[int, ...], apart: float = 0.3, seed: int = 0) -> tuple[Tensor, ...]:
    """Scale [B], two means and a draw from the first, float32."""
    generator = torch.Generator().manual_seed(seed)
    scale = 0.1 + torch.rand(shape[0], generator=generator)
    loc, other, noise = (torch.randn(shape, generator=generator) for _ in range(3))
    wide = gaussian.expand_to(scale, loc)
    return scale, loc, loc + apart * wide * other, loc + wide * noise


def normal(loc: Tensor, scale: Tensor) -> Independent:
    return Independent(Normal(loc, gaussian.expand_to(scale, loc).expand_as(loc)), loc.ndim - 1)


@pytest.mark.parametrize("shape", [(5, 2), (4, 1, 8, 8)])
def test_equals_torch_distributions(shape: tuple[int, ...]) -> None:
    scale, loc, other, value = (t.double() for t in triple(shape))
    p, q = normal(loc, scale), normal(other, scale)
    close = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(
        gaussian.log_prob(value, loc, scale).double(), p.log_prob(value), **close
    )
    torch.testing.assert_close(
        gaussian.kl(loc, other, scale).double(), kl_divergence(p, q), **close
    )
    torch.testing.assert_close(
        gaussian.log_ratio(value, loc, other, scale).double(),
        p.log_prob(value) - q.log_prob(value),
        **close,
    )


def test_two_batch_dimensions_are_as_good_as_one() -> None:
    scale, loc, other, value = triple((6, 3, 2))
    nested = [t.unflatten(0, (2, 3)) for t in (value, loc, other, scale)]
    flat = gaussian.log_ratio(value, loc, other, scale)
    assert torch.equal(gaussian.log_ratio(*nested), flat.unflatten(0, (2, 3)))
    assert torch.equal(
        gaussian.kl(nested[1], nested[2], nested[3]),
        gaussian.kl(loc, other, scale).unflatten(0, (2, 3)),
    )


def test_equal_means_have_ratio_and_divergence_exactly_zero() -> None:
    scale, loc, _, value = triple((4, 3, 64, 64))
    assert torch.equal(gaussian.log_ratio(value, loc, loc.clone(), scale), torch.zeros(4))
    assert torch.equal(gaussian.kl(loc, loc.clone(), scale), torch.zeros(4))


@pytest.mark.parametrize("apart", [1e-3, 0.02, 0.3])
def test_log_ratio_keeps_its_digits_at_12288_dimensions(apart: float) -> None:
    scale, loc, other, value = triple((8, 3, 64, 64), apart)
    exact = gaussian_log_ratio_in_float64(value, loc, other, scale)
    # One rounding per term, so the error grows with the root of the sum of squares of the terms.
    allowed = 1e-6 * exact.abs() + 1e-5 * apart * value[0].numel() ** 0.5
    ratio = gaussian.log_ratio(value, loc, other, scale).double()
    assert ((ratio - exact).abs() < allowed).all()
    # The difference of two log-densities is what this avoids.
    naive = gaussian.log_prob(value, loc, scale) - gaussian.log_prob(value, other, scale)
    assert (naive.double() - exact).abs().max() > 10 * (ratio - exact).abs().max()


def gaussian_log_ratio_in_float64(
    value: Tensor, loc: Tensor, other: Tensor, scale: Tensor
) -> Tensor:
    value, loc, other, scale = (t.double() for t in (value, loc, other, scale))
    p, q = normal(loc, scale), normal(other, scale)
    return p.log_prob(value) - q.log_prob(value)


def test_divergence_is_the_mean_of_the_log_ratio() -> None:
    draws = 200_000
    scale, loc, other, _ = triple((1, 3), apart=0.8)
    many = [t.expand(draws, *t.shape[1:]) for t in (loc, other, scale)]
    value = gaussian.draw(many[0], many[2], torch.Generator().manual_seed(1))
    ratio = gaussian.log_ratio(value, *many)
    error = ratio.std() / draws**0.5
    assert abs(ratio.mean() - gaussian.kl(loc, other, scale)[0]) < 4 * error


def test_resolution_doubles_what_is_summed() -> None:
    scale, loc, other, value = triple((3, 1, 4, 4))
    twice = [torch.cat([t, t], -1) for t in (value, loc, other)]
    for name, arguments, doubled in (
        ("log_prob", (value, loc), twice[:2]),
        ("kl", (loc, other), twice[1:]),
        ("log_ratio", (value, loc, other), twice),
    ):
        function = getattr(gaussian, name)
        torch.testing.assert_close(function(*doubled, scale), 2 * function(*arguments, scale))


def test_draws_have_the_law_and_the_gradient_of_the_mean() -> None:
    loc = torch.full((50_000, 2), 3.0).requires_grad_()
    scale = torch.full((50_000,), 0.25)
    value = gaussian.draw(loc, scale, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(value.sum(), loc)
    value = value.detach()
    assert abs(float(value.mean()) - 3) < 4 * 0.25 / 100_000**0.5
    assert abs(float(value.std()) / 0.25 - 1) < 4 / 200_000**0.5
    assert torch.equal(gradient, torch.ones_like(loc))


def test_half_precision_inputs_are_computed_in_float32() -> None:
    scale, loc, other, value = triple((4, 3, 32, 32), apart=0.02)
    half = [t.bfloat16() for t in (value, loc, other)]
    ratio = gaussian.log_ratio(*half, scale)
    exact = gaussian_log_ratio_in_float64(*half, scale)
    assert ratio.dtype == torch.float32
    torch.testing.assert_close(ratio.double(), exact, rtol=1e-5, atol=1e-2)
