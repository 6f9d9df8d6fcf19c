"""How soon the callback knows the noise scale, and how well for one percent of the passes."""
