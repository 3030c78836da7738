"""Pretraining, long-context activation at 32,768 tokens (k1.5 §2.5.1, App. B).

    python scripts/train.py --config=configs/pretrain_long_32k.py --workdir=runs/pretrain_long_32k \
        --config.init=runs/pretrain_cooldown

Before it, rows had 4,096 tokens. The base of the rotary embedding rises to 1,000,000. Not run yet but at the size of
the tests.
"""

from kimi_jax.trainers.config import default_config, source


def get_config():
    config = default_config()
    with config.unlocked():
        config.model.size = "small"
        config.model.kept = ("attention",)  # most of the operations of long rows
        config.model.rope_base = 1e6  # later stages need to say so as well
        config.tokenizer.vocab_size = 512  # of the one that comes with config.init

        config.data.text_tasks = ()
        config.data.image_tasks = ()
        # 40%: long documents, attended to as a whole. Each ends with a question about one of its 700 problems.
        config.data.mixture.long = source(
            tasks=("chain",), records=200, problems=700, attention="full", weight=((0, 0.4),)
        )
        # 60%: the data of the cooldown. Documents that share a row do not see each other (partial attention).
        config.data.mixture.text = source(tasks=("countdown", "countdown_hard"), records=4_000, weight=((0, 0.3),))
        config.data.mixture.questions = source(
            tasks=("chain", "countdown"), records=2_000, problems=8, weight=((0, 0.12),)
        )
        config.data.mixture.images = source(
            tasks=("text_image_rich", "scene_count_rich", "bar_chart_rich", "pips_rich"),
            records=8_000,
            weight=((0, 0.18),),
        )

        config.rows.tokens = 32_768
        config.rows.patches = 81_920
        config.rows.logits_chunk = 2_048

        config.sft.steps = 100
        config.sft.rows = 8
        config.sft.micro_rows = 1
        config.sft.eval_every = 25
        config.sft.eval_problems = 4
        config.sft.checkpoint_every = 25
        config.sft.optimizer.schedule = "cosine"
        config.sft.optimizer.peak = 1e-4
        config.sft.optimizer.end = 5e-5
        config.sft.optimizer.warmup_steps = 10
        config.sft.optimizer.weight_decay = 0.1

        config.rl.iterations = 0
    return config.lock()
