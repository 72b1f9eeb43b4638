import numpy as np
import pytest
import torch

from experiments.seeds import derive_seed


def test_the_value_is_the_documented_hash() -> None:
    # sha256sum of the 11 bytes [3, "init"], first 8 bytes as a big-endian number, without its last bit.
    assert derive_seed(3, "init") == 0xCE9F6A7F77568B8C >> 1


def test_purposes_and_seeds_have_streams_of_their_own() -> None:
    quoted = ('init", "order',)
    purposes = [(), ("init",), ("order",), ("in", "it"), ("i", "nit"), ("init", ""), quoted, ("init", "order")]
    seeds = {derive_seed(seed, *names) for seed in (-1, 0, 1, 2**70) for names in purposes}
    assert len(seeds) == 4 * len(purposes)


def test_values_fit_the_generators_and_fill_their_range() -> None:
    values = [derive_seed(seed, "x") for seed in range(200)]
    assert 0 <= min(values) < 2**58  # each of the two fails by chance with probability below 0.002
    assert 2**63 - 2**58 < max(values) < 2**63
    torch.manual_seed(max(values))
    np.random.PCG64(max(values))


def test_the_type_of_an_integer_does_not_matter_and_others_are_refused() -> None:
    assert derive_seed(np.int64(7), "x") == derive_seed(7, "x")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        derive_seed(1.5, "x")  # type: ignore[arg-type]
