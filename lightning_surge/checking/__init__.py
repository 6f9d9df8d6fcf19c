"""What users pass and checkpoints hold, checked before it is used; how answers look: no torch here."""
