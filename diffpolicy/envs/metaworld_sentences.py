"""What the 50 tasks of Meta-World are called in words.

Meta-World itself (3.1.1) ships task names only; these sentences are ours. They say what a task's success asks for, seen
from the robot: forward is away from it, left and right are its own, clockwise is as seen by it or, for what turns lying
flat, from above. The unseen wordings are other sentences made of the words of the seen ones of the same task.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from diffpolicy.envs.base import Wordings


def _wordings(text: str) -> Wordings:
    """One sentence a line; those marked with * are unseen."""
    lines = [line.strip() for line in text.strip().splitlines()]
    seen = tuple(line for line in lines if not line.startswith("*"))
    return Wordings(seen=seen, unseen=tuple(line[1:].strip() for line in lines if line.startswith("*")))


_TEXT = {
    "assembly": """
        put the ring on the peg
        place the ring over the peg
        pick up the ring and put it on the peg
        lower the ring onto the peg
        fit the ring over the peg
        * pick up the ring and fit it on the peg
        * lower the ring over the peg
    """,
    "basketball": """
        put the ball into the basket
        drop the basketball into the hoop
        pick up the ball and dunk it in the basket
        take the basketball to the hoop and drop it in
        * drop the ball into the basket
        * pick up the basketball and put it into the hoop
    """,
    "bin-picking": """
        move the block to the blue bin
        pick the block out of the red bin and put it in the blue bin
        take the block from the red bin to the blue one
        put the block into the blue bin
        carry the block over to the other bin
        * take the block out of the red bin and put it into the blue one
        * carry the block to the blue bin
    """,
    "box-close": """
        close the box with the lid
        put the lid on the box
        pick up the lid and close the box
        place the cover on top of the box
        cover the box with its lid
        * pick up the cover and close the box
        * place the lid on top of the box
    """,
    "button-press": """
        press the button from the front
        push the red button in
        reach forward and press the button
        press the red button on the front of the box
        * push the button in from the front
        * reach forward and push the red button
    """,
    "button-press-topdown": """
        press the button from above
        push the button down
        press down on the red button
        reach above the box and press the button down
        push the red button on top of the box
        * push down on the button from above
        * press the red button on top of the box
    """,
    "button-press-topdown-wall": """
        reach over the wall and press the button from above
        push the button behind the wall down
        go over the wall and press down on the button
        press the red button behind the wall from above
        * go over the wall and push the red button down
        * press down on the button behind the wall
    """,
    "button-press-wall": """
        press the button behind the wall from the front
        reach past the wall and push the button in
        go past the wall and press the red button
        push in the red button that is behind the wall
        * reach past the wall and press the red button
        * go past the wall and push the button in from the front
    """,
    "coffee-button": """
        press the button of the coffee machine
        start the coffee machine
        make a coffee
        push the button on the coffee machine
        press the coffee button
        * push the coffee button
        * press the button on the machine
    """,
    "coffee-pull": """
        pull the mug away from the coffee machine
        take the mug from the coffee machine
        pull the cup out from the machine
        move the mug away from the machine
        drag the cup away from the coffee machine
        * drag the mug away from the machine
        * pull the cup away from the coffee machine
    """,
    "coffee-push": """
        push the mug under the coffee machine
        move the mug to the coffee machine
        slide the cup under the machine
        put the mug below the coffee machine
        push the cup towards the machine
        * slide the mug under the coffee machine
        * move the cup towards the coffee machine
    """,
    "dial-turn": """
        turn the dial
        rotate the dial clockwise
        turn the dial clockwise
        twist the knob
        rotate the knob on the table
        * twist the dial clockwise
        * turn the knob clockwise
    """,
    "disassemble": """
        take the ring off the peg
        lift the ring off the peg
        pull the ring up from the peg
        remove the ring from the peg
        grab the ring and take it off the peg
        * grab the ring and lift it off the peg
        * pull the ring off the peg
    """,
    "door-close": """
        close the door
        push the door shut
        swing the door closed
        shut the door
        push the open door until it is closed
        * swing the door shut
        * push the door until it is shut
    """,
    "door-lock": """
        lock the door
        turn the lock clockwise
        rotate the lock to lock the door
        push the lever of the lock down
        lock the door by turning the lever down
        * lock the door by turning the lock clockwise
        * push the lever down to lock the door
    """,
    "door-open": """
        open the door
        pull the door open
        grab the handle and open the door
        swing the door open by its handle
        * pull the door open by its handle
        * swing the door open by the handle
    """,
    "door-unlock": """
        unlock the door
        turn the lock counterclockwise
        rotate the lock to unlock the door
        unlock the door by turning the lever up
        * turn the lever up to unlock the door
        * rotate the lock counterclockwise
    """,
    "drawer-close": """
        close the drawer
        push the drawer shut
        shut the drawer
        push the drawer in
        slide the drawer closed
        * slide the drawer shut
        * push the drawer closed
    """,
    "drawer-open": """
        open the drawer
        pull the drawer open
        pull the drawer out by its handle
        slide the drawer open
        grab the handle and open the drawer
        * grab the handle and pull the drawer open
        * slide the drawer out by its handle
    """,
    "faucet-close": """
        close the faucet
        turn the faucet off
        turn off the tap
        turn the faucet clockwise
        close the tap
        * turn the tap off
        * turn the tap clockwise
    """,
    "faucet-open": """
        open the faucet
        turn the faucet on
        turn on the tap
        turn the faucet counterclockwise
        open the tap
        * turn the tap on
        * turn the tap counterclockwise
    """,
    "hammer": """
        hammer the nail in
        hit the nail with the hammer
        pick up the hammer and drive the nail in
        drive the nail into the wood with the hammer
        * pick up the hammer and hit the nail
        * hammer the nail into the wood
    """,
    "hand-insert": """
        lower the block into the hole
        put the hand with the block into the hole
        reach down into the hole with the block
        insert the block into the hole in the table
        * put the block down into the hole
        * reach into the hole in the table with the block
    """,
    "handle-press": """
        press the handle down
        push the handle down
        push down on the handle
        press the handle all the way down
        lower the handle
        * push the handle all the way down
        * press down on the handle
    """,
    "handle-press-side": """
        press the handle down from the side
        push the handle at the side down
        press down on the handle on the side of the box
        push down the handle from the side
        * push the handle down from the side
        * press the handle on the side of the box down
    """,
    "handle-pull": """
        pull the handle up
        lift the handle
        raise the handle
        pull up the handle all the way
        * raise the handle all the way up
        * lift the handle up
    """,
    "handle-pull-side": """
        pull the handle up from the side
        lift the handle at the side
        raise the handle on the side of the box
        pull up the handle from the side
        * lift the handle from the side
        * pull up the handle on the side of the box
    """,
    "lever-pull": """
        pull the lever up
        lift the lever
        raise the lever
        pull up the lever until it stands upright
        turn the lever upwards
        * lift the lever until it stands upright
        * turn the lever up
    """,
    "peg-insert-side": """
        push the peg into the hole from the side
        insert the peg into the box from the side
        pick up the peg and put it into the hole in the box
        put the green peg into the side of the box
        * pick up the green peg and insert it into the box
        * push the peg into the side of the box
    """,
    "peg-unplug-side": """
        unplug the peg
        pull the peg out of the box from the side
        pull the plug out sideways
        unplug the peg from the side of the box
        * pull the peg out sideways
        * unplug the plug from the box
    """,
    "pick-out-of-hole": """
        pick the puck out of the hole
        take the puck out of the hole
        lift the puck up from the hole
        grab the puck in the hole and lift it up
        * grab the puck and take it out of the hole
        * lift the puck out of the hole
    """,
    "pick-place": """
        pick up the puck and bring it to the goal
        lift the puck to the goal
        grab the puck and carry it to the goal
        carry the puck up to the goal
        * pick up the puck and carry it to the goal
        * grab the puck and bring it up to the goal
    """,
    "pick-place-wall": """
        pick up the puck and bring it over the wall to the goal
        carry the puck over the wall to the goal
        lift the puck over the wall
        take the puck to the goal behind the wall
        * lift the puck over the wall and bring it to the goal
        * carry the puck to the goal behind the wall
    """,
    "plate-slide": """
        slide the plate into the net
        push the plate forward into the net
        move the plate forward until it is in the net
        push the plate away into the net
        * slide the plate forward into the net
        * move the plate into the net
    """,
    "plate-slide-back": """
        slide the plate back out of the net
        pull the plate out of the net
        pull the plate back towards the robot
        move the plate back from the net
        * pull the plate back out of the net
        * move the plate out of the net towards the robot
    """,
    "plate-slide-back-side": """
        slide the plate sideways out of the net
        move the plate to the right out of the net
        pull the plate to the right
        push the plate out of the net to the right
        * move the plate sideways out of the net
        * slide the plate to the right out of the net
    """,
    "plate-slide-side": """
        slide the plate to the left into the net
        push the plate sideways into the net
        move the plate left into the net
        slide the plate sideways to the net on the left
        * push the plate to the left into the net
        * slide the plate sideways into the net
    """,
    "push": """
        push the puck to the goal
        slide the puck to the goal
        move the puck across the table to the goal
        shove the puck along the table to the goal
        * slide the puck across the table to the goal
        * push the puck along the table to the goal
    """,
    "push-back": """
        pull the block back to the goal
        push the block back towards the robot
        drag the block back to the goal
        move the block closer to the robot
        * pull the block back towards the robot
        * drag the block closer to the robot
    """,
    "push-wall": """
        push the puck around the wall to the goal
        push the puck past the wall
        slide the puck around the wall
        move the puck past the wall to the goal
        * slide the puck past the wall to the goal
        * move the puck around the wall
    """,
    "reach": """
        reach the goal
        move the hand to the goal
        bring the gripper to the goal
        go to the marked point
        move to the goal
        * move the gripper to the goal
        * bring the hand to the marked point
    """,
    "reach-wall": """
        reach the goal behind the wall
        move the hand over the wall to the goal
        reach over the wall to the goal
        bring the gripper to the goal behind the wall
        * move the gripper over the wall to the goal
        * bring the hand to the goal behind the wall
    """,
    "shelf-place": """
        put the block on the shelf
        place the block on the shelf
        pick up the block and put it on the shelf
        lift the blue block onto the shelf
        set the blue block on the shelf
        * pick up the blue block and place it on the shelf
        * lift the block onto the shelf
    """,
    "soccer": """
        kick the ball into the goal
        push the football into the goal
        score a goal with the ball
        roll the ball into the goal
        * push the ball into the goal
        * score a goal with the football
    """,
    "stick-pull": """
        pull the thermos with the stick
        pick up the stick and pull the thermos
        use the stick to pull the thermos
        grab the stick and pull the thermos to the goal
        * use the stick to pull the thermos to the goal
        * grab the stick and pull the thermos
    """,
    "stick-push": """
        push the thermos with the stick
        pick up the stick and push the thermos
        use the stick to push the thermos
        grab the stick and push the thermos to the goal
        * use the stick to push the thermos to the goal
        * grab the stick and push the thermos
    """,
    "sweep": """
        sweep the block to the right edge of the table
        sweep the block across the table to the right
        push the block to the right edge
        brush the block to the edge of the table
        * brush the block across the table to the right edge
        * push the block to the right edge of the table
    """,
    "sweep-into": """
        sweep the block into the hole
        push the block into the hole
        sweep the block forward into the hole in the table
        brush the block into the hole
        * push the block into the hole in the table
        * brush the block forward into the hole
    """,
    "window-close": """
        close the window
        slide the window closed
        push the window to the left
        slide the window to the left to close it
        push the window shut
        * slide the window shut
        * push the window to the left to close it
    """,
    "window-open": """
        open the window
        slide the window open
        push the window to the right
        slide the window to the right to open it
        push the window open
        * push the window open to the right
        * push the window to the right to open it
    """,
}

SENTENCES: Mapping[str, Wordings] = MappingProxyType({task: _wordings(text) for task, text in _TEXT.items()})
"""Task, as Meta-World calls it without its version -> what is said of it, in alphabetic order."""
