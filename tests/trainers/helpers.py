"""Configs that several tests of the trainers share."""

from kimi_jax.trainers.config import check_config, default_config


def text_config(**changes):
    """A tiny model on text alone, which compiles fast."""
    config = default_config()
    with config.unlocked():
        config.data.image_tasks = ()
        config.rows.patches = config.sampling.prompt_patches = 0
        config.mesh.fsdp = config.mesh.tensor = 2
        config.update_from_flattened_dict(changes)
    check_config(config)
    return config
