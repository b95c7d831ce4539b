"""The ``torch`` backend: chunks of frames that fit a cache, in ATen calls and the extension's operators."""
