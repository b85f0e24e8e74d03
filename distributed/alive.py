"""How far the training of this process is: marked by the loop, read by whoever watches the process."""

from dataclasses import dataclass


@dataclass
class Mark:
    """What changes while a training moves. Setting an attribute is all that it costs."""

    step: int = 0  # optimizer steps done
    beats: int = 0  # counts up with anything else that shows a training to move, such as a batch of an evaluation


MARK = Mark()
