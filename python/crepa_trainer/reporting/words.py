"""The words of the web page and of reports, in each of their languages. English is the key."""

from __future__ import annotations

from collections.abc import Callable

LANGUAGES = {"en": "English", "ja": "日本語"}

JAPANESE = {
    "Back to the default": "既定値に戻す",
    "Cancel": "キャンセル",
    "Checkpoints": "チェックポイント",
    "Close": "閉じる",
    "Command line": "コマンドライン",
    "Dark": "ダーク",
    "Light": "ライト",
    "Data": "データ",
    "File name": "ファイル名",
    "Filled in from the model: {what}": "モデルから入力：{what}",
    "Give a file name without folders": "フォルダーを含まないファイル名を入力してください",
    "Menu": "メニュー",
    "Model": "モデル",
    "New run": "新しい学習",
    "Open a file": "ファイルを開く",
    "Plan": "計画",
    "Replace": "置き換える",
    "Runs are in {folder}": "学習の保存先：{folder}",
    "Save": "保存",
    "Saved as {path}": "{path} に保存しました",
    "Settings file (JSON)": "設定ファイル（JSON）",
    "Start": "ホーム",
    "The preset sets: {what}": "プリセットの値：{what}",
    "These settings can be used": "この設定で実行できます",
    "Training → Loss functions": "学習 → 損失関数",
    "Training → Optimization": "学習 → 最適化",
    "Validation": "検証",
    "Weight": "重み",
    "from the preset: {value}": "プリセットより：{value}",
    "see the form": "フォームを参照",
    "step": "ステップ",
    "{name} is there already: replace it?": "{name} はすでにあります。置き換えますか？",
}


def translator(language: str) -> Callable[[str], str]:
    """English to `language`, a key of `LANGUAGES`; what has no translation stays English."""
    table = JAPANESE if language == "ja" else {}
    return lambda text: table.get(text, text)
