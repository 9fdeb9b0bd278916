"""`python -m tokenweave_models.tokenweave`: see runner/main.py."""

import sys

from tokenweave_models.tokenweave.runner.main import main

if __name__ == "__main__":
    sys.exit(main())
