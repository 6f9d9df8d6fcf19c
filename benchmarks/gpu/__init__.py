"""What the callback costs on a GPU, and whether it measures the same there."""
