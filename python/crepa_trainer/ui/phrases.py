"""Sentences with values in them, of the plan and of errors, in the page's languages. English is what the package says.

In a template `{name}` is anything, `{#name}` a number, `{*name}` parts between commas of which each is a sentence of
its own or stays as it is, and `(s)` an s or none. A text that no template has stays English.
"""

from __future__ import annotations

import re
from functools import cache

from crepa_kernels.config.sources import SUFFIXES

from .error_phrases import ERRORS
from .form import FIELDS
from .form_words import field_help

_REASONS = {
    "{#frames} frame(s), the shortest clip needs {#least}": "{frames} フレーム。最短のクリップに {least} 必要",
    "cannot be decoded ({why})": "デコードできません（{why}）",
    'HDR ({kind}), and hdr is "skip"': "HDR（{kind}）で、hdr が「skip」",
    "no video stream": "映像ストリームなし",
    "no frame in its video stream": "映像ストリームにフレームなし",
    "a playlist ({kind}), not a video": "動画ではなくプレイリスト（{kind}）",
    "not a regular file": "通常のファイルではありません",
    "no such file": "ファイルがありません",
    "damaged or cut off after frame {#frame}": "フレーム {frame} の後で破損または途切れ",
    "damaged after frame {#frame}": "フレーム {frame} の後で破損",
    "frame {#frame} is corrupt": "フレーム {frame} が破損",
    "ends after {#frames} frame(s), a clip of it needs {#least}": "{frames} フレームで終わり、クリップに {least} 必要",
}
_LISTED = {
    **{f"{{name}} ({reason})": f"{{name}}（{said}）" for reason, said in _REASONS.items()},
    "{file} is missing": "{file} がありません",
    "{file} is empty": "{file} は空です",
    "{file} is not UTF-8 text": "{file} は UTF-8 の文章ではありません",
    "{file} is UTF-16 or UTF-32, not UTF-8 text": "{file} は UTF-8 ではなく UTF-16 か UTF-32 です",
    "{file} has NUL bytes: it is not UTF-8 text": "{file} には NUL があり、UTF-8 の文章ではありません",
    "{file} has nothing but characters that nobody sees": "{file} には見えない文字しかありません",
    "{name} has {#size} of its {#whole} bytes": "{name}：{whole} バイトのうち {size} バイトのみ",
    "{name} ends before its last part": "{name}：最後の部分の前で終わっています",
    "{name} loses {#share}% of its picture": "{name}：画面の {share}% が失われます",
    "{name} {#times} times": "{name}：{times} 倍",
    "and {#more} more": "ほか {more} 件",
    "tone-mapped to SDR: {name}": "SDR へトーンマップ：{name}",
    "at {#limit} token(s): {name}": "{limit} トークンまで：{name}",
    "at {#limit} token(s) of {part}: {name}": "{part} の {limit} トークンまで：{name}",
}
_OF_SIZE = "{family}, {task}, {#blocks} block(s) of width {#width}, {count} parameters"
_SIZE = "{family}、{task}、幅 {width} のブロック {blocks} 個、パラメーター数 {count}"
_OF_BUCKET = (
    "{#frames} frame(s) of {size}: {#clips} clip(s), {#latent} latent frame(s), {#tokens} token(s) a frame ({grid})"
)
_BUCKET = "{size}、{frames} フレーム：クリップ {clips}、潜在フレーム {latent}、1 フレーム {tokens} トークン（{grid}）"
_BLOCK = "0〜{last} のうちブロック {index}、重み {weight}、{schedule}"
_EXTRA = "{total}：プロジェクター（勾配・オプティマイザー込み）{projector}、損失が保持 {kept}"
_OPTIMIZED = "{optimizer}, learning rate {#rate}, {*schedule}, weight decay {#decay}"
_AHEAD = "クリップの読み込みとノイズの生成を行い、最大 {ahead} マイクロバッチ先行"
_TERMS = {
    "text encoders": "テキストエンコーダー",
    "VAE": "VAE",
    "transformer": "transformer",
    "trained": "学習する重み",
    "optimizer": "オプティマイザー",
    "EMA": "EMA",
    "gradients": "勾配",
    "activations": "活性",
    "teacher": "教師",
}
_TEMPLATES = {
    # Model
    f"{{model}} ({{part}}, the {{expert}} noise levels): {_OF_SIZE}": (
        f"{{model}}（{{part}}、ノイズレベル {{expert}}）：{_SIZE}"
    ),
    f"{{model}}: {_OF_SIZE}": f"{{model}}：{_SIZE}",
    "all weights: {count} parameters, {*how}": "すべての重み：パラメーター数 {count}、{how}",
    "{kind} of rank {#rank} on {layers}: {count} parameters, {*how}": (
        "{layers} にランク {rank} の {kind}：パラメーター数 {count}、{how}"
    ),
    "{kind} of rank {#rank}, alpha {#alpha} on {layers}: {count} parameters, {*how}": (
        "{layers} にランク {rank}、アルファ {alpha} の {kind}：パラメーター数 {count}、{how}"
    ),
    "{kind} of rank {#rank}, dropout {#dropout} on {layers}: {count} parameters, {*how}": (
        "{layers} にランク {rank}、ドロップアウト {dropout} の {kind}：パラメーター数 {count}、{how}"
    ),
    "{kind} of rank {#rank}, alpha {#alpha}, dropout {#dropout} on {layers}: {count} parameters, {*how}": (
        "{layers} にランク {rank}、アルファ {alpha}、ドロップアウト {dropout} の {kind}：パラメーター数 {count}、{how}"
    ),
    _OPTIMIZED: "{optimizer}、学習率 {rate}、{schedule}、重み減衰 {decay}",
    "{schedule} after {#steps} step(s) of warm-up": "{schedule}（ウォームアップ {steps} ステップ）",
    "frozen weights in {precision}": "凍結した重みは {precision}",
    "offloaded by block": "ブロックごとにオフロード",
    "offloaded by leaf": "層ごとにオフロード",
    "gradient checkpointing": "勾配チェックポイント",
    # Data
    "{folder}: {#clips} clip(s) of {#videos} video(s)": "{folder}：動画 {videos} 本からクリップ {clips} 個",
    "{folder}: {#clips} clip(s) of {#videos} video(s), {#skipped} skipped": (
        "{folder}：動画 {videos} 本からクリップ {clips} 個、除外 {skipped} 本"
    ),
    f"{_OF_BUCKET}, {{#all}} a clip": f"{_BUCKET}、1 クリップ {{all}} トークン",
    "{#frames} frame(s) of {size}, {rate} fps → {#clip} frame(s) of {bucket}": (
        "{size}、{frames} フレーム、{rate} fps → {bucket}、{clip} フレーム"
    ),
    "{size} in {folder}, and the captions' embeddings": "{folder} に {size}、ほかにキャプションの埋め込み",
    "hidden: {#number}": "隠しファイル：{number}",
    **{f"{kind}: {{#number}}": f"{kind}：{{number}}" for kind in ("AppleDouble (._*)", "@eaDir", ".ipynb_checkpoints")},
    "broken links: {#number}": "リンク切れ：{number}",
    "pipes and devices: {#number}": "パイプとデバイス：{number}",
    "files of other kinds: {#number}": "ほかの種類のファイル：{number}",
    "output folders of this trainer: {#number}": "このトレーナーの出力フォルダー：{number}",
    "folders with a video's name: {#number}": "動画の名前のフォルダー：{number}",
    "links to folders that were seen: {#number}": "既出のフォルダーへのリンク：{number}",
    "folders that cannot be read: {#number}": "読めないフォルダー：{number}",
    "captions without a video: {#number}": "動画のないキャプション：{number}",
    "{*rates} a second": "毎秒 {rates}",
    "{*rates} a second; frame by frame, whatever lies between: fps takes all at one rate": (
        "毎秒 {rates}。間隔によらずフレームごとに取得（fps を指定すると同じ間隔で取得）"
    ),
    "taken at {#fps} a second; found: {*rates}": "毎秒 {fps} で取得。元は {rates}",
    "variable ({#videos} video(s))": "可変（{videos} 本）",
    "{#rate} ({#videos} video(s))": "{rate}（{videos} 本）",
    # Losses
    "off": "オフ",
    "block {#index} of 0 to {#last}, weight {#weight}, {schedule}": _BLOCK,
    "block {#index} of 0 to {#last}, weight {#weight}, {schedule}, relations of {pairs} x {#relational}": (
        f"{_BLOCK}、関係（{{pairs}}）x {{relational}}"
    ),
    "block {#index} of the model itself": "モデル自身のブロック {index}",
    "none: the weight is 0 throughout": "なし：重みは常に 0",
    "{encoder}, {grids} patches a frame": "{encoder}、1 フレーム {grids} パッチ",
    "{*frames} of a clip, once, before training": "クリップごとに {frames}、学習前に一度",
    "{*frames} of a clip, each time it is seen": "クリップごとに {frames}、使うたびに",
    "{#frames} of {#all}": "{all} のうち {frames}",
    "projector a convolution of {size} tokens, teacher less {#alpha} of each frame's mean, over its deviation": (
        "プロジェクターは {size} トークンの畳み込み、教師は各フレームの平均の {alpha} 倍を引き、偏差で割る"
    ),
    "{total}: projector with gradients and optimiser {projector}, kept by the loss {kept}": _EXTRA,
    "{total}: projector with gradients and optimiser {projector}, kept by the loss {kept}, teacher {teacher}": (
        f"{_EXTRA}、教師 {{teacher}}"
    ),
    "block {#student} learns from block {#teacher} of 0 to {#last}, weight {#weight}, {kept} kept by the loss": (
        "0〜{last} のうちブロック {student} がブロック {teacher} から学ぶ、重み {weight}、損失が保持 {kept}"
    ),
    # Steps
    "{#steps} ({*each}), {#epochs} epochs": "{steps}（{each}）、{epochs} エポック",
    "{#clips} clip(s) a step": "1 ステップ {clips} クリップ",
    "{#clips} clips a step on average": "1 ステップ平均 {clips} クリップ",
    "in micro-batches of {#least} to {#most}": "マイクロバッチは {least}〜{most}",
    "{#number} micro-batches": "{number} マイクロバッチ",
    "{#number} processes": "{number} プロセス",
    "none: clips are read and noise is drawn in the training process": (
        "なし：クリップの読み込みとノイズの生成は学習プロセスで行う"
    ),
    "{#workers}, which read clips and draw noise, at most {#ahead} micro-batch(es) ahead": f"{{workers}} 個。{_AHEAD}",
    "{#workers} for each process, which read clips and draw noise, at most {#ahead} micro-batch(es) ahead": (
        f"各プロセスに {{workers}} 個。{_AHEAD}"
    ),
    "{#number}, every {#every} step(s) and at the end, the last {#kept} kept": (
        "{number} 個（{every} ステップごとと最後）、新しい {kept} 個を残す"
    ),
    "{#times} time(s), {#prompts} prompt(s)": "{times} 回、プロンプト {prompts} 個",
    "which share the model by FSDP2": "モデルを FSDP2 で分け持つ",
    "{#number} a clip": "1 クリップに {number}",
    # Memory
    **{
        f"{{#size}} {unit}: {{*terms}}": f"{{size}} {unit}：{{terms}}"
        for unit in ("GiB", "MiB", "KiB", "bytes")
    },
    **{
        f"{name} {{#size}} {unit}{english}": f"{said} {{size}} {unit}{japanese}"
        for name, said in _TERMS.items()
        for unit in ("GiB", "MiB", "KiB", "bytes")
        for english, japanese in (
            ("", ""),
            (" ({other} without gradient checkpointing)", "（勾配チェックポイントなしなら {other}）"),
            (" ({other} with gradient checkpointing)", "（勾配チェックポイントありなら {other}）"),
        )
        if not english or name == "activations"
    },
    "needs {need}": "必要量 {need}",
    "needs {need}, has {all}": "必要量 {need}、搭載量 {all}",
    "needs {need}, has {all}: {*saved}": "必要量 {need}、搭載量 {all}：{saved}",
    "{setting} saves {size}": "{setting} で {size} 減ります",
    "{#size} {unit} is still too much without smaller resolutions": (
        "{size} {unit} でも多すぎます。resolutions を小さくするか"
    ),
    "frame_counts or batch_size": "frame_counts または batch_size を小さく",
    "not counted: {why}": "計算できません：{why}",
    # Errors
    "{path}: outside the folders that this page was started with ({folders}): see --folder": (
        "{path}：このページに許されたフォルダー（{folders}）の外です。--folder を参照"
    ),
    "{run}: a run is under way there": "{run}：そこでは学習が実行中です",
    "{run}: no run is under way there": "{run}：そこで実行中の学習はありません",
    "{run} is no run's output folder": "{run} は学習の出力フォルダーではありません",
    "{file}: must be a file name without folders": "{file}：フォルダーを含まないファイル名にしてください",
    "{run} has no {file} that can be read: {why}": "{run} に読める {file} がありません：{why}",
    "{run}: its {file} is of another folder, {folder}": (
        "{run}：{file} は別のフォルダー {folder} のものです"
    ),
    "{file} is there already": "{file} はすでにあります",
    "{file}: CREPA is not on in it": "{file}：CREPA がオンになっていません",
    "{file}: a caption must not be empty": "{file}：キャプションは空にできません",
    "output: a folder is needed": "output：フォルダーが必要です",
    "each key may appear once": "各キーは 1 回だけ書けます",
    "model = {model}: no such folder, and not a hub id (owner/name)": (
        "model = {model}：そのフォルダーはなく、Hub の ID（owner/name）でもありません"
    ),
    "--data {folder}: no such folder": "--data {folder}：そのフォルダーはありません",
    "no caption beside {#number} of {#all} video(s): {files}": (
        "動画 {all} 本のうち {number} 本にキャプションがありません：{files}"
    ),
    "{key} = {#index}: the {kind} of {model} has {#blocks} block(s), valid are {#first} to {#last}": (
        "{key} = {index}：{model} の {kind} のブロックは {blocks} 個で、{first}〜{last} が有効です"
    ),
    "{key}: unknown key": "{key}：未知のキーです",
    "{key}: unknown key; did you mean {other}?": "{key}：未知のキーです。{other} のことですか？",
    "{key} = {value}: unknown key": "{key} = {value}：未知のキーです",
    "{key} = {value}: unknown key; did you mean {other}?": "{key} = {value}：未知のキーです。{other} のことですか？",
    "{run}: a checkpoint after the step that it is at": "{run}：今のステップの後にチェックポイントを保存します",
    "{run}: a clip of each validation prompt after the step that it is at": (
        "{run}：今のステップの後に各検証プロンプトのクリップを生成します"
    ),
    "{run}: a checkpoint, and its end after the step that it is at": (
        "{run}：今のステップの後にチェックポイントを保存して終了します"
    ),
    **_LISTED,
    **ERRORS,
}  # fmt: skip
# Before what is said of the next setting.
_NEXT = re.compile(rf"; (?=(?:{'|'.join(FIELDS)})(?: = |: )|\w+(?: = [^;]*)?: unknown key)")
_SLOT = re.compile(r"\\\{(\\#|\\\*|)(\w+)\\\}")
_WITHIN = {r"\#": r"[\d.,e+-]+", r"\*": ".+", "": ".+"}


@cache
def _patterns() -> list[tuple[re.Pattern[str], frozenset[str], str]]:
    """Each template as a pattern, its names of parts, and its Japanese; the one with the most of its own first."""
    made = []
    for english, japanese in _TEMPLATES.items():
        pattern = _SLOT.sub(lambda slot: f"(?P<{slot[2]}>{_WITHIN[slot[1]]})", re.escape(english))
        pattern = pattern.replace(r"\(s\)", "s?").replace(r"\(es\)", "(?:es)?")
        parts = frozenset(slot[2] for slot in _SLOT.finditer(re.escape(english)) if slot[1] == r"\*")
        made.append((len(_SLOT.sub("", re.escape(english))), re.compile(pattern, re.DOTALL), parts, japanese))
    return [each[1:] for each in sorted(made, key=lambda each: -each[0])]


def phrase(text: str, language: str) -> str:
    """A sentence of the plan or an error in a language of the page."""
    if language != "ja":
        return text
    # A file's name, and what is wrong in it: several settings in one line.
    file, colon, said = text.partition(": ")
    if colon and file.lower().endswith(tuple(SUFFIXES)) and (found := _several(said)):
        return f"{file}：{found}"
    return _several(text) or text


def _several(text: str) -> str | None:
    """The Japanese of a line that may say something of each of several settings; what has none of it stays English."""
    parts = _NEXT.split(text)
    found = [_one(part) for part in parts]
    if len(parts) > 1 and any(found):
        return "；".join(said or part for said, part in zip(found, parts, strict=True))
    return _one(text)


def _one(text: str) -> str | None:
    found = _whole(text)
    if found is None:
        # A rule of a setting, in the words of its field; or several sentences.
        key, _, rule = text.partition(": ")
        field = FIELDS.get(key.partition(" = ")[0])
        if field is not None and rule == field.help:
            return f"{key}：{field_help(field, 'ja')}"
        parts = [_whole(part) for part in text.split(", ")]
        found = "、".join(part for part in parts if part) if all(parts) else None
    return found


def _whole(text: str) -> str | None:
    """The Japanese of one sentence, None where no template has it."""
    for pattern, parts, japanese in _patterns():
        if found := pattern.fullmatch(text):
            slots = found.groupdict()
            for name in parts:
                slots[name] = "、".join(_whole(part) or part for part in slots[name].split(", "))
            return japanese.format(**slots)
    return None
