"""Synthetic tasks with labels, a file each: what a mixer can remember, in minutes on a CPU.

Importing this package makes them known to `data.task` of a recipe.
"""

from pha.tasks.flip_flop import FlipFlop
from pha.tasks.gist import Gist
from pha.tasks.induction import Induction
from pha.tasks.mqar import MQAR, ZoologyMQAR
from pha.tasks.parity import Parity
from pha.tasks.phone_book import PhoneBook
from pha.tasks.selective_copy import SelectiveCopy
from pha.tasks.task import IGNORE, TASKS, Drawn, Task, make_task, register_task

__all__ = [
    "IGNORE",
    "MQAR",
    "TASKS",
    "Drawn",
    "FlipFlop",
    "Gist",
    "Induction",
    "Parity",
    "PhoneBook",
    "SelectiveCopy",
    "Task",
    "ZoologyMQAR",
    "make_task",
    "register_task",
]
