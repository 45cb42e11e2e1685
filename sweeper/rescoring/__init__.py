"""Saved adapters scored on any tasks without training, by us or by lm-eval. `evaluate.py` is the command."""
