"""What people see of a sweep: the live display, trackers, the table at the end."""
