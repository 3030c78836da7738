"""Long2short RL (k1.5 §2.4): a policy that RL made right learns to be right in fewer tokens.

    python scripts/long2short.py select --out=frontier.png runs/rl_gpu
    python scripts/train.py --config=configs/long2short_rl.py --workdir=runs/short --config.init=CHECKPOINT

Begins with the checkpoint that `select` names, of a run of configs/rl_gpu.py, whose settings these are, but that the
length reward is on from the first iteration, and that a response has half the tokens. Not run yet.
"""

from kimi_jax.trainers.config import default_config


def get_config():
    config = default_config()
    with config.unlocked():
        config.init = "runs/rl_gpu"  # its last checkpoint, unless one is named
        config.model.size = "small"

        config.data.text_tasks = ("countdown",)
        config.data.image_tasks = ("text_image_rich", "pips_rich")
        config.data.train_per_kind = 5_000

        config.rows.tokens = 512
        config.rows.patches = 256
        config.rows.logits_chunk = 512

        config.sft.steps = 0

        config.rewards.weights.length = 0.5
        config.rewards.length_warmup = 0

        config.rl.iterations = 60
        config.rl.problems = 256
        config.rl.responses = 8
        config.rl.updates = 4
        config.rl.micro_rows = 32
        config.rl.tau = 0.1
        config.rl.optimizer.schedule = "cosine"
        config.rl.optimizer.peak = 1e-4
        config.rl.optimizer.end = 1e-5
        config.rl.optimizer.b2 = 0.99
        config.rl.optimizer.warmup_steps = 4
        config.rl.reset_optimizer = False
        config.rl.eval_every = 10
        config.rl.checkpoint_every = 10

        config.sampling.rows = 2_048
        config.sampling.prompt_tokens = 96
        config.sampling.prompt_patches = 256
        config.sampling.max_tokens = 128
        config.sampling.page = 64
        config.sampling.prefill_tokens = 8_192
    return config.lock()
