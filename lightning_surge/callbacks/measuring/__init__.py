"""Which windows of a training are measured, and how."""
