"""A plain training loop as in torchvision's references: SAM-ON with a schedule, mixed precision where there is a GPU,
evaluation and a checkpoint. ``python experiments/examples/torch_loop.py``"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from masks import MaskContext, build_mask, cross_entropy
from sam import SAM


def main(epochs: int = 2) -> float:
    """Train; returns the accuracy on held-out digits."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 8 - 1
    y = torch.tensor(digits.target)
    held_out = slice(1500, None)
    loader = DataLoader(TensorDataset(x[:1500], y[:1500]), batch_size=64, shuffle=True)

    model = resnet18(num_classes=10).to(device)
    mask = build_mask("norm", MaskContext(model))
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    optimizer = SAM(base, model, mask=mask, rho=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))

    def losses(batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return cross_entropy(model(batch[0]), batch[1])

    for epoch in range(epochs):
        model.train()
        total = 0.0
        for images, labels in loader:
            total += float(optimizer.step_on(losses, (images.to(device), labels.to(device))))
            scheduler.step()
        print(f"epoch {epoch}: loss {total / len(loader):.3f}")

    model.eval()
    with torch.no_grad():
        accuracy = (model(x[held_out].to(device)).argmax(1).cpu() == y[held_out]).double().mean().item()
    with tempfile.TemporaryDirectory() as folder:  # in earnest, a folder of your own
        path = Path(folder) / "checkpoint.pt"
        torch.save({"model": model.state_dict(), "sam": optimizer.state_dict()}, path)
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["sam"])
    print(f"accuracy on held-out digits {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
