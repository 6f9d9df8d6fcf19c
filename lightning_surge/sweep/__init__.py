"""Grids of runs: every batch size at every learning rate, each run in a process of its own."""
