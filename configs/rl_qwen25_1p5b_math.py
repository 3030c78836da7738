"""RL of Qwen2.5-1.5B-Instruct on arithmetic in text: chains to be computed, targets to be searched for.

    python scripts/train.py --config=configs/rl_qwen25_1p5b_math.py --workdir=runs/math --config.model.path=DIR

DIR is the published directory, or what scripts/import_weights.py made of it. All parameters are trained. What --dry_run
says of the memory, the larger of its two phases; it needs no DIR:

    one GPU of 80 GB     32 GiB   as it stands; JAX takes three quarters of a GPU, which is 59
                         32 GiB   8 problems x 16: rl.problems=8 sampling.rows=128
    8 GPUs of 80 GB      12 GiB   mesh.data=1 mesh.fsdp=8 rl.problems=128 rl.micro_rows=64 sampling.rows=1024
    v5e:16x16, 16 GB    2.6 GiB   mesh.data=8 mesh.fsdp=16 mesh.tensor=2 and the rest as below
    v5p:4x4x4, 95 GB    4.0 GiB   mesh.data=2 mesh.fsdp=16 mesh.tensor=2 rl.problems=256 rl.micro_rows=128
                                  sampling.rows=2048

Adam's moments, the largest part, exist in the update phase only (rl.reset_optimizer). The estimate counts the large
arrays; --topology asks the compiler for TPUs. One H100, 8 problems x 16, prompts of up to 512 tokens and responses of
1,536, random weights (commit e08665a): 33,500 tokens/s; 5.9 s for the rollout phase and 9.0 s for the update of an
iteration, 35 GiB at most. Nothing has been learned with it yet: there was no published model at hand.
"""

from kimi_jax.trainers.config import default_config

SYSTEM = (
    "Reason step by step. Compute expressions strictly from left to right, so 2+3*4 is 20. To make a target, use each "
    "of the given numbers exactly once, with + - * / and parentheses. End with one line of this form, and write "
    "'Answer:' nowhere else:\nAnswer: <the number, or the expression that makes the target>"
)


def get_config():
    config = default_config()
    with config.unlocked():
        config.model.size = "qwen2.5-1.5b"  # what --dry_run plans with; a run begins with model.path
        config.tokenizer.vocab_size = 151_936
        config.model.system = SYSTEM

        config.data.text_tasks = ("chain", "countdown")
        config.data.image_tasks = ()
        config.data.train_per_kind = 8_000
        config.data.heldout_per_kind = 500

        config.rows.tokens = 2_048  # prompt and response
        config.rows.patches = 0
        config.rows.logits_chunk = 256

        config.sft.steps = 0  # the model has been taught to follow instructions

        config.rl.iterations = 100
        config.rl.problems = 32
        config.rl.responses = 16
        config.rl.updates = 4
        config.rl.micro_rows = 8
        config.rl.optimizer.peak = 1e-6
        config.rl.optimizer.end = 1e-6
        config.rl.optimizer.warmup_steps = 8
        config.rl.eval_every = 20

        config.sampling.rows = 256
        config.sampling.prompt_tokens = 256
        config.sampling.prompt_patches = 0
        config.sampling.max_tokens = 1_792
        config.sampling.page = 64
        config.sampling.prefill_tokens = 8_192
    return config.lock()
