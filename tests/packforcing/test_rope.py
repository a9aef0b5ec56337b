"""RoPE tables and positions, against complex exponentials and numbers worked out by hand."""

import msgspec
import numpy as np
import torch

from packforcing import model_config, transformer
from packforcing.rope import axis_pairs, block_positions, compressed_positions, rope_table

WAN = model_config("wan-1.3b")


def rotate(keys: np.ndarray, positions: np.ndarray, dtype=np.float64) -> np.ndarray:
    """Keys [n, d] rotated to positions [n, 3] by the model's own rotation, rounded to `dtype`."""
    tables = [torch.from_numpy(table).double() for table in rope_table(positions, keys.shape[-1])]
    rotated = transformer.rotate(torch.from_numpy(keys).double()[None, None], tuple(tables))
    return rotated[0, 0].numpy().astype(dtype)


def test_rope_splits_a_head_as_wan_does():
    assert axis_pairs(128) == (22, 21, 21)


def test_rope_equals_complex_exponentials():
    positions = np.random.default_rng(0).uniform(0, 100, (50, 3))
    pairs = axis_pairs(32)
    expected = np.concatenate(
        [
            np.exp(1j * positions[:, [axis]] * 10000.0 ** (-np.arange(n) / n))
            for axis, n in enumerate(pairs)
        ],
        axis=1,
    )
    cos, sin = rope_table(positions, 32)
    np.testing.assert_allclose(cos + 1j * sin, expected, atol=1e-7)


def test_rotation_composes_and_stored_rotations_drift():
    """The paper's incremental rotation equals rotating when read; in fp16 it drifts.

    After 500 shifts by a block the worst error, as a share of the largest key, is below 1e-4 in
    float64 (the tables are float32), but 0.08 in half precision, where a key stored before RoPE
    and rotated once keeps 5e-4. That is why keys are stored before RoPE.
    """
    rng = np.random.default_rng(0)
    keys, positions = rng.standard_normal((64, 128)), rng.integers(0, 30, (64, 3)).astype(float)
    shift = np.tile([4.0, 0, 0], (64, 1))
    target = rotate(keys, positions + 500 * shift)
    exact, half = rotate(keys, positions), rotate(keys, positions, np.float16)
    for _ in range(500):
        exact, half = rotate(exact, shift), rotate(half, shift, np.float16)
    scale = np.abs(target).max()
    assert np.abs(exact - target).max() / scale < 1e-4
    read = rotate(keys.astype(np.float16), positions + 500 * shift)
    drift, once = (np.abs(x - target).max() / scale for x in (half, read))
    assert once < 5e-4 < 0.02 < drift < 0.2


def test_spatial_channels_ignore_time():
    keys = np.random.default_rng(0).standard_normal((1, 128))
    moved = rotate(keys, np.array([[7.0, 0, 0]]))
    np.testing.assert_array_equal(moved[:, 44:], keys[:, 44:])
    assert (moved[:, :44] != keys[:, :44]).any()


def test_compressed_tokens_sit_at_the_center_of_their_cells():
    at = compressed_positions(WAN, 8.0, 4.0).reshape(2, 7, 13, 3)
    assert at[0, 0, 0].tolist() == [8.5, 1.5, 1.5]
    assert at[1, 6, 12].tolist() == [10.5, 25.5, 49.5]
    full = block_positions(WAN, 8.0).reshape(4, 30, 52, 3)
    np.testing.assert_allclose(full[2:4, 4:8, 8:12].mean((0, 1, 2)), at[1, 1, 2])


def test_mid_span_scales_time_alone():
    at = compressed_positions(WAN, 0.0, 2.0).reshape(2, -1, 3)
    assert set(at[0, :, 0]) == {0.0} and set(at[1, :, 0]) == {1.0}


def test_odd_block_centers_stop_at_its_last_frame():
    three = msgspec.structs.replace(WAN, block_frames=3)
    assert sorted(set(compressed_positions(three, 0.0, 3.0)[:, 0])) == [0.5, 2.0]
