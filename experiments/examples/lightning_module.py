"""SAM in Lightning, with its automatic optimization: the optimizer gets the closure that it needs.

``pip install 'sam-masks[examples]' && python experiments/examples/lightning_module.py``. What Lightning does around a
step decides what goes with it:

- precision "bf16-mixed" works; under "16-mixed" Lightning calls ``step`` without the closure, which SAM refuses.
- ``gradient_clip_val`` acts after each of the two passes; ``SAM(..., clip_grad_norm=...)`` clips what is stepped with.
- ``accumulate_grad_batches`` loses all but the last batch, as SAM begins every step with new gradients. Set
  ``automatic_optimization = False`` and call ``step_on`` with ``sam.Accumulated`` in ``training_step``; so, too, for
  methods that look into the batch (``micro_batch_sam``, ``esam``).
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from masks import MaskContext, build_mask
from sam import SAM


class Digits(lightning.LightningModule):
    """A small convolutional net."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 10))
        )

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)  # of the pass at w + eps, the second of the step
        return loss

    def configure_optimizers(self) -> Any:
        mask = build_mask("norm", MaskContext(self.net))
        optimizer = SAM(torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9), self.net, mask=mask, rho=0.5)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


def main(epochs: int = 2) -> float:
    """Train; returns the accuracy on the training images."""
    lightning.seed_everything(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    module = Digits()
    trainer = lightning.Trainer(max_epochs=epochs, devices=1, logger=False, enable_checkpointing=False)
    trainer.fit(module, loader)
    module.eval()
    with torch.no_grad():
        accuracy = (module.net(x).argmax(1) == y).double().mean().item()
    print(f"steps {trainer.global_step}, accuracy on the training images {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
