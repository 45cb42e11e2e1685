"""Hydra plugins of the project: the default sweeper and the default launcher. Hydra imports these at every start."""
