"""Long2short RL (k1.5 §2.4): a policy that RL made right learns to be right in fewer tokens.

    python scripts/long2short.py select --out=frontier.png runs/climb/start-0 runs/climb/brief-0
    python scripts/train.py --config=configs/long2short_rl.py --workdir=runs/short --config.init=CHECKPOINT

Begins with the checkpoint that `select` names, of runs of configs/climb.py, whose settings these are, but that the
length reward is on from the first iteration, and that a response has half the tokens: what scripts/climb.py calls
short_rl. One H200, shared with another run: 5 minutes. Held-out problems, mean of three seeds, pass@1 and tokens of the
long model and of this: text 87.3% at 146 -> 94.2% at 54, pictures 81.9% at 171 -> 90.3% at 70 (commit 4953371).
"""

from kimi_jax.trainers.config import default_config


def get_config():
    config = default_config()
    with config.unlocked():
        config.init = "runs/climb/start-0"  # its last checkpoint, unless one is named
        config.model.size = "small"
        config.model.remat = False
        config.model.unroll = 8

        config.data.text_tasks = ("countdown",)
        config.data.image_tasks = ("countdown_image", "countdown_image_rich")
        config.data.train_per_kind = 5_000

        config.rows.tokens = 512
        config.rows.patches = 512
        config.rows.logits_chunk = 512

        config.sft.steps = 0

        config.rewards.weights.length = 0.2
        config.rewards.length_warmup = 0

        config.rl.iterations = 200
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
        config.sampling.max_tokens = 160
        config.sampling.page = 64
        config.sampling.prefill_tokens = 8_192
    return config.lock()
