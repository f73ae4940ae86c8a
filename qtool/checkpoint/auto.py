"""Which of transformers' auto classes builds the model that a config.json describes, with its output projection."""

from __future__ import annotations

from typing import Any


def auto_class(config: Any) -> Any:
    """The auto class for a transformers config: for text alone, or for text beside pictures and sound.

    Of two that know the model type it is the one whose class config.json names; text alone, if it names neither.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    known = (
        (transformers.AutoModelForCausalLM, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (transformers.AutoModelForImageTextToText, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        (transformers.AutoModelForMultimodalLM, auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES),
    )
    own_code = getattr(config, "auto_map", None) or {}
    architectures = config.architectures or ()
    fitting = [
        (made, names.get(config.model_type))
        for made, names in known
        if config.model_type in names or made.__name__ in own_code
    ]
    named = [made for made, name in fitting if name in architectures]
    return next(iter([*named, *(made for made, _ in fitting)]), transformers.AutoModelForCausalLM)
