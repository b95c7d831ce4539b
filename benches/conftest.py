"""What a stored result says of the machine: its processor and versions, not its name."""

from __future__ import annotations

from typing import Any

import torch


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    cpu = machine_info.get("cpu", {})
    kept = {
        "python_version": machine_info.get("python_version"),
        "system": machine_info.get("system"),
        "cpu": {key: cpu.get(key) for key in ("brand_raw", "count", "arch")},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "bf16_products": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    }
    machine_info.clear()
    machine_info.update(kept)
