"""A timm model with timm's own scheduler, SAM perturbing its LayerNorms only.

``pip install 'sam-masks[examples]' && python experiments/examples/timm_model.py``. In comparisons such a model is
``--model timm:NAME``.
"""

from __future__ import annotations

import timm
import torch
from sklearn.datasets import load_digits
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor

from masks import MaskContext, build_mask, cross_entropy
from sam import SAM


def main(epochs: int = 3) -> float:
    """Train; returns the accuracy on the training images."""
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(digits.target)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=48, depth=2, num_heads=2
    )
    mask = build_mask("norm", MaskContext(model))
    optimizer = SAM(torch.optim.AdamW(model.parameters(), lr=3e-3), model, mask=mask, rho=0.5)
    scheduler = CosineLRScheduler(optimizer, t_initial=epochs, warmup_t=1, warmup_lr_init=1e-3)

    def losses(batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    for epoch in range(epochs):
        scheduler.step(epoch)
        for index in torch.randperm(len(x)).split(64):
            loss = optimizer.step_on(losses, (x[index], y[index]))
        print(f"epoch {epoch}: loss of the last step {float(loss):.3f}")
    model.eval()
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == y).double().mean().item()
    print(f"{mask}; accuracy on the training images {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
