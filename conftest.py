"""What must be decided before torch and Triton are at work."""

import getpass
import hashlib
import os
import tempfile
from pathlib import Path

import torch

# Where there is no GPU, Triton kernels run through its interpreter, which it decides when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Inductor keeps what it compiled by the graph alone, and another state of our operators' shapes is not in that.
_sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("crepa_kernels/**/*.py")))
_state = hashlib.sha256(_sources).hexdigest()[:12]
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"torchinductor-{getpass.getuser()}-{_state}")
)
