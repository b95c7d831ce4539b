"""The words of the web page and of reports, in each of their languages. English is the key."""

from __future__ import annotations

from collections.abc import Callable

LANGUAGES = {"en": "English", "ja": "日本語"}

JAPANESE = {
    "Close": "閉じる",
    "Dark": "ダーク",
    "Light": "ライト",
    "Menu": "メニュー",
    "Runs are in {folder}": "学習の保存先：{folder}",
    "Start": "ホーム",
}


def translator(language: str) -> Callable[[str], str]:
    """English to `language`, a key of `LANGUAGES`; what has no translation stays English."""
    table = JAPANESE if language == "ja" else {}
    return lambda text: table.get(text, text)
