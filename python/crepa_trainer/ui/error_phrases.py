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
    "not supported by this package": "このパッケージでは使えません",
    "not supported by this package; only {off} or null is accepted": (
        "このパッケージでは使えません。{off} か null だけが書けます"
    ),
    "Qwen encoders are not supported by this package": "このパッケージでは Qwen のエンコーダーは使えません",
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
    # Families
    "{model}: {image} ({transformer}) makes images, and crepa-train trains on videos: attach CrepaRegularizer in a "
    "loop of your own, as examples/train_flux_repa.py does": (
        "{model}：{image}（{transformer}）は画像のモデルで、crepa-train が学習するのは動画です："
        "examples/train_flux_repa.py のように、自分のループで CrepaRegularizer を使ってください"
    ),
    "{model}: its UNet makes images, and crepa-train trains transformers on videos: attach UrepaRegularizer in a "
    "loop of your own, as examples/train_sdxl_urepa.py does": (
        "{model}：UNet は画像のモデルで、crepa-train が学習するのは動画の transformer です："
        "examples/train_sdxl_urepa.py のように、自分のループで UrepaRegularizer を使ってください"
    ),
    "{model}: its VAE is an {vae}; {family} needs an {vaes}": (
        "{model}：VAE が {vae} です。{family} には {vaes} が必要です"
    ),
    "{model}: {part} is an {own}, where its model_index.json has {kind}": (
        "{model}：{part} は {own} ですが、model_index.json には {kind} とあります"
    ),
    "{model}: prediction_type = {type} of the scheduler: must be v_prediction": (
        "{model}：スケジューラーの prediction_type = {type}：v_prediction であること"
    ),
    "{size} with {#frames} frame(s): {model} has learned positions for {only} with {#most} frames alone": (
        "{size}、{frames} フレーム：{model} の学習済みの位置は {only}、{most} フレームのものだけです"
    ),
    "task = {task}: the transformer of {model} takes {#given} channels, {same} needs {needed} (the VAE makes "
    "{#made})": (
        "task = {task}：{model} の transformer が受け取るのは {given} チャネルで、"
        "必要なのは {needed}（VAE が作るのは {made}）"
    ),
    "{model}: the transformer takes {#given} channels, {task} with image_condition_type = {condition} needs {#needed} "
    "(the VAE makes {#made})": (
        "{model}：transformer が受け取るのは {given} チャネルで、"
        "image_condition_type = {condition} の {task} に必要なのは {needed}（VAE が作るのは {made}）"
    ),
    "{model}: the transformer takes {#given} channels and the VAE makes {#made}: supported are {#plain} and, with an "
    "image by channels, {#more}": (
        "{model}：transformer が受け取るのは {given} チャネル、VAE が作るのは {made}："
        "対応しているのは {plain} と、画像をチャネルで渡すときの {more} です"
    ),
    "{model} lacks {part}, which makes the text encoder's image of the first frame": (
        "{model} に、最初のフレームをテキストエンコーダーに渡す {part} がありません"
    ),
    "{model} lacks {part}, whose image embeddings the transformer takes": (
        "{model} に、画像の埋め込みを作る {part} がありません"
    ),
    "{model} wants a first and a last frame (pos_embed_seq_len): not supported": (
        "{model} は最初と最後のフレームを使うモデルで（pos_embed_seq_len）、対応していません"
    ),
    "{model} has two transformers and no boundary_ratio in its model_index.json": (
        "{model} には transformer が 2 つありますが、model_index.json に boundary_ratio がありません"
    ),
    "the text encoder reads the first frame at {mark}, which a text must not contain": (
        "テキストエンコーダーは {mark} の位置で最初のフレームを読むので、文章に {mark} は書けません"
    ),
    "{model} attends sparsely (attention_type = nabla), which has no backward on a CPU: train it on a GPU": (
        "{model} の疎な注意（attention_type = nabla）は CPU では逆伝播できません。GPU で学習してください"
    ),
    "batch_size = {#size}: {family} has no mask for texts of different lengths, so a forward takes one clip: set "
    "batch_size to 1 and gradient_accumulation_steps to as many": (
        "batch_size = {size}：{family} には長さの違う文章のためのマスクがなく、順伝播は 1 クリップずつです："
        "batch_size を 1 に、gradient_accumulation_steps を {size} にしてください"
    ),
    "frame count {#frames}: the image-to-video pipeline makes clips of {#least} frames or more": (
        "フレーム数 {frames}：画像から動画を作るパイプラインのクリップは {least} フレーム以上です"
    ),
    "frame count {#frames}: {#latent} latent frame(s), not a multiple of the transformer's temporal patch {#patch}": (
        "フレーム数 {frames}：潜在フレーム {latent} は、transformer の時間方向のパッチ {patch} の倍数ではありません"
    ),
    "task = image2video: the transformer of {model} has no channels that say which frame is given (visual_cond)": (
        "task = image2video：{model} の transformer には、与えたフレームを示すチャネルがありません（visual_cond）"
    ),
    # Videos and captions
    "--data {folder}: no video in this folder ({kinds})": (
        "--data {folder}：このフォルダーに動画がありません（{kinds}）"
    ),
    "--data {folder}: no video in this folder ({kinds}); passed over: {passed}": (
        "--data {folder}：このフォルダーに動画がありません（{kinds}）。対象外：{passed}"
    ),
    "no usable clip in {#number} video(s): {reasons}": "動画 {number} 本に使えるクリップがありません：{reasons}",
    "{#number} of {#all} caption(s) cannot be used: {files}": (
        "キャプション {all} 個のうち {number} 個が使えません：{files}"
    ),
    "{text}: the text encoder makes NaN or infinity of it": "{text}：テキストエンコーダーの出力が NaN か無限大です",
    "the {part} makes NaN or infinity of the clip at frame {#frame}": (
        "フレーム {frame} のクリップで {part} の出力が NaN か無限大です"
    ),
    "the processes see different files in {folder}: cache must be a folder that they share": (
        "プロセスごとに {folder} の中身が違います。cache は共有フォルダーにしてください"
    ),
    "{why}; it was removed: start again, with --resume latest": (
        "{why}。そのファイルは削除しました。--resume latest でもう一度始めてください"
    ),
    "colour matrix {#matrix} of H.273 is not supported": "H.273 のカラーマトリックス {matrix} には対応していません",
    'cache_teacher = "features", but the encoder {name} is a callable without a key, so what it made cannot be told '
    "from another one's: give FrozenEncoder(key=...), or cache_teacher = \"frames\"": (
        "cache_teacher =「features」ですが、エンコーダー {name} は key のない関数で、その出力を他と区別できません："
        "FrozenEncoder(key=...) か cache_teacher =「frames」にしてください"
    ),
    "there is no clip to train on": "学習するクリップがありません",
    # A run
    "step {#step}: the {found}; lower the learning rate": "ステップ {step}：{found}。学習率を下げてください",
    "step {#step}: the {found}; it came from {source}, which no learning rate changes: the teacher's weights or its "
    "frames are damaged": (
        "ステップ {step}：{found}。原因は {source} で、学習率では変わりません。教師の重みかフレームが壊れています"
    ),
    "no shared memory for a batch ({why}): give it more, or lower workers": (
        "バッチのための共有メモリーがありません（{why}）。増やすか、workers を減らしてください"
    ),
    "{what}: workers = {#workers} needs more memory than there is: lower it, 0 reads clips in the training process, "
    "and go on with --resume latest": (
        "{what}：workers = {workers} にはメモリーが足りません。減らして（0 なら学習プロセスで読み込みます）、"
        "--resume latest で続けてください"
    ),
    "{what}; crepa-train run --plan says what each phase needs, and what to switch on": (
        "{what}。段階ごとの必要量と減らし方は、「計画」のページか crepa-train run --plan で見られます"
    ),
    "checkpoint {folder} could not be written: {why}; the ones before it are whole": (
        "チェックポイント {folder} を書き込めませんでした：{why}。それより前のものは無事です"
    ),
    "the values of step {#step} could not be logged: {why}; checkpoints are whole": (
        "ステップ {step} の値を記録できませんでした：{why}。チェックポイントは無事です"
    ),
    "report_to: {kind}: {why}": "report_to：{kind}：{why}",
    "--queue {folder}: runs of several processes do not wait for each other": (
        "--queue {folder}：複数プロセスの学習は順番待ちをしません"
    ),
    "launched as {#number} process(es), of which each knows {#known}": (
        "{number} プロセスで起動されましたが、各プロセスから見えるのは {known} です"
    ),
    "launched with {kind}, which is not used: see sharding and context_parallel": (
        "{kind} で起動されましたが、使われません。sharding と context_parallel を見てください"
    ),
    # Checkpoints
    "{folder}: no such folder": "{folder}：そのフォルダーはありません",
    "{folder} has checkpoints after step {#step} ({later}): remove them to go back to it, or go on from the newest "
    "with resume = latest": (
        "{folder} にはステップ {step} より後のチェックポイントがあります（{later}）："
        "戻るならそれらを削除し、最新から続けるなら resume を latest にしてください"
    ),
    "{folder} holds a checkpoint of step {#step}: it was renamed or damaged": (
        "{folder} の中身はステップ {step} のチェックポイントです：名前が変えられたか、壊れています"
    ),
    "{folder} is not a complete checkpoint: {files} missing": (
        "{folder} は完全なチェックポイントではありません：{files} がありません"
    ),
    "{folder} is not a complete checkpoint: {files} of another size than was written": (
        "{folder} は完全なチェックポイントではありません：{files} の大きさが書き込んだときと違います"
    ),
    "{folder} is damaged: {files} with other bytes than were written; remove it to go on from the one before it, or "
    "start anew in another output": (
        "{folder} は壊れています：{files} の中身が書き込んだときと違います。"
        "削除して 1 つ前から続けるか、別の output で始めてください"
    ),
    "{folder} is of a run on other clips than {data} gives: {changed}; go on with what it had, or start anew in "
    "another output": (
        "{folder} は、{data} とは別のクリップの学習のものです：{changed}。"
        "元のもので続けるか、別の output で始めてください"
    ),
    "{folder} is of a run on other clips than {data} gives now: start anew in another output": (
        "{folder} は、今の {data} とは別のクリップの学習のものです：別の output で始めてください"
    ),
    "{folder} is of a run with other settings: {differing}; go on with what it had, or start anew in another output": (
        "{folder} は設定の違う学習のものです：{differing}。元の設定で続けるか、別の output で始めてください"
    ),
    "{folder} is of an earlier version, in files that can hold code: it is not opened; start anew in another output": (
        "{folder} は以前の版のもので、コードを含みうるファイルなので開きません。別の output で始めてください"
    ),
    "{file} is of another model, first at {name}": "{file} は別のモデルのものです（最初の違いは {name}）",
    "{file} is of another run: {why}": "{file} は別の学習のものです：{why}",
    # Exported files
    "ComfyUI divides a DoRA's magnitudes by other norms than it was trained with: take the format diffusers": (
        "ComfyUI は DoRA の大きさを学習時とは違うノルムで割ります。形式を diffusers にしてください"
    ),
    "{layer} is one layer in ComfyUI, and the LoKr of its parts are no LoKr of it: leave them out of lora_targets, or "
    "take the format peft": (
        "{layer} は ComfyUI では 1 つの層で、部分ごとの LoKr はその LoKr になりません。"
        "lora_targets から外すか、形式を peft にしてください"
    ),
    "ComfyUI's name for {layer} of {family} is not known: leave it out of lora_targets, or take the format diffusers": (
        "{family} の {layer} の ComfyUI での名前が分かりません。"
        "lora_targets から外すか、形式を diffusers にしてください"
    ),
    "ComfyUI's names for the layers of {family} are not known, those of {known} are: take the format diffusers": (
        "{family} の層の ComfyUI での名前は分かりません（分かるのは {known}）。形式を diffusers にしてください"
    ),
    "--format {form}: {folder} has no LoRA, all weights were trained": (
        "--format {form}：{folder} に LoRA はありません（すべての重みを学習したもの）"
    ),
    "--format {form}: stock diffusers loads no {kind}: take peft or comfyui": (
        "--format {form}：diffusers は {kind} を読み込めません。peft か comfyui にしてください"
    ),
    "{folder} is no complete checkpoint, and no run's folder that has one": (
        "{folder} は完全なチェックポイントでも、それがある学習のフォルダーでもありません"
    ),
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
