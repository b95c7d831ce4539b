"""What settings, models and machines are refused with, in Japanese: templates as in phrases.py."""

from __future__ import annotations

# What is wrong of one setting, behind "key = value: ".
_RULES = {
    "must be one of {names}": "{names} のいずれか",
    "must be odd": "奇数であること",
    'must be a device such as "cpu" or "cuda:1"': "「cpu」や「cuda:1」のようなデバイス",
    "must be a multiple of the patch size of {encoder}, {#side}, at least one patch": (
        "{encoder} のパッチの一辺 {side} の倍数で、1 パッチ以上"
    ),
    'required when crepa_feature_source is "backbone": a block deeper than crepa_block_index': (
        "crepa_feature_source が「backbone」のときは必須。crepa_block_index より深いブロック"
    ),
    "required when layersync_enabled is true": "layersync_enabled が true のときは必須",
    "must be another block than layersync_student_block": "layersync_student_block とは別のブロック",
    'lr_scheduler = "constant" has no warm-up: use "constant_with_warmup"': (
        "lr_scheduler =「constant」にはウォームアップがありません。「constant_with_warmup」にしてください"
    ),
    "must be at most max_train_steps = {#most}": "max_train_steps = {most} 以下",
    "validation_prompts is empty: give what to sample, or 0": (
        "validation_prompts が空です。生成するプロンプトを書くか、0 にしてください"
    ),
    "validation_every is not given: give the steps between validations, or 0 for never": (
        "validation_every がありません。検証の間隔をステップ数で、しないなら 0 を書いてください"
    ),
    'only features are kept in 8 bits: give cache_teacher = "features"': (
        "8 ビットで保存できるのは特徴量だけです。cache_teacher を「features」にしてください"
    ),
    "teacher_device = {device}, where its weights are already: give one of the two": (
        "teacher_device = {device} なら重みはすでにそこにあります。どちらか一方にしてください"
    ),
    "must be another folder than data, whose videos are trained on": "学習する動画のある data とは別のフォルダー",
    'sharding = "fsdp2" has no gradient scaler: use "bf16" or "no"': (
        "sharding =「fsdp2」には勾配スケーラーがありません。「bf16」か「no」にしてください"
    ),
    'sharding = "fsdp2" needs {few}': "sharding =「fsdp2」では {few} だけが使えます",
    "is another name of {key2}, which says {other}; give one of them": (
        "{key2} の別名で、そちらは {other} です。どちらか一方にしてください"
    ),
    'contradicts crepa_feature_source = "encoder"; it means "backbone"': (
        "crepa_feature_source =「encoder」と矛盾します（「backbone」の意味です）"
    ),
    "required when crepa_enabled is true (recommended: {families})": (
        "crepa_enabled が true のときは必須（推奨：{families}）"
    ),
    "must be deeper than the student's block, crepa_block_index = {#block}": (
        "生徒のブロック crepa_block_index = {block} より深いこと"
    ),
    "must be at most {#most} on crepa_similarity_metric = {metric} ({why})": (
        "crepa_similarity_metric = {metric} では {most} 以下（{why}）"
    ),
    "it modifies CREPA or U-REPA, so it needs {switch} = true": (
        "CREPA または U-REPA を変えるものなので、{switch} = true が必要です"
    ),
    'it computes in bf16: mixed_precision must be "bf16"': (
        "bf16 で計算します。mixed_precision を「bf16」にしてください"
    ),
    "compile_blocks must be false": "compile_blocks を false にしてください",
    'training = "full" keeps all weights in fp32': "training =「full」ではすべての重みが fp32 です",
    'training = "full" has no frozen weights': "training =「full」には凍結した重みがありません",
    'training = "full" trains all weights and has no LoRA': (
        "training =「full」はすべての重みを学習し、LoRA はありません"
    ),
    "the backward pass would find the weights gone: gradient_checkpointing must be true": (
        "逆伝播のときに重みがありません。gradient_checkpointing を true にしてください"
    ),
    "the weights of bitsandbytes stay on the GPU: base_precision must be another": (
        "bitsandbytes の重みは GPU から動きません。別の base_precision にしてください"
    ),
    'lora_type = "{type}" has only been tried on weights that are there as they are': (
        "lora_type =「{type}」は、重みがそのままの形でそこにある場合しか試されていません"
    ),
    'pipelines of stock diffusers load no {type}: must be "peft" or "comfyui"': (
        "diffusers のパイプラインは {type} を読み込めません。「peft」か「comfyui」にしてください"
    ),
    'ComfyUI reads {type} otherwise than it was trained: must be "diffusers" or "peft"': (
        "ComfyUI は {type} を学習時とは違う形で読みます。「diffusers」か「peft」にしてください"
    ),
    "its values must be numbers that are finite, text, true, false, null, and lists and mappings of them": (
        "値は有限の数、文字列、true、false、null と、それらのリストと対応表"
    ),
    "{optimizer} averages the weights itself": "{optimizer} は自身で重みを平均します",
    "{optimizer} finds the step itself and takes a factor of it: give one, as a rule 1": (
        "{optimizer} は歩幅を自身で決め、その倍率を取ります。倍率（通常は 1）を書いてください"
    ),
    "{optimizer} has one for all: leave it out, or give learning_rate = {#rate}": (
        "{optimizer} の学習率は全体で 1 つです。書かないか、learning_rate = {rate} にしてください"
    ),
    "{key2} is {other}; give one of them, or the same": (
        "{key2} は {other} です。どちらか一方か、同じ値を書いてください"
    ),
    "processes that share their gradients keep all weights on their devices; use none, or one process": (
        "勾配を分け合うプロセスは、すべての重みをデバイスに置きます。none にするか、1 プロセスにしてください"
    ),
    'use compile_blocks, and dynamo_backend "no" in accelerate\'s config': (
        "compile_blocks を使い、accelerate の設定では dynamo_backend を「no」にしてください"
    ),
    "{type} has none in peft": "{type} にはこの設定がありません（peft）",
    "{optimizer} refuses it": "{optimizer} が受け付けない値です",
    "{why}; only {off} or null is accepted": "使えません。{off} か null だけが書けます",
    "{family} makes images, whose one frame has no other: use \"frame\", or crepa_relational_weight = 0": (
        "{family} の画像は 1 フレームだけです。「frame」か crepa_relational_weight = 0 にしてください"
    ),
}  # fmt: skip
_IDLE = "{title} is OFF: {key} is not given, without which {idle} does nothing"
ERRORS = {
    **{f"{{key}} = {{value}}: {rule}": f"{{key}} = {{value}}：{said}" for rule, said in _RULES.items()},
    # Notes
    _IDLE: "{title} はオフです：{key} がないため、{idle} は働きません",
    "relational loss is OFF: {key} is not given, without which {idle} does nothing": (
        "関係損失はオフです：{key} がないため、{idle} は働きません"
    ),
    "{title} is OFF: neither {key} nor a preset is given, without which {idle} does nothing": (
        "{title} はオフです：{key} もプリセットもないため、{idle} は働きません"
    ),
    "{key} = {value}: no path has NUL in it": "{key} = {value}：パスに NUL は使えません",
    "{key} = {value}: one is there twice": "{key} = {value}：同じものが 2 つあります",
    # Files of settings
    "data: a folder is needed": "data：フォルダーが必要です",
    "{path} is no video": "{path} は動画ではありません",
    "must begin with: crepa-train run": "crepa-train run で始めてください",
    "{word}: write options as --KEY=VALUE": "{word}：オプションは --KEY=VALUE と書きます",
    "{file}: output: {value} is no folder": "{file}：output：{value} はフォルダーではありません",
    "each key may appear once; repeated: {keys}": "各キーは 1 回だけ書けます。重複：{keys}",
    "must hold one {kind} object, not {found}": "{kind} のオブジェクト 1 つであること（{found} があります）",
    "not usable: nested too deeply": "使えません：入れ子が深すぎます",
    "not JSON: {why}": "JSON ではありません：{why}",
    "not TOML: {why}": "TOML ではありません：{why}",
    "not YAML: {why}": "YAML ではありません：{why}",
    "{kind} cannot be read here: pip install {package}": "{kind} を読むには pip install {package}",
    "command {name}: must be one of {names}": "命令 {name}：{names} のいずれか",
    # Models
    "no recommended block index for family {family}; known families: {names}": (
        "モデルファミリー {family} に推奨ブロックはありません。あるもの：{names}"
    ),
    "crepa_block_index = {#block} is the recommended block for {other}, and the transformer is of {family}: "
    'give family="{same}" with the preset, or the block': (
        "crepa_block_index = {block} は {other} の推奨ブロックですが、transformer は {family} です："
        "プリセットとともに family に「{same}」を指定するか、ブロックを指定してください"
    ),
    "{model} has no {file}: model must be a diffusers pipeline folder or hub id": (
        "{model} に {file} がありません：model は diffusers のパイプラインのフォルダーか Hub の ID です"
    ),
    "{model}: {file} cannot be read: {why}": "{model}：{file} を読めません：{why}",
    "task = {task}: valid are {names}": "task = {task}：使えるのは {names}",
    "task = {task}: {family} can be trained for {only} alone": (
        "task = {task}：{family} で学習できるのは {only} だけです"
    ),
    "{model}: transformer {name} is of no supported family; supported: {names}": (
        "{model}：transformer {name} には対応していません。対応：{names}"
    ),
    "family = {given}, but {model} has a {name} ({family})": (
        "family = {given} ですが、{model} は {name}（{family}）です"
    ),
    "{model} lacks {part}: a {family} pipeline has {parts}": (
        "{model} に {part} がありません：{family} のパイプラインには {parts} があります"
    ),
    "{model} lacks {files}: download it again": "{model} に {files} がありません：もう一度ダウンロードしてください",
    "expert = {expert}: {model} has one transformer, which is trained at all noise levels": (
        "expert = {expert}：{model} の transformer は 1 つで、すべてのノイズレベルで学習します"
    ),
    "{model} has two transformers, of which one is trained: set expert to high (transformer, noise levels from "
    "boundary_ratio = {#ratio} on) or low (transformer_2, those below)": (
        "{model} には transformer が 2 つあり、その 1 つを学習します："
        "expert を high（transformer、ノイズレベル {ratio} 以上）か low（transformer_2、それ未満）にしてください"
    ),
    "task = text2video: {model} is an image-to-video model ({why})": (
        "task = text2video：{model} は画像から動画を作るモデルです（{why}）"
    ),
    "task = image2video: {model} is a text-to-video model ({why})": (
        "task = image2video：{model} は文章から動画を作るモデルです（{why}）"
    ),
    "frame count {#frames}: the VAE makes 1 + {#step}n frames ({some})": (
        "フレーム数 {frames}：VAE が扱えるのは 1 + {step}n フレーム（{some}）"
    ),
    "resolution {size}: height must be a multiple of {#high}, width of {#wide} ({why})": (
        "解像度 {size}：高さは {high} の倍数、幅は {wide} の倍数（{why}）"
    ),
    "frame count {#frames}: the first latent frame is the given image's, and none is left to predict": (
        "フレーム数 {frames}：最初の潜在フレームは与えた画像のもので、予測するものが残りません"
    ),
    "lora_targets: {name} is no layer of {model}": "lora_targets：{name} は {model} の層ではありません",
    "lora_targets: {name} is a {kind}, and only {kinds}": "lora_targets：{name} は {kind} です（{kinds}）",
    # The machine and its packages
    "{key} = {value}: {folder} is not a folder": "{key} = {value}：{folder} はフォルダーではありません",
    "{key} = {value}: no permission to write in {folder}": "{key} = {value}：{folder} に書き込む権限がありません",
    "output = {output} cannot be written: {why}": "output = {output} に書き込めません：{why}",
    "output = {output}: {process} is running there; wait for it, or give another": (
        "output = {output}：そこで {process} が実行中です。終わりを待つか、別のフォルダーにしてください"
    ),
    "teacher_device = {device}: this machine has {devices}": (
        "teacher_device = {device}：このマシンにあるのは {devices}"
    ),
    "offload = {offload}: launched as {#number} processes: {why}": (
        "offload = {offload}：{number} プロセスで起動されています：{why}"
    ),
    "context_parallel = {#number} needs GPUs: diffusers shares out no tokens on CPUs": (
        "context_parallel = {number} には GPU が必要です：diffusers は CPU ではトークンを分け合いません"
    ),
    "context_parallel = {#number}: diffusers does not train {model} with its tokens shared out, only {names}": (
        "context_parallel = {number}：diffusers がトークンを分け合って学習できるのは {names} で、{model} はできません"
    ),
    "context_parallel = {#number} must divide the {#all} {what}": (
        "context_parallel = {number}：{what} の数 {all} の約数であること"
    ),
    "mixed_precision = fp16 needs a GPU: use bf16 or no": (
        "mixed_precision = fp16 には GPU が必要です。bf16 か no にしてください"
    ),
    "optimizer = {optimizer}: {why}: pip install {package}": (
        "optimizer = {optimizer}：{why}：pip install {package}"
    ),
    "optimizer_args: {name} of {optimizer} is what {key} says": (
        "optimizer_args：{optimizer} の {name} は {key} で指定します"
    ),
    "optimizer_args: {given} must be {rule}": "optimizer_args：{given} は {rule} でなければなりません",
    "optimizer_args: {name} is no argument of {optimizer}; {hint}": (
        "optimizer_args：{name} は {optimizer} の引数ではありません。{hint}"
    ),
    "{what} needs {package}: pip install crepa-kernels[quantization]": (
        "{what} には {package} が必要です：pip install crepa-kernels[quantization]"
    ),
    "{what} needs a GPU: diffusers loads bitsandbytes' weights on nothing else; use int8 or fp8": (
        "{what} には GPU が必要です（bitsandbytes の重みは GPU でだけ読み込めます）。int8 か fp8 にしてください"
    ),
    "a GPU that multiplies fp8 (compute capability {#least} or {other})": (
        "fp8 の積を計算できる GPU（compute capability {least} または {other}）"
    ),
    "{what} needs {*need}; use fp8 or int8": "{what} には {need} が必要です。fp8 か int8 にしてください",
    "report_to: {name} is unknown; {hint}": "report_to：{name} は未知の名前です。{hint}",
    "report_to: {name} is not installed: pip install {package}": (
        "report_to：{name} がありません：pip install {package}"
    ),
    "crepa_backend = triton cannot run here: {why}": "crepa_backend = triton はここでは動きません：{why}",
    # Checkpoints
    "resume = {folder}: no such folder; {hint}": "resume = {folder}：そのフォルダーはありません。{hint}",
    "{folder} is damaged: {why}": "{folder} は壊れています：{why}",
    "{folder} is not a complete checkpoint: {file} is missing": (
        "{folder} は完全なチェックポイントではありません：{file} がありません"
    ),
    "{folder} is at step {#step}, past max_train_steps = {#most}": (
        "{folder} はステップ {step} のもので、max_train_steps = {most} を過ぎています"
    ),
    "{folder} has checkpoints of an earlier run: go on from them with resume = latest, or give another output": (
        "{folder} に以前の学習のチェックポイントがあります：resume を latest にして続けるか、output を変えてください"
    ),
    "{file}: {why} (strict)": "{file}：{why}（strict）",
}  # fmt: skip
