"""The form in a browser: the documentation's quick setup, errors as one types, and the three views in step."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crepa_trainer.ui.form import FIELDS
from crepa_trainer.ui.guard import Folders
from crepa_trainer.ui.starting import save_settings
from playwright.sync_api import Page, WebSocketRoute, expect
from web_pages import PHONE, Server, page_server

COMMIT = "a" * 40
JSON, COMMAND = "Settings file (JSON)", "Command line"


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    hub = tmp_path_factory.mktemp("hub")
    for name, kept in (("whole", "*.json"), ("part", "model_index.json")):
        folder = hub / f"models--owner--{name}"
        for file in (models / "wan").rglob(kept):
            copy = folder / "snapshots" / COMMIT / file.relative_to(models / "wan")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(hub))
        # A proxy that is not there: what asks the network fails, and its test with it.
        patch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
        with page_server(tmp_path_factory.mktemp("runs"), folder=models) as served:
            yield served


def values_of(page: Page) -> dict[str, object]:
    found: dict[str, object] = json.loads(page.get_by_label(JSON).input_value())
    return found


def fill(page: Page, label: str, text: str) -> None:
    page.get_by_label(label, exact=True).fill(text)


def expect_json(page: Page, part: str) -> None:
    expect(page.get_by_label(JSON)).to_have_value(re.compile(re.escape(part)))


def test_the_quick_setup_of_crepas_documentation(server: Server, models: Path, visit: Callable[..., Page]) -> None:
    page = visit(f"{server.address}new")
    fill(page, "Model *", str(models / "wan"))
    page.get_by_label("Model *", exact=True).blur()
    # From the model's configs: the family's block, and the size that its pipeline takes when none is given.
    expect_json(page, '"crepa_block_index": 8')
    assert values_of(page)["resolutions"] == [[480, 832]]
    assert values_of(page)["frame_counts"] == [81]
    fill(page, "Data *", str(server.runs / "videos"))
    fill(page, "Output *", str(server.runs / "first"))
    fill(page, "Max Train Steps *", "100")
    page.get_by_role("switch", name="Enable CREPA").click()
    fill(page, "CREPA Block Index", "1")
    fill(page, "Weight", "0.5")
    fill(page, "Adjacent Distance", "1")
    fill(page, "Temporal Decay", "1.0")
    fill(page, "Vision Encoder", "dinov2_vitb14")
    expect_json(page, "dinov2_vitb14")
    expect(page.get_by_text("These settings can be used")).to_be_visible()
    values = values_of(page)
    assert values["crepa_enabled"] is True
    assert values["crepa_block_index"] == 1
    assert values["crepa_adjacent_tau"] == 1.0
    assert "--crepa_lambda=0.5" in page.get_by_label(COMMAND).input_value()

    fill(page, "File name", "first")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_text("Saved as")).to_be_visible()
    assert json.loads((server.runs / "first.json").read_text()) == values
    page.goto(f"{server.address}new?file=first.json")
    expect(page.get_by_label("Vision Encoder", exact=True)).to_have_value("dinov2_vitb14")
    assert values_of(page) == values


def test_a_hub_id_is_filled_in_from_the_cache_and_the_network_is_not_asked(
    server: Server, visit: Callable[..., Page]
) -> None:
    page = visit(f"{server.address}new")
    for name in ("owner/part", "owner/nothing", "no id at all"):
        fill(page, "Model *", name)
        page.get_by_label("Model *", exact=True).blur()
    fill(page, "Model *", "owner/whole")
    page.get_by_label("Model *", exact=True).blur()
    expect_json(page, '"crepa_block_index": 8')
    assert values_of(page) == {
        "model": "owner/whole", "crepa_block_index": 8, "resolutions": [[480, 832]], "frame_counts": [81],
    }  # fmt: skip
    expect(page.get_by_text("Filled in from the model: crepa_block_index, resolutions, frame_counts")).to_be_visible()


def test_errors_stand_at_the_field_as_one_types(server: Server, visit: Callable[..., Page]) -> None:
    page = visit(f"{server.address}new")
    fill(page, "Weight", "-1")
    wrong = page.get_by_role("alert").get_by_text("crepa_lambda = -1: weight of the loss; must be a number >= 0")
    expect(wrong).to_be_visible()
    fill(page, "Weight", "0.2")
    expect(wrong).to_be_hidden()
    page.get_by_role("button", name="Back to the default: Weight").click()
    expect(page.get_by_label(JSON)).not_to_have_value(re.compile("crepa_lambda"))


def test_file_and_command_fill_the_form(server: Server, visit: Callable[..., Page]) -> None:
    page = visit(f"{server.address}new")
    fill(page, JSON, '{"crepa_lambda": 0.25, "crepa_enabled": true, "hdr": "skip"}')
    expect(page.get_by_label("Weight", exact=True)).to_have_value("0.25")
    expect(page.get_by_role("switch", name="Enable CREPA")).to_be_checked()
    fill(page, COMMAND, "crepa-train run --crepa_lambda=0.75")
    expect(page.get_by_label("Weight", exact=True)).to_have_value("0.75")
    expect(page.get_by_role("switch", name="Enable CREPA")).not_to_be_checked()
    fill(page, JSON, "{")
    expect(page.get_by_role("alert").get_by_text("Expecting property name")).to_be_visible()


@pytest.mark.parametrize("query", ["", "?file=begun.json"])
def test_what_is_typed_before_the_server_speaks_stays(server: Server, visit: Callable[..., Page], query: str) -> None:
    save_settings(Folders(server.runs), "begun.json", {"crepa_lambda": 0.5, "model": "a/b"})
    page, held, holding = visit(f"{server.address}compare"), list[tuple[WebSocketRoute, str | bytes]](), True

    def hold_what_is_said(browser: WebSocketRoute) -> None:
        def said(message: str | bytes) -> None:
            if holding and (held or '42["' in str(message)):
                held.append((browser, message))
            else:
                browser.send(message)

        browser.connect_to_server().on_message(said)

    page.route_web_socket(re.compile("socket.io"), hold_what_is_said)
    page.goto(f"{server.address}new{query}")
    page.wait_for_function("window.did_handshake === true")
    fill(page, JSON, '{"crepa_lambda": 0.25}')
    end = time.monotonic() + 20
    while not any('"0.25"' in str(message) for _, message in held) and time.monotonic() < end:
        page.wait_for_timeout(50)
    holding = False
    for browser, message in held:
        browser.send(message)
    expect(page.get_by_label("Weight", exact=True)).to_have_value("0.25")
    expect(page.get_by_label(COMMAND, exact=True)).to_have_value(re.compile("--crepa_lambda=0.25$"))
    expect(page.get_by_label(JSON)).to_have_value('{"crepa_lambda": 0.25}')


def test_a_preset_shows_what_it_changes_and_the_weight_is_drawn(server: Server, visit: Callable[..., Page]) -> None:
    page = visit(f"{server.address}new", size=PHONE)
    fill(page, JSON, '{"model": "a/b", "data": "v", "output": "o", "max_train_steps": 1000, "preset": "t2v"}')
    expect(page.get_by_text("The preset sets: crepa_enabled = true, crepa_lambda = 0.5")).to_be_visible()
    drawn = page.locator(".js-line")
    expect(drawn).to_be_attached()
    before = drawn.get_attribute("d")
    fill(page, "Warmup Steps", "500")
    page.wait_for_function("before => document.querySelector('.js-line').getAttribute('d') !== before", arg=before)


def test_the_keyboard_alone_fills_in_and_saves(server: Server, visit: Callable[..., Page]) -> None:
    page = visit(f"{server.address}new")

    def tab_to(name: str) -> None:
        for _ in range(400):
            page.keyboard.press("Tab")
            if (
                page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.innerText")
                == name
            ):
                return
        pytest.fail(f"{name} is not reached by Tab")

    tab_to("File name")
    page.keyboard.type("keys")
    tab_to("Max Train Steps *")
    page.keyboard.type("7")
    tab_to("Enable CREPA")
    page.keyboard.press("Space")
    expect_json(page, '"crepa_enabled": true')
    assert values_of(page) == {"max_train_steps": 7, "crepa_enabled": True}


def test_a_file_without_a_name_is_not_saved(server: Server, visit: Callable[..., Page]) -> None:
    page = visit(f"{server.address}new")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_text("Give a file name")).to_be_visible()
    page.get_by_role("button", name="Close").click()
    fill(page, "File name", "../out")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_text("../out.json: must be a file name without folders")).to_be_visible()


@pytest.mark.parametrize("name", ["../out.json", "a/b.json", ".hidden.json", "/etc/x.json", "", "..", "link.json"])
def test_a_file_lies_in_the_folder_of_runs(tmp_path: Path, name: str) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link.json").symlink_to(tmp_path / "outside.json")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"without folders|outside the folders"):
        save_settings(Folders(tmp_path / "runs"), name, {})
    assert sorted(tmp_path.rglob("*")) == before


ODD = ["[1, [2]]", '{"a": null}', '"<b>x</b>"', "1e400"]


def test_any_value_of_any_field_is_shown_and_judged(server: Server, visit: Callable[..., Page]) -> None:
    page = visit(f"{server.address}new")
    for value in ODD:
        fill(page, JSON, "{" + ", ".join(f'"{key}": {value}' for key in FIELDS) + "}")
        expect(page.get_by_label(COMMAND)).to_have_value(re.compile("crepa_power"))
        assert page.locator("b", has_text="x").count() == 0
        # The page goes on.
        fill(page, JSON, '{"crepa_lambda": 0.125}')
        expect(page.get_by_label("Weight", exact=True)).to_have_value("0.125")
