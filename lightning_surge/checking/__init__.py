"""What users pass and what checkpoints hold, checked before it is used: no torch, nothing of this package."""
