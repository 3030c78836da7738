"""Countdown and richer pictures on one GPU: search with backtracking; several fonts, sizes, jitter and noise.

    python scripts/train.py --config=configs/rl_gpu.py --workdir=runs/rl_gpu

One H200, 2 min 30 s. SFT learns from 4,000 worked solutions in all and memorises them; RL gains about one point so far:
docs/log.md has the figures and what is left to try.
"""

from kimi_jax.trainers.config import default_config


def get_config():
    config = default_config()
    with config.unlocked():
        config.model.size = "small"

        config.data.text_tasks = ("countdown",)
        config.data.image_tasks = ("text_image_rich", "pips_rich", "scene_count_rich", "bar_chart_rich")
        config.data.train_per_kind = 4_000

        config.rows.tokens = 512
        config.rows.patches = 400
        config.rows.logits_chunk = 512

        config.sft.examples_per_kind = 2_000
        config.sft.steps = 1_200
        config.sft.rows = 16
        config.sft.micro_rows = 16
        config.sft.eval_every = 300
        config.sft.checkpoint_every = 1_200
        config.sft.optimizer.peak = 1e-3
        config.sft.optimizer.end = 3e-4

        config.rl.iterations = 60
        config.rl.problems = 128
        config.rl.responses = 8
        config.rl.updates = 4
        config.rl.micro_rows = 32
        config.rl.tau = 0.1
        config.rl.optimizer.schedule = "cosine"
        config.rl.optimizer.peak = 2e-5
        config.rl.optimizer.end = 5e-6
        config.rl.optimizer.warmup_steps = 4

        config.sampling.rows = 1_024
        config.sampling.prompt_tokens = 128
        config.sampling.prompt_patches = 400
        config.sampling.max_tokens = 320
    return config.lock()
