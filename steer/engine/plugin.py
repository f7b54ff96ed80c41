"""vLLM's general plugin: lets Qwen3.5 load where torchvision is missing.

vLLM's `qwen3_5` module imports transformers' `image_processing_qwen2_vl`, which needs torchvision. The CPU environment
has none (its registry builds are linked to CUDA). transformers ships the same processor on Pillow; text serving never
runs either, so the Pillow module stands in. vLLM loads general plugins in every process it starts.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

_NEEDS_TORCHVISION = "transformers.models.qwen2_vl.image_processing_qwen2_vl"
_PILLOW = "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl"


def register() -> None:
    """Put the Pillow image processor where the torchvision one is asked for; nothing where torchvision is installed."""
    if importlib.util.find_spec("torchvision") is None and _NEEDS_TORCHVISION not in sys.modules:
        module = importlib.import_module(_PILLOW)
        for name in list(vars(module)):
            if "Pil" in name:
                vars(module).setdefault(name.replace("Pil", ""), getattr(module, name))
        sys.modules[_NEEDS_TORCHVISION] = module
