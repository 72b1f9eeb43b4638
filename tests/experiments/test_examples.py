"""The examples of other libraries' training loops run, learn, and step as SAM does by itself."""

from __future__ import annotations

import runpy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.documents import ROOT

pytestmark = pytest.mark.slow
FOLDER = ROOT / "experiments" / "examples"
EXAMPLES = {  # the package it needs, and an accuracy that it exceeds if it learns at all
    "torch_loop": ("torch", 0.6),
    "lightning_module": ("lightning", 0.6),
    "accelerate_loop": ("accelerate", 0.6),
    "timm_model": ("timm", 0.2),
    "transformers_finetune": ("transformers", 0.7),
}


def names_of(example: str) -> dict[str, Any]:
    """What an example defines; skipped where its library is missing."""
    pytest.importorskip(EXAMPLES[example][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return runpy.run_path(str(FOLDER / f"{example}.py"))


def test_every_example_is_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.filterwarnings("ignore")
def test_an_example_learns(example: str) -> None:
    main = names_of(example)["main"]
    with torch.random.fork_rng(devices=[]):
        assert main() > EXAMPLES[example][1]


@pytest.mark.filterwarnings("ignore")
def test_lightning_steps_as_a_plain_loop_does() -> None:
    module_class = names_of("lightning_module")["Digits"]
    import lightning

    x, y = torch.randn(48, 1, 8, 8), torch.randint(10, (48,))
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    by_lightning, by_hand = module_class(), module_class()
    by_hand.load_state_dict(by_lightning.state_dict())
    by_hand.trainer = trainer  # for the number of epochs
    (optimizer,), _ = by_hand.configure_optimizers()
    for images, labels in batches:

        def closure(images: torch.Tensor = images, labels: torch.Tensor = labels) -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(by_hand.net(images), labels)
            loss.backward()
            return loss

        optimizer.step(closure)
    trainer.fit(by_lightning, batches)
    for ours, theirs in zip(by_hand.state_dict().values(), by_lightning.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
