"""The physics of a table seen from above: a round pusher under position control, blocks, edges and a rail.

All lengths are pixels of a 512 x 512 table: x to the right, y down. The physics is quasi-static, as in Push-T
(Chi et al. 2023, arXiv:2303.04137): a block moves only while it is pushed. The rail stops blocks but not the pusher,
which can therefore always get behind a block: none is ever lost at an edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pymunk

TABLE = 512.0
PUSHER_RADIUS = 16.0
RAIL_INSET = 40.0
"""Distance of the rail from the table's edge; more than the pusher's width, so that it fits behind a block there."""

PHYSICS_HZ = 100
STIFFNESS, DAMPING = 100.0, 20.0
"""Position control of the pusher, in 1/s^2 and 1/s: critically damped, as in Push-T."""
MAX_SPEED = 500.0
"""Speed limit of the pusher's drive, px/s: 5 px in one physics step, so that it never jumps into a block."""
PUSHER_MASS = 10.0
"""In block masses: heavy enough to hardly notice a block, finite so that posts and edges stop it."""
FRICTION = 1.2
"""Of pusher and blocks; a contact has the product of the two. Rubber: a push at an angle does not slip off."""

_PUSHER, _BLOCK, _FIXED = 1, 2, 4

BlockShape = Callable[[pymunk.Body], pymunk.Shape]


def square(half: float) -> BlockShape:
    """A square block, from half its side, px."""
    return lambda body: pymunk.Poly.create_box(body, (2 * half, 2 * half))


def polygon(corners: Sequence[tuple[float, float]]) -> BlockShape:
    """A convex block, from its corners around its centre, px."""
    return lambda body: pymunk.Poly(body, list(corners))


def disc(radius: float) -> BlockShape:
    """A round block, px."""
    return lambda body: pymunk.Circle(body, radius)


class TableWorld:
    """Pusher and blocks as bodies that may be read and set at will; call renew() after setting them.

    Args:
        shapes: one for each block.
        moment: of inertia of every block, in block mass times px^2; infinite for blocks that never turn.
        control_hz: steps of `drive` in a second.
        post_radius: px; None for a table without a post.
    """

    def __init__(
        self, shapes: Sequence[BlockShape], *, moment: float, control_hz: float, post_radius: float | None = None
    ):
        self._physics_steps = round(PHYSICS_HZ / control_hz)
        self.pusher = pymunk.Body(PUSHER_MASS, math.inf)
        hand = pymunk.Circle(self.pusher, PUSHER_RADIUS)
        hand.filter = pymunk.ShapeFilter(categories=_PUSHER, mask=_BLOCK | _FIXED)
        self.blocks: list[pymunk.Body] = []
        solids = [hand]
        for make_shape in shapes:
            body = pymunk.Body(1.0, moment)
            solid = make_shape(body)
            solid.filter = pymunk.ShapeFilter(categories=_BLOCK, mask=_PUSHER | _BLOCK | _FIXED)
            self.blocks.append(body)
            solids.append(solid)
        for solid in solids:
            solid.friction = FRICTION
        ground = pymunk.Body(body_type=pymunk.Body.STATIC)
        for inset, stops in ((0.0, _PUSHER), (RAIL_INSET, _BLOCK)):
            low, high, thick = inset - 20, TABLE - inset + 20, 20.0
            for a, b in (((0, 0), (0, 1)), ((0, 1), (1, 1)), ((1, 1), (1, 0)), ((1, 0), (0, 0))):
                ends = [tuple(high if corner else low for corner in point) for point in (a, b)]
                wall = pymunk.Segment(ground, *ends, thick)
                wall.filter = pymunk.ShapeFilter(categories=_FIXED, mask=stops)
                solids.append(wall)
        self._post: pymunk.Circle | None = None
        if post_radius is not None:
            self._post = pymunk.Circle(ground, post_radius)
            self._post.filter = pymunk.ShapeFilter(categories=_FIXED, mask=_PUSHER | _BLOCK)
            solids.append(self._post)
        self._things = [self.pusher, *self.blocks, ground, *solids]
        self._space: pymunk.Space | None = None

    def place_post(self, xy: Sequence[float]) -> None:
        """Puts the post's centre to (x, y), px."""
        assert self._post is not None
        self._post.unsafe_set_offset(list(xy))

    def renew(self) -> None:
        """Puts everything into an empty space: no contact is remembered, so poses and velocities are all there is to know."""
        if self._space is not None:
            self._space.remove(*self._things)
        self._space = pymunk.Space()
        self._space.damping = 0.0  # quasi-static: what is not pushed stops at once
        self._space.add(*self._things)
        for body in (self.pusher, *self.blocks):
            # A step of no time clears the solver's hidden push-apart velocity and moves nothing.
            pymunk.Body.update_position(body, 0.0)

    def drive(self, target_x: float, target_y: float) -> None:
        """One control step of the pusher's position control and the physics."""
        pusher, space, dt = self.pusher, self._space, 1.0 / PHYSICS_HZ
        for _ in range(self._physics_steps):
            (x, y), (vx, vy) = pusher.position, pusher.velocity
            vx += (STIFFNESS * (target_x - x) - DAMPING * vx) * dt
            vy += (STIFFNESS * (target_y - y) - DAMPING * vy) * dt
            slow = min(1.0, MAX_SPEED / max(math.hypot(vx, vy), 1e-9)) * PUSHER_MASS / dt
            pusher.force = (vx * slow, vy * slow)  # velocities start at 0 (damping): this force gives (vx, vy)
            space.step(dt)
        self.renew()
