"""Pictures of a table seen from above: anti-aliased discs, squares and polygons, painted in numpy without a display.

Lengths are pixels of the table; `scale` is picture pixels per table pixel. All functions paint into a uint8 (h, w, 3).
"""

from __future__ import annotations

import math

import numpy as np

from diffpolicy.envs.table_world import RAIL_INSET, TABLE

BLOCK_COLOURS = {"red": (208, 40, 42), "blue": (38, 92, 204), "yellow": (238, 190, 24), "purple": (128, 60, 170)}
ZONE_COLOURS = {"green": (46, 160, 70), "orange": (248, 130, 22), "pink": (236, 106, 180), "cyan": (36, 186, 206)}
TABLE_COLOUR, RAIL_COLOUR = (240, 238, 232), (214, 211, 203)
PUSHER_COLOUR, TARGET_COLOUR = (34, 34, 40), (230, 0, 120)


def empty_table(size: int, colour=TABLE_COLOUR, rail_colour=RAIL_COLOUR) -> np.ndarray:
    """The bare table with its rail, uint8 (size, size, 3)."""
    picture = np.empty((size, size, 3), dtype=np.uint8)
    picture[:] = colour
    centre, half = (TABLE / 2, TABLE / 2), TABLE / 2 - RAIL_INSET
    paint_square(picture, size / TABLE, centre, half, 0.0, rail_colour, ring=2.5)
    return picture


def paint_zone(picture, scale, centre, radius, colour) -> None:
    """A see-through disc with a rim."""
    paint_disc(picture, scale, centre, radius, colour, opacity=0.45)
    paint_disc(picture, scale, centre, radius, colour, ring=5.0)


def paint_disc(picture, scale, centre, radius, colour, *, opacity=1.0, ring=0.0) -> None:
    """Blends a disc, or its outline of width `ring`, into the picture."""
    (rows, columns), x, y = _patch(picture, scale, centre, radius)
    outside = np.sqrt(x * x + y * y) - radius * scale  # signed distance, in picture pixels
    _blend(picture, rows, columns, outside, scale * ring, colour, opacity)


def paint_square(picture, scale, centre, half, angle, colour, *, opacity=1.0, ring=0.0) -> None:
    """Blends a square turned by `angle` (radians), or its outline, into the picture."""
    (rows, columns), x, y = _patch(picture, scale, centre, half * math.sqrt(2))
    cos, sin = math.cos(angle), math.sin(angle)
    outside = np.maximum(np.abs(cos * x + sin * y), np.abs(cos * y - sin * x)) - half * scale
    _blend(picture, rows, columns, outside, scale * ring, colour, opacity)


def paint_polygon(picture, scale, centre, corners, colour) -> None:
    """Blends a convex polygon into the picture; corners (n, 2) around the centre, clockwise as one sees it."""
    corners = np.asarray(corners, dtype=np.float32) * np.float32(scale)
    (rows, columns), x, y = _patch(picture, scale, centre, float(np.linalg.norm(corners, axis=1).max()) / scale)
    outside = np.float32(-np.inf)
    for start, side in zip(corners, np.roll(corners, -1, axis=0) - corners, strict=True):
        normal_x, normal_y = side[1] / np.hypot(*side), -side[0] / np.hypot(*side)
        outside = np.maximum(outside, (x - start[0]) * normal_x + (y - start[1]) * normal_y)
    _blend(picture, rows, columns, outside, 0.0, colour, 1.0)


def _patch(picture, scale, centre, reach):
    """The part of the picture within `reach` of a centre, and where its pixels lie from there: x (1, w), y (h, 1)."""
    parts, offsets = [], []
    for middle, size in ((centre[1] * scale, picture.shape[0]), (centre[0] * scale, picture.shape[1])):
        low = min(max(int(middle - reach * scale - 1), 0), size)
        high = min(max(int(middle + reach * scale + 2), low), size)
        parts.append(slice(low, high))
        offsets.append(np.arange(low, high, dtype=np.float32) + np.float32(0.5 - middle))
    return parts, offsets[1][None, :], offsets[0][:, None]


def _blend(picture, rows, columns, outside, ring, colour, opacity) -> None:
    if ring:
        outside = np.abs(outside + ring / 2) - ring / 2
    cover = np.clip(0.5 - outside, 0.0, 1.0)[..., None] * np.float32(opacity)
    patch = picture[rows, columns]
    picture[rows, columns] = np.rint(patch + (np.array(colour, dtype=np.float32) - patch) * cover)
