"""Pretraining, cooldown: the better data, and questions that were made for it (k1.5 §2.5.1, App. B).

    python scripts/train.py --config=configs/pretrain_cooldown.py --workdir=runs/pretrain_cooldown \
        --config.init=runs/pretrain_joint

Better here means harder problems; a document of `questions` has eight problems and asks for the answer to one of them.
In place of these, `files` may hold what was selected and what was made by rejection sampling. Not run yet but at the
size of the tests.
"""

from kimi_jax.trainers.config import default_config, source


def get_config():
    config = default_config()
    with config.unlocked():
        config.model.size = "small"

        config.tokenizer.vocab_size = 512  # of the one that comes with config.init

        config.data.text_tasks = ()
        config.data.image_tasks = ()
        config.data.mixture.text = source(tasks=("countdown", "countdown_hard"), records=4_000, weight=((0, 0.5),))
        config.data.mixture.questions = source(
            tasks=("chain", "countdown"), records=2_000, problems=8, weight=((0, 0.2),)
        )
        config.data.mixture.images = source(
            tasks=("text_image_rich", "scene_count_rich", "bar_chart_rich", "pips_rich"),
            records=8_000,
            weight=((0, 0.3),),
        )

        config.rows.tokens = 4_096
        config.rows.patches = 10_240
        config.rows.logits_chunk = 512

        config.sft.steps = 250
        config.sft.rows = 16
        config.sft.micro_rows = 4
        config.sft.eval_every = 50
        config.sft.eval_problems = 64
        config.sft.checkpoint_every = 50
        config.sft.optimizer.schedule = "cosine"
        config.sft.optimizer.peak = 2e-4
        config.sft.optimizer.end = 2e-5
        config.sft.optimizer.warmup_steps = 50
        config.sft.optimizer.weight_decay = 0.1

        config.rl.iterations = 0
    return config.lock()
