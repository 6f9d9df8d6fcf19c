"""A training that is configured from a YAML file by LightningCLI."""
