"""What users pass and checkpoints hold, checked before use; missing libraries; how answers look. No torch."""
