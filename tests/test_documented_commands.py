"""The commands and tables of the documentation are those of the package."""

from __future__ import annotations

import functools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from crepa_trainer import families
from crepa_trainer.cli import main
from crepa_trainer.reporting.plan import CrepaMemory, projector_bytes
from crepa_trainer.reporting.table import readable_bytes

from benches.published import MODELS
from benches.scaling import lora_parameters, transformer_of
from crepa_kernels import CrepaConfig
from crepa_kernels.grid import plan_alignment
from crepa_kernels.loss import KEPT_BYTES
from crepa_kernels.models.families import FAMILIES, family_of

ROOT = Path(__file__).resolve().parents[1]
# E and the parameters of DINOv2 giant.
GIANT, GIANT_PARAMETERS = 1536, 1_136_480_768


def commands(page: str) -> list[list[str]]:
    """The words of each `crepa-train run` of a page, without what stands before it and comments."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    lines = re.findall(r"^(?: {4})?(?:crepa-train|torchrun .* -m crepa_trainer) (run .*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Fills with the settings of CREPA and the run that would be planned or made."""
    given: list[Any] = []
    monkeypatch.setattr("crepa_trainer.run.run", lambda *found, **_: given.append(found[:2]))
    monkeypatch.setattr("crepa_trainer.run.show_plan", lambda *found, **_: given.append(found[:2]))
    return given


def test_each_familys_commands_are_understood(started: list[Any]) -> None:
    for words in commands("docs/families.md"):
        assert main(words) == 0, words
    recommended = {row.name: row.block_index for row in FAMILIES}
    # Each is under its family's name.
    _, *parts = re.split(r"^# (\w+)\n", (ROOT / "docs/families.md").read_text(), flags=re.MULTILINE)
    under = zip(parts[::2], parts[1::2], strict=True)
    of_commands = [name for name, part in under for _ in re.findall(r"^crepa-train run ", part, re.MULTILINE)]
    assert set(of_commands) == set(families.TrainingFamily.known)
    for family, (settings, config) in zip(of_commands, started, strict=True):
        assert config.crepa_enabled
        assert config.crepa_block_index == recommended[family]
        assert (settings.task == "image2video") == ("I2V" in settings.model)
        assert (settings.expert is not None) == ("A14B" in settings.model)


@pytest.mark.parametrize("page", ["README.md", "README.ja.md", "docs/training.md", "docs/losses.md"])
def test_the_commands_of_the_trainers_pages_are_understood(
    page: str, started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs/training.md").read_text(), re.DOTALL)
    # What is taken from the model otherwise, which would be downloaded.
    (tmp_path / "config.json").write_text(json.dumps({**json.loads(example), "crepa_block_index": 8}))
    monkeypatch.chdir(tmp_path)
    every = commands(page)
    assert every
    for words in every:
        assert main(words) == 0, words
    assert len(started) == len(every)


def test_the_table_of_families_is_that_of_the_package() -> None:
    table = (ROOT / "docs/families.md").read_text().split("\n\n")[2].splitlines()[2:]
    rows = [[re.findall(r"`(\w+)`", cell) or [cell.strip()] for cell in line.strip("|").split("|")] for line in table]
    assert rows == [[[row.name], [row.transformer], list(row.block_lists), [str(row.block_index)]] for row in FAMILIES]


def memory_table() -> list[list[str]]:
    text = (ROOT / "docs/families.md").read_text()
    (table,) = re.findall(r"\| family \| parameters \|.*\n\|[-|]*\n((?:\|.*\n)+)", text)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert len(rows) == len(MODELS)
    return rows


def three_digits(value: int) -> str:
    return f"{value / 1e9:.3g} B" if value >= 1e9 else f"{value / 1e6:.3g} M"


@pytest.mark.slow
def test_the_documented_parameters_are_those_of_the_models() -> None:
    """Every transformer built without memory, and its LoRA as the trainer adds it."""
    for (title, every, trained, *_), model in zip(memory_table(), MODELS, strict=True):
        transformer = transformer_of(model)
        counted = sum(each.numel() for each in transformer.parameters())
        assert family_of(transformer).hidden_size(transformer.config) == model.width, title
        lora = lora_parameters(model, transformer)
        assert [every, trained] == [three_digits(counted), three_digits(lora)], title


def test_the_documented_memory_is_what_the_plan_predicts() -> None:
    for row, model in zip(memory_table(), MODELS, strict=True):
        name, _, _, tokens, projector, kept, teacher, total = row
        sizes = re.findall(r"[\d,]+", tokens)
        count, frames, height, width_of_grid = (int(size.replace(",", "")) for size in sizes)
        assert count == frames * height * width_of_grid, name
        grid = (height, width_of_grid)
        plan, half = plan_alignment("student", grid, grid), torch.bfloat16
        memory = CrepaMemory(
            projector=projector_bytes(model.width, GIANT),
            kept=KEPT_BYTES["torch"](plan, frames, model.width, GIANT, half, half, "cuda"),
            teacher=GIANT_PARAMETERS * 2,
        )
        said = [memory.projector, memory.kept, memory.teacher, memory.total]
        assert [projector, kept, teacher, total] == [readable_bytes(size) for size in said], name


def test_the_documented_grid_of_sdxls_middle_is_the_models() -> None:
    text = (ROOT / "docs/families.md").read_text()
    found = re.search(r"\((\d+) x (\d+) for SDXL at 1024 squared, (\d+) x (\d+) at 512\)", text)
    assert found is not None
    unet: Any = functools.partial(
        diffusers.UNet2DConditionModel,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
    )
    grids: list[str] = []
    with torch.device("meta"), torch.no_grad():
        model = unet()
        model.mid_block.register_forward_hook(lambda *given: grids.extend(str(side) for side in given[2].shape[2:]))
        for side in (1024, 512):
            model(torch.empty(1, 4, side // 8, side // 8), torch.ones(()), torch.empty(1, 5, 2048))
    assert list(found.groups()) == grids


PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_links_to_and_names_is_there(page: Path) -> None:
    text = page.read_text()
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}
    files = set(re.findall(r"`((?:crepa_kernels|python|csrc|tests|benches|docs)/[\w./]+)`", text))
    missing = {link for link in links if link and not (page.parent / link).exists()}
    missing |= {name for name in files if not (ROOT / name).exists() and "NAME" not in name and "DEVICE" not in name}
    assert missing == set()


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/index.md").read_text()
    assert [page.name for page in PAGES if page.name != "index.md" and f"{page.name})" not in index] == []


def test_the_documented_costs_of_the_losses_are_the_packages() -> None:
    """Of Wan 14B at 480p and 81 frames, with DINOv2 giant: 21 frames of 30 x 52 tokens."""
    page = (ROOT / "docs/losses.md").read_text()
    costs = dict(re.findall(r"^- \*\*(\S+)\*\* (?:.*\n  )+?- Cost: ((?:.+\n)+?)  - ", page, re.MULTILINE))
    (table,) = re.findall(r"\| loss \|.*\n\|[-|]*\n((?:\|.*\n)+)", page)
    assert list(costs) == re.findall(r"\*\*(\S+)\*\*", table)
    shown = re.sub(r"[*`]|\]\([^)]*\)|\[(?=\*)", "", "\n".join(re.findall(r"^\|.*", page, re.MULTILINE)))
    assert [row for row in shown.splitlines() if len(row) > 100] == []
    tokens, width = 21 * 30 * 52, 5120
    projection = 6 * tokens * width * GIANT  # forward, and two products backward
    irepa = CrepaConfig.from_dict({"crepa_enabled": True, "crepa_block_index": 8, "irepa_enabled": True})
    plain, convolution = (readable_bytes(projector_bytes(width, GIANT, config)) for config in (None, irepa))
    half, plan = torch.bfloat16, plan_alignment("student", (30, 52), (30, 52))
    kept = {keeps(plan, 21, width, width, half, half, "cuda", given=True) for keeps in KEPT_BYTES.values()}
    assert f"{projection / 1e12:.2f} TFLOP" in costs["CREPA"]
    assert f"{10 * tokens * GIANT**2 / 1e12:.2f} TFLOP" in costs["relational"]
    assert f"{9 * projection / 1e12:.1f} TFLOP" in costs["iREPA"]
    assert f"({convolution} there, instead of {plain})" in costs["iREPA"]
    assert {readable_bytes(each) for each in kept} == set(re.findall(r"\(([\d.]+ \w+) there", costs["LayerSync"]))
