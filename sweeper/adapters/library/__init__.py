"""A library: adapters that were trained separately on one base, and rules that route or combine them for a task."""
