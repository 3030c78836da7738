"""The start of scripts/climb.py: Countdown and its image twin, where a longer search finds more, on one GPU.

    python scripts/train.py --config=configs/climb.py --workdir=runs/climb/start-0

The settings are those of configs/rl_gpu.py but for less SFT, longer responses, more iterations, and checkpoints of RL
that are all measured and kept, from which `scripts/long2short.py select` chooses. What follows RL changes some of them
(scripts/climb.py says which). One H200, shared with another run: 6 minutes. Held-out problems, mean of three seeds,
pass@1: text 67.7% -> 87.3%, pictures 54.1% -> 81.9% (commit 4953371).
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
        config.sft.steps = 4_000
        config.sft.rows = 16
        config.sft.micro_rows = 16
        config.sft.eval_every = 2_000
        config.sft.checkpoint_every = 2_000
        config.sft.optimizer.peak = 2e-3
        config.sft.optimizer.end = 2e-3
        config.sft.optimizer.weight_decay = 1.0

        config.rl.iterations = 100
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
        config.rl.eval_every = 20
        config.rl.eval_problems = 500
        config.rl.checkpoint_every = 20
        config.rl.keep_last = 5

        config.sampling.rows = 2_048
        config.sampling.prompt_tokens = 64
        config.sampling.prompt_patches = 128
        config.sampling.max_tokens = 320  # worked solutions have up to 292
        config.sampling.page = 64
        config.sampling.prefill_tokens = 8_192
    return config.lock()
