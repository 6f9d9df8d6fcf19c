"""What long trainings do to the callback."""
