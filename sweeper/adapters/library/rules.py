"""The rules, by name: a new one is a file of its own and its line here and in `asked.RULES`."""

from sweeper.adapters.library.arrow import arrow
from sweeper.adapters.library.centroid import centroid
from sweeper.adapters.library.folding import uniform
from sweeper.adapters.library.lorahub import lorahub
from sweeper.adapters.library.made import Rule
from sweeper.adapters.library.mole import mole

MAKERS: dict[str, Rule] = {"uniform": uniform, "centroid": centroid, "arrow": arrow, "lorahub": lorahub, "mole": mole}
