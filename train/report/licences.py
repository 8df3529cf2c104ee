"""What is known of the licences behind a run: of its backbone's weights, and of its imagery."""

from __future__ import annotations

from dataclasses import dataclass

from .facts import Facts

DINOV3_URL = "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"
XVIEW_URL = "https://creativecommons.org/licenses/by-nc-sa/4.0/"
_XVIEW_SITE = "https://xviewdataset.org/"
_HUB = "facebook/dinov3-"
_SHORT_NAMES = {
    "vitl16": "facebook/dinov3-vitl16-pretrain-sat493m",
    "vit7b16": "facebook/dinov3-vit7b16-pretrain-sat493m",
}


@dataclass(frozen=True)
class Licences:
    """Notes for people, each a sentence or two, and what the front matter of a model card says.

    Attributes:
        backbone, imagery: notes; addresses in them are plain text.
        base_model: on the hub, None for weights from elsewhere.
        name, link: of the backbone's licence where it is known.
    """

    backbone: str
    imagery: str
    base_model: str | None
    name: str | None
    link: str | None


def find_licences(facts: Facts) -> Licences:
    """What follows from the names that the cache recorded; a guess is said to be one."""
    backbone = facts.settings["recorded"]["backbone"]
    base = _SHORT_NAMES.get(backbone, backbone if backbone.startswith(_HUB) else None)
    if base:
        note = (
            f"{base}: the DINOv3 License of Meta (last updated 19 August 2025), {DINOV3_URL}. It allows commercial use, "
            "with conditions: whoever passes on the weights or anything derived from them, a fine-tuned export "
            "included, does so under that agreement and with a copy of it; publications name the use of DINOv3; uses "
            "under ITAR, for military or nuclear purposes, espionage or weapons are excluded. Read it before you rely on this "
            "summary."
        )
        return Licences(note, _describe_imagery(facts), base, "dinov3-license", DINOV3_URL)
    if backbone == "demo":
        note = (
            "demo: a stand-in that this package ships, trained on drawn scenes. It is no DINOv3 checkpoint and its "
            "figures say nothing about one."
        )
    else:
        note = (
            f"{backbone}: a checkpoint of your own. If it was derived from DINOv3, a fine-tuned export included, the DINOv3 License of Meta "
            f"goes with it ({DINOV3_URL}); else check the licence it came with."
        )
    return Licences(note, _describe_imagery(facts), None, None, None)


def _describe_imagery(facts: Facts) -> str:
    tiles = facts.settings["recorded"]["tiles"]
    if "tileprobe-demo" in tiles:
        return "The tiles are drawn by this package's demo: no satellite took them, and nothing restricts their use."
    if "xview" in tiles.lower():
        return (
            f"The name of the tiles' place ({tiles}) suggests xView ({_XVIEW_SITE}), whose images and labels are under CC BY-NC-SA 4.0 "
            f"({XVIEW_URL}): name the source, no commercial use, and pass on what you make of them under the same "
            "licence. Thumbnails in this report are such copies. Where the tiles are not xView, check the licence of your own imagery."
        )
    return (
        f"Check the licence of your own imagery ({tiles}) before you share pictures of it; `--no-images` leaves every "
        f"picture out. xView's images and labels are under CC BY-NC-SA 4.0 ({XVIEW_URL})."
    )
