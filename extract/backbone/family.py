"""Families of backbones: what differs between model types of transformers. To add a family, add a row to `FAMILIES`."""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn

from extract.errors import BackboneError


@dataclass(frozen=True)
class Family:
    """How to read a model of one type.

    Attributes:
        title: for messages.
        layers: attributes of the model that may hold its transformer layers, one per release of transformers.
        patch_size, depth, width, mlp_width, registers, gated_mlp: keys of config.json.
    """

    title: str
    layers: tuple[str, ...]
    patch_size: str = "patch_size"
    depth: str = "num_hidden_layers"
    width: str = "hidden_size"
    mlp_width: str = "intermediate_size"
    registers: str = "num_register_tokens"
    gated_mlp: str = "use_gated_mlp"

    def find_layers(self, model: Any) -> nn.ModuleList:
        """Return the transformer layers of a model.

        Raises:
            BackboneError: this release of transformers keeps them somewhere else.
        """
        for path in self.layers:
            try:
                layers = attrgetter(path)(model)
            except AttributeError:
                continue
            if isinstance(layers, nn.ModuleList):
                return layers
        raise BackboneError("cannot find the transformer layers in this release of transformers: see constraints.txt")

    def find_first_patch(self, config: Mapping[str, Any]) -> int:
        """Return the index of the first patch token: CLS and the registers come before it."""
        return 1 + int(config[self.registers])


FAMILIES = {"dinov3_vit": Family("DINOv3 ViT", layers=("model.layer", "layer"))}
"""By the `model_type` of config.json."""


def find_family(name: str, model_type: Any) -> Family:
    """Return the family of checkpoint `name`.

    Raises:
        BackboneError: no family has this `model_type`.
    """
    if model_type not in FAMILIES:
        titles = " or ".join(family.title for family in FAMILIES.values())
        raise BackboneError(f"{name} is a {model_type!r} checkpoint: BACKBONE must be a {titles}")
    return FAMILIES[model_type]
