"""Vanilla SFT, second of two stages: warmed up again, 1e-5 → 1e-6 on rows of 131,072 tokens (k1.5 §2.5.2).

    python scripts/train.py --config=configs/sft_vanilla_131k.py --workdir=runs/sft_vanilla_131k \
        --config.init=runs/sft_vanilla_32k

Not run yet but at the size of the tests.
"""

from kimi_jax.trainers.config import default_config, source


def get_config():
    config = default_config()
    with config.unlocked():
        config.model.size = "small"
        config.model.kept = ("attention",)  # most of the operations of long rows
        config.model.rope_base = 1e6
        config.tokenizer.vocab_size = 512  # of the one that comes with config.init

        config.data.text_tasks = ()
        config.data.image_tasks = ()
        # Conversations of several turns, of which the assistant's are learnt: as many of text as of images, and so many
        # rows that all come about once.
        config.data.mixture.text = source(
            tasks=("chain", "countdown"), form="chat", records=10_000, problems=4, weight=((0, 0.69),)
        )
        config.data.mixture.images = source(
            tasks=("text_image_rich", "scene_count_rich", "bar_chart_rich", "pips_rich"),
            form="chat",
            records=10_000,
            problems=2,
            weight=((0, 0.31),),
        )

        config.rows.tokens = 131_072
        config.rows.patches = 327_680
        config.rows.logits_chunk = 2_048

        config.sft.steps = 10
        config.sft.rows = 4
        config.sft.micro_rows = 1
        config.sft.eval_every = 5
        config.sft.eval_problems = 64
        config.sft.checkpoint_every = 5
        config.sft.optimizer.schedule = "cosine"
        config.sft.optimizer.peak = 1e-5
        config.sft.optimizer.end = 1e-6
        config.sft.optimizer.warmup_steps = 2
        config.sft.optimizer.weight_decay = 0.1

        config.rl.iterations = 0
    return config.lock()
