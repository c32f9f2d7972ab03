"""Models of MindFormers that are not supported, recognized in a YAML by what they need: images, sound, experts, an encoder.

Without this, the first key that only such a model has would be reported as unknown.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from launcher.settings.yaml_family import list_names
from parallel.errors import ConfigError

_NEEDS: Mapping[str, tuple[str, ...]] = {
    "a model of images and text": ("vision", "cogvlm", "llava", "blip", "internvl", "mllama", "qwenvl", "qwen2vl", "qwen_vl"),
    "a vision model": ("clip", "vit", "swin", "filip", "mae", "sam"),
    "a speech model": ("whisper", "audio"),
    "a mixture of experts": ("moe", "mixtral", "deepseekv2", "deepseekv3"),
    "an encoder": ("bert", "t5"),
}
"""Parts of lower-case class names, by the kind of model."""
_IMAGE_KEYS = ("vision_model", "vision_config", "vision_encoder", "llm_model", "text_model")
_EXPERT_KEYS = ("expert_num", "num_experts", "num_local_experts", "n_routed_experts", "routed_expert_num", "shared_expert_num")


def check_model(raw: Mapping[str, Any]) -> None:
    """Raise ConfigError if the file describes a model that is not supported, naming the key and what the model is."""
    model = raw.get("model")
    config = model.get("model_config") if isinstance(model, Mapping) else None
    for key in _IMAGE_KEYS:
        if isinstance(config, Mapping) and isinstance(config.get(key), Mapping):
            raise ConfigError(f"model.model_config.{key} belongs to a model of images and text, which is not supported")
    for path, name in _list_classes(model):
        found = next((what for what, words in _NEEDS.items() if any(word in name.lower() for word in words)), None)
        if found and name not in (*list_names("Config"), *list_names("ForCausalLM")):
            raise ConfigError(f"{path} is {name!r}, {found}, which is not supported")


def count_experts(moe: Mapping[str, Any]) -> bool:
    """Return whether a moe_config has experts: any count except 1, which is the dense model."""
    return any(value not in (None, "None", False, 0, 1) for key, value in moe.items() if key in _EXPERT_KEYS)


def _list_classes(model: Any) -> Iterator[tuple[str, str]]:
    for section in ("model_config", "arch"):
        part = model.get(section) if isinstance(model, Mapping) else None
        name = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(name, str):
            yield f"model.{section}.type", name
