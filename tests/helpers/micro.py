"""The smallest model, for tests that need few collectives per forward."""


def micro_preset() -> str:
    """The name of a preset for tests alone, made on the first call: one layer, and two blocks per tower.

    It has 36 patches of 16 pixels and a language model of width 128, whatever the presets that learn look like.
    """
    from vla.models.tiny import TINY_OPENVLA, TINY_PRESETS

    TINY_PRESETS["openvla-micro"] = {
        **TINY_OPENVLA,
        "image_sizes": [96, 96],
        "vision_dims": [{**dims, "depth": 2, "patch_size": 16} for dims in TINY_OPENVLA["vision_dims"]],
        "text_config": {
            **TINY_OPENVLA["text_config"],
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 1,
        },
    }
    return "openvla-micro"
