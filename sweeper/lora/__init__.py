"""What trains in the slots of a pack: its parameters, how they act on the frozen base, and how they are updated."""
