"""RL at the shape of Qwen2.5-7B on a TPU slice. Not run: compiled for the slices below, where it fits.

    python scripts/train.py --config=configs/rl_qwen25_7b.py --dry_run --topology=v5e:16x16

What the compiler says of RL (libtpu 0.0.42, JAX 0.10.2; five to ten minutes on two CPU cores):

    v5e:16x16   256 chips, rows over 64 groups    9.2 of 15.8 GiB per chip at the peak, which is the gradient
    v5p:4x4x4    64 chips, rows over 16 groups   18.1 of 95.7 GiB per chip at the peak, which is the gradient

The weights are random and the task is arithmetic, so there is no result to expect; with --config.model.path=DIR it
begins with published weights instead. Slices like these have several hosts: start it on each with
--distributed. The mesh needs a multiple of 64 chips.
"""

from kimi_jax.trainers.config import default_config


def get_config():
    config = default_config()
    with config.unlocked():
        config.model.size = "qwen2.5-7b"  # bfloat16 compute, float32 masters

        # 16 ways for the training copy and its optimizer; 4 is what the four key/value heads divide into.
        config.mesh.data = -1
        config.mesh.fsdp = 16
        config.mesh.tensor = 4

        config.tokenizer.vocab_size = 152_064  # the size's own; a tokenizer trained on the task text stays below it
        config.data.text_tasks = ("chain",)
        config.data.image_tasks = ()

        config.rows.tokens = 8_192
        config.rows.patches = 0
        config.rows.logits_chunk = 512

        config.sampling.rows = 512
        config.sampling.prompt_tokens = 1_024
        config.sampling.prompt_patches = 0
        config.sampling.max_tokens = 7_168
        config.sampling.chunk = 64
        config.sampling.page = 64
        config.sampling.prefill_tokens = 8_192

        config.sft.rows = 64
        config.sft.micro_rows = 64
        config.sft.optimizer.peak = 1e-5
        config.sft.optimizer.end = 1e-6

        config.rl.problems = 128
        config.rl.responses = 8
        config.rl.updates = 4
        config.rl.micro_rows = 64
        config.rl.optimizer.peak = 1e-6
        config.rl.optimizer.end = 1e-6
    return config.lock()
