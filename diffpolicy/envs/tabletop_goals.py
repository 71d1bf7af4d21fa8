"""What can be asked on a table of four blocks and four zones: the goals, when each is reached, and the words for it.

A goal names a block and where it belongs. Goals of one block, in this order, and their rules (x to the right, y down, px):

    zone     "push the red block to the green zone"         its centre is within ZONE_RADIUS of the zone's centre
    edge     "push the red block to the left edge"          its centre is within EDGE_REACH of that edge of the table, and
                                                            farther than CORNER from the two edges that meet it
    beside   "push the red block left of the yellow one"    its centre is within BESIDE_RADIUS of the point that lies
                                                            BESIDE_DISTANCE to the left of the other block's centre

and for all three: the block was pushed, it lies at least MOVED from where the episode found it. So red left of yellow is
not yellow right of red: what counts is who came. Colour and shape go together (red square, blue disc, yellow triangle,
purple diamond), so that either names a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from diffpolicy.envs.base import Wordings
from diffpolicy.envs.table_picture import BLOCK_COLOURS, ZONE_COLOURS
from diffpolicy.envs.table_world import RAIL_INSET, TABLE

ZONE_RADIUS = 60.0
EDGE_REACH = 90.0
EDGE_TARGET = RAIL_INSET + 35.0
"""How far from the edge a block is meant to come to rest."""
CORNER, CORNER_MARGIN = 160.0, 10.0
BESIDE_DISTANCE, BESIDE_RADIUS = 90.0, 36.0
MOVED = 30.0
MIN_WAY = 40.0
"""Least way of an asked block to where its goal begins, px."""
TOLERANCE = 6.0
"""By how much a push may miss its line without reaching another goal than the asked one, px."""
NUM_POINTS = 16
"""Points on a block's way at which this is looked at."""

BLOCKS, ZONES = tuple(BLOCK_COLOURS), tuple(ZONE_COLOURS)
SHAPES = MappingProxyType({"red": "square", "blue": "disc", "yellow": "triangle", "purple": "diamond"})
EDGES = ("left", "right", "top", "bottom")
DIRECTIONS = MappingProxyType({"left": (-1.0, 0.0), "right": (1.0, 0.0), "above": (0.0, -1.0), "below": (0.0, 1.0)})
HELD_OUT_ZONES = frozenset({("red", "cyan"), ("blue", "green"), ("yellow", "orange"), ("purple", "pink")})
"""Block and zone that no demonstration brings together; each colour of both is missing one partner."""
HELD_OUT_DIRECTIONS = frozenset({("red", "above"), ("blue", "left"), ("yellow", "below"), ("purple", "right")})
"""Block and the side of another block on which no demonstration puts it."""


@dataclass(frozen=True)
class Goal:
    """A block and where it belongs."""

    block: str
    kind: str
    """`zone`, `edge` or `beside`."""
    place: str
    """Name of the zone, the edge or the direction."""
    other: str = ""
    """beside: the block that the place is seen from."""

    @property
    def is_held_out(self) -> bool:
        """Whether demonstrations leave this combination out."""
        pairs = {"zone": HELD_OUT_ZONES, "beside": HELD_OUT_DIRECTIONS}.get(self.kind, ())
        return (self.block, self.place) in pairs

    def wordings(self) -> Wordings:
        """Sentences that ask for this goal; the unseen ones are made of words that other seen ones use."""
        block, shape = self.block, SHAPES[self.block]
        if self.kind == "zone":
            return Wordings(
                seen=(
                    f"push the {block} block to the {self.place} zone",
                    f"move the {block} {shape} into the {self.place} circle",
                    f"bring the {shape} to the {self.place} zone",
                    f"the {block} block goes into the {self.place} zone",
                    f"slide the {block} {shape} over to {self.place}",
                ),
                unseen=(
                    f"slide the {block} block into the {self.place} circle",
                    f"bring the {block} {shape} over to the {self.place} zone",
                    f"move the {shape} to the {self.place} circle",
                ),
            )
        if self.kind == "edge":
            return Wordings(
                seen=(
                    f"push the {block} block to the {self.place} edge",
                    f"move the {block} {shape} to the {self.place} side of the table",
                    f"bring the {shape} to the {self.place} edge",
                    f"the {block} block goes to the {self.place} edge of the table",
                    f"slide the {block} {shape} over to the {self.place} side",
                ),
                unseen=(
                    f"slide the {block} block to the {self.place} edge",
                    f"bring the {block} {shape} over to the {self.place} edge of the table",
                    f"move the {shape} to the {self.place} side",
                ),
            )
        other, other_shape = self.other, SHAPES[self.other]
        at = {"left": "left of", "right": "right of"}.get(self.place, self.place)
        return Wordings(
            seen=(
                f"push the {block} block {at} the {other} one",
                f"move the {block} {shape} {at} the {other} {other_shape}",
                f"bring the {shape} {at} the {other_shape}",
                f"the {block} block goes {at} the {other} block",
                f"slide the {block} {shape} over, {at} the {other} one",
            ),
            unseen=(
                f"slide the {block} block {at} the {other_shape}",
                f"bring the {block} {shape} over, {at} the {other} block",
                f"move the {shape} {at} the {other} one",
            ),
        )


def _goals_of(block: str) -> list[Goal]:
    others = [other for other in BLOCKS if other != block]
    return [
        *(Goal(block, "zone", zone) for zone in ZONES),
        *(Goal(block, "edge", edge) for edge in EDGES),
        *(Goal(block, "beside", direction, other) for other in others for direction in DIRECTIONS),
    ]


GOALS: tuple[Goal, ...] = tuple(goal for block in BLOCKS for goal in _goals_of(block))
"""All 80, 20 a block, in the order in which the functions below give numbers of goals."""
WORDINGS = MappingProxyType({goal.wordings().seen[0]: goal.wordings() for goal in GOALS})
"""Name of each goal -> its sentences."""
NAMES = tuple(WORDINGS)
HELD_OUT = tuple(name for name, goal in zip(NAMES, GOALS, strict=True) if goal.is_held_out)

_OTHERS = np.array([[j for j in range(len(BLOCKS)) if j != i] for i in range(len(BLOCKS))])  # (4, 3)
_OFFSETS = BESIDE_DISTANCE * np.array(list(DIRECTIONS.values()))  # (4, 2)
_RADII = np.array([ZONE_RADIUS] * len(ZONES) + [BESIDE_RADIUS] * len(DIRECTIONS) * (len(BLOCKS) - 1))  # (16,)


def _centres(block_xy: np.ndarray, zone_xy: np.ndarray) -> np.ndarray:
    """Middles of the discs in which the blocks' goals are reached, zones first: (4 blocks, 16, 2)."""
    zones = np.broadcast_to(zone_xy, (len(BLOCKS), len(ZONES), 2))
    beside = (block_xy[_OTHERS][:, :, None] + _OFFSETS).reshape(len(BLOCKS), -1, 2)
    return np.concatenate([zones, beside], axis=1)


def targets(block_xy: np.ndarray, zone_xy: np.ndarray) -> np.ndarray:
    """Where each goal wants its block, (4 blocks, 20 goals, 2), px; at an edge straight ahead of the block.

    Args:
        block_xy, zone_xy: centres of all blocks and zones, (4, 2) each.
    """
    discs = _centres(block_xy, zone_xy)
    x, y = np.clip(block_xy, CORNER + CORNER_MARGIN, TABLE - CORNER - CORNER_MARGIN).T  # (4,) each
    near, far = np.full_like(x, EDGE_TARGET), np.full_like(x, TABLE - EDGE_TARGET)
    edges = np.stack([np.stack(p, axis=-1) for p in ((near, y), (far, y), (x, near), (x, far))], axis=1)  # (4, 4, 2)
    return np.concatenate([discs[:, : len(ZONES)], edges, discs[:, len(ZONES) :]], axis=1)


def shortfalls(points: np.ndarray, block_xy: np.ndarray, zone_xy: np.ndarray) -> np.ndarray:
    """How far blocks at `points` (4 blocks, n, 2) would be from reaching each of their goals: (4, n, 20), px; 0 inside.

    The other blocks stand at block_xy; whether a block has been moved is not looked at.
    """
    away = np.linalg.norm(points[:, :, None] - _centres(block_xy, zone_xy)[:, None], axis=-1)  # (4, n, 16)
    discs = np.maximum(away - _RADII, 0.0)
    edges = np.hypot(*_edge_gaps(points))
    return np.concatenate([discs[..., : len(ZONES)], edges, discs[..., len(ZONES) :]], axis=-1)


def _edge_gaps(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far points (4, n, 2) are from the reach of each edge, and how deep in its corners: (4, n, 4 edges), px, from 0."""
    x, y = points[..., 0], points[..., 1]
    to_edge = np.stack([x, TABLE - x, y, TABLE - y], axis=-1)
    in_corner = np.maximum(CORNER - np.minimum(to_edge[..., 0::2], to_edge[..., 1::2]), 0.0)  # along x, along y
    return np.maximum(to_edge - EDGE_REACH, 0.0), in_corner[..., [1, 1, 0, 0]]  # at the left edge, y tells of corners


def allowed_goals(block_xy: np.ndarray, zone_xy: np.ndarray, *, behind: float, reach: float) -> np.ndarray:
    """Which goals this scene allows: (80,) bool, in the order of GOALS.

    A straight push reaches them: over at least MIN_WAY, with room for block and pusher beside the other blocks. And no
    allowed goal is met on the way to another, so that a block which goes where it is told reaches that goal alone.

    Args:
        behind: distance from block to pusher, centre to centre, where a push begins, px.
        reach: largest distance from a block's centre to its rim, px.
    """
    wanted = targets(block_xy, zone_xy)  # (4, 20, 2)
    starts = np.broadcast_to(block_xy[:, None], wanted.shape)
    way = wanted - starts
    length = np.linalg.norm(way, axis=-1, keepdims=True)
    hand = starts - behind * way / np.maximum(length, 1e-9)  # the pusher's place at the start of a push
    own = np.eye(len(BLOCKS), dtype=bool)[:, None]  # (4, 1, 4)
    others = np.broadcast_to(block_xy, (*wanted.shape[:2], len(BLOCKS), 2))  # (4, 20, 4, 2)

    from_start = others - starts[:, :, None]
    share = np.clip((from_start * way[:, :, None]).sum(-1) / np.maximum(length**2, 1e-9), 0.0, 1.0)
    beside_way = np.linalg.norm(from_start - share[..., None] * way[:, :, None], axis=-1)  # (4, 20, 4)
    beside_hand = np.linalg.norm(others - hand[:, :, None], axis=-1)
    free = (((beside_way >= 1.75 * reach) & (beside_hand >= behind)) | own).all(-1)  # (4, 20)
    on_table = ((hand > 20) & (hand < TABLE - 20)).all(-1)

    # Where the block first is at its goal: a disc's rim on the way to its centre, or the edge's reach and no corner.
    missing = shortfalls(block_xy[:, None], block_xy, zone_xy)[:, 0]  # (4, 20)
    share = 1.0 - np.insert(_RADII, [len(ZONES)] * len(EDGES), 0.0) / length[..., 0]
    too_far, in_corner = (gap[:, 0] for gap in _edge_gaps(block_xy[:, None]))  # (4 blocks, 4 edges) each
    beyond = EDGE_REACH - EDGE_TARGET
    share[:, len(ZONES) : len(ZONES) + len(EDGES)] = np.maximum(
        too_far / (too_far + beyond), in_corner / (in_corner + CORNER_MARGIN)
    )
    steps = np.linspace(0.0, 1.0, NUM_POINTS)[:, None] * share[:, :, None, None]  # (4, 20, NUM_POINTS, 1)
    points = starts[:, :, None] + steps * way[:, :, None]  # from the start to there, (4, 20, NUM_POINTS, 2)
    near = shortfalls(points.reshape(len(BLOCKS), -1, 2), block_xy, zone_xy).reshape(*points.shape[:3], -1) <= TOLERANCE
    near[:, range(near.shape[1]), :, range(near.shape[1])] = False  # its own goal does not count
    pushed = (steps * length[:, :, None])[..., 0] >= MOVED - TOLERANCE  # (4, 20, NUM_POINTS)
    met = (near & pushed[..., None]).any(2)  # (4, 20 goals, 20 goals that the block meets on the way)
    possible = free & on_table & (missing >= MIN_WAY)
    return np.concatenate([_undisturbed(*of_block) for of_block in zip(possible, met, length[..., 0], strict=True)])


def _undisturbed(possible: np.ndarray, met: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Goals of one block, (20,) bool each, none of which is met on the way to another: zones first, and near before far."""
    chosen = np.zeros(len(possible), dtype=bool)
    for k in sorted(np.flatnonzero(possible), key=lambda k: (k >= len(ZONES), k >= len(ZONES) + len(EDGES), length[k])):
        chosen[k] = not (met[k] & chosen).any() and not (met[:, k] & chosen).any()
    return chosen
