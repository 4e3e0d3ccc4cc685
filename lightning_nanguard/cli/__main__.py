"""``python -m lightning_nanguard.cli``."""

from __future__ import annotations

import sys

from lightning_nanguard.cli.main import main

sys.exit(main())
