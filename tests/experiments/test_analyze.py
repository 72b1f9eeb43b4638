"""The command's work on checkpoints of models that were never trained here."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from analysis import PRIMARY, evaluate, list_metrics
from experiments.analyze import DEFAULT_METRICS, AnalyzeOptions, _standardised, analyze, as_text
from experiments.cli import main
from experiments.config import RunConfig
from experiments.models import build_model
from experiments.seeds import derive_seed
from experiments.single import train_one
from experiments.split import make_split
from experiments.train import batches_of, load_cached, sample_of, split_of
from masks import Mask, ParamTable
from masks.errors import InputError

CPU = torch.device("cpu")


def model_and_file(tmp_path, name="resnet_small", width=4):
    torch.manual_seed(0)
    model = build_model(name, in_channels=1, image_size=(8, 8), num_classes=10, width=width)
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": model.state_dict()}, path)
    return model.eval(), path


@pytest.fixture
def options(tmp_path):
    _, path = model_and_file(tmp_path)

    def make(**changes):
        settings = {"model": "resnet_small", "checkpoint": str(path), "data": "digits", "width": 4, "device": "cpu"}
        return AnalyzeOptions(**{**settings, "images": 64, "m": 32, **changes})

    return make


def images(options, n=64, clean=False):
    config = options.run_config()
    split = split_of(config, load_cached("digits"))
    x, y = sample_of(split, n, config.seed, CPU)
    if clean:
        order = {tuple(row.flatten().tolist()): c for row, c in zip(split.train_x, split.train_y_clean, strict=True)}
        y = torch.stack([order[tuple(row.flatten().tolist())] for row in x])
    return batches_of(x, y, 256)


def test_values_are_those_of_the_api(tmp_path, options):
    model, _ = model_and_file(tmp_path)
    chosen = options(metrics=f"{PRIMARY}, lambda_max,one_step_l2", seed=3)
    seen = []
    got = analyze(chosen, on_result=seen.append)
    assert seen == got
    want = evaluate(model, images(chosen), [PRIMARY, "lambda_max", "one_step_l2"], m=32, seed=3)
    assert [r["metric"] for r in got] == list(want)
    assert len(got) == 2 + 5
    for result in got:
        estimate = want[result["metric"]]
        assert list(result) == ["metric", "value", "error", "n", "settings"]
        assert (result["value"], result["n"]) == (estimate.value, estimate.n)
        assert result["error"] == (estimate.standard_error or estimate.settings["residual"])
        assert result["settings"]["name"] == f"{estimate.name}, labels as given (0 % redrawn at random)"
        assert result["settings"]["data_digest"] == estimate.settings["data_digest"]
        assert result["settings"]["labels"] == "given"
        assert len(result["settings"]["checkpoint_digest"]) >= 16
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    assert as_text(got[0]).startswith(f"{PRIMARY}: ")
    assert "\n" not in as_text(got[0])


def test_mask_and_radius(tmp_path, options):
    model, _ = model_and_file(tmp_path)
    table = ParamTable.from_model(model)
    mask = Mask(table, tuple(row.is_norm for row in table))
    chosen = options(mask="norm", radius="rms", metrics="one_step_l2@0.1")
    (got,) = analyze(chosen)
    want = evaluate(model, images(chosen), ["one_step_l2@0.1"], mask=mask, m=32, radius="rms")["one_step_l2@0.1"]
    assert got["value"] == want.value
    assert got["settings"]["mask_digest"] == mask.digest()
    assert got["settings"]["mask"] == "norm"
    assert got["settings"]["radius"] == "rms"
    # A budgeted mask has as many coordinates.
    (got,) = analyze(options(mask="random", metrics="gradient_norm"))
    assert got["settings"]["num_kept"] == mask.num_kept


def test_labels_given_and_clean(tmp_path, options):
    model, _ = model_and_file(tmp_path)
    values = {}
    for labels in ("given", "clean"):
        chosen = options(metrics="fisher_trace_empirical", labels=labels, label_noise=0.5)
        (got,) = analyze(chosen)
        assert got["settings"]["labels"] == labels
        want = evaluate(model, images(chosen, clean=labels == "clean"), ["fisher_trace_empirical"])
        assert got["value"] == want["fisher_trace_empirical"].value
        assert got["settings"]["name"].endswith(
            "labels as given (50 % redrawn at random)" if labels == "given" else "clean labels"
        )
        assert got["settings"]["name"].partition(":")[0] in as_text(got)
        values[labels] = got
    assert values["given"]["value"] != values["clean"]["value"]
    assert values["given"]["settings"]["data_digest"] != values["clean"]["settings"]["data_digest"]


def test_default_metrics_and_all_images(options):
    got = analyze(options(images=1024, m=128))
    assert [r["metric"].split("@")[0] for r in got] == [name.split("@")[0] for name in DEFAULT_METRICS]
    assert got[0]["metric"] == PRIMARY
    # 400 training images are fewer than 1024: all of them, three micro-batches, 16 left over.
    assert (got[0]["n"], got[0]["settings"]["num_dropped"]) == (3, 16)
    assert got[-1]["n"] == 400
    assert all(math.isfinite(r["value"]) for r in got)


def test_same_options_same_numbers(options):
    chosen = options(metrics="average_gaussian@0.1,fisher_trace_true,relative_flatness,apgd_l2@0.5")
    assert analyze(chosen) == analyze(chosen)


def test_a_metric_that_does_not_apply_is_named_and_the_others_measured(options):
    got = analyze(options(mask="norm", metrics="relative_flatness,gradient_norm,one_step_l2@0.1", m=65))
    assert [r["value"] is None for r in got] == [True, False, True]
    assert "relative_flatness does not apply to a mask" in got[0]["settings"]["reason"]
    assert "m=65 needs at least 65 examples, got 64" in got[2]["settings"]["reason"]
    assert got[0]["error"] is None
    assert as_text(got[0]).startswith("relative_flatness: not measured: metric relative_flatness does not apply")


def test_unusable_input_is_one_line(tmp_path, options):
    (tmp_path / "x").mkdir()
    _, other = model_and_file(tmp_path / "x", "mlp", 8)
    for changes, text in [
        ({"metrics": "lamda_max"}, "unknown metric 'lamda_max'; did you mean lambda_max"),
        ({"checkpoint": str(tmp_path / "missing.pt")}, "cannot read checkpoint"),
        ({"checkpoint": str(other)}, "the checkpoint is of another model"),
        ({"model": "resnet_smal"}, "did you mean resnet_small"),
        ({"data": "digit"}, "did you mean digits"),
        ({"mask": "nrom"}, "unknown mask 'nrom'; did you mean norm"),
        ({"mask": "none"}, "keeps no coordinate"),
        ({"m": 0}, "images and m must be at least 1"),
        ({"images": 0}, "images and m must be at least 1"),
        ({"labels": "noisy"}, "labels must be given or clean"),
        ({"m": 65, "metrics": PRIMARY}, "m=65 needs at least 65 examples, got 64"),
    ]:
        with pytest.raises(InputError, match=text) as error:
            analyze(options(**changes))
        assert "\n" not in str(error.value)


def test_a_checkpoint_that_is_not_finite_is_one_line(tmp_path, options):
    model, path = model_and_file(tmp_path)
    state = model.state_dict()
    state["head.weight"][0, 0] = math.nan
    torch.save(state, path)
    with pytest.raises(InputError, match="loss is not finite"):
        analyze(options())


def test_a_model_of_ones_own_with_augmentation_inside(tmp_path, options, monkeypatch):
    (tmp_path / "foreign_net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Flip(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x + self.noise * torch.randn_like(x)\n"
        "def build(num_classes, noise=0.0):\n"
        "    flip = Flip()\n"
        "    flip.noise = noise\n"
        "    return nn.Sequential(flip, nn.Flatten(), nn.Linear(64, num_classes))\n"
        "def noisy(num_classes):\n"
        "    return build(num_classes, 0.1)\n"
    )
    monkeypatch.chdir(tmp_path)
    torch.save({"2.weight": torch.randn(10, 64), "2.bias": torch.zeros(10)}, "own.pt")
    with pytest.raises(InputError, match="data that differ between passes"):
        analyze(options(model="foreign_net:noisy", checkpoint="own.pt", width=None))


# -- what the model was trained on ---------------------------------------------------------------------------


def fit(model, batches):
    with torch.no_grad():
        logits = torch.cat([model(x) for x, _ in batches])
    labels = torch.cat([y for _, y in batches])
    return float(torch.nn.functional.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).double().mean())


def test_inputs_are_what_standardise_says_and_the_fit_is_printed_first(tmp_path, options):
    model, _ = model_and_file(tmp_path)
    chosen = options(metrics="gradient_norm")
    config = chosen.run_config()
    data, split = load_cached("digits"), split_of(config, load_cached("digits"))
    order = torch.randperm(len(split.train_x), generator=torch.Generator().manual_seed(derive_seed(0, "sample")))[:64]
    pixels, y = data.x[split.train_index][order], split.train_y[order]
    assert float(pixels.min()) == 0
    assert float(pixels.max()) == 1
    mean, std = float(split.mean[0]), float(split.std[0])
    for how, x in {
        None: (pixels - mean) / std,
        "split": (pixels - mean) / std,
        "none": pixels,
        "0.5,0.25": (pixels - 0.5) / 0.25,
    }.items():
        notes = []
        (got,) = analyze(options(metrics="gradient_norm", standardise=how), on_note=notes.append)
        want = evaluate(model, [(x, y)], ["gradient_norm"])["gradient_norm"].value
        assert got["value"] == pytest.approx(want, rel=1e-4)
        loss, accuracy = fit(model, [(x, y)])
        settings = got["settings"]
        assert settings["mean_loss"] == pytest.approx(loss, rel=1e-5)
        assert (settings["accuracy"], settings["images"]) == (accuracy, 64)
        assert settings["standardise"] == (how or "split")
        assert notes[-1].startswith(f"mean loss {loss:.4g}, accuracy {100 * accuracy:.1f} % on 64 training images")
        # Only where nobody said what the inputs are is there something to warn of.
        assert [n for n in notes if "no record of train beside the checkpoint" in n] == notes[:-1]
        assert settings["notes"] == [n.removeprefix("warning: ") for n in notes[:-1]]
        assert len(notes) == (2 if how is None else 1)
    for bad in ("both", "0.5", "0.5,0", "0.5,-1", "nan,1", "0.5+0.5,1", "0.5,0.2,0.1"):
        with pytest.raises(InputError, match="standardise must be split, none or MEAN,STD"):
            analyze(options(standardise=bad))


def test_channels_are_standardised_each_for_itself(tmp_path):
    x = np.random.default_rng(0).random((60, 8, 8, 3), dtype=np.float32)
    y = np.arange(60) % 2
    np.savez(tmp_path / "d.npz", x_train=x[:40], y_train=y[:40], x_test=x[40:], y_test=y[40:])
    data = load_cached(f"npz:{tmp_path / 'd.npz'}")
    split = make_split(data, seed=0)
    moved, found = _standardised(split, data, "0.1+0.2+0.3,1+2+4")
    pixels = data.x[split.train_index]
    for c in range(3):
        torch.testing.assert_close(moved.train_x[:, c], (pixels[:, c] - (0.1, 0.2, 0.3)[c]) / (1, 2, 4)[c])
    assert (found["mean"], found["std"]) == ([0.1, 0.2, 0.3], [1.0, 2.0, 4.0])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    config = RunConfig(data="digits", n_train=100, n_val=50, n_test=50, label_noise=0.3, width=4, epochs=2, seed=5)
    record, _, _ = train_one(config, folder)
    return folder, record


def test_a_checkpoint_of_train_is_measured_on_the_images_that_it_was_trained_on(trained):
    folder, record = trained
    notes = []
    chosen = AnalyzeOptions("resnet_small", str(folder / "checkpoint.pt"), images=100, metrics="gradient_norm", m=10)
    (got,) = analyze(chosen, on_note=notes.append)
    # The record holds the loss and error that train measured on all training images, noisy labels included.
    assert got["settings"]["mean_loss"] == pytest.approx(record.result["fit"]["train_loss"], rel=1e-5)
    assert got["settings"]["accuracy"] == pytest.approx(1 - record.result["fit"]["train_error"], abs=1e-12)
    assert (got["settings"]["record"], got["settings"]["label_noise"]) == (record.run_id, 0.3)
    assert got["settings"]["sample_seed"] == 5
    assert len(notes) == 1
    assert "labels as given (30 % redrawn at random)" in notes[0]


def test_what_differs_from_the_record_is_one_warning(trained):
    folder, _ = trained
    notes = []
    chosen = AnalyzeOptions("resnet_small", str(folder / "checkpoint.pt"), images=64, metrics="gradient_norm",
                            seed=6, label_noise=0.0, standardise="none")  # fmt: skip
    analyze(chosen, on_note=notes.append)
    assert notes[0] == (
        "warning: the checkpoint's record says another label_noise 0.3 (here 0.0), seed 5 (here 6), inputs "
        "standardised by the training split (here none)"
    )
    assert len(notes) == 2


def test_without_a_record_labels_have_no_noise_and_data_must_be_named(options):
    assert options().run_config().label_noise == 0
    with pytest.raises(InputError, match="missing: --data"):
        analyze(options(data=None))


def test_a_radius_convention_that_has_no_effect_is_said(options):
    notes = []
    analyze(options(metrics="gradient_norm,one_step_l2@0.1,lambda_max", radius="rms"), on_note=notes.append)
    assert "warning: radius rms has no effect on gradient_norm, lambda_max" in notes


def test_models_in_float64_are_measured_in_float64(tmp_path, options, monkeypatch):
    (tmp_path / "double_net.py").write_text(
        "from torch import nn\n"
        "def build(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes)).double()\n"
    )
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 64, generator=generator, dtype=torch.float64)
    torch.save({"1.weight": weight, "1.bias": weight[:, 0].clone()}, "double.pt")
    (got,) = analyze(options(model="double_net:build", checkpoint="double.pt", width=None, metrics="gradient_norm"))
    assert got["settings"]["dtype"] == "float64"


def test_the_list_of_metrics(capsys):
    assert main(["analyze", "--metrics", "list"]) == 0
    text = capsys.readouterr().out
    assert main(["analyze", "--metrics=list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in listed] == [info.name for info in list_metrics()]
    for one in listed:
        assert f"{one['name']}\n  {one['summary']}\n  larger is {one['direction']}; about {one['cost']:g}" in text
