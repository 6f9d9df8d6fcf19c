"""Kinds of optimizers, and the factor on their learning rate."""
