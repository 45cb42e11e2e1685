"""What can be done with saved adapters after training: merged, combined, taken apart. `adapters.py` is the command."""
