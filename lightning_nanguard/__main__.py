"""``python -m lightning_nanguard``: the ``nanguard`` command."""

from __future__ import annotations

import sys

from lightning_nanguard.cli.main import main

sys.exit(main())
