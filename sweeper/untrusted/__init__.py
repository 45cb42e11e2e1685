"""Where programs run that a model wrote. Only `jail.py` runs in their process, as a script; nothing imports it."""
