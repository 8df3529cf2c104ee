"""DINOv3 checkpoints of the real architecture with random weights from a seed, for tests only."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

MEAN, STD = (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)


def make_checkpoint(path: Path, *, seed: int = 0, image_size: int = 64, **overrides: Any) -> Path:
    """Save a tiny DINOv3 ViT (64-d, 4 layers) as the hub would hold it; `use_gated_mlp=True` is the 7B's shape."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_register_tokens": 4,
        "patch_size": 16,
        "image_size": image_size,
    }
    model = DINOv3ViTModel(DINOv3ViTConfig(**(shape | overrides)))
    model.save_pretrained(path)
    processor = {
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "size": {"height": image_size, "width": image_size},
        "image_mean": MEAN,
        "image_std": STD,
        "rescale_factor": 1 / 255,
        "resample": 2,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
    }
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path
