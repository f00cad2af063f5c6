"""The claim's control takes the condition and nothing else; the saving is what it says."""

import numpy as np

from experiments.claims import fitv2_adaln_lora as claim
from jlora.models.dit.modulation import size


def test_the_control_changes_only_what_is_said_of_a_picture():
    draw = np.random.default_rng(0)
    x, noise = draw.normal(size=(2, 3, 4, 4, 3))
    t, said = np.asarray([0.1, 0.5, 0.9]), np.asarray([0.5, 0.9, 0.1])
    a, b, time = claim._mixed(x, noise, t, said)
    at = lambda x, noise, t: (1 - t)[:, None, None, None] * x + t[:, None, None, None] * noise  # noqa: E731
    np.testing.assert_allclose(at(a, b, time), at(x, noise, t))  # the same noisy picture
    np.testing.assert_allclose(b - a, noise - x)  # and the same answer
    np.testing.assert_array_equal(time, said)


def test_at_most_60_percent_of_the_numbers():
    sizes = [size(claim.WIDTH, claim.DEPTH, rank) for rank in (claim.RANK, 0)]
    assert 0.5 < sizes[0] / sizes[1] <= 0.6


def test_rectangles_are_resized_each_way():
    pixels = np.zeros((1, 32, 32, 3), np.uint8)
    pixels[:, :, 16:] = 255
    got = claim.resized(pixels, 16, 24)
    assert got.shape == (1, 16, 24, 3)
    np.testing.assert_allclose(got[0, :, :12], -1)
    np.testing.assert_allclose(got[0, :, 12:], 1)
