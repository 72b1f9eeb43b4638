"""sam-masks doctor: it finds what is broken, says why, and calls nothing broken that works."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import numpy
import pytest
import torch
from torch import Tensor, nn

from experiments import doctor
from experiments.cli import main
from experiments.doctor import DoctorOptions, Finding, examine, norm_layers
from masks import MaskContext, build_mask, mask_info, params, register_norm_type, registry

Output = pytest.CaptureFixture[str]


@pytest.fixture
def torchvision(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts another torchvision before the installed one, for processes that the doctor starts."""
    folder = tmp_path_factory.mktemp("libraries")
    monkeypatch.setenv("PYTHONPATH", str(folder))

    def replace(source: str) -> None:
        (folder / "torchvision.py").write_text(source)

    replace("")  # importing the real one takes seconds
    return replace


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plugin is installed, and what a test registers is forgotten."""
    mask_info("norm")
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    monkeypatch.setattr(registry, "_broken", {})
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    monkeypatch.setattr(params, "_norm_types", params._norm_types)


@pytest.fixture
def healthy(torchvision: Callable[[str], None], own_registry: None, in_folder: Path) -> Path:
    """A machine on which everything works; gives the current folder."""
    return in_folder


def found(subject: str, **options: Any) -> Finding:
    """The only finding whose subject begins so."""
    (one,) = [one for one in examine(DoctorOptions(**options)) if one.subject.startswith(subject)]
    return one


def test_nothing_is_broken_here(healthy: Path, capsys: Output) -> None:
    assert main(["doctor", "--json"]) == 0
    findings = {one["subject"]: one for one in json.loads(capsys.readouterr().out)}
    assert {one["state"] for one in findings.values()} <= {"ok", "note"}
    own = {text.split(";")[0].strip() for text in requires("sam-masks") or () if "extra" not in text}
    assert len(own) >= 10
    assert all(any(text.startswith(subject) for subject in findings) for text in own)
    assert findings["numpy"]["text"] == numpy.__version__
    assert findings["torch"]["text"] == torch.__version__.partition("+")[0]
    assert findings["installed plugins"]["text"] == "none"
    assert "extra test" in findings
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "nothing is broken"
    assert f"ok      numpy: {numpy.__version__}" in lines
    assert list(healthy.iterdir()) == []


# -- libraries --------------------------------------------------------------------------------------------------


def test_requirements_that_are_not_met(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = [
        "numpy>=2.0",
        "torch<1,>=0.5",
        "nowhere-at-all>=3",
        "scipy>=1; python_version < '3'",
        'pandas>=2; extra == "tables"',
        'another-nowhere>=1; extra == "more"',
        'numpy>=99; extra == "more"',
        'sam-masks[tables]; extra == "more"',
    ]
    metadata = SimpleNamespace(get_all=lambda key: ["tables", "more"])
    monkeypatch.setattr(
        doctor, "distribution", lambda name: SimpleNamespace(version="9.8", requires=declared, metadata=metadata)
    )
    states = {one.subject: (one.state, one.text, one.advice) for one in doctor._libraries()}
    version = torch.__version__.partition("+")[0]
    own = numpy.__version__
    assert states == {
        "sam-masks": ("ok", "9.8", None),
        "numpy": ("ok", own, None),
        "torch": ("broken", f"{version} is installed, <1,>=0.5 is required", "pip install 'torch<1,>=0.5'"),
        "nowhere-at-all": ("broken", "not installed", "pip install 'nowhere-at-all>=3'"),
        "extra tables": ("ok", states["extra tables"][1], None),
        "extra more": (
            "note",
            f"another-nowhere not installed, numpy {own} is installed, >=99 is required",
            "only if you want it: pip install 'sam-masks[more]'",
        ),
    }
    assert states["extra tables"][1].startswith("pandas ")


def test_a_project_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "distribution", missing)
    (one,) = doctor._libraries()
    assert (one.subject, one.state) == ("sam-masks", "note")


def test_a_torchvision_of_another_torch_is_explained(
    healthy: Path, torchvision: Callable[[str], None], capsys: Output
) -> None:
    torchvision("raise RuntimeError('operator torchvision::nms does not exist')")
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("broken  torchvision with torch: "))
    assert f"torch {torch.__version__}: cannot be imported (RuntimeError: operator torchvision::nms" in lines[at]
    assert lines[at].endswith("its compiled operators were built for another torch and could not be registered")
    assert lines[at + 1] == f"        -> {doctor.PAIR}"
    assert lines[-1] == "broken: torchvision with torch"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("import os; os._exit(3)", "(the process ended with code 3)"),
        ("import os; os.abort()", "(the process ended with code -6)"),
        ("import nowhere_at_all", "(ModuleNotFoundError: No module named 'nowhere_at_all')"),
    ],
)
def test_a_torchvision_that_fails_otherwise(source: str, text: str, torchvision: Callable[[str], None]) -> None:
    torchvision(source)
    one = doctor._torchvision()
    assert one.state == "broken"
    assert text in one.text
    assert "compiled operators" not in one.text


def test_a_torchvision_that_declares_another_torch_or_is_missing(
    torchvision: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "distribution", lambda name: SimpleNamespace(requires=["numpy", "torch==1.2.3"]))
    one = doctor._torchvision()
    assert (one.state, one.advice) == ("note", doctor.PAIR)
    assert one.text.endswith("; this torchvision requires torch==1.2.3")

    def missing(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", missing)
    assert doctor._torchvision().text == "torchvision is not installed"


# -- devices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["torch.cuda.get_device_properties", "torch.ones"])
def test_a_device_that_cannot_compute(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: no kernel image is available\nfor execution")

    known = SimpleNamespace(name="one", total_memory=2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: known)
    monkeypatch.setattr(where, fails)
    processor, device = doctor._devices()
    assert processor.state == "ok"
    assert (device.subject, device.state) == ("cuda:0", "broken")
    assert device.text == "RuntimeError: CUDA error: no kernel image is available for execution"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_no_device_is_nothing_broken() -> None:
    _, cuda = doctor._devices()
    assert (cuda.subject, cuda.state) == ("CUDA", "ok")
    assert cuda.text.startswith("none; torch is built ")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_that_works() -> None:
    device = list(doctor._devices())[1]
    assert (device.subject, device.state) == ("cuda:0", "ok")
    assert device.text.startswith(f"{torch.cuda.get_device_name(0)}, ")
    assert device.text.endswith(f" GiB, CUDA {torch.version.cuda}")


# -- plugins and locks ----------------------------------------------------------------------------------------------

PLUGIN = """from masks import register_score

@register_score("{name}", summary="", source="")
def score(context):
    return context.parameters()
"""


def test_plugins_and_their_states(healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    def point(name: str, load: Callable[[], object]) -> SimpleNamespace:
        dist = SimpleNamespace(name=f"{name}-plugin", version="1.2")
        return SimpleNamespace(name=name, value=f"{name}.module", dist=dist, load=load)

    def fails() -> None:
        raise ZeroDivisionError("on the way")

    def registers() -> None:
        namespace = {"__name__": "good"}
        exec(PLUGIN.format(name="from_good"), namespace)

    points = [point("bad", fails), point("empty", lambda: None), point("good", registers)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    monkeypatch.setattr(registry, "_discovered", False)
    Path("mine.py").write_text(PLUGIN.format(name="of_mine"))
    Path("raising.py").write_text("raise RuntimeError('no luck')")
    Path("taking.py").write_text(PLUGIN.format(name="norm"))
    assert main(["doctor", "--plugin=mine,raising,taking,nowhere_at_all", "--json"]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    states = {
        one["subject"]: (one["state"], one["text"])
        for one in json.loads(out)
        if one["subject"].startswith("plugin") or one["state"] == "broken"
    }
    assert states == {
        "plugin bad-plugin 1.2 (bad.module)": ("broken", "failed to import: ZeroDivisionError: on the way"),
        "plugin empty-plugin 1.2 (empty.module)": ("note", "loads, but registers no mask"),
        "plugin good-plugin 1.2 (good.module)": ("ok", "masks from_good"),
        "plugin mine": ("ok", "masks of_mine"),
        "plugin raising": ("broken", "failed to import: RuntimeError: no luck"),
        "plugin taking": ("broken", "mask 'norm' is already registered by sam-masks; taking must rename its own"),
        "plugin nowhere_at_all": (
            "broken",
            "failed to import: ModuleNotFoundError: No module named 'nowhere_at_all'",
        ),
    }


def test_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._locks(tmp_path).state == "ok"
    missing = doctor._locks(tmp_path / "nowhere")
    assert (missing.state, missing.text) == ("broken", "No such file or directory")
    monkeypatch.setattr(filelock.FileLock, "acquire", lambda self: None)
    assert doctor._locks(tmp_path).text == "two can hold one lock at once"

    def unsupported(self: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(filelock.FileLock, "acquire", unsupported)
    assert "Function not implemented" in doctor._locks(tmp_path).text
    assert doctor._locks(tmp_path).state == "broken"
    assert list(tmp_path.iterdir()) == []


# -- normalization layers -------------------------------------------------------------------------------------------


class Scale(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))


class TableNorm(nn.Module):
    """By its class alone: a table, and a child."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(3, 4))
        self.child = nn.Identity()


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(2, 2))


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(5))


class Net(nn.Module):
    """What may be missed, among what must not be named: tokens, biases, layers of torch, single numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 6))
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.PReLU(8), Scale(8, 1, 1))
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 1), Scale(1), Biased(), TableNorm(), Scale(8))
        self.ln_f = Affine()
        self.lnet = Affine()

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_what_normalizes_and_what_may_be_missed(own_registry: None) -> None:
    model = Net()
    known, *missed = norm_layers(model)
    assert known.state == "ok"
    assert known.text == "1 BatchNorm2d, 1 LayerNorm: 32 trainable coordinates belong to normalization layers"
    assert {one.state for one in missed} == {"note"}
    assert [one.text for one in missed] == [
        "2 Scale (first: stem.3) may normalize: its weight gamma has shape (8, 1, 1)",
        "1 TableNorm (first: head.4) may normalize: its class says so",
        "1 Affine (first: ln_f) may normalize: it is called ln_f",
    ]
    assert f"masks.register_norm_type(Scale), of module {__name__}" in (missed[0].advice or "")
    # Once they are declared, they count, as they do for the mask norm.
    for cls in (Scale, TableNorm, Affine):
        register_norm_type(cls)
    (known,) = norm_layers(model)
    assert f" {build_mask('norm', MaskContext(model)).num_kept:,} trainable coordinates" in known.text
    assert "1 BatchNorm2d, 3 Scale, 1 LayerNorm, 1 TableNorm, 2 Affine: 86 " in known.text
    model.requires_grad_(False).lnet.requires_grad_(True)
    assert ": 4 trainable coordinates" in next(norm_layers(model)).text


def test_a_model_without_normalization(healthy: Path) -> None:
    one = found("model", model="mlp")
    assert (one.state, one.text.partition(":")[0]) == ("note", "no normalization layer by type")


def test_a_model_of_ones_own_is_examined_with_the_types_that_a_plugin_declares(healthy: Path) -> None:
    Path("own_net.py").write_text(
        "from torch import nn, ones\n\nclass Own(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.weight = nn.Parameter(ones(7))\n\ndef net():\n"
        "    return nn.Sequential(Own(), nn.BatchNorm1d(2))\n"
    )
    Path("own_types.py").write_text("import own_net\nfrom masks import register_norm_type\n"
                                    "register_norm_type(own_net.Own)\n")  # fmt: skip
    before = [one for one in examine(DoctorOptions(model="own_net:net")) if one.subject == "model own_net:net"]
    assert [one.text.partition(" ")[0] for one in before] == ["1", "1"]
    assert before[1].advice == (
        "if so, where the class is defined or in a --plugin: masks.register_norm_type(Own), of module own_net"
    )
    after = found("model", model="own_net:net", plugin="own_types")
    assert after.text == "1 Own, 1 BatchNorm1d: 11 trainable coordinates belong to normalization layers"


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("resnet_smal", "unknown model 'resnet_smal'; did you mean resnet_small"),
        ("nowhere_at_all:net", "model nowhere_at_all:net: cannot import 'nowhere_at_all'"),
    ],
)
def test_a_model_that_cannot_be_built_is_a_finding(model: str, text: str, healthy: Path, capsys: Output) -> None:
    assert main(["doctor", f"--model={model}"]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert text in out
    assert "net: model" not in out
    assert out.endswith(f"broken: model {model}\n")


def test_a_model_of_a_torchvision_that_fails_is_a_finding(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise AttributeError("partially initialized module 'torchvision' has no attribute 'extension'")

    monkeypatch.setattr("experiments.models._torchvision_model", fails)
    assert found("model", model="torchvision:resnet18").text.startswith("AttributeError: partially initialized")
