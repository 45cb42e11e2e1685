"""Runs model-written programs in a sandbox. `jail.py` runs in their process, as a script; nothing imports it."""
