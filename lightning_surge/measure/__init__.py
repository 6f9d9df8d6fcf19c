"""Gradients in, statistics out: what one measurement of noise and curvature takes and tells."""
