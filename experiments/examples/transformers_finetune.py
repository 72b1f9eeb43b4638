"""Fine-tuning a Transformers model, SAM perturbing its LayerNorms only. The small model is built from its configuration
and nothing is downloaded; in earnest, ``BertForSequenceClassification.from_pretrained(NAME)``.

``pip install 'sam-masks[examples]' && python experiments/examples/transformers_finetune.py``. A loop of its own, as
the library's Trainer computes one gradient and calls ``step`` without a closure, which SAM refuses. Losses per example
come from the logits: the loss that the model returns is a mean.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup

from masks import MaskContext, build_mask, cross_entropy
from sam import SAM


def sequences(n: int) -> dict[str, Tensor]:
    """Sequences of 16 tokens of different lengths; label 1 if more than half of the tokens are above 20."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 40, (n, 16), generator=generator)
    attention = (torch.arange(16) < torch.randint(5, 17, (n, 1), generator=generator)).long()
    labels = ((ids > 20) * attention).sum(1) * 2 > attention.sum(1)
    return {"input_ids": ids * attention, "attention_mask": attention, "labels": labels.long()}


def main(epochs: int = 3) -> float:
    """Fine-tune; returns the accuracy on held-out sequences."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = BertForSequenceClassification(config)
    data = sequences(1200)
    held_out = {name: values[1000:] for name, values in data.items()}
    mask = build_mask("norm", MaskContext(model))
    optimizer = SAM(torch.optim.AdamW(model.parameters(), lr=5e-3), model, mask=mask, rho=0.5, clip_grad_norm=1.0)
    scheduler = get_linear_schedule_with_warmup(optimizer, 5, epochs * 32)

    def logits(batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return found

    def losses(batch: dict[str, Tensor]) -> Tensor:
        return cross_entropy(logits(batch), batch["labels"])

    for epoch in range(epochs):
        model.train()
        for index in torch.randperm(1000).split(32):
            loss = optimizer.step_on(losses, {name: values[index] for name, values in data.items()})
            scheduler.step()
        print(f"epoch {epoch}: loss of the last step {float(loss):.3f}")
    model.eval()
    with torch.no_grad():
        accuracy = (logits(held_out).argmax(1) == held_out["labels"]).double().mean().item()
    print(f"{mask}; accuracy on held-out sequences {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
