"""The form's labels and help in Japanese. In English they are the schema's own."""

from __future__ import annotations

from .form import FormField

# By key: label, help.
_JAPANESE: dict[str, tuple[str, str]] = {
    "preset": ("プリセット", "個別に指定した値の下に敷かれる crepa_* の値"),
    # Model
    "model": ("モデル", "Hub 形式のパイプラインのフォルダー、または Hub の ID。必須"),
    "family": ("モデルファミリー", "モデルの系列。省略時は transformer から判断。指定する場合は一致していること"),
    "task": ("タスク", "学習する内容。「text2video」または「image2video」"),
    "expert": (
        "エキスパート",
        "2 つの transformer のうち学習する方（高ノイズ・低ノイズ）。1 つだけのモデルでは空。「high」または「low」",
    ),
    "training": ("学習方式", "学習する重み。「lora」または「full」"),
    "lora_type": ("LoRA の種類", "学習するアダプター。peft のもの"),
    "lora_rank": ("LoRA ランク", "LoRA のランク。1 以上の整数"),
    "lora_alpha": ("LoRA の alpha", "LoRA の積に掛ける値（ランクで割る）。空ならランクと同じ。0 より大きい数"),
    "lora_dropout": ("LoRA のドロップアウト", "学習中に落とす LoRA の入力の割合。0 以上 1 未満"),
    "lora_targets": ("LoRA の対象", 'LoRA を付ける層。空なら注意機構の射影。["to_q", "to_v"] のような名前のリスト'),
    # Data
    "data": ("データ", "動画とキャプションのフォルダー（name.mp4 と name.txt）。必須"),
    "resolutions": (
        "解像度",
        "切り抜き後の画素数。各動画に縦横比の最も近いものを使用。[[480, 832]] のような [高さ, 幅] のリスト",
    ),
    "frame_counts": (
        "フレーム数",
        "クリップの長さ（画素フレーム）。各動画で取れる最大のものを使用。[81] のようなリスト",
    ),
    "clips_per_video": ("動画あたりのクリップ数", "各動画から等間隔に切り出すクリップの数。1 以上の整数"),
    "fps": ("フレームレート", "クリップを取る 1 秒あたりのフレーム数。空なら動画のまま。0 より大きく 1000 以下の数"),
    "hdr": ("HDR 動画", "HDR 動画（PQ、HLG）の扱い。SDR へトーンマップ「tonemap」、または除外「skip」"),
    "strict": ("厳格", "使えない動画があれば中止する"),
    "cache": ("キャッシュ", "エンコード済みのクリップとキャプションのフォルダー。空なら output/cache"),
    "cache_teacher": ("教師のキャッシュ", "教師側で保存するもの。入力フレーム「frames」、または特徴量「features」"),
    "cache_teacher_precision": (
        "教師キャッシュの精度",
        "保存する特徴量の型。教師の型のまま「teacher」、またはトークンごとの尺度付き 8 ビット「int8」",
    ),
    "teacher_device": ("教師のデバイス", "教師を動かす場所。空なら学習デバイス。「cpu」や「cuda:1」など"),
    "teacher_offload": ("教師の退避", "使わない間、教師の重みを CPU に置く"),
    "vae_tiling": ("VAE タイリング", "重なり合うタイルで符号化・復号する。メモリーは減り、結果はわずかに変わる"),
    "workers": (
        "ワーカー",
        "各学習プロセスに付く、クリップの読み込みとノイズ生成のプロセス数。空なら GPU で 2、CPU で 0",
    ),
    # Optimization
    "max_train_steps": ("最大学習ステップ数", "オプティマイザーのステップ数。1 以上の整数、必須"),
    "batch_size": ("バッチサイズ", "各プロセスのマイクロバッチのクリップ数。1 以上の整数"),
    "gradient_accumulation_steps": ("勾配累積ステップ数", "1 ステップあたりのマイクロバッチ数。1 以上の整数"),
    "learning_rate": ("学習率", "0 より大きい数"),
    "projector_learning_rate": (
        "プロジェクターの学習率",
        "CREPA のプロジェクターの学習率。空なら learning_rate。0 より大きい数",
    ),
    "optimizer": ("オプティマイザー", "重みを更新する方法。torch のもの、または名前が示すパッケージのもの"),
    "optimizer_args": ("オプティマイザーの引数", 'オプティマイザーのその他の引数。{"betas": [0.9, 0.99]} のように書く'),
    "weight_decay": ("重み減衰", "オプティマイザーの重み減衰。0 以上の数"),
    "lr_scheduler": ("学習率スケジューラー", "学習率の推移"),
    "lr_warmup_steps": ("学習率ウォームアップ", "学習率が 0 から上がるまでのステップ数。0 以上の整数"),
    "max_grad_norm": ("最大勾配ノルム", "勾配をこのノルムに切り詰める。0 より大きい数"),
    "mixed_precision": ("混合精度", "順伝播と凍結した重みの型。「no」「fp16」「bf16」"),
    "base_precision": (
        "凍結した重みの精度",
        "凍結した重みを保持する型。「bf16」は mixed_precision の型。「bf16」「fp8」「int8」「fp8_dynamic」「nf4」",
    ),
    "offload": (
        "オフロード",
        "順番が来るまで主記憶で待つ凍結した重み。ブロックごと「block」、層ごと「leaf」、または「none」",
    ),
    "sharding": (
        "シャーディング",
        "複数プロセスで、各自がモデル全体を持つ「none」、重み・勾配・オプティマイザーをブロックごとに分け持つ「fsdp2」",
    ),
    "step_timeout": (
        "ステップの制限時間",
        "ステップ内で他のプロセスを待つ秒数。過ぎれば全プロセスが止まる。1 以上の整数",
    ),
    "context_parallel": (
        "コンテキスト並列",
        "各クリップのトークンを分け合うプロセス数。diffusers の Ulysses 注意機構による",
    ),
    "gradient_checkpointing": ("勾配チェックポイント", "活性を逆伝播で計算し直す"),
    "compile_blocks": ("ブロックのコンパイル", "各ブロックに torch.compile を使う"),
    "ema_decay": ("EMA 減衰率", "学習した重みの移動平均。空なら使わない。0 以上 1 未満"),
    "seed": ("シード", "重み・ノイズ・クリップの順序の乱数。0 以上の整数"),
    # Loss functions
    "crepa_enabled": ("CREPA を有効にする", "CREPA を使うかどうか"),
    "crepa_block_index": ("CREPA ブロック番号", "揃えるブロック（0 から数える）。0 以上の整数。有効時は必須"),
    "crepa_lambda": ("重み", "損失の重み。0 以上の数"),
    "crepa_adjacent_distance": ("隣接距離", "隣のフレームまでの距離（潜在フレーム）。0 なら隣を使わない"),
    "crepa_adjacent_tau": ("時間減衰", "隣の重み exp(-距離/tau) の減衰長。0 より大きい数"),
    "crepa_cumulative_neighbors": ("累積隣接", "その距離だけでなく、そこまでのすべての距離を使う"),
    "crepa_normalize_neighbour_sum": ("隣接和の正規化", "各フレームの和を 1 + Σw で割る"),
    "crepa_normalize_by_frames": ("フレーム平均", "潜在フレームの和ではなく平均を取る"),
    "crepa_spatial_align": (
        "空間の整列",
        '相手のトークン格子へ再標本化する側。true（student）、false（pool）、"student"、"teacher"、"smaller"、"pool"',
    ),
    "crepa_frame_map": ("フレーム対応", "潜在フレームに対応する教師フレーム。「last」「center」「mean」"),
    "crepa_encoder": ("視覚エンコーダー", "教師。dinov2_vitb14 などの名前、ローカルのフォルダー、Hub の ID"),
    "crepa_encoder_image_size": (
        "視覚エンコーダーの画像サイズ",
        "エンコーダーが見る正方形画像の一辺（画素）。パッチサイズの倍数",
    ),
    "crepa_encoder_resize": (
        "エンコーダーのリサイズ",
        "正方形にする「square」、または生徒のトークンごとに 1 パッチ「grid」",
    ),
    "crepa_encoder_frames_batch_size": (
        "エンコーダーのバッチ",
        "一度にエンコードするフレーム数。0 以下ならすべて一度に",
    ),
    "crepa_feature_source": ("特徴量の出所", "教師の特徴量の出所。「encoder」または「backbone」"),
    "crepa_use_backbone_features": ("バックボーン特徴量を使う", 'crepa_feature_source = "backbone" と同じ'),
    "crepa_teacher_block_index": ("教師ブロック番号", "backbone で教師になるブロック。crepa_block_index より深いこと"),
    "crepa_drop_vae_encoder": ("VAE エンコーダーを解放", "復号だけが必要なとき、VAE のエンコーダーを解放する"),
    "crepa_scheduler": ("スケジューラー", "ウォームアップ後の重み。「constant」「linear」「cosine」「polynomial」"),
    "crepa_warmup_steps": ("ウォームアップ", "重みが 0 から直線的に上がるステップ数。0 以上の整数"),
    "crepa_decay_steps": ("減衰ステップ数", "ウォームアップから lambda_end までのステップ数。0 なら残り全部"),
    "crepa_lambda_end": ("最終の重み", "減衰後の重み。0 以上の数"),
    "crepa_power": ("べき指数", "polynomial 減衰の指数。0 より大きい数"),
    "crepa_cutoff_step": ("打ち切りステップ", "重みが 0 になるステップ。0 なら打ち切らない"),
    "crepa_similarity_threshold": ("類似度のしきい値", "平均類似度がこの値に達すると重みが 0 になる"),
    "crepa_similarity_metric": (
        "類似度の尺度",
        "平均してしきい値と比べるもの。平均コサイン「similarity」、隣接和「alignment_score」",
    ),
    "crepa_similarity_ema_decay": ("類似度の EMA 減衰率", "類似度の移動平均の減衰率。0 以上 1 未満"),
    "crepa_threshold_mode": ("しきい値の動作", "平均が下がれば重みを戻す「recoverable」、戻さない「permanent」"),
    "crepa_probe_interval": ("測定の間隔", "recoverable で打ち切り中に測定するステップ間隔。1 以上の整数"),
    "crepa_relational_weight": ("関係損失の重み", "CREPA の中での関係損失の重み。0 なら使わない"),
    "crepa_relational_pairs": ("関係損失の組", "トークンを比べるフレームの組。「frame」「all」「cross」「neighbours」"),
    "crepa_relational_margin": ("関係損失のマージン", "損失にならないコサインの差。空なら二乗。0 以上の数"),
    "crepa_recompute": ("損失の再計算", "順伝播と逆伝播の間に tokens x E の大きさのものを残さず、計算し直す"),
    "crepa_backend": (
        "バックエンド",
        "損失を計算するもの。環境変数 CREPA_BACKEND が優先。「auto」「triton」「torch」「reference」",
    ),
    "irepa_enabled": ("iREPA を有効にする", "プロジェクターを畳み込みにし、教師を各フレームのパッチで正規化する"),
    "irepa_spatial_norm_alpha": ("iREPA 空間正規化", "教師のパッチから除く、フレーム平均の割合。0 以上の数"),
    "irepa_projector_kernel_size": ("iREPA カーネルサイズ", "プロジェクターの畳み込みの一辺（トークン）。1 以上の奇数"),
    "layersync_enabled": ("LayerSync を有効にする", "LayerSync を使うかどうか"),
    "layersync_student_block": ("LayerSync 生徒ブロック", "別のブロックから学ぶブロック（0 から数える）。有効時は必須"),
    "layersync_teacher_block": (
        "LayerSync 教師ブロック",
        "同じ順伝播の中で教えるブロック。生徒と異なること。有効時は必須",
    ),
    "layersync_lambda": ("LayerSync の重み", "損失の重み。0 より大きい数"),
    # Validation
    "validation_prompts": (
        "検証プロンプト",
        '途中で生成するクリップのプロンプト。["a red square"] のような文字列のリスト',
    ),
    "validation_every": ("検証の間隔", "検証の間のステップ数。0 なら行わない"),
    "validation_steps": ("検証のステップ数", "サンプルのノイズ除去ステップ数。1 以上の整数"),
    "validation_guidance": ("検証のガイダンス", "サンプルのガイダンススケール。0 以上の数"),
    "validation_seed": ("検証のシード", "サンプルのノイズの乱数。0 以上の整数"),
    "matrix_every": ("類似度行列の間隔", "類似度行列の間のステップ数。0 なら行わない"),
    "report_to": ("記録先", 'metrics.jsonl のほかに値を記録する先。["tensorboard", "wandb"] のように書く'),
    # Checkpoints
    "output": ("出力", "チェックポイント・ログ・学習した重みのフォルダー。必須"),
    "lora_format": ("LoRA の形式", "学習した LoRA のファイル。標準の diffusers 用、ComfyUI 用、両方、または peft 用"),
    "checkpoint_every": ("チェックポイントの間隔", "チェックポイントの間のステップ数。1 以上の整数"),
    "checkpoints_kept": ("残すチェックポイント数", "残す新しいチェックポイントの数。1 以上の整数"),
    "resume": ("再開", "「latest」またはチェックポイントのフォルダーから続ける"),
}


def field_label(field: FormField, language: str) -> str:
    """A setting's name."""
    return _JAPANESE[field.key][0] if language == "ja" and field.key in _JAPANESE else field.label


def field_help(field: FormField, language: str) -> str:
    """What a setting does, and its rule."""
    return _JAPANESE[field.key][1] if language == "ja" and field.key in _JAPANESE else field.help
