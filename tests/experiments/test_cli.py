"""The command line: what it prints, and one clear line for whatever cannot be had."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from experiments import cli, commands, worker
from experiments.checkpoint import save_checkpoint
from experiments.cli import main
from experiments.compare import Comparison
from experiments.config import CompareConfig, RunConfig
from experiments.models import build_model
from experiments.presets import get_preset, list_presets
from experiments.store import RESULT, read_run
from masks import Mask, MaskContext, build_mask, list_masks, mask_info, registry

TINY = ["--n-train=100", "--n-val=30", "--n-test=50", "--width=4", "--epochs=1", "--batch-size=32"]
COMMAND = Path(sys.executable).with_name("sam-masks")
LIMITED = pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")


@pytest.fixture(autouse=True)
def own_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of plugins loaded in a test are forgotten."""
    mask_info("norm")
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))


Output = pytest.CaptureFixture[str]


def refused(arguments: list[str], output: Output) -> str:
    """The one line on stderr of a command that must be refused."""
    try:
        code = main(arguments)
    except SystemExit as error:
        pytest.fail(f"SystemExit({error.code}): {output.readouterr().err}")
    out, err = output.readouterr()
    assert code == 2, err
    assert out == ""
    assert err.startswith("sam-masks: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    assert len(err) < 500, err
    return err.removeprefix("sam-masks: error: ").rstrip()


# -- bad input ----------------------------------------------------------------------------------------------

BAD: dict[str, tuple[list[str], str]] = {
    # names
    "command": (["trian"], "unknown command 'trian'; did you mean train?"),
    "mask": (["train", "--mask", "nrom"], "unknown mask 'nrom'; did you mean norm"),
    "mask among masks": (["compare", "--masks", "all,rnadom"], "unknown mask 'rnadom'; did you mean random"),
    "mask to list": (["masks", "--model=mlp", "--density=.1", "--masks=magnitud"], "did you mean magnitude?"),
    "option of a mask": (["train", "--mask", "fisher:label=model"], "did you mean labels?"),
    "value of an option of a mask": (["train", "--mask=fisher:labels=x"], "must be data|model, got 'x'"),
    "model": (["train", "--model", "resnet_smal"], "unknown model 'resnet_smal'; did you mean resnet_small"),
    "torchvision model": (["masks", "--model=torchvision:resnet81"], "did you mean resnet18"),
    "model of one's own": (["masks", "--model=nowhere:net"], "cannot import 'nowhere'"),
    "function of one's own": (["masks", "--model=json:lods"], "did you mean loads"),
    "data": (["train", "--data", "digts"], "unknown data set 'digts'; did you mean digits?"),
    "rule": (["train", "--rule", "l3"], "option rule must be one of l2, linf, elementwise_l2"),
    "optimizer": (["train", "--optimizer", "adem"], "unknown optimizer 'adem'; did you mean adam"),
    "optimizer that asks for losses": (["train", "--optimizer=lbfgs"], "its step is more than one gradient"),
    "option of an optimizer": (["train", "--optimizer=adamw:beta=1"], "did you mean betas"),
    "value of an option of an optimizer": (
        ["train", "--optimizer=adamw:eps=x"],
        "eps of optimizer adamw must be float",
    ),
    "setting as an option": (["train", "--optimizer=sgd:lr=1"], "lr is a setting of the run; leave it out"),
    "optimizer without weight decay": (["train", *TINY, "--optimizer=rprop"], "has no weight decay; set weight_decay"),
    "optimizer of matrices": (["train", *TINY, "--optimizer=muon"], "optimizer muon: Muon only supports 2D parameters"),
    "method": (["train", "--method", "asma"], "unknown method 'asma'; did you mean asam"),
    "method among methods": (["compare", "--methods=sam,gasm"], "unknown method 'gasm'; did you mean gsam"),
    "option of a method": (["train", "--method=gsam:alfa=1"], "did you mean alpha?"),
    "value of an option of a method": (
        ["train", "--method=gsam:alpha=-1"],
        "alpha of gsam must be a finite number >= 0",
    ),
    "method without its base width": (["train", *TINY, "--method=mup_sam"], "needs a base width: mup_sam:base_width=N"),
    "mask for a method with its own": (
        ["train", "--method=ssam_f", "--mask=all"],
        "method ssam_f has a mask of its own (fisher); leave mask out, got all",
    ),
    "norm scope for a method with its own": (
        ["train", "--method=ssam_d", "--norm-scope=masked"],
        "method ssam_d has a norm_scope of its own (full); leave norm_scope out, got masked",
    ),
    "rule for a method with its own": (["train", "--method=asam", "--rule=linf"], "has a rule of its own; leave rule"),
    "momentum SAM without momentum": (
        ["train", *TINY, "--method=momentum_sam", "--momentum=0"],
        "give it momentum > 0",
    ),
    "preset": (["presets", "--name=sam_on_cifar10_wrn28_10"], "did you mean sam_on_cifar100_wrn28_10"),
    "scale of no preset": (["presets", "--scale=0.5"], "scale has no effect without --name"),
    "scale above 1": (["presets", "--name=sam_cifar10_resnet20", "--scale=2"], "scale must be above 0 and at most 1"),
    "learning-rate schedule": (["train", "--schedule=cosin"], "option schedule must be one of cosine, step, constant"),
    "augmentation": (
        ["train", "--augment=crop+flop"],
        "augmentation 'crop+flop': unknown part 'flop'; did you mean flip",
    ),
    "what is trained": (["train", "--trainable=norms"], "option trainable must be one of all, norm, no_norm"),
    "window": (["train", "--sam-epochs=3-5"], "sam_epochs must be START..END, got '3-5'"),
    "option": (["train", "--moedl", "mlp"], "unknown option 'moedl'; did you mean model"),
    "option with =": (["compare", "--epochz=3"], "unknown option 'epochz'; did you mean epochs or"),
    "option like none": (["compare", "--xyzzy"], "unknown option 'xyzzy'; --help lists the options"),
    "abbreviation": (["train", "--epoch", "3"], "unknown option 'epoch'; did you mean epochs or"),
    "argument": (["train", "foo"], "unknown option 'foo'"),
    "option of another command": (["train", "--seeds", "3"], "unknown option 'seeds'; did you mean seed"),
    "what a comparison decides": (["compare", "--mask", "norm"], "unknown option 'mask'; did you mean masks"),
    "one seed of a comparison": (["compare", "--seed", "3"], "unknown option 'seed'; did you mean seeds"),
    "one radius of a comparison": (["compare", "--rho", "3"], "unknown option 'rho'; did you mean rho_min or rho_grid"),
    "tuning by hand": (["train", "--tuning", "true"], "unknown option 'tuning'"),
    "missing value": (["train", "--epochs"], "expected one argument"),
    "device": (["train", "--device", "gpu"], "unknown device 'gpu'; use auto, cpu, cuda or cuda:N"),
    # numbers
    "density above 1": (["train", "--mask=random", "--density=1.5"], "density must lie between 0 and 1, got 1.5"),
    "negative density": (["masks", "--model=mlp", "--density=-0.1"], "density must lie between 0 and 1, got -0.1"),
    "unreachable density": (["train", *TINY, "--mask=random", "--density=1e-7"], "out of reach: it would keep 0"),
    "density of no norm": (
        ["train", *TINY, "--mask=magnitude:exclude_norm=true", "--density=0.99"],
        "cannot keep 1368 coordinates: only 1310 of 1382 are eligible",
    ),
    "negative rho": (["train", "--rho", "-1"], "rho must be a finite number >= 0, got -1.0"),
    "NaN rho": (["train", "--rho", "nan"], "rho must be a finite number"),
    "NaN rho in YAML": (["train", "--rho", ".nan"], "rho must be a finite number >= 0, got nan"),
    "infinite rho": (["train", "--rho", "1e999"], "rho must be a finite number >= 0, got inf"),
    "negative grid": (["compare", "--rho-grid=1,-2"], "distinct finite numbers >= 0"),
    "NaN in a grid": (["compare", "--masks=norm", "--rho-grid=1,nan"], "distinct finite numbers >= 0"),
    "words": (["train", "--epochs", "many"], "option epochs must be a whole number, got many"),
    "words for an optional number": (["train", "--n-train", "x"], "option n_train must be a whole number, got x"),
    "words for a share": (["compare", "--label-noise=x"], "option label_noise must be a finite number, got x"),
    "half an epoch": (["train", "--epochs", "1.5"], "option epochs must be a whole number, got 1.5"),
    "noise above 1": (["train", "--label-noise", "2"], "label_noise must be from 0 to 1"),
    "no processes": (["compare", *TINY, "--processes=0"], "processes must be at least 1, got 0"),
    "sharpness radius": (["compare", "--sharpness-rho=0"], "sharpness_rho must be a positive finite number"),
    "more images than there are": (["train", "--n-train=5000"], "n_train = 5000"),
    "empty window": (["train", "--sam-epochs=5..5"], "sam_epochs 5..5 holds no epoch"),
    "late window": (["train", "--epochs=3", "--sam-epochs=3.."], "sam_epochs 3.. begins after the run, which has 3"),
    "long warm-up": (["train", "--epochs=3", "--warmup=3"], "warmup must be shorter than the run: 3 of 3 epochs"),
    "no clipping": (["train", "--clip-grad-norm=0"], "clip_grad_norm must be a positive finite number, got 0"),
    "smoothing of 1": (["train", "--label-smoothing=1"], "label_smoothing must lie in [0, 1), got 1"),
    "least radius": (["train", "--rho=1", "--rho-min=2"], "rho_min must lie between 0 and rho=1, got 2"),
    "least radius of a grid": (["compare", "--rho-grid=1,2", "--rho-min=1.5"], "between 0 and rho=1, got 1.5"),
    # masks and models that do not go together
    "norms that are frozen": (["train", *TINY, "--trainable=no_norm", "--mask=norm"], "trainable tensors belongs to a"),
    "count of norms that are frozen": (["train", *TINY, "--trainable=no_norm", "--mask=random"], "mask norm: none of"),
    "no norms to train": (["train", "--model=mlp", "--trainable=norm", "--mask=all"], "leaves nothing to train"),
    "norm without norms": (["train", "--model=mlp", "--mask=norm"], "none of the model's 6 trainable tensors belongs"),
    "match without norms": (["train", "--model=mlp", "--mask=random"], "none of the model's 6 trainable tensors"),
    "arm without norms": (["compare", "--model=mlp", "--masks=all,random"], "arm random: mask norm: none of the"),
    "list without norms": (["masks", "--model=mlp"], "none of the model's 6 trainable tensors belongs to a norm"),
    "match of a budgeted mask": (["train", "--mask=random", "--match=fisher"], "fisher is budgeted; give a density"),
    "classes that are too few": (["masks", "--model=mlp", "--data=digits", "--num-classes=3"], "num_classes is 3"),
    "images of another shape": (["train", "--model=torchvision:resnet18"], "does not take images of 1x8x8"),
    "a mask that needs data": (["masks", "--model=vit_small", "--masks=fisher"], "none was given"),
    "a mask never built": (["train", *TINY, "--mask=norm@after=1"], "would never be built: the run ends after 1 epoch"),
    "a rule without a norm": (["train", "--rule=linf", "--norm-scope=full"], "norm_scope full has no meaning"),
    "what has no effect": (
        ["masks", "--density", "0.1", "--save=x"],
        "density and save have no effect without --model",
    ),
    # comparisons
    "an arm twice": (["compare", "--masks=norm,norm"], "two arms have the same name: norm"),
    "nothing to compare": (["compare", "--masks=none"], "nothing to compare"),
    "methods without a mask": (["compare", "--masks=none", "--methods=sam"], "no mask for the methods sam"),
    "an arm twice by its method": (["compare", "--masks=norm", "--methods=sam,sam:p=2"], "the same name: sam/norm"),
    "a method with a mask as the method": (["compare", "--method=ssam_f"], "compare it with methods=ssam_f"),
    "method and methods": (["compare", "--method=asam", "--methods=sam"], "give method or methods, not both"),
    "scope for one of the methods": (["compare", "--methods=sam,sam_on", "--norm-scope=full"], "leave norm_scope out"),
    # files
    "no configuration": (["compare", "--config=nowhere.yaml"], "nowhere.yaml"),
    "no checkpoint": (["train", *TINY, "--init=nowhere.pt"], "cannot read checkpoint nowhere.pt: No such file"),
    "no mask file": (["train", *TINY, "--mask=file:path=nowhere.npz"], "cannot read mask file nowhere.npz: No such"),
    "no path": (["train", *TINY, "--mask=file"], "mask file needs its option path: file:path=FILE.npz"),
    "no data file": (["train", "--data=npz:nowhere.npz"], "cannot read npz:nowhere.npz: No such file"),
    "no image folder": (["train", "--data=folder:nowhere"], "folder:nowhere"),
    "no plugin": (["masks", "--plugin=nowhere"], "plugin nowhere failed to import: ModuleNotFoundError"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_line_and_leaves_nothing(case: str, in_folder: Path, capsys: Output) -> None:
    arguments, message = BAD[case]
    assert message in refused(arguments, capsys)
    assert [path for path in in_folder.rglob("*") if path.is_file()] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("command", ["compare", "train"])
def test_cuda_where_there_is_none(command: str, in_folder: Path, capsys: Output) -> None:
    assert "finds no CUDA device here" in refused([command, "--device=cuda"], capsys)
    assert list(in_folder.iterdir()) == []


def data(**changes: Any) -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).random((40, 8, 8)).astype(np.float32)
    y = np.arange(40) % 4
    return {"x_train": x[:32], "y_train": y[:32], "x_test": x[32:], "y_test": y[32:], **changes}


def with_nan() -> np.ndarray:
    x = data()["x_train"].copy()
    x[3, 1, 1] = np.nan
    return x


BAD_DATA: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "shape": (data(x_train=np.zeros((32, 64), np.float32)), "x_train has shape (32, 64); images must be N x H x W"),
    "lengths": (data(y_train=np.zeros(31, int)), "x_train has 32 images, but y_train has 31 labels"),
    "two shapes": (data(x_test=np.zeros((8, 9, 8), np.float32)), "x_train and x_test differ"),
    "NaN": (data(x_train=with_nan()), "1 of 40 images hold NaN or infinite"),
    "labels": (data(y_test=np.full(8, 4)), "y_test holds label 4, but the classes of y_train are 0 to 3"),
    "negative labels": (data(y_train=np.full(32, -1)), "y_train holds label -1"),
    "float labels": (data(y_train=np.zeros(32)), "labels must be integers"),
    "missing": ({"x_train": data()["x_train"]}, "lacks y_train, x_test, y_test"),
}


@pytest.mark.parametrize("case", BAD_DATA)
@pytest.mark.parametrize("command", ["compare", "train"])
def test_data_that_are_wrong(case: str, command: str, in_folder: Path, capsys: Output) -> None:
    content, message = BAD_DATA[case]
    np.savez("d.npz", **content)  # type: ignore[arg-type]
    assert message in refused([command, "--data=npz:d.npz"], capsys)
    assert [p.name for p in in_folder.iterdir()] == ["d.npz"]


def test_data_that_are_truncated(in_folder: Path, capsys: Output) -> None:
    np.savez("d.npz", **data())  # type: ignore[arg-type]
    Path("d.npz").write_bytes(Path("d.npz").read_bytes()[:500])
    assert "is not an .npz of plain arrays, or is truncated" in refused(["train", "--data=npz:d.npz"], capsys)


CONFIGS: dict[str, tuple[bytes, str]] = {
    "unknown key": (b"epochz: 1\n", "unknown option 'epochz'; did you mean epochs or"),
    "key like none": (b"foo: 1\n", "unknown option 'foo'; --help lists the options"),
    "key of a run": (b"rho: 1\n", "unknown option 'rho'; did you mean rho_min or rho_grid"),
    "wrong type": (b"epochs: many\n", "option epochs must be a whole number, got many"),
    "malformed": (b"epochs: [1\n", "Problems parsing config"),
    "a list": (b"- 1\n", "config"),
    "no text": (bytes(range(128, 256)), "the configuration file is not text"),
    "arms as text": (b"arms: norm\n", "option arms must be a list, got norm"),
    "unknown mask": (b"arms:\n- {name: a, mask: nrom, rho: [1.0]}\n", "unknown mask 'nrom'; did you mean norm"),
    "negative rho": (b"arms:\n- {name: a, mask: norm, rho: [-1.0]}\n", "arm a: rho must be distinct finite numbers"),
    "unknown key of an arm": (b"arms:\n- {name: a, maks: norm, rho: [1.0]}\n", "unknown option 'maks'; did you mean"),
    "two of a name": (b"arms:\n- {name: a, mask: norm, rho: [1]}\n- {name: a, mask: all, rho: [1]}\n", "same name: a"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configuration_files_that_are_wrong(case: str, in_folder: Path, capsys: Output) -> None:
    content, message = CONFIGS[case]
    Path("c.yaml").write_bytes(content)
    assert message in refused(["compare", "--config=c.yaml"], capsys)
    Path("folder.yaml").mkdir()
    assert "folder.yaml" in refused(["compare", "--config=folder.yaml"], capsys)


def test_checkpoints_that_are_wrong(in_folder: Path, capsys: Output) -> None:
    model = build_model("resnet_small", in_channels=1, image_size=(8, 8), num_classes=10, width=8)
    save_checkpoint(Path("other.pt"), {"model": model.state_dict()})
    for command in (["train", *TINY], ["masks", "--model=resnet_small", "--width=4"]):
        found = refused([*command, "--init=other.pt"], capsys)
        assert found.startswith("the checkpoint is of another model: ")
        assert "has shape" in found
    Path("cut.pt").write_bytes(Path("other.pt").read_bytes()[:-300])
    Path("foreign.pt").write_text("not a checkpoint")
    for name in ("cut.pt", "foreign.pt"):
        message = refused(["train", *TINY, f"--init={name}"], capsys)
        assert f"{name} is not a checkpoint of plain tensors, or is truncated" in message
    assert sorted(p.name for p in in_folder.iterdir() if p.is_file()) == ["cut.pt", "foreign.pt", "other.pt"]
    assert not Path("results").exists() or not any(Path("results").iterdir())


def test_mask_files_that_are_wrong(in_folder: Path, capsys: Output) -> None:
    model = build_model("resnet_small", in_channels=1, image_size=(8, 8), num_classes=10, width=8)
    build_mask("norm", MaskContext(model)).save("other.npz")
    Path("cut.npz").write_bytes(Path("other.npz").read_bytes()[:-100])
    Path("text.npz").write_text("not a mask")
    np.savez("foreign.npz", x=np.zeros(3))
    wanted = {
        "other.npz": "holds a mask of another model",
        "cut.npz": "is not a mask file, or is truncated",
        "text.npz": "is not a mask file, or is truncated",
        "foreign.npz": "is not a mask file, or is truncated",
    }
    for name, message in wanted.items():
        assert f"{name} {message}" in refused(["train", *TINY, f"--mask=file:path={name}"], capsys)
        found = refused(["compare", *TINY, f"--masks=file:path={name}"], capsys)
        assert f"{name} {message}" in found
        assert found.startswith(f"arm file:path={name}: ")


PLUGIN = """from masks import register_score

@register_score("{name}", summary="|w| to a power", source="test")
def score(context, *, power: float = 1.0):
    return [w.abs() ** power for w in context.parameters()]
"""


def test_plugins_that_are_wrong(in_folder: Path, capsys: Output) -> None:
    Path("raising_masks.py").write_text("raise RuntimeError('no\\nluck')\n")
    Path("syntax_masks.py").write_text("def (\n")
    Path("taking_masks.py").write_text(PLUGIN.format(name="norm"))
    Path("two_masks.py").write_text(PLUGIN.format(name="fresh") + PLUGIN.format(name="random"))
    wanted = {
        "raising_masks": "plugin raising_masks failed to import: RuntimeError: no luck",
        "syntax_masks": "plugin syntax_masks failed to import: SyntaxError",
        "taking_masks": "mask 'norm' is already registered by sam-masks; taking_masks must rename its own",
        "two_masks": "mask 'random' is already registered by sam-masks; two_masks must rename its own",
    }
    for name, message in wanted.items():
        for command in (["masks"], ["compare"], ["train"]):
            assert message in refused([*command, f"--plugin={name}"], capsys)
    assert "unknown mask 'fresh'" in refused(["train", "--mask=fresh"], capsys)  # none of a broken plugin's masks stays


def test_folders_that_hold_other_things(in_folder: Path, capsys: Output) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("my only copy")
    Path("file").write_text("mine, too")
    for command in ("compare", "train"):
        assert "choose another folder with --out" in refused([command, *TINY, "--out=mine"], capsys)
        assert "cannot use file for results" in refused([command, *TINY, "--out=file"], capsys)
    assert Path("mine/thesis.txt").read_text() == "my only copy"
    assert len(list(in_folder.rglob("*"))) == 3


@LIMITED
def test_a_folder_that_may_not_be_written_to(in_folder: Path, capsys: Output) -> None:
    Path("locked").mkdir(mode=0o555)
    for command in ("compare", "train"):
        for out in ("locked", "locked/below"):
            assert "locked" in refused([command, *TINY, f"--out={out}"], capsys)


def test_an_unforeseen_error_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    def broken(values: Any) -> int:
        raise ZeroDivisionError("a\nbug")

    monkeypatch.setattr(commands, "run_masks", broken)
    assert main(["masks"]) == 1
    err = capsys.readouterr().err
    assert err == "sam-masks: error: ZeroDivisionError: a bug; set SAM_MASKS_TRACEBACK=1 to see where it comes from\n"
    monkeypatch.setenv("SAM_MASKS_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["masks"])


def test_an_interruption_is_one_line_and_code_130(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    def interrupted(values: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run_train", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == (
        "sam-masks: interrupted; finished runs are kept, and the same command goes on from there\n"
    )


# -- help ---------------------------------------------------------------------------------------------------

COMMANDS = (
    *("compare", "ablate", "train", "masks", "methods", "presets"),
    *("analyze", "report", "verdict", "new-mask", "doctor"),
)


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_lists_and_explains_every_option(command: str | None, capsys: Output) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*([command] if command else []), "--help"])
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    if command is None:
        assert all(name in out for name in (*COMMANDS, "--version", "exit codes: 0 done"))
        return
    assert f"example: sam-masks {command}" in out
    assert "<class" not in out
    parser = next(a.choices for a in cli.build_parser()._actions if isinstance(a.choices, dict))[command]
    for action in parser._actions:
        for option in action.option_strings:
            assert option in out
        if action.help != "==SUPPRESS==" and not any(o.endswith(".help") for o in action.option_strings):
            assert action.help, action.option_strings


def test_no_command_shows_what_there_is(capsys: Output) -> None:
    assert main([]) == 2
    assert "compare" in capsys.readouterr().out


def test_version(capsys: Output) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert re.fullmatch(r"sam-masks \S+\n", capsys.readouterr().out)


# -- masks --------------------------------------------------------------------------------------------------


ANALYSIS_NOTES = ("sam-masks: warning: no record of train", "sam-masks: mean loss ")
"""What stands on stderr before the numbers of an analysis."""


def printed(arguments: list[str], output: Output) -> Any:
    assert main(arguments) == 0
    out, err = output.readouterr()
    assert [line for line in err.splitlines() if not line.startswith(ANALYSIS_NOTES)] == []
    return json.loads(out) if "--json" in arguments else out


def test_masks_lists_every_mask(capsys: Output) -> None:
    text = printed(["masks"], capsys)
    listed = printed(["masks", "--json"], capsys)
    names = [info.name for info in list_masks()]
    assert [one["name"] for one in listed] == names
    for info in list_masks():
        assert re.search(rf"^{info.name}  \(", text, flags=re.MULTILINE)
        assert info.summary in text


def test_masks_of_a_model_as_json(capsys: Output) -> None:
    masks = printed(["masks", "--model=vit_small", "--width=16", "--num-classes=3", "--json"], capsys)
    norm = next(mask for mask in masks if mask["name"] == "norm")
    assert (norm["kept"], norm["matched"], norm["jaccard_norm"]) == (7 * 32, False, 1.0)
    for mask in masks:
        assert {"name", "kept", "numel", "density", "matched", "jaccard_norm"} <= set(mask)
        if mask["matched"]:
            assert (mask["kept"], mask["numel"]) == (norm["kept"], norm["numel"])
    assert {mask["name"] for mask in masks if mask["matched"]} == {"random", "random_depth", "magnitude"}


def test_masks_of_a_model_with_data(capsys: Output) -> None:
    command = ["masks", "--model=resnet_small", "--width=4", "--data=digits", "--score-images=40"]
    text = printed(command, capsys)
    masks = {mask["name"]: mask for mask in printed([*command, "--json"], capsys)}
    for name in ("fisher", "snip", "gradient", "magnitude", "random"):
        assert masks[name]["kept"] == 72
        assert re.search(rf"^ *{name} +72 +5\.21 % +yes ", text, flags=re.MULTILINE)
    assert masks["fisher"]["build_seconds"] > 0
    assert "skipped file" in text


def test_both_spellings_of_an_option(capsys: Output) -> None:
    one, other = (
        printed(["masks", "--model=mlp", "--width=4", "--density=0.5", flag, "3", "--masks=all", "--json"], capsys)
        for flag in ("--num-classes", "--num_classes")
    )
    assert one[0]["numel"] == other[0]["numel"] == 64 * 4 + 4 + 16 + 4 + 12 + 3


def test_a_saved_mask_can_be_trained_with(in_folder: Path, capsys: Output) -> None:
    printed(["masks", "--model=resnet_small", "--width=4", "--masks=random", "--save=m", "--seed=5", "--json"], capsys)
    mask = Mask.load("m/random.npz")
    record = printed(["train", *TINY, "--mask=file:path=m/random.npz", "--out=o", "--json"], capsys)
    (build,) = record["result"]["mask_builds"]
    assert build["digest"] == mask.digest()
    assert build["num_kept"] == 72


# -- train --------------------------------------------------------------------------------------------------


def test_train_prints_the_record_that_it_keeps(in_folder: Path, capsys: Output) -> None:
    command = ["train", *TINY, "--mask=random", "--rho=0.5", "--out=o", "--seed=3"]
    record = printed([*command, "--json"], capsys)
    assert record["config"] == asdict(
        RunConfig(
            **{
                **{"n_train": 100, "n_val": 30, "n_test": 50, "width": 4, "epochs": 1, "batch_size": 32},
                **{"mask": "random", "rho": 0.5, "seed": 3},
            }
        ).resolved()
    )
    kept = read_run(Path("o"))
    assert {**asdict(kept), "telemetry": None} == {**record, "telemetry": None}
    text = printed(command, capsys)
    result = record["result"]
    assert "mask random: 72 of 1,382 coordinates" in text
    assert f"test accuracy {result['test_accuracy']:.4f} of 50 images" in text
    for name, metric in result["metrics"].items():
        assert f"{name}: {metric['value']:.5g}" in text
    assert f"loss {result['history'][-1]['loss']:.4f}, ascent" in text
    assert "||eps|| 0.5000" in text
    assert "record and checkpoint: o" in text


def test_a_diverged_run_is_printed_as_one(in_folder: Path, capsys: Output) -> None:
    command = ["train", *TINY, "--lr=1e18", "--mask=gradient", "--epochs=3", "--model=vit_small", "--width=16"]
    record = printed([*command, "--json"], capsys)  # strict JSON: what is not finite is null
    assert record["result"]["history"][-1]["loss"] is None
    text = printed(command, capsys)
    assert "DIVERGED: " in text
    assert "loss -" in text
    assert "lambda_max: " in text


def test_train_needs_no_validation_images(in_folder: Path, capsys: Output) -> None:
    text = printed(["train", *TINY, "--n-val=0"], capsys)
    assert "validation accuracy - of 0 images" in text


# -- compare ------------------------------------------------------------------------------------------------

COMPARE = ["compare", *TINY, "--seeds=2", "--tuning-seeds=1", "--images=64", "--sharpness-m=16", "--processes=1"]


def test_compare_prints_the_table_that_it_keeps(in_folder: Path, capsys: Output, serial: None) -> None:
    command = [*COMPARE, "--masks=norm,random", "--rho-grid=0.5,1", "--quiet", "--out=o"]
    found = printed([*command, "--json"], capsys)
    assert [line["arm"] for line in found["arms"]] == ["none", "norm", "random"]
    assert found["folder"] == "o"
    assert {path.name for path in Path("o").iterdir()} == {
        *("figures", "mask_layers.csv", "mask_overlap.csv", "report.html", "report.md", "runs", "runs.csv"),
        *("study.json", "table.csv", "table.tex", "training.csv", "trials.csv", "verdict.csv"),
    }
    assert len(list(Path("o/runs").iterdir())) == 2 * 2 + 3 * 2
    text = printed(command, capsys)  # reads the records
    for line in found["arms"]:
        shown = next(row for row in text.splitlines() if row.startswith(line["arm"]))
        assert f"{100 * line['test_accuracy']:.1f} [" in shown
    for note in found["notes"]:
        assert f"- {note}" in text
    assert "page: o/report.html" in text
    assert any(note.startswith("TOO FEW SEEDS") for note in found["notes"])


def test_methods_are_compared_by_masks(in_folder: Path, capsys: Output, serial: None, no_figures: None) -> None:
    methods = "--methods=sam,momentum_sam,ssam_f,esam:gamma=1.0"
    command = [*COMPARE, "--masks=all,norm", methods, "--rho-grid=0.5", "--quiet", "--out=o"]
    found = printed([*command, "--json"], capsys)
    arms = {line["arm"]: line for line in found["arms"]}
    names = ["sam/all", "sam/norm", "momentum_sam/all", "momentum_sam/norm", "ssam_f", "esam:gamma=1.0/all"]
    assert list(arms) == ["none", *names, "esam:gamma=1.0/norm"]
    cells = {(cell["method"], cell["column"]): cell for cell in found["methods_by_masks"]["cells"]}
    assert set(cells) == {
        *((method, mask) for method in ("sam", "momentum_sam", "esam:gamma=1.0") for mask in ("all", "norm")),
        ("ssam_f", "own mask"),
    }
    for cell in cells.values():
        assert {key: cell[key] for key in arms["none"] if key != "method"} == {
            key: value for key, value in arms[cell["arm"]].items() if key != "method"
        }
    text = printed(command, capsys)
    assert "\nmethods by masks\n" in text
    below = text.partition("\nmethods by masks\n")[2]
    for cell in cells.values():
        assert f"{100 * cell['gain']:+.1f} [" in below
    for note in found["methods_by_masks"]["notes"]:
        assert f"- {note}\n" in below
    written = pd.read_csv("o/methods_by_masks.csv")
    assert list(zip(written["method"], written["column"], strict=True)) == list(cells)
    page = Path("o/report.html").read_text()
    assert "<h2>Methods by masks</h2>" in page
    assert page.count('scope="rowgroup"') == 4
    # A step of momentum SAM is one pass, of ssam_f, whose norm is over all parameters, two.
    assert (arms["momentum_sam/norm"]["predicted_cost"], arms["ssam_f"]["predicted_cost"]) == (1, 2)
    assert arms["sam/all"]["predicted_cost"] == 2 > arms["sam/norm"]["predicted_cost"] > 1
    assert (arms["esam:gamma=1.0/all"]["predicted_cost"], arms["none"]["predicted_cost"]) == (None, 1)
    assert {arm["ascent"] is None for name, arm in arms.items() if "momentum" in name} == {True}
    runs = pd.read_csv("o/runs.csv")
    assert set(runs["method"].dropna()) == {"sam", "momentum_sam", "ssam_f", "esam:gamma=1.0"}


def test_a_comparison_without_methods_has_no_table_of_them(
    in_folder: Path, capsys: Output, serial: None, no_figures: None
) -> None:
    command = [*COMPARE, "--masks=norm", "--rho-grid=0.5", "--quiet", "--out=o"]
    assert "methods_by_masks" not in printed([*command, "--json"], capsys)
    assert "methods by masks" not in printed(command, capsys)
    assert not Path("o/methods_by_masks.csv").exists()
    assert "Methods by masks" not in Path("o/report.html").read_text()


def test_presets_are_listed_and_are_configuration_files(
    in_folder: Path, capsys: Output, asked: list[tuple[CompareConfig, dict[str, Any]]]
) -> None:
    listed = printed(["presets"], capsys)
    assert [line for line in listed.splitlines() if not line.startswith(" ")] == list(list_presets())
    for name in list_presets():
        text = printed(["presets", "--name", name, "--scale=0.1"], capsys)
        assert "Scaled by 0.1" in text
        preset = get_preset(name, 0.1)
        assert yaml.safe_load(text) == preset.config()
        Path("study.yaml").write_text(text)
        assert main(["compare", "--config=study.yaml"]) == 130
        capsys.readouterr()
        config = asked[-1][0]
        assert {key: getattr(config, key) for key in preset.settings} == preset.settings
        assert [(arm.name, arm.rho) for arm in config.arms] == [
            (arm["name"], tuple(arm.get("rho", ()))) for arm in preset.arms
        ]


def test_a_run_of_a_method_from_the_command_line(in_folder: Path, capsys: Output) -> None:
    options = ["--optimizer=adamw:betas=0.9+0.95", "--lr=0.003", "--schedule=step", "--warmup=1", "--epochs=4"]
    more = ["--augment=flip+crop=1", "--label-smoothing=0.1", "--clip-grad-norm=1", "--norm-weight-decay=false"]
    method = ["--method=ssam_d:drop_rate=0.3", "--density=0.5", "--sam-epochs=1..", "--rho=0.2", "--rho-min=0.1"]
    record = printed(["train", *TINY, *options, *more, *method, "--out=o", "--json"], capsys)
    config = record["config"]
    assert {key: config[key] for key in ("optimizer", "augment", "method", "mask", "norm_scope", "sam_epochs")} == {
        **{"optimizer": "adamw:betas=0.9+0.95", "augment": "crop=1+flip", "method": "ssam_d:drop_rate=0.3"},
        **{"mask": "dynamic:drop_rate=0.3", "norm_scope": "full", "sam_epochs": "1.."},
    }
    assert (config["norm_weight_decay"], config["clip_grad_norm"], config["rho_min"]) == (False, 1.0, 0.1)
    assert [epoch["radius"] > 0 for epoch in record["result"]["history"]] == [False, True, True, True]
    text = printed(["train", *TINY, "--method=momentum_sam", "--rho=0.3", "--mask=all"], capsys)
    assert re.search(r"loss \d\.\d{4}, ascent -, \|\|eps\|\| 0\.\d{4}", text)


def test_a_swept_comparison_and_its_verdict(in_folder: Path, capsys: Output, serial: None, no_figures: None) -> None:
    command = [
        *COMPARE,
        "--masks=all,norm",
        "--rho-grid=0.5,1",
        "--epochs=2",
        "--measure-every=1",
        "--quiet",
        "--out=o",
    ]
    plain = printed([*command, "--json"], capsys)
    records = {path: path.read_bytes() for path in Path("o/runs").glob(f"*/{RESULT}")}
    assert len(records) == 2 * 2 + 3 * 2
    swept = printed([*command, "--sweep", "--json"], capsys)
    assert [{**line, "rho": None} for line in swept["arms"]] == [{**line, "rho": None} for line in plain["arms"]]
    assert {path: path.read_bytes() for path in Path("o/runs").glob(f"*/{RESULT}")}.items() > records.items()
    assert len(list(Path("o/runs").iterdir())) == len(records) + 2 * 2
    assert "Sweep: 4 more runs" in next(note for note in swept["notes"] if note.startswith("Sweep"))
    assert not any(note.startswith("Sweep") for note in plain["notes"])
    fast = "--primary=one_step_linf_adaptive_normalised@0.002"
    assert "the runs lack the primary metric" in refused(["verdict", "o"], capsys)
    text = printed(["verdict", "o", fast], capsys)
    assert "norm against all, 2 seeds, by one_step_linf_adaptive_normalised@0.002: TOO FEW SEEDS." in text
    assert "norm against none, 2 seeds" in text
    found = printed(["verdict", "o", fast, "--contrasts=norm-all", "--at=equal_train_loss", "--json"], capsys)
    assert set(found["levels"]) | set(found["not_decided"]) == {"norm-all"}


def test_compare_shows_progress_unless_told_not_to(
    in_folder: Path, capsys: Output, serial: None, no_figures: None
) -> None:
    assert main([*COMPARE, "--masks=norm", "--rho-grid=1"]) == 0
    err = capsys.readouterr().err
    assert "comparing: 100%" in err
    assert "\x1b" not in err  # no colours
    assert "choosing rho" not in err  # there is nothing to choose


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[CompareConfig, dict[str, Any]]]:
    """What comparisons are asked for; none is made."""
    calls: list[tuple[CompareConfig, dict[str, Any]]] = []

    def spy(config: CompareConfig, folder: Any, **options: Any) -> Comparison:
        calls.append((config, options))
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.compare.compare", spy)
    return calls


def test_a_configuration_file_asks_for_what_it_says(
    in_folder: Path, asked: list[tuple[CompareConfig, dict[str, Any]]], tiny_comparison: Any
) -> None:
    config = replace(tiny_comparison(), norm_scope="full", density=0.1)
    Path("c.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(config.settings()))))
    assert main(["compare", "--config=c.yaml"]) == 130
    assert asked[-1][0] == config
    assert main(["compare", "--config", "c.yaml", "--seeds=5", "--masks=all", "--images", "9", "--processes=3"]) == 130
    changed, options = asked[-1]
    assert changed == replace(config, seeds=5, arms=tuple(a for a in config.arms if a.name in ("none", "all")))
    assert (options["measure"].images, len(options["executor"]._slots)) == (9, 3)


@pytest.mark.parametrize("words", [["--config", "c.yaml"], ["--config=c.yaml"]])
def test_an_option_overrides_the_configuration_file_wherever_it_stands(
    words: list[str], in_folder: Path, asked: list[tuple[CompareConfig, dict[str, Any]]]
) -> None:
    Path("c.yaml").write_text("momentum: 0.5\nlr: 0.3\n")
    option = ["--momentum", "0.7"]
    for order in (words + option, option + words):
        assert main(["compare", *order]) == 130
        assert (asked[-1][0].momentum, asked[-1][0].lr) == (0.7, 0.3)


def test_masks_of_a_plugin_with_options_are_compared(
    in_folder: Path, capsys: Output, serial: None, no_figures: None
) -> None:
    Path("power_masks.py").write_text(PLUGIN.format(name="power_of_w"))
    masks = "--masks=norm,power_of_w:power=2,power_of_w:power=2:exclude_norm=true"
    found = printed([*COMPARE, "--plugin=power_masks", masks, "--rho-grid=0.5", "--quiet", "--json"], capsys)
    arms = {line["arm"]: line for line in found["arms"]}
    for name in ("power_of_w:power=2", "power_of_w:power=2:exclude_norm=true"):
        assert (arms[name]["kept"], arms[name]["matched"]) == (72, "yes")
    assert arms["power_of_w:power=2:exclude_norm=true"]["norm_share"] == 0
    Path("c.yaml").write_text("plugin: power_masks\narms:\n- {name: squares, mask: 'power_of_w:power=2', rho: [1.0]}\n")
    found = printed([*COMPARE, "--config=c.yaml", "--quiet", "--json"], capsys)
    assert [line["arm"] for line in found["arms"]] == ["none", "squares"]


def test_a_failing_run_is_exit_code_1_and_one_line(
    in_folder: Path, capsys: Output, serial: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = worker.execute

    def fail(job: worker.Job, *arguments: Any, **options: Any) -> Any:
        if job.arm == "norm":
            raise ArithmeticError("a\nb")
        return original(job, *arguments, **options)

    monkeypatch.setattr(worker, "execute", fail)
    assert main([*COMPARE, "--masks=norm", "--rho-grid=1", "--quiet", "--out=o"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "sam-masks: error: 2 of 4 runs failed, the others are kept; first: norm, rho 1, seed 0: ArithmeticError: a b\n"
    )
    assert len(list(Path("o/runs").glob(f"*/{RESULT}"))) == 2


# -- analyze ------------------------------------------------------------------------------------------------

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


# -- as a command -------------------------------------------------------------------------------------------


def test_the_installed_command(in_folder: Path) -> None:
    done = subprocess.run([COMMAND, "train", "--model=mlp"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("sam-masks: error: mask norm: none of the model's 6 trainable tensors")
    assert list(in_folder.iterdir()) == []


class Closed(io.StringIO):
    """A standard output whose reader has gone."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.file = path.open("w")

    def flush(self) -> None:
        raise BrokenPipeError

    def fileno(self) -> int:
        return self.file.fileno()


def test_a_reader_who_stops_reading_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setattr(sys, "stdout", Closed(tmp_path / "out"))
    assert main(["masks"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_closed_pipe_is_no_error(in_folder: Path) -> None:
    command = f"{sys.executable} -m experiments.cli masks | true; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_an_interrupted_comparison_ends_at_once_without_a_trace_and_goes_on_later(in_folder: Path) -> None:
    command = [COMMAND, *COMPARE, "--masks=norm", "--rho-grid=1", "--epochs=40", "--out=o", "--quiet"]
    for wait_for in (Path("o/runs"), "a record"):
        running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if wait_for.exists() if isinstance(wait_for, Path) else any(Path("o/runs").glob(f"*/{RESULT}")):
                break
            time.sleep(0.05)
        time.sleep(0.5)
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to the workers, too
        _, err = running.communicate(timeout=30)
        assert running.returncode == 130
        assert err == "sam-masks: interrupted; finished runs are kept, and the same command goes on from there\n"
    kept = {path: path.stat().st_mtime_ns for path in Path("o/runs").glob(f"*/{RESULT}")}
    assert kept
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list(Path("o/runs").glob(f"*/{RESULT}"))) == 4
