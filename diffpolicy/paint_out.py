"""Takes out of recorded pictures what gives the task away: the goal that Push-T draws, found and removed by its pixels.

A recorded pixel is a mixture of at most a few flat colours: what lies below (white, the light green goal) and what covers
it (block, pusher, red marks where they touch). Resizing to the picture made the mixture; how much green is in it says how
much white must take its place:

    pixel = h * green + w * white + sum_k s_k * cover_k,   h + w + sum_k s_k = 1   ->   pixel + h * (white - green)

h is at most the share of green in the same pixel while nothing covers it, which the recordings show themselves: it is the
most frequent mixture of white and green there. Neither the goal's pose nor a simulator is needed, nor the recorded states.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import numpy as np

from diffpolicy.replay import ReplayBuffer
from diffpolicy.spec import unknown_name
from diffpolicy.store_layout import to_uint8

WHITE = np.array([255.0, 255.0, 255.0])
GREEN = np.array([144.0, 238.0, 144.0])
"""LightGreen, the goal as gym-pusht draws it."""
COVERS = np.array([(143, 163, 184), (119, 136, 153), (78, 126, 255), (65, 105, 225), (231, 76, 60)], np.float64)
"""What may lie on the goal: face and edge of the block, face and edge of the pusher, marks of contact."""
COSTS = (1.0, 1.0, 1.0, 1.0, 2.0)
"""How much an explanation pays for each of COVERS: few colours are likelier than many, and marks are rare."""
COST_UNIT = 0.3
"""Levels of 255 by which a pixel may be off for each unit of cost that this saves."""
ROUNDING = 1.0
"""Levels of 255 that resizing and rounding may be off, for free."""
LEVELS = int(WHITE[0] - GREEN[0])
"""Steps of red from white (0) to green (111): a mixture of the two is known by its red alone."""
FRAMES_LOOKED_AT = 2000
"""So many frames, evenly spaced, say what lies below."""
LEAST_SHARE = 0.05
"""Of those frames; what is seen in fewer is chance. In the human sets each pixel of the goal is uncovered in 36 % or more."""


def pusht_goal(buffer: ReplayBuffer, camera: str) -> Callable[[np.ndarray], np.ndarray]:
    """What turns frames (n, H, W, 3) uint8 of a Push-T camera into the same frames without the goal.

    Raises:
        ValueError: here, if no goal is drawn in the camera; later, if one is drawn elsewhere than in most frames.
    """
    green = goal_levels(buffer, camera)  # (H, W)
    if not green.any():
        raise ValueError(f"{buffer.path}: there is no light green goal in {camera}, so nothing can be painted out")

    def paint(frames: np.ndarray) -> np.ndarray:
        levels, on_line = green_levels(frames)
        strange = on_line & (levels > LEVELS // 2) & (green == 0)  # (n, H, W)
        if strange.any():
            _, row, column = np.argwhere(strange)[0]
            raise ValueError(
                f"{buffer.path}: {camera} shows green at pixel ({row}, {column}), where most frames show no goal; "
                "one that moves cannot be painted out"
            )
        return remove_green(frames, green)

    return paint


def goal_levels(buffer: ReplayBuffer, camera: str) -> np.ndarray:
    """(H, W) how green each pixel is where nothing lies on it, 0 (white) to LEVELS."""
    height, width = buffer.fields[camera].shape[:2]
    counts = np.zeros((LEVELS + 1, height * width), np.int64)
    stride = max(1, buffer.num_steps // FRAMES_LOOKED_AT)
    num_frames = 0
    for start, stop in buffer.blocks(camera):
        first = -start % stride
        frames = to_uint8(buffer.read(camera, start, stop)[first::stride], f"{buffer.path}: {camera}", start + first)
        num_frames += len(frames)
        levels, on_line = green_levels(frames)
        for level, seen in zip(levels.reshape(-1, height * width), on_line.reshape(-1, height * width), strict=True):
            counts[level[seen], np.flatnonzero(seen)] += 1
    often = counts.max(axis=0) >= LEAST_SHARE * num_frames
    return np.where(often, counts.argmax(axis=0), 0).reshape(height, width)


def green_levels(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(how green, whether it is a mixture of white and green at all) of each pixel of frames (..., 3)."""
    red, green, blue = np.moveaxis(frames.astype(np.int16), -1, 0)
    level = 255 - red
    expected = WHITE[1] - level * ((WHITE[1] - GREEN[1]) / LEVELS)
    on_line = (np.abs(blue - red) <= 1) & (np.abs(green - expected) <= 1) & (level <= LEVELS)
    return np.where(on_line, level, 0), on_line


def remove_green(frames: np.ndarray, green: np.ndarray) -> np.ndarray:
    """Frames (n, H, W, 3) uint8 with white where the goal shone through; `green` (H, W) as from goal_levels."""
    goal = green > 0
    inside = frames[:, goal].astype(np.int64)  # (n, P, 3)
    # Flat colours make few distinct pixels: each is explained once.
    codes = ((green[goal] * 256 + inside[..., 0]) * 256 + inside[..., 1]) * 256 + inside[..., 2]  # (n, P)
    distinct, where = np.unique(codes, return_inverse=True)
    shares = np.array([remaining_green(*_decoded(int(code))) for code in distinct])
    painted = inside + shares[where.reshape(codes.shape)][..., None] * (WHITE - GREEN)
    out = frames.copy()
    out[:, goal] = np.clip(np.rint(painted), 0, 255).astype(np.uint8)
    return out


def _decoded(code: int) -> tuple[tuple[int, int, int], int]:
    return (code >> 16 & 255, code >> 8 & 255, code & 255), code >> 24


@cache
def remaining_green(colour: tuple[int, int, int], level: int) -> float:
    """h: the share of green in a pixel of this colour, at most that of the uncovered goal, level / LEVELS.

    Of all mixtures of up to three covers with what lies below, the one that meets the colour best; each colour costs.
    """
    most, pixel = level / LEVELS, np.array([*colour, 1.0])
    best_score, best = np.inf, 0.0
    for colours, solve, below, cost in _mixtures():
        if cost * COST_UNIT >= best_score:
            continue
        shares = solve @ pixel  # (K,)
        green, white = (shares[below.index(name)] if name in below else 0.0 for name in ("green", "white"))
        if shares.min() < -0.01 or green > most + 0.02 or white > 1 - most + 0.02:
            continue
        score = max(np.abs(colours.T @ shares - pixel[:3]).max() - ROUNDING, 0.0) + cost * COST_UNIT
        if score < best_score:
            best_score, best = score, float(np.clip(green, 0.0, most))
    return best


@cache
def _mixtures() -> list[tuple[np.ndarray, np.ndarray, tuple[str, ...], float]]:
    """(colours (K, 3), what maps (red, green, blue, 1) to K shares by least squares, names of those below, cost)."""
    mixtures = []
    for below in ((), ("green",), ("white",), ("green", "white")):
        base = [GREEN if name == "green" else WHITE for name in below]
        for num_covers in range(4):
            for covers in itertools.combinations(range(len(COVERS)), num_covers):
                colours = np.array([*base, *COVERS[list(covers)]])
                if not 1 <= len(colours) <= 4:  # three channels and the sum determine four shares
                    continue
                weight = 1000.0  # of the sum, against levels of 255
                system = np.vstack([colours.T, np.full(len(colours), weight)])  # (4, K)
                solve = np.linalg.pinv(system) * [1.0, 1.0, 1.0, weight]
                cost = len(below) + sum(COSTS[i] for i in covers)
                mixtures.append((colours, solve, below, cost))
    return sorted(mixtures, key=lambda mixture: mixture[-1])


PAINTERS = {"pusht_goal": pusht_goal}
"""What `diffpolicy data merge --paint-out` knows: name -> function of a store and a camera."""


def painter(name: str) -> Callable[[ReplayBuffer, str], Callable[[np.ndarray], np.ndarray]]:
    """The painter of this name; ValueError with the nearest one where there is none."""
    if name not in PAINTERS:
        raise unknown_name("--paint-out", name, PAINTERS)
    return PAINTERS[name]
