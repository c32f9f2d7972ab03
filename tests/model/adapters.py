"""LoRA adapters written by PEFT for the tiny models of the tests, with updates large enough to change every token."""

from pathlib import Path
from typing import Any

import peft
import torch
import transformers


def write_adapter(base: Path, folder: Path, seed: int = 1, **settings: Any) -> Path:
    """Write a random adapter. `settings`: of PEFT's LoraConfig."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    values = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "init_lora_weights": False, **settings}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**values))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    adapted.save_pretrained(folder)
    return folder


@torch.no_grad()
def compute_peft_logits(base: Path, adapter: Path | None, ids: list[int], **options: Any) -> torch.Tensor:
    """Logits [tokens, vocab] of PEFT on transformers; without an adapter of transformers alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager", **options)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits
