"""On PYTHONPATH of what ``python -m crepa_kernels.integrations.simpletuner`` starts, for ``sitecustomize``."""
