"""The ways to eigenvalues, trace and spectral moments that :mod:`benchmarks.curvature` compares."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import eigsh as scipy_eigsh
from torch import Tensor

from analysis.arpack import eigsh
from analysis.eigen import EigenPairs, eigenpairs, lambda_max
from analysis.linear import as_scipy
from analysis.low_rank_trace import hutch_pp, xtrace
from analysis.operator import HessianOperator
from analysis.spectrum import spectral_density
from analysis.trace import moments
from benchmarks import peers
from benchmarks.small_nets import dense_hessian, trained

BATCH_SIZE = 50
TRACE_PRODUCTS = 60
NUM_VECTORS, NUM_STEPS, POWERS = 4, 15, (1, 2, 3, 4)

Floats = NDArray[np.float64]
Values = list[float]
Method = Callable[[int], tuple[Values, int]]
"""From a seed to the values and the number of products."""


class Net:
    """A network in float32, its data, and the eigenvalues of its Hessian in float64, descending."""

    def __init__(self, name: str) -> None:
        found = trained(name)
        self.model = copy.deepcopy(found.model).float().eval()
        self.batches = [(x.float(), y) for x, y in found.cut(BATCH_SIZE)]
        self.hessian = dense_hessian(copy.deepcopy(self.model).double(), found.x.float().double(), found.y)
        self.eigenvalues = torch.linalg.eigvalsh(self.hessian).flip(0).numpy()

    def own(self, solve: Callable[[HessianOperator, int], Values]) -> Method:
        """A method of this package."""

        def method(seed: int) -> tuple[Values, int]:
            with HessianOperator(self.model, self.batches) as operator:
                return solve(operator, seed), operator.num_products

        return method

    def peer(self, module: str, solve: Callable[[peers.Peer, int], Values]) -> Method:
        """A method of another library, which may draw from torch's and numpy's random streams."""

        def method(seed: int) -> tuple[Values, int]:
            torch.manual_seed(seed)
            np.random.seed(seed)
            peer = peers.PEERS[module](copy.deepcopy(self.model), self.batches)
            with peers.conditions():
                return solve(peer, seed), peer.num_products

        return method


def eigen_methods(net: Net, k: int) -> dict[str, tuple[str, Method]]:
    """For the k largest eigenvalues, by name, with the module that it needs."""

    def values(found: EigenPairs) -> Values:
        return [pair.value for pair in found.largest]

    def first(operator: HessianOperator, seed: int) -> Values:
        return [lambda_max(operator, seed=seed).value]

    def unchecked(operator: HessianOperator, seed: int) -> Values:
        return values(eigenpairs(operator, k, seed=seed, check=False))

    def arpack(peer: peers.Peer, seed: int) -> Values:
        start = torch.randn(peer.dimension, generator=torch.Generator().manual_seed(seed)).numpy()
        return sorted(scipy_eigsh(as_scipy(peer), k, which="LA", v0=start, return_eigenvectors=False), reverse=True)

    def eigenthings(solve: str, **options: Any) -> Callable[[peers.Peer, int], Values]:
        def run(peer: peers.Peer, seed: int) -> Values:
            import hessian_eigenthings as package

            found = getattr(package, solve)(peer.own, k=k, seed=seed, **options)
            return [float(v) for v in found.eigenvalues]

        return run

    checked = {"ours, with the deflation check": lambda op, seed: values(eigenpairs(op, k, seed=seed))} if k > 1 else {}
    mine = {
        "ours": first if k == 1 else unchecked,
        **checked,
        "ours, scipy eigsh": lambda operator, seed: values(eigsh(operator, k, seed=seed)),
    }
    others = {
        "curvlinops, scipy eigsh": arpack,
        "pyhessian, power iteration": lambda peer, seed: peer.own.eigenvalues(top_n=k)[0],
        "hessian_eigenthings, Lanczos": eigenthings("lanczos", which="LA"),
        "hessian_eigenthings, Lanczos, max_iter=30": eigenthings("lanczos", which="LA", max_iter=30),
        "hessian_eigenthings, power iteration": eigenthings("deflated_power_iteration"),
    }
    return _named(net, mine, others)


def trace_methods(net: Net) -> dict[str, tuple[str, Method]]:
    """All of ``TRACE_PRODUCTS`` products, those that find the deflated pairs included, but for PyHessian's own stop."""

    def deflated(operator: HessianOperator, seed: int) -> Values:
        pairs = eigenpairs(operator, 5, check=False, seed=seed, keep_vectors=True).largest
        left = TRACE_PRODUCTS - operator.num_products
        return [moments(operator, num_probes=left, seed=seed, deflate=pairs).trace.value]

    def curvlinops(solve: str) -> Callable[[peers.Peer, int], Values]:
        def run(peer: peers.Peer, seed: int) -> Values:
            import curvlinops as package

            return [float(getattr(package, solve)(peer.own, TRACE_PRODUCTS))]

        return run

    def eigenthings(name: str) -> Callable[[peers.Peer, int], Values]:
        def run(peer: peers.Peer, seed: int) -> Values:
            from hessian_eigenthings import trace

            return [trace(peer.own, num_matvecs=TRACE_PRODUCTS, method=name, seed=seed).estimate]

        return run

    mine = {
        "ours, Hutchinson": lambda op, seed: [moments(op, num_probes=TRACE_PRODUCTS, seed=seed).trace.value],
        "ours, Hutchinson deflated": deflated,
        "ours, Hutch++": lambda op, seed: [hutch_pp(op, num_products=TRACE_PRODUCTS, seed=seed).value],
        "ours, XTrace": lambda op, seed: [xtrace(op, num_products=TRACE_PRODUCTS, seed=seed).value],
    }
    others = {
        "curvlinops, Hutchinson": curvlinops("hutchinson_trace"),
        "curvlinops, Hutch++": curvlinops("hutchpp_trace"),
        "curvlinops, XTrace": curvlinops("xtrace"),
        "hessian_eigenthings, Hutchinson": eigenthings("hutchinson"),
        "hessian_eigenthings, Hutch++": eigenthings("hutch++"),
        "pyhessian, its own stop": lambda peer, seed: [float(np.mean(peer.own.trace()))],
        "pyhessian, tol=0": lambda peer, seed: [float(np.mean(peer.own.trace(maxIter=TRACE_PRODUCTS, tol=0)))],
    }
    return _named(net, mine, others)


def moment_methods(net: Net) -> dict[str, tuple[str, Method]]:
    """Moments of the spectrum from quadratures of ``NUM_VECTORS`` vectors and ``NUM_STEPS`` steps each."""

    def quadrature(nodes: Any, weights: Any) -> Values:
        x, w = np.array(nodes, dtype=np.float64), np.array(weights, dtype=np.float64)
        return [float((w * x**p).sum(-1).mean()) for p in POWERS]

    def ours(operator: HessianOperator, seed: int) -> Values:
        found = spectral_density(operator, num_vectors=NUM_VECTORS, num_steps=NUM_STEPS, seed=seed)
        return [found.moment(p).value for p in POWERS]

    def eigenthings(peer: peers.Peer, seed: int) -> Values:
        from hessian_eigenthings import spectral_density

        found = spectral_density(peer.own, num_runs=NUM_VECTORS, lanczos_steps=NUM_STEPS, seed=1000 * seed)
        return quadrature(found.raw_eigenvalues, found.raw_weights)

    def curvlinops(peer: peers.Peer, seed: int) -> Values:
        from curvlinops.papyan2020traces.spectrum import fast_lanczos

        runs: list[tuple[Tensor, Tensor]] = [fast_lanczos(peer.own, NUM_STEPS) for _ in range(NUM_VECTORS)]
        return quadrature(*(torch.stack(part).numpy() for part in zip(*((x, v[0] ** 2) for x, v in runs), strict=True)))

    others = {
        "curvlinops, without reorthogonalisation": curvlinops,
        "hessian_eigenthings": eigenthings,
        "pyhessian": lambda peer, seed: quadrature(*peer.own.density(iter=NUM_STEPS, n_v=NUM_VECTORS)),
    }
    return _named(net, {"ours": ours}, others)


def _named(net: Net, mine: dict[str, Any], others: dict[str, Any]) -> dict[str, tuple[str, Method]]:
    """With the module that each needs, "" for none; that of another library begins its name."""
    found = {name: ("", net.own(solve)) for name, solve in mine.items()}
    for name, solve in others.items():
        module = name.split(",")[0]
        found[name] = module, net.peer(module, solve)
    return found


def tasks(net: Net) -> dict[str, tuple[Floats, dict[str, tuple[str, Method]]]]:
    """For each task its exact values and its methods."""
    e = net.eigenvalues
    return {
        "lambda_max": (e[:1], eigen_methods(net, 1)),
        "top five": (e[:5], eigen_methods(net, 5)),
        "trace": (np.array([e.sum()]), trace_methods(net)),
        "moments": (np.array([(e**p).mean() for p in POWERS]), moment_methods(net)),
    }
