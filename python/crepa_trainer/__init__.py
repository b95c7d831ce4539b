"""The reference trainer of crepa-kernels; its command is `crepa-train`."""
