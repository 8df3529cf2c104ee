"""Describe the licences of a run's backbone weights and of its imagery.

Sources, read in November 2026: LICENSE.md next to the weights on the hub, such as
https://huggingface.co/facebook/dinov3-vitl16-pretrain-lvd1689m/blob/main/LICENSE.md, and for xView the dataset card
https://huggingface.co/datasets/CDAO/xview-subset-classification.
"""

from dataclasses import dataclass

from .facts import Facts

DINOV3_URL = "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"
XVIEW_URL = "https://creativecommons.org/licenses/by-nc-sa/4.0/"
XVIEW_SITE = "https://xviewdataset.org/"
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
        base_model: on the hub; None for other weights.
        name, link: of the backbone's licence; None if unknown.
    """

    backbone: str
    imagery: str
    base_model: str | None
    name: str | None
    link: str | None


def find_licences(facts: Facts) -> Licences:
    """Find the licences by the names that the cache recorded; the note says if it is a guess."""
    backbone = facts.settings["recorded"]["backbone"]
    base = _SHORT_NAMES.get(backbone, backbone if backbone.startswith(_HUB) else None)
    imagery = _describe_imagery(facts.settings["recorded"]["tiles"])
    if base:
        note = (
            f"{base}: the DINOv3 License of Meta, last updated on 19 August 2025, {DINOV3_URL}. It allows commercial "
            "use, with conditions: if you pass on the weights or anything derived from them, such as a fine-tuned "
            "export, do so under that agreement and with a copy of it; publications name the use of DINOv3; uses "
            "under ITAR, for military or nuclear purposes, espionage or weapons are excluded. Read it before you rely "
            "on this summary."
        )
        return Licences(note, imagery, base, "dinov3-license", DINOV3_URL)
    if backbone == "demo":
        note = (
            "demo: a stand-in that this package ships, trained on drawn scenes. It is not a DINOv3 checkpoint, and "
            "its figures say nothing about DINOv3."
        )
    else:
        note = (
            f"{backbone}: a checkpoint of your own. If it was derived from DINOv3, as a fine-tuned export is, the "
            f"DINOv3 License of Meta applies to it, {DINOV3_URL}; otherwise check the licence it came with."
        )
    return Licences(note, imagery, None, None, None)


def _describe_imagery(tiles: str) -> str:
    if "tileprobe-demo" in tiles:
        return (
            "The tiles are drawn by this package's demo: they are not satellite images, and their use is unrestricted."
        )
    if "xview" in tiles.lower():
        return (
            f"The address of the tiles, {tiles}, suggests xView, {XVIEW_SITE}, whose images and labels are under "
            f"CC BY-NC-SA 4.0, {XVIEW_URL}, that is: name the source, no commercial use, and pass on derived "
            "works under the same licence. Thumbnails in a report are such copies. If the tiles are not xView's, check "
            "the licence of your own imagery."
        )
    return (
        f"Check the licence of your own imagery, {tiles}, before you share pictures of it; `--no-images` leaves every "
        f"picture out of the report. xView's images and labels are under CC BY-NC-SA 4.0, {XVIEW_URL}."
    )
