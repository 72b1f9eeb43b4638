"""Bad input to the command line: one clear line, and nothing is left behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.checkpoint import save_checkpoint
from experiments.models import build_model
from masks import MaskContext, build_mask
from tests.experiments.command_line import PLUGIN, TINY, Output, refused

pytestmark = pytest.mark.usefixtures("own_masks")

LIMITED = pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")

BAD: dict[str, tuple[list[str], str]] = {
    # names
    "command": (["trian"], "unknown command 'trian'; did you mean train?"),
    "mask": (["train", "--mask", "nrom"], "unknown mask 'nrom'; did you mean norm"),
    "words without commas": (
        ["compare", "--masks", "all", "norm"],
        "nothing takes the word 'norm'; a list has commas and no spaces, such as --masks all,norm",
    ),
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
    "option before the command": (["--quiet", "train"], "option --quiet belongs after the command"),
    "argument": (["train", "foo"], "nothing takes the word 'foo'; a list has commas"),
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
