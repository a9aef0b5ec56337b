"""Denoising steps, samplers and noise."""

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from packforcing import model_config
from packforcing.sampler import advance, denoising_steps, draw_noise

WAN = model_config("wan-1.3b")


def test_denoising_steps_are_self_forcings():
    timesteps, now, then = zip(*denoising_steps(WAN, 0))
    assert np.allclose(timesteps, [1000, 937.5, 1000 * 5 / 6, 625])
    assert np.allclose(now, [1, 0.9375, 5 / 6, 0.625]) and np.allclose(then[:-1], now[1:])
    assert then[-1] == 0


def test_causvids_timesteps_are_not_shifted():
    timesteps, now, then = zip(*denoising_steps(model_config("causvid"), 0))
    assert timesteps == (1000, 757, 522)
    assert np.allclose(now, [1, 0.756757, 0.521739], atol=1e-6) and then == (*now[1:], 0)


def test_two_step_models_take_four_steps_for_the_first_block():
    config = model_config("causal-forcing-frame-2step")
    assert denoising_steps(config, 0) == denoising_steps(WAN, 0)
    assert np.allclose(denoising_steps(config, 1), [(1000, 1, 5 / 6), (1000 * 5 / 6, 5 / 6, 0)])


@given(st.floats(0.01, 1.0), st.floats(0, 0.99), st.integers(0, 2**32))
def test_both_samplers_reach_x0_with_the_true_flow(now, then, seed):
    """With flow = noise - x0 a step lands on the line between x0 and noise, at any level."""
    rng = np.random.default_rng(seed)
    x0, noise, fresh = rng.standard_normal((3, 4, 4))
    x = (1 - now) * x0 + now * noise
    euler = advance(msgspec.structs.replace(WAN, sampler="euler"), x, noise - x0, None, now, then)
    np.testing.assert_allclose(euler, (1 - then) * x0 + then * noise, atol=1e-9)
    renoised = advance(WAN, x, noise - x0, fresh, now, then)
    np.testing.assert_allclose(renoised, (1 - then) * x0 + then * fresh, atol=1e-9)


def test_noise_depends_on_seed_block_and_step_alone(tiny_config):
    first = draw_noise(tiny_config, 1, 2, 3)
    draw_noise(tiny_config, 9, 9, 9)
    assert np.array_equal(first, draw_noise(tiny_config, 1, 2, 3))
    others = [draw_noise(tiny_config, *key) for key in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (1, 3, 2))]
    assert all(abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.1 for other in others)
    assert abs(first.mean()) < 0.1 and abs(first.std() - 1) < 0.1
