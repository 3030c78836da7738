"""RL of Qwen2.5-VL-3B-Instruct on pictures: shapes to be counted, compared and found, expressions to be read.

    python scripts/train.py --config=configs/rl_qwen25_vl_3b_vision.py --workdir=runs/vision --config.model.path=DIR

DIR is the published directory, or what scripts/import_weights.py made of it. Adapters (LoRA) on the matrices of the
decoder are trained, on a base in bfloat16. To train everything:

    --config.model.lora.rank=0 --config.model.base_dtype=float32 --config.rl.optimizer.{peak,end}=1e-6

What --dry_run says of the memory, the larger of its two phases; it needs no DIR:

                        LoRA       all
    one GPU of 80 GB    24 GiB     67 GiB   all: rl.micro_rows=4 sampling.rows=128
    8 GPUs of 80 GB     15 GiB     20 GiB   mesh.data=1 mesh.fsdp=8 rl.problems=128 rl.micro_rows=64 sampling.rows=1024
    v5e:16x16, 16 GB   4.6 GiB    5.8 GiB   mesh.data=8 mesh.fsdp=16 mesh.tensor=2 and the rest as below
    v5p:4x4x4, 95 GB   6.1 GiB    7.4 GiB   mesh.data=2 mesh.fsdp=16 mesh.tensor=2 rl.problems=256 rl.micro_rows=128
                                            sampling.rows=2048

JAX takes three quarters of a GPU, 59 GiB; 67 need XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 and are tight. Adam's moments
exist in the update phase only (rl.reset_optimizer). The estimate counts the large arrays; --topology asks the compiler
for TPUs. Not run yet.
"""

from kimi_jax.trainers.config import default_config

SYSTEM = (
    "Look at the picture and reason step by step. Shapes lie in a grid of 4 rows and 4 columns, some of whose cells "
    "are empty. Compute expressions strictly from left to right, so 2+3*4 is 20. End with one line of this form, and "
    "write 'Answer:' nowhere else:\nAnswer: <a number, or a place such as: row 2 column 3>"
)


def get_config():
    config = default_config()
    with config.unlocked():
        config.model.size = "qwen2.5-vl-3b"  # what --dry_run plans with; a run begins with model.path
        config.tokenizer.vocab_size = 151_936
        config.model.system = SYSTEM
        config.model.lora.rank = 32
        config.model.lora.alpha = 64.0
        config.model.base_dtype = "bfloat16"

        config.data.text_tasks = ()
        config.data.image_tasks = ("scene_count_large", "scene_compare_large", "scene_locate_large", "text_image_large")
        config.data.train_per_kind = 4_000
        config.data.heldout_per_kind = 400

        # A scene of 224 x 224 pixels is 256 patches, which are 64 tokens.
        config.rows.tokens = 1_024
        config.rows.patches = 512
        config.rows.logits_chunk = 256

        config.sft.steps = 0  # the model has been taught to follow instructions

        config.rl.iterations = 100
        config.rl.problems = 32
        config.rl.responses = 16
        config.rl.updates = 4
        config.rl.micro_rows = 8
        config.rl.optimizer.peak = 2e-5
        config.rl.optimizer.end = 2e-5
        config.rl.optimizer.warmup_steps = 8
        config.rl.eval_every = 20

        config.sampling.rows = 256
        config.sampling.prompt_tokens = 256
        config.sampling.prompt_patches = 256
        config.sampling.max_tokens = 768
        config.sampling.page = 64
        config.sampling.prefill_tokens = 8_192
    return config.lock()
