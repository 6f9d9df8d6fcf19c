"""From the history of measurements to a law with errors, and to the decision on a factor: floats only."""
