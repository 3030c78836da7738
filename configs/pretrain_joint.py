"""Pretraining, third stage: everything, and a share of images that rises to 30% (k1.5 §2.5.1, App. B).

    python scripts/train.py --config=configs/pretrain_joint.py --workdir=runs/pretrain_joint \
        --config.init=runs/pretrain_vision

The share is of rows, which are all of one length; it rises over the first half of the steps. Every stage may begin
with a published model instead, --config.model.path=DIR; what that takes, without DIR:

    python scripts/train.py --config=configs/pretrain_joint.py --config.model.size=qwen2.5-vl-3b --dry_run \
        --config.mesh.data=1 --config.mesh.fsdp=8 --config.sft.micro_rows=8

Not run yet but at the size of the tests.
"""

from kimi_jax.trainers.config import default_config, source


def get_config():
    config = default_config()
    with config.unlocked():
        config.model.size = "small"

        config.tokenizer.vocab_size = 512  # of the one that comes with config.init

        config.data.text_tasks = ()
        config.data.image_tasks = ()
        rise = ((0, 0.0), (250, 0.3))
        config.data.mixture.text = source(
            tasks=("chain", "countdown"), records=10_000, weight=tuple((step, 1 - share) for step, share in rise)
        )
        config.data.mixture.images = source(
            tasks=("text_image_rich", "scene_count_rich", "bar_chart_rich", "pips_rich"), records=8_000, weight=rise
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
        config.sft.optimizer.peak = 5e-4
        config.sft.optimizer.end = 2e-4
        config.sft.optimizer.warmup_steps = 50
        config.sft.optimizer.weight_decay = 0.1

        config.rl.iterations = 0
    return config.lock()
