r"""Families of picture transforms with one continuous parameter: styles that can be interpolated.

===========  =====================================================================================
hue          rotation of chroma by v degrees at constant luma
tint         luma times a colour of hue v, mixed 3 : 1 with the picture
ground       white turns into a colour of hue v
invert       x + v (1 - 2 x); v = 1 is the negative
saturation   luma + v (x - luma); 0 is grey
gamma        x^v
posterise    v levels per channel
pixelate     averages over a grid of v x v
lines        white minus v times the gradient of luma
blur         Gaussian of v pixels, edges repeated
halftone     dots of period v pixels whose size follows from luma
stripes      rows darkened by a wave of period v pixels
===========  =====================================================================================

Pictures are float32 [n, h, w, 3] in 0 .. 1; luma is 0.299 R + 0.587 G + 0.114 B. Everything is a
function of the picture and v alone, so a style is the same wherever it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

Pixels = np.ndarray  # float32 [n, h, w, 3], 0 .. 1
WEIGHTS = np.asarray((0.299, 0.587, 0.114), np.float32)
# luma, and the two axes of chroma of the YIQ colour space
YIQ = np.asarray(
    ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)), np.float64
)
WHITE, WHITER = 0.80, 0.95  # smallest channel at which a place starts to be, and is, ground
EDGE = 0.15  # width of the step of a halftone dot, in luma


def luma(x: Pixels) -> np.ndarray:
    """Brightness, [n, h, w, 1]."""
    return (x @ WEIGHTS)[..., None]


def colour(degrees: float) -> np.ndarray:
    """A bright colour of a hue, float32 [3]: cosines of three phases, raised to 0.25 .. 1."""
    phase = np.deg2rad(degrees) - 2 * np.pi / 3 * np.arange(3)
    return (0.625 + 0.375 * np.cos(phase)).astype(np.float32)


def hue(x: Pixels, value: float) -> Pixels:
    """Chroma turned by `value` degrees."""
    c, s = np.cos(np.deg2rad(value)), np.sin(np.deg2rad(value))
    turn = np.asarray(((1, 0, 0), (0, c, -s), (0, s, c)))
    return x @ (np.linalg.inv(YIQ) @ turn @ YIQ).T.astype(np.float32)


def tint(x: Pixels, value: float) -> Pixels:
    """Three parts luma in a colour of hue `value`, one part the picture."""
    return np.float32(0.75) * luma(x) * colour(value) + np.float32(0.25) * x


def ground(x: Pixels, value: float) -> Pixels:
    """A colour of hue `value` where the picture is white."""
    low = x.min(-1, keepdims=True)
    share = np.clip((low - np.float32(WHITE)) / np.float32(WHITER - WHITE), 0, 1)
    return x + share * (colour(value) - x)


def invert(x: Pixels, value: float) -> Pixels:
    """Towards the negative."""
    return x + np.float32(value) * (1 - 2 * x)


def saturation(x: Pixels, value: float) -> Pixels:
    """Chroma times `value`."""
    grey = luma(x)
    return grey + np.float32(value) * (x - grey)


def gamma(x: Pixels, value: float) -> Pixels:
    """Darker above 1, lighter below."""
    return np.power(x, np.float32(value))


def posterise(x: Pixels, value: float) -> Pixels:
    """Rounded to `value` levels per channel."""
    steps = np.float32(value - 1)
    return np.round(x * steps) / steps


def _averages(side: int, cells: int) -> np.ndarray:
    """[side, side]: every place gets the average over its cell of a grid; cells may cut places."""
    edges = np.linspace(0, side, cells + 1)
    places = np.arange(side)
    inside = np.minimum(places[:, None] + 1, edges[None, 1:]) - np.maximum(
        places[:, None], edges[None, :-1]
    )
    share = np.clip(inside, 0, None)  # [place, cell]
    own = np.eye(cells)[np.clip(np.searchsorted(edges, places + 0.5) - 1, 0, cells - 1)]
    return (own @ (share / share.sum(0)).T).astype(np.float32)


def _both(x: Pixels, matrix: np.ndarray) -> Pixels:
    """A linear map of rows and of columns."""
    return np.einsum("yj,njkc,xk->nyxc", matrix, x, matrix, optimize=True)


def pixelate(x: Pixels, value: float) -> Pixels:
    """A grid of `value` x `value` plain squares."""
    return _both(x, _averages(x.shape[1], round(value)))


def blur(x: Pixels, value: float) -> Pixels:
    """A Gaussian of `value` pixels."""
    side = x.shape[1]
    reach = int(np.ceil(3 * value))
    matrix = np.zeros((side, side))
    for shift in range(-reach, reach + 1):
        places = np.clip(np.arange(side) + shift, 0, side - 1)
        matrix[np.arange(side), places] += np.exp(-0.5 * (shift / value) ** 2)
    return _both(x, (matrix / matrix.sum(1, keepdims=True)).astype(np.float32))


def lines(x: Pixels, value: float) -> Pixels:
    """Dark lines on white where luma changes."""
    padded = np.pad(luma(x), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    across = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    drawn = 1 - np.float32(value) * np.sqrt(down**2 + across**2)
    return np.repeat(drawn, 3, axis=-1)


def halftone(x: Pixels, value: float) -> Pixels:
    """Black dots on white, larger where the picture is darker."""
    wave = np.cos(2 * np.pi * (np.arange(x.shape[1]) + 0.5) / value)
    screen = (0.5 + 0.25 * (wave[:, None] + wave[None])).astype(np.float32)[None, ..., None]
    dots = np.clip((luma(x) - screen) / np.float32(EDGE) + np.float32(0.5), 0, 1)
    return np.repeat(dots, 3, axis=-1)


def stripes(x: Pixels, value: float) -> Pixels:
    """Rows that are darker and lighter in turn."""
    wave = 0.5 + 0.5 * np.cos(2 * np.pi * (np.arange(x.shape[1]) + 0.5) / value)
    return x * (np.float32(0.35) + np.float32(0.65) * wave.astype(np.float32))[:, None, None]


FAMILIES: Mapping[str, Callable[[Pixels, float], Pixels]] = {
    f.__name__: f
    for f in (
        *(hue, tint, ground, invert, saturation, gamma),
        *(posterise, pixelate, lines, blur, halftone, stripes),
    )
}


def transformed(pixels: np.ndarray, family: str, value: float) -> np.ndarray:
    """Pictures in the style of a family.

    Args:
      pixels: uint8 [n, h, h, 3].
      family: key of FAMILIES; "" leaves them as they are.
      value: its parameter v.

    Raises:
      KeyError: an unknown family.
    """
    if not family:
        return pixels
    out = FAMILIES[family](pixels.astype(np.float32) / np.float32(255), value)
    return np.clip(np.round(out * np.float32(255)), 0, 255).astype(np.uint8)
