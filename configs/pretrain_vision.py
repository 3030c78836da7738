"""Pretraining, second stage: the vision tower alone, the language model frozen (k1.5 §2.5.1, App. B).

    python scripts/train.py --config=configs/pretrain_vision.py --workdir=runs/pretrain_vision \
        --config.init=runs/pretrain_language

Images within text, of which the text is learnt. What is frozen has no gradients and no moments, and stays as it is to
the bit. Not run yet but at the size of the tests.
"""

from kimi_jax.trainers.config import default_config, source


def get_config():
    config = default_config()
    with config.unlocked():
        config.model.size = "small"
        config.model.trainable = ("vision/.*",)
        config.tokenizer.vocab_size = 512  # of the one that comes with config.init

        config.data.text_tasks = ()
        config.data.image_tasks = ()
        config.data.mixture.images = source(
            tasks=("text_image_rich", "scene_count_rich", "bar_chart_rich", "pips_rich"), records=8_000
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
        config.sft.optimizer.end = 1e-4
        config.sft.optimizer.warmup_steps = 50
        config.sft.optimizer.weight_decay = 0.1

        config.rl.iterations = 0
    return config.lock()
