"""Batch-size warm-up against constant batch sizes, over equal examples."""
