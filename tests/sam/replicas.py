"""What two processes of `test_parallel.py` run, each under DistributedDataParallel on a shard of its own."""

from __future__ import annotations

import contextlib
import copy
import itertools
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from masks import InputError, Mask, MaskContext, build_mask
from sam import SAM, Accumulated, MethodSpec, build_method, list_methods
from tests.sam.nets import batches, build, closure, losses, make, mixed_mask, own_settings, snapshot

WORLD, RHO, STEPS = 2, 0.2, 3
ASCENTS = ("replica", "synchronised")


def shards(step: int = 0, size: int = 6) -> list:
    """One batch per rank; what a rank does not use, the single-process oracle does."""
    return batches(WORLD, size=size, seed=10 + step, dtype=torch.float64)


def base_of(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-3)


def model_of(net="vit"):
    return make(net).double()


def mask_of(net, name) -> Mask:
    template = make(net)
    return mixed_mask(template) if name == "mixed" else build(template, name)


def take(optimizer, loss_fn, batch, entry):
    if entry == "step_on":
        return optimizer.step_on(loss_fn, batch)
    return optimizer.step(closure(optimizer, loss_fn, batch))


def train(rank, *, net="vit", mask="norm", entry="step_on", given="wrapper", steps=STEPS, wrap=None, **options):
    """Weights, and what the last step's statistics say, after some steps; SAM is given the wrapper or the module."""
    model = model_of(net)
    late = given == "late"
    ddp = None if late else DistributedDataParallel(model, **(wrap or {}))
    if isinstance(mask, str):
        mask = mask_of(net, mask)
    optimizer = SAM(base_of(model), ddp if given == "wrapper" else model, mask=mask, rho=RHO, **options)
    ddp = ddp or DistributedDataParallel(model)
    for step in range(steps):
        take(optimizer, losses(ddp), shards(step)[rank], entry)
    return {
        "weights": snapshot(model),
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "state": optimizer.state_dict(),
    }


def message(run) -> str:
    try:
        run()
    except InputError as error:
        return str(error)
    return ""


# -- what is run: each function gets the rank and returns tensors and text -------------------------------------


def training(rank):
    return {
        f"{net} {mask} {entry} {given} {ascent}": train(
            rank, net=net, mask=mask, entry=entry, given=given, ascent_gradient=ascent
        )
        for (net, mask, given), entry, ascent in itertools.product(
            [
                ("vit", "norm", "wrapper"),
                ("vit", "mixed", "module"),
                ("vit", "mixed", "wrapper"),
                ("resnet", "mixed", "wrapper"),
            ],
            ("step_on", "step"),
            ASCENTS,
        )
    } | {f"late {entry}": train(rank, entry=entry, given="late") for entry in ("step_on", "step")}


def wrapper_options(rank):
    return {
        f"{name} {entry} {ascent}": train(rank, wrap={name: True}, entry=entry, ascent_gradient=ascent)
        for name in ("find_unused_parameters", "gradient_as_bucket_view")
        for entry in ("step_on", "step")
        for ascent in ASCENTS
    }


def names(rank):
    """A mask built on the wrapper."""
    ddp = DistributedDataParallel(model_of())
    return train(rank, mask=build_mask("norm", MaskContext(ddp)))


def different_masks(rank):
    model = model_of()
    ddp = DistributedDataParallel(model)
    own = build(make("vit"), "norm" if rank == 0 else "no_norm")
    optimizer = SAM(base_of(model), ddp, mask=mask_of("vit", "all"), rho=RHO)
    kept = optimizer.mask
    before = [group.copy() for group in base_of(model).param_groups]
    out = {
        "digest": own.digest(),
        "construction": message(lambda: SAM(base_of(model), ddp, mask=own)),
        "module": message(lambda: SAM(base_of(model), model, mask=own)),
        "set_mask": message(lambda: optimizer.set_mask(own)),
    }
    assert optimizer.mask is kept
    assert all("rho" not in group for group in before)
    return out


class _Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * torch.inf


def infinities(rank):
    """Rank 1 has an infinity in one pass of the second of three steps."""
    out = {}
    for ascent, entry, bad, scaled in itertools.product(ASCENTS, ("step_on", "step"), (1, 2), (False, True)):
        model = model_of()
        ddp = DistributedDataParallel(model)
        scaler = GradScaler("cpu", init_scale=1024.0) if scaled else None
        mask = mask_of("vit", "norm")
        optimizer = SAM(base_of(model), ddp, mask=mask, rho=RHO, ascent_gradient=ascent, scaler=scaler)
        calls = [0]

        def loss_fn(batch, ddp=ddp, calls=calls, bad=bad):
            calls[0] += 1
            logits = ddp(batch[0])
            if rank == 1 and calls[0] == 2 + bad:
                logits = _Poison.apply(logits)
            return F.cross_entropy(logits, batch[1], reduction="none")

        def run(optimizer, step, loss_fn=loss_fn, entry=entry, scaler=scaler):
            batch = shards(step)[rank]
            if entry == "step_on":
                return optimizer.step_on(loss_fn, batch)

            def closure():
                optimizer.zero_grad()
                loss = loss_fn(batch).mean()
                (loss if scaler is None else scaler.scale(loss)).backward()
                return loss

            return optimizer.step(closure)

        run(optimizer, 0)
        before = snapshot(model)
        run(optimizer, 1)
        skipped = snapshot(model)
        finite = bool(optimizer.stats.finite)
        run(optimizer, 2)
        out[f"{ascent} {entry} {bad} {scaled}"] = {
            "before": before,
            "skipped": skipped,
            "finite": finite,
            "after": snapshot(model),
            "count": int(optimizer.skipped_steps),
            "scale": scaler.get_scale() if scaler else 512.0,
        }
    return out


def accumulation(rank):
    """Micro-batches of other numbers and sizes on the two ranks."""
    out = {}
    for ascent in ASCENTS:
        model = model_of()
        ddp = DistributedDataParallel(model)
        optimizer = SAM(base_of(model), ddp, mask=mask_of("vit", "norm"), rho=RHO, ascent_gradient=ascent)
        for step in range(2):
            optimizer.step_on(losses(ddp), Accumulated(micro_batches(step)[rank]))
        out[ascent] = snapshot(model)
    return out


def micro_batches(step):
    sizes = [(1, 3), (2, 2, 1)]
    return [
        [tuple(part) for part in zip(*(t[: sum(size)].split(list(size)) for t in shard), strict=True)]
        for shard, size in zip(shards(step), sizes, strict=True)
    ]


def methods(rank):
    """Every registered method, with either ascent gradient: weights after three steps, or the refusal."""
    out = {}
    for info, ascent in itertools.product(list_methods(), ASCENTS):
        if info.needs_model:
            continue
        key = f"{info.name} {ascent}"
        try:
            spec = MethodSpec(info.name)
            own = own_settings(spec, make("vit")) if spec.preset else {"method": spec.build()}
            out[key] = train(rank, **own, ascent_gradient=ascent)["weights"]
        except InputError as error:
            out[key] = str(error)
    return out


def resumed(rank):
    """Five steps, and two steps resumed from the state after three: with the rank's own state, and with rank 0's."""
    out = {}
    for name, ascent in itertools.product(("sam", "friendly_sam", "vasso"), ASCENTS):

        def start(name=name, ascent=ascent):
            model = model_of()
            ddp = DistributedDataParallel(model)
            options = {"method": build_method(name), "ascent_gradient": ascent}
            return model, ddp, SAM(base_of(model), ddp, mask=mask_of("vit", "mixed"), rho=RHO, **options)

        model, ddp, optimizer = start()
        for step in range(3):
            optimizer.step_on(losses(ddp), shards(step)[rank])
        # Copies: a base optimizer shares the tensors of a state that it gave or took.
        weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        of_first = [state]
        dist.broadcast_object_list(of_first, src=0)
        for step in (3, 4):
            optimizer.step_on(losses(ddp), shards(step)[rank])
        out[f"{name} {ascent}"] = {"end": snapshot(model)}
        for whose, given in (("own", state), ("first", of_first[0])):
            model, ddp, optimizer = start()
            model.load_state_dict(weights)
            refusal = message(lambda o=optimizer, given=given: o.load_state_dict(copy.deepcopy(given)))
            everywhere = [None] * WORLD
            dist.all_gather_object(everywhere, refusal)
            if not any(everywhere):
                for step in (3, 4):
                    optimizer.step_on(losses(ddp), shards(step)[rank])
            out[f"{name} {ascent}"] |= {whose: snapshot(model), f"{whose} refused": refusal}
    return out


@contextlib.contextmanager
def counted(calls):
    real = dist.all_reduce

    def spy(tensor, *args, **kwargs):
        calls.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    dist.all_reduce = spy
    try:
        yield
    finally:
        dist.all_reduce = real


def traffic(rank):
    """Numbers of entries in the messages of one step: the engine's own, and DDP's."""
    out = {}
    for ascent, entry in itertools.product(ASCENTS, ("step_on", "step")):
        model, own, reduced = model_of(), [], []
        ddp = DistributedDataParallel(model)

        def hook(state, bucket, reduced=reduced):
            reduced.append(bucket.buffer().numel())
            future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
            return future.then(lambda done: done.value()[0].div_(WORLD))

        ddp.register_comm_hook(None, hook)
        optimizer = SAM(base_of(model), ddp, mask=mask_of("vit", "norm"), rho=RHO, ascent_gradient=ascent)
        with counted(own):
            take(optimizer, losses(ddp), shards()[rank], entry)
        out[f"{ascent} {entry}"] = {"all": own, "ddp": reduced}
    return out


def sharded(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make("vit")
    mask = build(model, "norm")
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    inner = torch.optim.SGD(model.parameters(), 0.1)
    return message(lambda: SAM(inner, model, mask=mask))


def refused_wrappers(rank):
    model = model_of()
    static = DistributedDataParallel(model, static_graph=True)
    out = {"static": message(lambda: SAM(base_of(model), static, mask=mask_of("vit", "norm")))}
    model = model_of()
    two = [DistributedDataParallel(model), DistributedDataParallel(model)]
    out["two"] = message(lambda: SAM(base_of(model), model, mask=mask_of("vit", "norm")))
    out["one of two"] = message(lambda: SAM(base_of(model), two[1], mask=mask_of("vit", "norm")))
    model = model_of()
    mask = mask_of("vit", "norm")
    model.block = DistributedDataParallel(model.block)
    return out | {"partly": message(lambda: SAM(base_of(model), model, mask=mask))}


SCENARIOS = (
    training,
    wrapper_options,
    names,
    different_masks,
    infinities,
    accumulation,
    methods,
    resumed,
    traffic,
    sharded,
    refused_wrappers,
)


def work(rank: int, folder: str) -> None:
    """One process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        torch.save({run.__name__: run(rank) for run in SCENARIOS}, Path(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()
