"""SAM under Hugging Face Accelerate, on one device or several.

``pip install 'sam-masks[examples]' && accelerate launch experiments/examples/accelerate_loop.py``. Accelerate prepares
the model and the data, and SAM is made around the prepared model. SAM itself is not handed to ``prepare``: its wrapper
has no ``step_on``. For float16 give SAM a ``torch.amp.GradScaler`` and leave ``mixed_precision`` at "no" or "bf16"; for
micro-batches use ``sam.Accumulated`` instead of ``accelerator.accumulate``.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from masks import MaskContext, build_mask, cross_entropy
from sam import SAM


def main(epochs: int = 2) -> float:
    """Train; returns the accuracy on the training images."""
    torch.manual_seed(0)
    accelerator = Accelerator()
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(digits.target)
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 10))
    )
    model, loader = accelerator.prepare(net, DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True))
    mask = build_mask("norm", MaskContext(accelerator.unwrap_model(model)))
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, mask=mask, rho=0.5)

    def losses(batch: list[Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    for epoch in range(epochs):
        for batch in loader:
            loss = optimizer.step_on(losses, batch)
        accelerator.print(f"epoch {epoch}: loss of the last step {float(loss):.3f}")
    model.eval()
    with torch.no_grad():
        predicted = model(x.to(accelerator.device)).argmax(1).cpu()
    accuracy = (predicted == y).double().mean().item()
    accelerator.print(f"accuracy on the training images {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
