"""How the gradients of a run's tasks lie to one another while it trains."""

COMPARED = "conflict.steps"  # column of a run: at how many steps its tasks' gradients were compared
