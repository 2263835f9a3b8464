"""`python -m phiconv`."""

from __future__ import annotations

from phiconv.cli import main

if __name__ == "__main__":
    main()
