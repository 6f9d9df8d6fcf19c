"""What users pass and checkpoints hold, checked before it is used; how answers look; libraries that may be missing: no torch here."""
