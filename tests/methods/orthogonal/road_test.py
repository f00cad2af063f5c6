"""RoAd: the rotation matrix of the outputs, entry by entry."""

import numpy as np
import pytest

from jlora.methods.orthogonal.road import RoAd


def rotation(p, variant, g):
    """R [8, 8] with W' = W R."""
    theta, alpha, out, half = p["theta"], p["alpha"], np.zeros((8, 8)), g // 2
    for block in range(8 // g):
        for k in range(half):
            y, z = block * g + k, block * g + half + k
            if variant == 1:
                c1, s1, s2, c2 = [block * half + k] * 4
            elif variant == 2:
                c1, s1, s2, c2 = y, y, z, z
            else:
                start = 2 * block * g
                c1, c2 = start + k, start + half + k
                s1, s2 = start + g + k, start + g + half + k
            out[y, y] = alpha[c1] * np.cos(theta[c1])
            out[z, y] = -alpha[s1] * np.sin(theta[s1])
            out[y, z] = alpha[s2] * np.sin(theta[s2])
            out[z, z] = alpha[c2] * np.cos(theta[c2])
    return out


def check_value(bench, method):
    adapter = bench.noisy(method)
    r = rotation(bench.numbers(adapter), method.variant, method.group)
    bench.agree(adapter, bench.w @ r)


@pytest.mark.parametrize("method", [RoAd(1, 4), RoAd(2, 8), RoAd(4, 4)])
def test_value(bench, method):
    check_value(bench, method)


def test_limit_unit_scales_keep_the_length_of_pairs(bench):
    adapter = bench.noisy(RoAd(1, 2))
    own = adapter.trainable["w"]
    unit = adapter.replace(trainable={"w": own | {"alpha": 0 * own["alpha"] + 1}})
    lengths = lambda w: (w.reshape(12, 4, 2) ** 2).sum(2)  # noqa: E731
    np.testing.assert_allclose(lengths(bench.merged(unit)), lengths(bench.w), atol=1e-4)


def test_counts(bench):
    for variant, count in ((1, 4), (2, 8), (4, 16)):
        assert bench.fresh(RoAd(variant, 4)).trainable["w"]["theta"].shape == (count,)


def test_refusals(bench):
    with pytest.raises(ValueError, match=r"RoAd\.variant: got 3, expected 1, 2 or 4"):
        RoAd(variant=3)
    with pytest.raises(ValueError, match=r"RoAd\.group: got 3, expected an even number"):
        RoAd(group=3)
    with pytest.raises(ValueError, match="w: RoAd group: got 6, expected a divisor of d_out = 8"):
        bench.fresh(RoAd(group=6))


def test_mutation_the_angle_the_other_way_is_seen(bench, monkeypatch):
    good = RoAd.rotated
    turned = lambda self, y, p: good(self, y, p | {"theta": -p["theta"]})  # noqa: E731
    monkeypatch.setattr(RoAd, "rotated", turned)
    with pytest.raises(AssertionError):
        check_value(bench, RoAd(1, 4))
