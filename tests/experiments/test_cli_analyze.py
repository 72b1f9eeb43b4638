"""sam-masks analyze: the numbers of the interface, one line for what cannot be measured, and interruptions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.checkpoint import save_checkpoint
from experiments.cli import main
from experiments.models import build_model
from tests.experiments.command_line import ANALYSIS_NOTES, Output, printed

OWN_NET = """import torch
from torch import nn

class Change(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change
    def forward(self, x):
        return self.change(x)

def net(num_classes, change=lambda x: x):
    return nn.Sequential(Change(change), nn.Flatten(), nn.Linear(64, num_classes))

def noisy(num_classes):
    return net(num_classes, lambda x: x + 0.1 * torch.randn_like(x))

def dropping(num_classes):
    return net(num_classes, lambda x: nn.functional.dropout(x, 0.1))

def shuffling(num_classes):
    return net(num_classes, lambda x: x[..., torch.randperm(8)])

def half(num_classes):
    return net(num_classes, lambda x: x.half()).half()
"""
FILES = ("own_net.py", "own.pt", "half.pt", "nan.pt", "inf.pt")


@pytest.fixture
def checkpoints(in_folder: Path) -> None:
    """A model of one's own with good and bad checkpoints."""
    Path("own_net.py").write_text(OWN_NET)
    generator = torch.Generator().manual_seed(0)
    good = {"2.weight": torch.randn(10, 64, generator=generator), "2.bias": torch.zeros(10)}
    bad = {"2.weight": good["2.weight"].clone(), "2.bias": good["2.bias"]}
    save_checkpoint(Path("own.pt"), good)
    save_checkpoint(Path("half.pt"), {name: value.half() for name, value in good.items()})
    for value in ("nan", "inf"):
        bad["2.weight"][0, 0] = float(value)
        save_checkpoint(Path(f"{value}.pt"), bad)


ANALYZE = ["analyze", "--data=digits", "--images=64", "--m=32", "--device=cpu"]
NET, HALF = "--model=own_net:net", "--checkpoint=half.pt"
BAD_ANALYSES: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "missing: --model, --checkpoint"),
    "a loss of NaN": (
        [NET, "--checkpoint=nan.pt"],
        "the loss is not finite for 64 of 64 examples at the given weights",
    ),
    "an infinite loss": ([NET, "--checkpoint=inf.pt"], "the loss is not finite for"),
    "a checkpoint in half precision": ([NET, HALF], "2.weight is torch.float16 in the checkpoint and torch.float32 in"),
    "a model in half precision": (["--model=own_net:half", HALF], "2.weight is torch.float16: curvature needs float32"),
    "a checkpoint of another model": (["--model=mlp", "--checkpoint=own.pt"], "the checkpoint is of another model: "),
    "no checkpoint": ([NET, "--checkpoint=nowhere.pt"], "cannot read checkpoint nowhere.pt"),
    "code for a checkpoint": ([NET, "--checkpoint=own_net.py"], "own_net.py is not a checkpoint of plain tensors"),
    "noise in the model": (["--model=own_net:noisy"], "data that differ between passes: 6"),
    "dropout that stays on": (
        ["--model=own_net:dropping"],
        "turn off random augmentation inside the model and dropout",
    ),
    "augmentation in the model": (["--model=own_net:shuffling"], "data that differ between passes"),
    "an empty mask": (
        [NET, "--mask=none"],
        "mask none keeps no coordinate of own_net:net: there is nothing to measure",
    ),
    "no norm layers": (
        [NET, "--mask=norm"],
        "none of the model's 2 trainable tensors belongs to a normalization layer",
    ),
    "an unknown metric": ([NET, "--metrics=lamda_max"], "unknown metric 'lamda_max'; did you mean lambda_max"),
    "a radius that is not taken": ([NET, "--metrics=gradient_norm@1"], "metric gradient_norm takes no radius"),
    "a metric that does not apply": (
        ["--model=vit_small", "--mask=norm", "--metrics=relative_flatness", "--checkpoint=vit.pt"],
        "metric relative_flatness does not apply to a mask",
    ),
    "too few images": ([NET, "--metrics=one_step_l2@0.5", "--m=65"], "m=65 needs at least 65 examples, got 64"),
    "no folder for the results": ([NET, "--out=nowhere/x.json"], "cannot write nowhere/x.json: its folder is not"),
    "other content": ([NET, "--out=own_net.py"], "own_net.py does not hold results of analyze"),
}


@pytest.mark.parametrize("case", BAD_ANALYSES)
def test_what_cannot_be_analyzed_is_one_line(case: str, checkpoints: None, in_folder: Path, capsys: Output) -> None:
    arguments, message = BAD_ANALYSES[case]
    files = set(FILES)
    if "--checkpoint=vit.pt" in arguments:
        model = build_model("vit_small", in_channels=1, image_size=(8, 8), num_classes=10, width=None)
        save_checkpoint(Path("vit.pt"), model.state_dict())
        files.add("vit.pt")
    given = [] if not arguments or any("--checkpoint" in a for a in arguments) else ["--checkpoint=own.pt"]
    assert message in refused_analysis([*ANALYZE, "--quiet", *given, *arguments], capsys)
    assert {path.name for path in in_folder.iterdir() if path.is_file()} == files


def refused_analysis(arguments: list[str], output: Output) -> str:
    """The one line on stderr."""
    assert main(arguments) == 2
    err = "".join(line for line in output.readouterr().err.splitlines(True) if not line.startswith(ANALYSIS_NOTES))
    assert err.startswith("sam-masks: error: ")
    assert err.count("\n") == 1
    return err


METRICS = "--metrics=gradient_norm,one_step_l2@0.5,relative_flatness,fisher_trace_empirical"
GOOD = [*ANALYZE, NET, "--checkpoint=own.pt", METRICS]


def test_analyze_prints_what_the_api_gives(checkpoints: None, capsys: Output) -> None:
    from experiments.analyze import AnalyzeOptions, analyze, as_text

    options = AnalyzeOptions("own_net:net", "own.pt", "digits", images=64, m=32, device="cpu", metrics=METRICS[10:])
    want = analyze(options)
    assert printed([*GOOD, "--quiet", "--json"], capsys) == want
    assert [one["metric"] for one in want] == METRICS[10:].split(",")
    assert all(list(one) == ["metric", "value", "error", "n", "settings"] for one in want)
    assert printed([*GOOD, "--quiet"], capsys).splitlines() == [as_text(one) for one in want]
    assert main(GOOD) == 0
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line.strip()] == [as_text(one) for one in want]
    assert "4/4" in err


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Ctrl-C during a metric."""
    from analysis import metrics

    def interrupt(name: str) -> None:
        def stop(context: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setitem(metrics._metrics, name, (metrics._metrics[name][0], stop))

    return interrupt


def test_an_interrupted_analysis_prints_what_it_has(
    checkpoints: None, capsys: Output, interrupted_at: Callable[[str], None]
) -> None:
    whole = printed([*GOOD, "--quiet", "--json"], capsys)
    interrupted_at("relative_flatness")
    assert main([*GOOD, "--quiet", "--json"]) == 130
    out, err = capsys.readouterr()
    assert json.loads(out) == whole[:2]
    assert err.endswith("\nsam-masks: interrupted; what was measured is printed; --out FILE would have kept it\n")
    assert main([*GOOD, "--quiet"]) == 130
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "gradient_norm",
        "one_step_l2@0.5",
    ]


def test_an_interrupted_analysis_goes_on_from_its_file(
    checkpoints: None, capsys: Output, interrupted_at: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = printed([*GOOD, "--quiet", "--json"], capsys)
    with monkeypatch.context() as during:
        from analysis import metrics

        during.setitem(metrics._metrics, "relative_flatness", (metrics._metrics["relative_flatness"][0], _stop))
        assert main([*GOOD, "--quiet", "--json", "--out=k.json"]) == 130
    assert "the same command goes on from k.json" in capsys.readouterr().err
    assert json.loads(Path("k.json").read_text())["results"] == whole[:2]
    interrupted_at("gradient_norm")  # which is not measured again
    assert printed([*GOOD, "--quiet", "--json", "--out=k.json"], capsys) == whole
    interrupted_at("fisher_trace_empirical")
    assert printed([*GOOD, "--quiet", "--json", "--out=k.json"], capsys) == whole
    assert [path.name for path in Path().glob("k.json*")] == ["k.json"]
    # Results of anything else are not taken.
    kept = Path("k.json").read_bytes()
    for change, what in (
        ("--m=16", "another m;"),
        ("--seed=1", "another seed;"),
        ("--labels=clean", "another labels;"),
        ("--images=32", "another images;"),
        ("--label-noise=0.1", "another label_noise;"),
        ("--checkpoint=other.pt", "another checkpoint;"),
    ):
        state = torch.load("own.pt")
        save_checkpoint(Path("other.pt"), {name: 2 * value for name, value in state.items()})
        assert what in refused_analysis([*GOOD, "--quiet", "--out=k.json", change], capsys)
    Path("own_net.py").write_text(OWN_NET + "\n")
    assert "another model own_net;" in refused_analysis([*GOOD, "--quiet", "--out=k.json"], capsys)
    assert Path("k.json").read_bytes() == kept


def _stop(context: Any) -> Any:
    raise KeyboardInterrupt
