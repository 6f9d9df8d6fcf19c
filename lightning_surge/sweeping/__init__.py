"""A grid of (batch size, learning rate, seed) trained cell by cell: no torch and no Lightning in here."""
