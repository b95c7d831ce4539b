"""Folders as runs leave them, with made-up numbers, and the settings of runs that make real ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from crepa_trainer.validation import save_clip


def row(step: int, **values: float | None) -> dict[str, Any]:
    base = {"loss": 1.0, "flow_loss": 0.8 + math.sin(step) / 10, "crepa_loss": 0.2, "crepa_similarity": 0.5}
    more = {"crepa_weight": 0.5, "learning_rate": 1e-4, "grad_norm_model": 0.2, "grad_norm_projector": 1.1}
    return {"step": step, **base, **more, "time": 1e9 + step, "seconds": 2.0, "memory": 2**30, **values}


def make_run(folder: Path, steps: int = 40, **settings: Any) -> Path:
    """A folder as a run leaves it, with clips at two steps and one look."""
    folder.mkdir(parents=True)
    given = {"model": "owner/wan", "max_train_steps": steps, "crepa_enabled": True, "crepa_block_index": 8, **settings}
    (folder / "settings.json").write_text(json.dumps(given))
    (folder / "run.json").write_text(json.dumps({"format": 1, "family": "wan", "model": "owner/wan", "total": steps}))
    status = {"format": 1, "phase": "done", "step": steps, "total": steps, "time": 1.0, "detail": "", "error": None}
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row(step)) + "\n" for step in range(steps)))
    for step in (10, 20):
        clips = folder / "validation" / f"step-{step:08d}"
        save_clip(np.full((5, 32, 48, 3), step, np.uint8), clips, "prompt-0")
        sample = {"file": "prompt-0.mp4", "strip": "prompt-0.png", "prompt": "a <b>cat</b>", "seed": 3}
        (clips / "samples.json").write_text(json.dumps([sample]))
    (folder / "looks").mkdir()
    look = {"clip": "</script><script>document.title='x'</script>", "matrix": [[0.9, 0.1], [0.2, None]]}
    (folder / "looks" / "step-00000010.json").write_text(json.dumps(look))
    return folder


def run_settings(models: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """As a file holds them, of a small LoRA with CREPA on the models of the fixture `models`."""
    settings = {
        "model": str(models / "wan"),
        "data": str(data),
        "resolutions": [[32, 48]],
        "frame_counts": [5],
        "lora_rank": 2,
        "mixed_precision": "no",
        "crepa_enabled": True,
        "crepa_block_index": 1,
        "crepa_encoder": str(models / "dinov2"),
        "crepa_encoder_image_size": 28,
    }
    return {**settings, **changes}
