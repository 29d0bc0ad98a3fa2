"""``python -m pyro_vae``, the same as ``pyro-vae``."""

from __future__ import annotations

__all__: list[str] = []

import sys

from pyro_vae.cli import main

if __name__ == "__main__":
    sys.exit(main())
