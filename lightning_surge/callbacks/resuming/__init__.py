"""Random streams and the places of loaders, kept so that a resumed run repeats itself bit for bit."""
