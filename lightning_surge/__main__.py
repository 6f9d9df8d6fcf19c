"""`python -m lightning_surge`."""

import sys

from lightning_surge.cli import main

sys.exit(main())
