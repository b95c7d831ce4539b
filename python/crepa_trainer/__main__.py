"""`python -m crepa_trainer` is `crepa-train`, for launchers that start modules."""

import os
import sys

from .cli import main

if "TORCHELASTIC_ERROR_FILE" in os.environ:
    from torch.distributed.elastic.multiprocessing.errors import record

    # torchrun then ends with the traceback of the process that failed first.
    sys.exit(record(main)())
sys.exit(main())
