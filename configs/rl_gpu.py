"""Countdown in text and in pictures on one GPU: search with backtracking; several fonts, sizes, jitter and noise.

    python scripts/train.py --config=configs/rl_gpu.py --workdir=runs/rl_gpu

One H200, shared with another run: 6 to 7 minutes. Held-out problems, mean of three seeds, pass@1: text 51.0% -> 70.3%,
pictures 40.1% -> 64.2%; greedy: 54.6% -> 72.4% and 44.0% -> 65.8% (commit ef6b6d6). docs/log.md has the controls of
SFT.
"""

from kimi_jax.trainers.config import default_config


def get_config():
    config = default_config()
    with config.unlocked():
        config.model.size = "small"
        config.model.remat = False
        config.model.unroll = 8

        config.data.text_tasks = ("countdown",)
        config.data.image_tasks = ("countdown_image", "countdown_image_rich")  # the second alone is hardly learnt
        config.data.train_per_kind = 5_000

        config.rows.tokens = 512
        config.rows.patches = 512
        config.rows.logits_chunk = 512

        config.sft.examples_per_kind = 1_500
        config.sft.steps = 12_000
        config.sft.rows = 16
        config.sft.micro_rows = 16
        config.sft.eval_every = 1_000
        config.sft.checkpoint_every = 6_000
        config.sft.optimizer.peak = 2e-3
        config.sft.optimizer.end = 2e-3
        config.sft.optimizer.weight_decay = 1.0

        config.rl.iterations = 80
        config.rl.problems = 256
        config.rl.responses = 8
        config.rl.updates = 4
        config.rl.micro_rows = 32
        config.rl.tau = 0.1
        config.rl.optimizer.schedule = "cosine"
        config.rl.optimizer.peak = 2e-4
        config.rl.optimizer.end = 1e-5
        config.rl.optimizer.b2 = 0.99
        config.rl.optimizer.warmup_steps = 4
        config.rl.reset_optimizer = False
        config.rl.checkpoint_every = 40

        config.sampling.rows = 2_048
        config.sampling.prompt_tokens = 64
        config.sampling.prompt_patches = 128
        config.sampling.max_tokens = 160
        config.sampling.page = 64
        config.sampling.prefill_tokens = 8_192
    return config.lock()
