"""The backbone and its weights: `create` builds a ViT, `load` brings weights into it, `export` writes them so that timm loads
them.

    from engine import model
    vit = model.create("vit_large_patch16_224")
    print(model.load(vit, "mae_pretrain_vit_large.pth"))
    tokens = vit(images)                      # [B, tokens, C] after the final norm
    model.export(vit, "my_vit")               # timm.create_model("local-dir:my_vit", pretrained=True)
"""

from engine.model.vit import VisionTransformer, create, names
from engine.model.weights import export, load

__all__ = ["VisionTransformer", "create", "export", "load", "names"]
