"""`python -m crepa_trainer` is `crepa-train`, for launchers that start modules."""

import sys

from .cli import main

sys.exit(main())
