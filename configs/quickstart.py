"""The main job, sized for two CPU cores: a 1M-parameter multimodal model learns arithmetic and small pictures.

    bash scripts/quickstart.sh
    python scripts/train.py --config=configs/quickstart.py --workdir=runs/quickstart
"""

from kimi_jax.trainers.config import default_config


def get_config():
    config = default_config()
    with config.unlocked():
        config.model.remat = False  # memory is no concern at this size
        config.model.unroll = 4
    return config.lock()
