"""Pretraining, first stage: language alone (k1.5 §2.5.1, App. B).

    python scripts/train.py --config=configs/pretrain_language.py --workdir=runs/pretrain_language

The first of a chain, whose other stages begin where the one before ended:

    pretrain_language -> pretrain_vision -> pretrain_joint -> pretrain_cooldown
        -> pretrain_long_32k -> pretrain_long_131k -> sft_vanilla_32k -> sft_vanilla_131k

The documents are made on the spot from problems and their worked solutions, so nothing is downloaded; `files` of a
source take any others (kimi_jax/data/documents.py). All stages have the shape of a model with a vision tower, which is
not trained yet. The tokenizer is trained here, and so it also reads a source of no weight: what later stages will add.
Not run yet but at the size of the tests.
"""

from kimi_jax.trainers.config import default_config, source


def get_config():
    config = default_config()
    with config.unlocked():
        config.model.size = "small"
        config.model.trainable = ("decoder/.*",)
        config.tokenizer.vocab_size = 512

        config.data.text_tasks = ()
        config.data.image_tasks = ()
        config.data.mixture.text = source(tasks=("chain", "countdown"), records=10_000)
        config.data.mixture.images = source(
            tasks=("text_image_rich", "scene_count_rich", "bar_chart_rich", "pips_rich"),
            records=2_000,
            weight=((0, 0.0),),
        )

        config.rows.tokens = 4_096
        config.rows.patches = 10_240
        config.rows.logits_chunk = 512

        config.sft.steps = 500
        config.sft.rows = 16
        config.sft.micro_rows = 4
        config.sft.eval_every = 100
        config.sft.eval_problems = 64
        config.sft.checkpoint_every = 100
        config.sft.optimizer.schedule = "cosine"
        config.sft.optimizer.peak = 1e-3
        config.sft.optimizer.end = 3e-4
        config.sft.optimizer.warmup_steps = 50
        config.sft.optimizer.weight_decay = 0.1

        config.rl.iterations = 0
    return config.lock()
