"""What turns pixels into embeddings.

from models import load_backbone
backbone = load_backbone("checkpoint.pth")
image_feature, patch_features = backbone(images)
"""

from models.pretrained import load_backbone
from models.registry import ARCHITECTURES, BackboneSpec, build_backbone

__all__ = ["ARCHITECTURES", "BackboneSpec", "build_backbone", "load_backbone"]
