"""The command's work on checkpoints of models that were never trained here."""

from __future__ import annotations

import json
import math

import pytest
import torch

from analysis import PRIMARY, evaluate
from experiments.analyze import DEFAULT_METRICS, AnalyzeOptions, analyze, as_text
from experiments.models import build_model
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
    x, y = sample_of(split, n, options.seed, CPU)
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
        assert result["settings"]["name"] == estimate.name
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
    (tmp_path / "own_net.py").write_text(
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
        analyze(options(model="own_net:noisy", checkpoint="own.pt", width=None))
