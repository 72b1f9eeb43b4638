"""One run over several processes: the numbers of one process, resumed bitwise, and ended together."""

from __future__ import annotations

import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed import HashStore

from experiments import distributed, train
from experiments.checkpoint import read_weights
from experiments.cli import main
from experiments.config import RunConfig
from experiments.distributed import Place, Team, attempt, current, placed
from experiments.resume import Checkpointing
from experiments.single import train_one
from experiments.store import read_run
from experiments.train import Training, batch_sizes, number_of_steps, train_run
from masks.errors import InputError
from sam import MethodSpec, list_methods
from tests.experiments.conftest import QUIET, TINY

Tiny = Callable[..., RunConfig]
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
SECONDS = 240

NETS = '''
import os
import torch
from torch import nn

class Double(nn.Sequential):
    """LayerNorm in float64, so that only the order of a sum tells one process from two."""
    def forward(self, x):
        return super().forward(x.double())

def smooth(num_classes):
    layers = nn.Flatten(), nn.Linear(64, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, num_classes)
    return Double(*layers).double()

class Noted(nn.Dropout):
    def forward(self, x):
        out = super().forward(x)
        place = f"dropped-{os.environ.get('RANK')}.pt"
        if self.training and not os.path.exists(place):
            torch.save(out == 0, place)
        return out

def dropped(num_classes):
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         Noted(0.3), nn.Linear(16, num_classes))
'''


@pytest.fixture
def here(in_folder: Path) -> Path:
    """A folder with models of the tests' own, which is the current one."""
    (in_folder / "rank_nets.py").write_text(NETS)
    return in_folder


def settings(**changes: Any) -> dict[str, Any]:
    small = {**TINY, "score_images": 40, "model": "rank_nets:smooth", "mask": "norm"}
    del small["width"]
    return {**small, **changes}


def words(out: str, values: dict[str, Any]) -> list[str]:
    return ["train", "--device=cpu", f"--out={out}", *(f"--{name}={value}" for name, value in values.items())]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def ranks(size: int, arguments: Sequence[str], happens: str = "") -> tuple[list[int], list[str], str]:
    """Exit codes, what each rank printed, and all lines of all ranks on stderr; started without a launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place |= {"HAPPENS": happens} if happens else {}
    started = [
        subprocess.Popen(
            [sys.executable, ROOT / "tests/experiments/rank.py", *arguments],
            env=environment(**place, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [process.communicate(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], [out for out, _ in said], "".join(err for _, err in said)


def done(size: int, out: str, values: dict[str, Any]) -> bytes:
    """The record that processes leave which nothing happens to."""
    codes, (first, *others), err = ranks(size, words(out, values))
    assert (codes, others, err) == ([0] * size, [""] * (size - 1), "")
    assert f"record and checkpoint: {out}" in first
    return (Path(out) / "result.json").read_bytes()


# -- the numbers --------------------------------------------------------------------------------------------


def close_to_one_process(values: dict[str, Any]) -> None:
    """In float64 the mean of two means differs from one mean by rounding, here 1e-15 of each number."""
    done(2, "two", values | {"ascent_gradient": "synchronised"})
    train_one(RunConfig(**values), Path("one"), policy=QUIET)
    one, two = read_run(Path("one")), read_run(Path("two"))
    assert (one.config["world_size"], two.config["world_size"]) == (1, 2)
    for epochs in zip(one.result["history"], two.result["history"], strict=True):
        # The statistics of a step are float32: 2e-7 of a loss of 2, of which the ascent is a difference.
        first, second = ({key: math.nan if v is None else v for key, v in epoch.items()} for epoch in epochs)
        assert first == pytest.approx(second, rel=1e-6, abs=5e-7, nan_ok=True)
    assert one.result["mask_builds"] == two.result["mask_builds"]
    assert one.result["test_correct"] == two.result["test_correct"]
    weights = [read_weights(Path(name) / "checkpoint.pt") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-10, atol=1e-12)


def test_two_processes_are_one(here: Path) -> None:
    """With the images shuffled and augmented, and a last batch of 4."""
    close_to_one_process(settings(augment="crop=1+flip+cutout=2"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"mask": "all"}, {"mask": "fisher", "method": "friendly_sam", "clip_grad_norm": 0.5}]
)
def test_two_processes_are_one_under_other_masks_and_methods(here: Path, changes: dict[str, Any]) -> None:
    close_to_one_process(settings(**changes))


WIDE = """
from torch import nn
from rank_nets import Double

def wide(num_classes, width=8):
    return Double(nn.Flatten(), nn.Linear(64, width), nn.GELU(), nn.Linear(width, num_classes)).double()
"""
DIVIDE = {"esam", "micro_batch_sam"}
"""Methods that choose or divide the examples of a batch."""
ALONE = {"exact_sam": "second derivative"}
"""Methods that run in one process only, and why."""


def of_method(name: str) -> dict[str, Any]:
    spec = MethodSpec(name)
    changes: dict[str, Any] = {"method": name, "rho": spec.info.rho}
    if name == "universal_sam":
        changes["rho"] = spec.info.rho / 10
    if name == "mup_sam":
        changes |= {"method": "mup_sam:base_width=4", "model": "wide_nets:wide", "width": 8}
    if "mask" not in spec.preset:
        changes["mask"] = "all"
    elif name != "sam_on":  # whose mask is settings' own
        changes["mask"] = ""
    return settings(**changes)


@pytest.mark.slow
@pytest.mark.parametrize("name", [info.name for info in list_methods() if info.name not in DIVIDE | {*ALONE}])
def test_two_processes_are_one_under_every_method(here: Path, name: str) -> None:
    (here / "wide_nets.py").write_text(WIDE)
    close_to_one_process(of_method(name))


@pytest.mark.slow
def test_a_method_that_runs_in_one_process_only_says_why(here: Path) -> None:
    for name, why in ALONE.items():
        codes, _, err = ranks(2, words("out", of_method(name) | {"ascent_gradient": "synchronised"}))
        assert codes == [2, 2]
        assert why in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("name", sorted(DIVIDE))
def test_methods_that_divide_a_batch_are_no_run_in_one_process(tiny: Tiny, name: str) -> None:
    config = tiny(method=name, ascent_gradient="synchronised")
    with pytest.raises(InputError, match=f"method {name} chooses or divides the examples of a batch, and each of 2 p"):
        placed(config, OneOfTwo(1))
    assert placed(config, None).resolved().ascent_gradient == "replica"
    assert placed(replace(config, ascent_gradient="replica"), OneOfTwo(1)).world_size == 2
    assert placed(replace(config, method="esam:gamma=1"), OneOfTwo(1)).ascent_gradient == "synchronised"


@pytest.mark.slow
def test_micro_batches_of_replicas_are_more_micro_batches(here: Path) -> None:
    values = settings(mask="all")
    done(2, "two", values | {"method": "micro_batch_sam:parts=2"})
    train_one(RunConfig(**values, method="micro_batch_sam:parts=4"), Path("parts"), policy=QUIET)
    two, parts = (read_weights(Path(name) / "checkpoint.pt") for name in ("two", "parts"))
    for name, tensor in parts.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_replicas_that_ascend_on_their_own_are_micro_batches(here: Path) -> None:
    values = settings(mask="all", augment="flip")
    done(2, "two", values)
    train_one(RunConfig(**values, method="micro_batch_sam:parts=2"), Path("parts"), policy=QUIET)
    train_one(RunConfig(**values), Path("one"), policy=QUIET)
    two, parts, one = (read_weights(Path(name) / "checkpoint.pt") for name in ("two", "parts", "one"))
    for name, tensor in parts.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-10, atol=1e-12)
    assert max(float((two[name] - one[name]).abs().max()) for name in one) > 1e-4


class OneOfTwo(Team):
    """A rank that nobody else is needed for: the other one would say the same."""

    def __init__(self, rank: int) -> None:
        self.rank, self.size = rank, 2

    def wrapped(self, model: nn.Module, device: torch.device) -> Any:
        return model

    def explained(self) -> Any:
        return nullcontext()

    def mean(self, values: Tensor) -> Tensor:
        return values

    def by_leader(self, make: Callable[[], Any]) -> Any:
        return make()


def epoch_of(config: RunConfig, team: Team | None) -> list[tuple[Tensor, Tensor]]:
    training = Training(placed(config, team).resolved(), CPU, None, None, team=team)
    batches = training._batches()
    found = zip(training.images.batches(batches, 0), batches, strict=True)
    return [(training._augmented(images), training.y[index]) for images, index in found]


@pytest.mark.parametrize("augment", ["none", "crop=1+flip+autoaugment+cutout=2"])
def test_shards_are_the_batches_of_one_process(tiny: Tiny, augment: str) -> None:
    """Order, split and augmentation, bit for bit; each image is in one shard."""
    config = tiny(augment=augment, n_train=100, batch_size=30)  # a last batch of 10
    whole, *shards = (epoch_of(config, team) for team in (None, OneOfTwo(0), OneOfTwo(1)))
    assert [[len(y) for _, y in shard] for shard in shards] == [[15, 15, 15, 5]] * 2
    for (x, y), *parts in zip(whole, *shards, strict=True):
        assert torch.equal(torch.cat([part[0] for part in parts]), x)
        assert torch.equal(torch.cat([part[1] for part in parts]), y)
        assert all(part[0].is_contiguous(memory_format=torch.channels_last) for part in parts)


@pytest.mark.parametrize(
    ("images", "world_size", "sizes"),
    [
        (96, 2, [32, 32, 32]),
        (100, 2, [32, 32, 32, 4]),
        (101, 2, [32, 32, 32, 4]),  # one image is left over
        (99, 2, [32, 32, 32]),  # each would have one
        (98, 1, [32, 32, 32, 2]),
        (97, 1, [32, 32, 32]),
        (127, 4, [32, 32, 32, 28]),
    ],
)
def test_shards_of_the_last_batch_are_equal(tiny: Tiny, images: int, world_size: int, sizes: list[int]) -> None:
    config = tiny(world_size=world_size)
    assert batch_sizes(config, images) == sizes
    assert number_of_steps(config, images) == 2 * len(sizes)


def test_validation_images_are_evaluated_by_the_leader_alone(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated: list[int] = []
    right = train.correct
    monkeypatch.setattr(train, "correct", lambda *arguments: evaluated.append(1) or right(*arguments))
    found = [train_run(tiny(mask="all"), CPU, team=OneOfTwo(rank)).val_accuracy for rank in (0, 1)]
    assert 0 < found[0] <= 1
    assert math.isnan(found[1])
    assert evaluated == [1]


# -- interruption -------------------------------------------------------------------------------------------

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "synchronised": (2, settings(ascent_gradient="synchronised", augment="flip", mask="fisher", measure_every=1)),
    # Statistics, dropout and memory are each rank's own.
    "replica": (2, settings(model="rank_nets:dropped", method="vasso", mask="all", norm_statistics="second")),
    # With three, the order of a sum depends on where in a bucket a gradient lies.
    "three": (3, settings(model="resnet_small", batch_size=30, mask="all")),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_interrupted_and_resumed_is_uninterrupted(here: Path, case: str) -> None:
    """Bytes of the record, though one rank alone was asked to stop; the same number of processes must go on."""
    size, values = CASES[case]
    whole = done(size, "whole", values)
    codes, _, err = ranks(size, words("parts", values), f"{size - 1}:1:SIGTERM")
    assert codes == [143] * size
    assert err == "sam-masks: ended by SIGTERM; finished runs are kept, and the same command goes on from there\n"
    saved = torch.load("parts.work/checkpoint.pt", weights_only=True)
    assert (saved["position"][1], len(saved["own"])) == (2, size)
    shutil.copytree("parts.work", "other.work")
    with pytest.raises(InputError, match=rf"is the checkpoint of a run of {size} processes, and this one has 1; start"):
        train_one(RunConfig(**values), Path("other"), policy=QUIET)
    assert done(size, "parts", values) == whole
    ends = [torch.load(Path(name) / "checkpoint.pt", weights_only=True) for name in ("whole", "parts")]
    assert all(torch.equal(ends[0]["model"][name], tensor) for name, tensor in ends[1]["model"].items())
    if case == "replica":
        first, second = (torch.load(f"dropped-{rank}.pt", weights_only=True) for rank in range(2))
        statistics = [own["buffers"]["1.running_mean"] for own in saved["own"]]
        assert not torch.equal(*statistics)
        assert first.shape == second.shape
        assert not torch.equal(first, second)


def test_a_checkpoint_of_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    Checkpointing(tmp_path / "c.pt", run="a", world_size=2).save({})
    with pytest.raises(InputError, match="of a run of 2 processes, and this one has 3; start 2 to go on, or move it"):
        Checkpointing(tmp_path / "c.pt", run="b", world_size=3).load()


# -- errors -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("happens", "codes", "line"),
    [
        ("1:2:refuse", {2}, "sam-masks: error: refused by hand"),
        ("0:2:raise", {1}, "sam-masks: error: ZeroDivisionError: by hand"),
        ("1:2:raise", {1}, "sam-masks: error: ZeroDivisionError: by hand; set SAM_MASKS_TRACEBACK=1"),
        ("1:2:SIGKILL", {1, -9}, "sam-masks: error: RankFailed: another rank ended without a word"),
        ("0:2:SIGKILL", {1, -9}, "sam-masks: error: RankFailed: another rank ended without a word"),
    ],
)
def test_what_ends_one_rank_ends_all_with_one_line(here: Path, happens: str, codes: set[int], line: str) -> None:
    found, out, err = ranks(2, words("out", settings()), happens)
    assert {*found} <= codes
    assert 0 not in found
    assert out == ["", ""]
    assert err.startswith(line)
    assert err.count("\n") == 1
    assert not Path("out").exists()
    assert Path("out.work/failure.json").exists() == (happens in ("0:2:raise", "1:2:raise", "1:2:SIGKILL"))


@pytest.mark.slow
def test_what_is_refused_on_all_ranks_is_said_once(here: Path) -> None:
    for values, line in (
        (
            settings(batch_size=31),
            "batch_size is that of all processes together and must give each of 2 as many images",
        ),
        (settings(world_size=4), "the configuration says world_size 4, and processes that train together: 2; start it"),
        (settings(mask="all", method="gsam"), "this method steps with a mixture of gradients"),
    ):
        codes, _, err = ranks(2, words("out", values))
        assert codes == [2, 2]
        assert err.startswith(f"sam-masks: error: {line}")
        assert err.count("\n") == 1
        assert [path.name for path in here.glob("out*")] == []


@pytest.mark.slow
def test_torchrun(here: Path) -> None:
    """As a launcher of the command, and again on the finished run, which is read."""
    values = settings(ascent_gradient="synchronised")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    texts = []
    for _ in range(2):
        run = subprocess.run(
            [*command, "-m", "experiments.cli", *words("out", values)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        )
        texts.append(run.stdout)
    assert texts[0] == texts[1]
    assert texts[0].count("record and checkpoint: out") == 1
    assert (here / "out" / "result.json").read_bytes() == done(2, "plain", values)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_torchrun_goes_on_after_a_rank_was_killed(here: Path, killed: int) -> None:
    """Its store outlives the processes, with what they said of their end."""
    values = settings(ascent_gradient="synchronised")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    run = subprocess.run(
        [*command, ROOT / "tests/experiments/rank.py", *words("out", values)],
        env=environment(HAPPENS=f"{killed}:3:SIGKILL", HAPPENED=str(here / "once")),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert (here / "once").exists()
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("record and checkpoint: out") == 1
    assert (here / "out" / "result.json").read_bytes() == done(2, "plain", values)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_is_heard_while_the_others_do_not_come(here: Path, rank: int, number: int, code: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.cli", *words("out", settings())],
        env=environment(WORLD_SIZE="2", RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(8)
    assert process.poll() is None
    process.send_signal(number)
    try:
        err = process.communicate(timeout=5)[1]
    finally:
        process.kill()
    assert process.returncode == code
    assert err.startswith("sam-masks: ")
    assert err.count("\n") == 1


# -- what else a run has ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_streamed_images_and_a_board(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of each rank's shards are decoded by its own workers; curves are written once, by rank 0."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rng = np.random.default_rng(0)
    for name in "abc":
        (here / "images" / name).mkdir(parents=True)
        for i in range(60):
            pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(here / "images" / name / f"{i:02}.png")
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    values = settings(data=f"stream:{here / 'images'}@8", ascent_gradient="synchronised", workers=2)
    board = done(2, "board", values | {"tensorboard": "curves"})
    assert done(2, "plain", values | {"workers": 0}) == board
    del values["workers"]
    close_to_one_process(values)
    (folder,) = (here / "curves").iterdir()
    (_,) = folder.iterdir()
    events = accumulators.EventAccumulator(str(folder)).Reload()
    history = read_run(Path("board")).result["history"]
    assert [e.value for e in events.Scalars("train/loss")] == [pytest.approx(epoch["loss"]) for epoch in history]


# -- what needs no second process ---------------------------------------------------------------------------


def test_the_place_in_the_environment() -> None:
    full = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "host", "MASTER_PORT": "1"}
    assert Place.of(full) == Place(rank=1, size=4, local_rank=0)
    assert Place.of({"PATH": "/bin"}) is None
    assert Place.of({**full, "RANK": "0", "WORLD_SIZE": "1"}) is None
    for changes, message in (
        ({"RANK": "4"}, "RANK must be below WORLD_SIZE; found 4 and 4"),
        ({"WORLD_SIZE": "two"}, "here WORLD_SIZE is 'two'"),
        ({"RANK": None}, "here RANK is not set"),
        ({"MASTER_PORT": None}, "WORLD_SIZE is 4, and MASTER_PORT, where rank 0 is met, is not set"),
    ):
        environ = {name: value for name, value in (full | changes).items() if value is not None}
        with pytest.raises(InputError, match=message):
            Place.of(environ)
    assert current() is None


def test_a_name_that_one_attempt_agrees_on() -> None:
    """In a store in which earlier attempts, with other processes, left what they said."""
    store, names = HashStore(), []
    for _ in range(3):
        store.set("sam-masks/asks/2", "of a process that was killed before anybody answered")
        with ThreadPoolExecutor(3) as ranks_:
            found = [ranks_.submit(attempt, store, rank, 3) for rank in (0, 1, 2)]
            (name,) = {each.result(timeout=60) for each in found}
        names.append(name)
    assert len(set(names)) == 3


def test_who_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_MEET", timedelta(seconds=0.1))
    with pytest.raises(RuntimeError, match="no word of rank 1"):
        attempt(HashStore(), 0, 3)


def test_what_another_launcher_left_is_no_matter_of_other_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["methods"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["train"]) == 2
    assert "RANK is not set" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["compare", "--help"], ["train", "-h"]])
@pytest.mark.parametrize("rank", [0, 1])
def test_help_is_printed_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], rank: int
) -> None:
    for name, value in {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with suppress(SystemExit):
        assert main(words) == 0
    out, err = capsys.readouterr()
    assert bool(out) == (rank == 0)
    assert err == ""


def test_only_train_runs_in_several_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["compare", "--seeds=2"]) == 2
    assert capsys.readouterr().err == "sam-masks: error: compare runs in one process, not in 2; only train does\n"
    monkeypatch.setenv("LOCAL_RANK", "1")  # another process of this machine says it
    assert main(["compare", "--seeds=2"]) == 2
    assert capsys.readouterr().err == ""


def test_settings_of_several_processes(tiny: Tiny) -> None:
    alone, two = tiny(), OneOfTwo(0)
    assert (alone.world_size, alone.resolved().world_size) == (None, 1)
    assert tiny(ascent_gradient="synchronised").resolved() == alone.resolved()  # in one process they are the same
    assert placed(tiny(ascent_gradient="synchronised"), two).resolved().ascent_gradient == "synchronised"
    assert placed(tiny(world_size=2), two) == placed(alone, two)
    for wrong, message in (
        (lambda: placed(tiny(world_size=3, batch_size=30), two), "world_size 3, and processes that train together: 2"),
        (lambda: placed(alone.resolved(), two), "world_size 1, and processes that train together: 2; start it with"),
        (lambda: placed(tiny(world_size=2), None), "start it with torchrun --nproc-per-node 2, or leave world_size"),
        (lambda: placed(tiny(batch_size=31), two), "must give each of 2 as many images, at least 2; got 31"),
        (lambda: tiny(batch_size=4, world_size=4), "must give each of 4 as many images, at least 2; got 4"),
        (lambda: tiny(world_size=0), "world_size must be at least 1, got 0"),
        (lambda: tiny(ascent_gradient="replicas"), "unknown ascent_gradient 'replicas'; did you mean replica"),
    ):
        with pytest.raises(InputError, match=message):
            wrong()


def test_one_device_cannot_be_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    team = OneOfTwo(1)
    team.place = Place(rank=1, size=2, local_rank=1)
    assert team.device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="device cuda:0 would be shared by 2 processes; say cuda"):
        team.device("cuda:0")
    with pytest.raises(InputError, match="LOCAL_RANK is 1; this machine has 1 CUDA devices"):
        team.device("cuda")
