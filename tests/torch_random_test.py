"""The generator against torch, where torch is there, and against numbers that torch has printed."""

import numpy as np
import pytest

from jlora.torch_random import Generator


def test_known_permutation():
    """`torch.randperm(10, generator=torch.Generator().manual_seed(0))`."""
    assert Generator(0).permutation(10, 10).tolist() == [4, 1, 7, 5, 3, 9, 0, 8, 6, 2]


@pytest.mark.parametrize(("n", "count"), [(1, 1), (2, 2), (96, 96), (5000, 7)])
def test_permutations_are_torchs(n, count):
    torch = pytest.importorskip("torch")
    want = torch.randperm(n, generator=torch.Generator().manual_seed(777)).numpy()[:count]
    np.testing.assert_array_equal(Generator(777).permutation(n, count), want)


@pytest.mark.parametrize("shape", [(1,), (3, 2, 2), (5, 3), (4, 4), (5, 2, 2), (64, 2, 2), (33,)])
def test_normal_numbers_are_torchs(shape):
    """Below 16 numbers one after the other, above in blocks, with and without a rest."""
    torch = pytest.importorskip("torch")
    generator, ours = torch.Generator().manual_seed(42), Generator(42)
    for _ in range(2):  # the second draw begins where the first one has ended
        want = torch.normal(mean=0.0, std=0.7, size=shape, generator=generator).numpy()
        np.testing.assert_allclose(ours.normal(shape, 0.7), want, rtol=1e-6, atol=1e-6)


def test_what_torch_draws_in_another_way_is_refused():
    with pytest.raises(ValueError, match="permutation: got 3 of 2, expected at most"):
        Generator(0).permutation(2, 3)
    with pytest.raises(ValueError, match="permutation: got 1 of 300000000"):
        Generator(0).permutation(300_000_000, 1)


def test_mutation_a_draw_too_many_is_seen():
    generator = Generator(0)
    generator.uniform((1,), 0.0, 1.0)
    assert generator.permutation(10, 10).tolist() != [4, 1, 7, 5, 3, 9, 0, 8, 6, 2]
