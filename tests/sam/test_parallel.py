"""Data-parallel training: two real processes against loops in one."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

from masks import InputError, MaskContext, build_mask
from sam import SAM, Accumulated, build_method, list_methods
from tests.sam.nets import batches, build, losses, make, same_bits, snapshot
from tests.sam.replicas import ASCENTS, RHO, STEPS, WORLD, base_of, mask_of, micro_batches, model_of, shards, work

ENTRIES = ("step_on", "step")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes found: one spawn for the whole file."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(work, (str(folder),), nprocs=WORLD, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def close(a, b, rtol=1e-11):
    for x, y in zip(a.values(), b.values(), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=1e-12)


def gradient(model, parts):
    """The mean over parts, of equal weight, of the gradients of their mean losses."""
    model.zero_grad()
    for batch in parts:
        (F.cross_entropy(model(batch[0]), batch[1]) / len(parts)).backward()
    return [p.grad.clone() for p in model.parameters()]


@functools.cache
def oracle(net, mask, ascent, data=shards, steps=STEPS):
    """Data-parallel SAM by loops over the shards in one process, without the engine: weights after some steps.

    Shards are lists of examples or, for accumulated batches, lists of micro-batches made one.
    """
    model = model_of(net)
    base = base_of(model)
    keep = mask_of(net, mask).dense()
    for step in range(steps):
        parts = data(step)
        final = [torch.zeros_like(p) for p in model.parameters()]
        for part in parts:
            g = gradient(model, [part] if ascent == "replica" else parts)
            norm = torch.sqrt(sum((x[k] ** 2).sum() for x, k in zip(g, keep, strict=True)))
            before = [p.detach().clone() for p in model.parameters()]
            with torch.no_grad():
                for p, x, k in zip(model.parameters(), g, keep, strict=True):
                    p.add_(torch.where(k, RHO * x / norm, 0))
            for total, x in zip(final, gradient(model, [part]), strict=True):
                total.add_(x / len(parts))
            with torch.no_grad():
                for p, w in zip(model.parameters(), before, strict=True):
                    p.copy_(w)
        for p, total in zip(model.parameters(), final, strict=True):
            p.grad = total
        base.step()
    return snapshot(model)


@pytest.mark.parametrize("ascent", ASCENTS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_training_is_the_loop_over_shards(ranks, entry, ascent):
    """Each replica ascends along its own gradient, or all along the average; DDP averages the final one."""
    for name, first in ranks[0]["training"].items():
        net, mask, *rest = name.split()
        if rest[:1] != [entry] or rest[2] != ascent:
            continue
        second = ranks[1]["training"][name]
        assert same_bits(first["weights"], second["weights"]), name
        close(first["weights"], oracle(net, mask, ascent))
    close(ranks[0]["training"][f"late {entry}"]["weights"], oracle("vit", "norm", "replica"))


def test_the_two_settings_differ():
    a, b = (oracle("vit", "norm", ascent) for ascent in ASCENTS)
    assert max(float((x - y).abs().max()) for x, y in zip(a.values(), b.values(), strict=True)) > 1e-4


@pytest.mark.parametrize("mask", ["norm", "mixed"])
@pytest.mark.parametrize("ascent", ASCENTS)
def test_training_is_a_method_on_the_whole_batch(ranks, ascent, mask):
    """A perturbation per replica is micro-batch SAM with one part per rank, the synchronised one is SAM."""
    model = model_of()
    method = build_method("micro_batch_sam", parts=WORLD) if ascent == "replica" else build_method("sam")
    optimizer = SAM(base_of(model), model, mask=mask_of("vit", mask), rho=RHO, method=method)
    for step in range(STEPS):
        optimizer.step_on(losses(model), tuple(torch.cat(part) for part in zip(*shards(step), strict=True)))
    close(ranks[0]["training"][f"vit {mask} step_on wrapper {ascent}"]["weights"], snapshot(model))


def test_running_statistics_are_those_of_the_first_pass(ranks):
    """Rank 0's, as DDP has it: every step updates them once, at w, on its own shard."""
    found = ranks[0]["training"]["resnet mixed step_on wrapper replica"]
    assert all(int(b) == STEPS for name, b in found["buffers"].items() if name.endswith("num_batches_tracked"))


def test_options_of_the_wrapper(ranks):
    for name, found in ranks[0]["wrapper_options"].items():
        close(found["weights"], oracle("vit", "norm", name.split()[-1]))


def test_names_of_the_wrapper(ranks):
    """A mask built on the wrapper is the module's; a checkpoint goes into one process and back."""
    found = ranks[0]["names"]
    assert same_bits(found["weights"], ranks[0]["training"]["vit norm step_on wrapper replica"]["weights"])
    model = model_of()
    optimizer = SAM(base_of(model), model, mask=mask_of("vit", "norm"), rho=RHO)
    optimizer.load_state_dict(found["state"])
    assert same_bits(optimizer.state_dict()["base"], found["state"]["base"])


def test_different_masks_are_refused_on_every_rank(ranks):
    digests = [rank["different_masks"].pop("digest") for rank in ranks]
    expected = f"the replicas have different masks: digest {digests[0][:16]} on rank 0, {digests[1][:16]} on rank 1;"
    for rank in ranks:
        assert all(text.startswith(expected) for text in rank["different_masks"].values())
        assert len(rank["different_masks"]) == 3


def test_an_infinity_on_one_rank_skips_the_step_on_all(ranks):
    """...and backs off every rank's scale alike; a power of two changes nothing else."""
    for name, first in ranks[0]["infinities"].items():
        second = ranks[1]["infinities"][name]
        assert same_bits(first, second), name
        assert same_bits(first["before"], first["skipped"]), name
        assert (first["finite"], first["count"], first["scale"]) == (False, 1, 512.0), name
        ascent = name.split()[0]
        close(first["after"], oracle("vit", "norm", ascent, data=without_the_second, steps=2))


def without_the_second(step):
    return shards(2 * step)


def joined(step):
    """Every rank's micro-batches as one batch."""
    return [tuple(torch.cat(t) for t in zip(*parts, strict=True)) for parts in micro_batches(step)]


@pytest.mark.parametrize("ascent", ASCENTS)
def test_accumulated_batches_of_other_sizes(ranks, ascent):
    """Weighted by examples within a rank, equally between ranks, as DDP has it."""
    found = [rank["accumulation"][ascent] for rank in ranks]
    assert same_bits(found[0], found[1])
    close(found[0], oracle("vit", "norm", ascent, data=joined, steps=2))


def test_every_method_keeps_the_replicas_alike_or_is_refused(ranks):
    names = [info.name for info in list_methods() if not info.needs_model]
    first, second = (rank["methods"] for rank in ranks)
    assert set(first) == {f"{name} {ascent}" for name in names for ascent in ASCENTS}
    for key in first:
        assert same_bits(first[key], second[key]), key
    refused = {key for key, value in first.items() if isinstance(value, str)}
    assert refused == {
        *(f"exact_sam {ascent}" for ascent in ASCENTS),
        *(f"{name} replica" for name in ("gsam", "looksam", "universal_sam", "wsam")),
    }
    assert 'ascent_gradient="synchronised"' in first["gsam replica"]
    assert "second derivative" in first["exact_sam replica"]


@pytest.mark.parametrize("name", ["asam", "fisher_sam", "friendly_sam", "gsam", "looksam", "momentum_sam", "wsam"])
def test_synchronised_methods_are_those_on_the_whole_batch(ranks, name):
    """Those that combine gradients, too."""
    model = model_of()
    optimizer = SAM(base_of(model), model, mask=mask_of("vit", "norm"), rho=RHO, method=build_method(name))
    for step in range(STEPS):
        optimizer.step_on(losses(model), tuple(torch.cat(part) for part in zip(*shards(step), strict=True)))
    close(ranks[0]["methods"][f"{name} synchronised"], snapshot(model), rtol=1e-9)


@pytest.mark.parametrize("ascent", ASCENTS)
@pytest.mark.parametrize("name", ["sam", "friendly_sam", "vasso"])
def test_resume(ranks, name, ascent):
    """Bitwise from the rank's own state; from rank 0's, too, or it is refused: gradients of another shard."""
    for rank, found in enumerate(found["resumed"][f"{name} {ascent}"] for found in ranks):
        assert found["own refused"] == ""
        assert same_bits(found["own"], found["end"])
        if rank and name != "sam" and ascent == "replica":
            assert "is of rank 0 of 2, and this is rank 1 of 2" in found["first refused"]
        else:
            assert found["first refused"] == ""
        if name == "sam" or ascent == "synchronised":
            assert same_bits(found["first"], found["end"])


def test_what_is_sent(ranks):
    """Per replica: DDP's average of the final pass, and one number. Synchronised: the masked tensors' gradient, too."""
    model = make("vit")
    everything = sum(p.numel() for p in model.parameters())
    masked = mask_of("vit", "norm").num_kept
    assert masked < everything
    for name, sent in ranks[0]["traffic"].items():
        assert sent["ddp"] == [everything]
        assert sent["all"] == [masked] * name.startswith("synchronised") + [everything, 1]


def test_sharded_and_otherwise_wrapped_models_are_refused(ranks):
    for rank in ranks:
        assert rank["sharded"].startswith("the parameters are DTensors (fully_shard or tensor parallelism)")
        assert rank["refused_wrappers"]["partly"].startswith("only block is wrapped in DistributedDataParallel")
        assert rank["refused_wrappers"]["two"].startswith("2 DistributedDataParallel wrappers of this model are alive")
        assert rank["refused_wrappers"]["one of two"] == ""
        assert rank["refused_wrappers"]["static"].startswith("static_graph=True fixes what is averaged in every pass")


# -- what needs no second process ----------------------------------------------------------------------------


def test_an_unknown_setting():
    model = make("vit")
    with pytest.raises(InputError, match="unknown ascent_gradient 'replicas'; did you mean replica"):
        SAM(base_of(model), model, mask=build(model, "norm"), ascent_gradient="replicas")


@pytest.mark.parametrize("ascent", ASCENTS)
def test_without_replicas_the_setting_has_no_effect(ascent):
    found = []
    for options in ({}, {"ascent_gradient": ascent}):
        model = make("vit")
        optimizer = SAM(base_of(model), model, mask=build(model, "norm"), **options)
        optimizer.step_on(losses(model), Accumulated(batches(2)))
        found.append(snapshot(model))
    assert same_bits(found[0], found[1])


def test_data_parallel_and_its_names():
    """`nn.DataParallel` prefixes the names, too."""
    found = []
    for wrap in (lambda model: model, torch.nn.DataParallel):
        model = make("vit")
        wrapped = wrap(model)
        optimizer = SAM(base_of(model), wrapped, mask=build_mask("norm", MaskContext(wrapped)), rho=RHO)
        optimizer.step_on(losses(wrapped), batches()[0])
        assert optimizer.mask == build(model, "norm")
        optimizer.set_mask(build_mask("no_norm", MaskContext(wrapped)))
        assert optimizer.mask == build(model, "no_norm")
        optimizer.step_on(losses(wrapped), batches()[0])
        found.append((snapshot(model), optimizer.state_dict()))
    assert same_bits(found[0][0], found[1][0])
