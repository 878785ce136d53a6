# SPDX-License-Identifier: Apache-2.0
"""sample: the random numbers against published vectors, the draws against exact distributions, and the kernel against
the reference."""

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from lightllm_backend.kernels.sampling import reference as sampling
from tests.kernels.spoiled_logits import spoiled_logits

BOTH = pytest.mark.parametrize("implementation", [reference, launchers])

# Known answers for philox4x32-10 of the Random123 library: counter, key, result.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _sample(implementation, logits, temperature=1.0, top_k=-1, top_p=1.0, seed=0, position=0, min_p=0.0):
    """Scalars hold for all rows."""
    rows, device = logits.shape[0], logits.device
    table = torch.full((rows,), 7, dtype=torch.int32, device=device)
    places = torch.arange(rows, device=device).flip(0)

    def column(value, dtype):
        return torch.as_tensor(value, dtype=dtype, device=device).expand(rows).contiguous()

    tokens = implementation.sample(
        logits,
        column(temperature, torch.float32),
        column(top_k, torch.int32),
        column(top_p, torch.float32),
        column(min_p, torch.float32),
        column(seed, torch.int64),
        column(position, torch.int32),
        places,
        table,
    )
    assert table[places].tolist() == tokens.clamp_min(0).tolist(), "the next step reads them there"
    return tokens


@pytest.mark.parametrize(("counter", "key", "result"), VECTORS)
def test_philox_known_answers(counter, key, result):
    counter_words = tuple(torch.tensor([int(word, 16)]) for word in counter.split())
    key_words = tuple(torch.tensor([int(word, 16)]) for word in key.split())
    words = sampling._philox(counter_words, key_words)
    assert [f"{int(word):08x}" for word in words] == result.split()


def test_uniform_is_philox_keyed_by_seed_and_counted_by_position():
    seed = torch.tensor([0, -1, 0x299F31D0A4093822])
    position = torch.tensor([0, 0, 7], dtype=torch.int32)
    uniform = sampling._uniform(seed, position)
    assert uniform[0] == (0x6627E8D5 >> 8) / 2**24
    assert uniform[0] != uniform[1]
    again = sampling._uniform(seed[2:], position[2:])
    assert again == uniform[2]
    many = sampling._uniform(torch.zeros(4096, dtype=torch.int64), torch.arange(4096, dtype=torch.int32))
    assert 0 <= float(many.min()) < float(many.max()) < 1
    assert abs(float(many.mean()) - 0.5) < 0.02


@BOTH
def test_kernels_uniform_is_the_references(implementation, device):
    # 4096 equal logits: the token drawn is the uniform number's first 12 bits.
    seeds = [0, 1, -1, 2**62 + 5, -(2**63), 123456789]
    positions = [0, 1, 2, 1000, 2**31 - 1, 77]
    out = _sample(implementation, torch.zeros(6, 4096, device=device), seed=seeds, position=positions)
    uniform = sampling._uniform(torch.tensor(seeds), torch.tensor(positions, dtype=torch.int32))
    assert out.tolist() == (uniform * 4096).int().tolist()


@BOTH
def test_temperature_zero_is_the_first_maximum(implementation, device):
    logits = torch.randn(3, 9001, device=device)
    logits[0, [8500, 17, 8193]] = 50.0
    logits[1, 9000] = 50.0
    logits[2] = -3.0
    out = _sample(implementation, logits, temperature=0.0, top_k=5, top_p=0.3, seed=3)
    assert out.tolist() == [17, 9000, 0]
    assert out.dtype == torch.int32


@BOTH
@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-6, 1e6, 3e38])
def test_extreme_temperatures(implementation, temperature, device):
    logits = torch.tensor([[1.0, 3.0, 2.999, -torch.inf]], device=device).repeat(8, 1)
    out = _sample(implementation, logits, temperature, position=list(range(8))).tolist()
    assert set(out) == {1} if temperature < 1 else set(out) <= {0, 1, 2} and len(set(out)) > 1


def _draws(implementation, device):
    """The interpreter takes tens of milliseconds a row; with seed 18 the first 4 are already all that is kept."""
    return 24 if implementation is reference or device.type == "cuda" else 4


@BOTH
@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (1, 1.0, {4}),
        (2, 1.0, {1, 4, 6}),  # the second is a tie
        (3, 1.0, {1, 4, 6}),
        (4, 1.0, {0, 1, 4, 6}),
        (0, 1.0, {0, 1, 2, 3, 4, 6}),
        (99, 1.0, {0, 1, 2, 3, 4, 6}),
        (-1, 1e-6, {4}),
        (-1, 0.39, {4}),
        (-1, 0.41, {1, 4, 6}),
        (-1, 0.81, {0, 1, 4, 6}),
        (3, 0.49, {4}),  # 0.4 of the 0.8 that top-k has left is 0.5
        (3, 0.51, {1, 4, 6}),
    ],
)
def test_what_is_kept(implementation, top_k, top_p, kept, device):
    probabilities = torch.tensor([0.1, 0.2, 0.06, 0.04, 0.4, 0.0, 0.2], device=device)
    draws = _draws(implementation, device)
    logits = probabilities.log().repeat(draws, 1)
    out = _sample(implementation, logits, 1.0, top_k, top_p, seed=18, position=list(range(draws)))
    assert set(out.tolist()) <= kept
    if len(kept) < 5:
        assert set(out.tolist()) == kept


@BOTH
@pytest.mark.parametrize(
    ("min_p", "top_k", "top_p", "kept"),
    [
        (1.0, -1, 1.0, {4}),
        (0.49, -1, 1.0, {1, 4, 6}),  # 0.2 of 0.4 is 0.5
        (0.51, -1, 1.0, {4}),
        (0.24, -1, 1.0, {0, 1, 4, 6}),
        (0.49, 1, 1.0, {4}),
        (0.49, 4, 1.0, {1, 4, 6}),
        (0.49, -1, 0.49, {4}),  # 0.4 of the 0.8 that min-p has left is 0.5
        (0.49, -1, 0.51, {1, 4, 6}),
        (0.24, 2, 0.51, {1, 4, 6}),
    ],
)
def test_what_min_p_keeps(implementation, min_p, top_k, top_p, kept, device):
    probabilities = torch.tensor([0.1, 0.2, 0.06, 0.04, 0.4, 0.0, 0.2], device=device)
    draws = _draws(implementation, device)
    logits = probabilities.log().repeat(draws, 1)
    out = _sample(implementation, logits, 1.0, top_k, top_p, seed=18, position=list(range(draws)), min_p=min_p)
    assert set(out.tolist()) == kept


@pytest.mark.parametrize(("temperature", "min_p", "top_k", "top_p"), [(0.7, 0.2, 0, 1.0), (1.5, 0.1, 7, 0.8)])
def test_min_p_is_that_of_transformers_before_the_others(temperature, min_p, top_k, top_p, device):
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(1, 16, device=device) * 2
    warpers = [
        processors.TemperatureLogitsWarper(temperature),
        processors.MinPLogitsWarper(min_p),
        *([processors.TopKLogitsWarper(top_k)] if top_k else []),
        *([processors.TopPLogitsWarper(top_p)] if top_p < 1 else []),
    ]
    exact = logits.clone()
    for warper in warpers:
        exact = warper(None, exact)
    _check_distribution(logits, exact.softmax(-1)[0].cpu(), temperature, top_k, top_p, min_p)


@BOTH
def test_signed_zeros_tie(implementation, device):
    logits = torch.tensor([[-0.0, 0.0, -1.0, -0.0]], device=device).repeat(32, 1)
    out = _sample(implementation, logits, top_k=1, position=list(range(32)))
    assert set(out.tolist()) == {0, 1, 3}


def _check_distribution(logits, exact, temperature, top_k, top_p, min_p=0.0):
    """The reference's draws against a distribution, and the first of the kernel's against the reference's."""
    draws, few = 20_000, 10  # the interpreter takes tens of milliseconds a row
    out = _sample(reference, logits.repeat(draws, 1), temperature, top_k, top_p, 11, list(range(draws)), min_p)
    expected, observed = exact * draws, torch.bincount(out.long().cpu(), minlength=len(exact)).double()
    live = exact > 0
    assert observed[~live].sum() == 0
    statistic, freedom = float(((observed - expected)[live].square() / expected[live]).sum()), int(live.sum()) - 1
    assert freedom > 1
    # Four standard deviations above the mean of a chi-square distribution; seeds are fixed.
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
    of_kernel = _sample(launchers, logits.repeat(few, 1), temperature, top_k, top_p, 11, list(range(few)), min_p)
    assert torch.equal(of_kernel, out[:few])


@pytest.mark.parametrize(("top_k", "top_p"), [(-1, 1.0), (6, 1.0), (-1, 0.8), (8, 0.9)])
def test_distribution(top_k, top_p, device):
    logits = torch.randn(12) * 1.5
    exact = (logits.double() / 0.7).softmax(0)
    order = exact.argsort(descending=True)
    if top_k > 0:
        exact[order[top_k:]] = 0
    exact /= exact.sum()
    before = exact[order].cumsum(0) - exact[order]
    exact[order[before >= top_p]] = 0
    exact /= exact.sum()
    _check_distribution(logits[None].to(device), exact, 0.7, top_k, top_p)


@pytest.mark.parametrize("vocab_size", [1, 3, 1000, 9001])
def test_kernel_matches_the_reference(vocab_size, device):
    logits = torch.randn(12, vocab_size, device=device) * 4
    logits[0, : vocab_size // 2] = -torch.inf
    temperature = [0.0, 0.3, 1.0, 1.7] * 3
    top_k = [-1, 1, 40, 5, 0, 2, 900, vocab_size, vocab_size + 1, 3, -1, 7]
    top_p = [1.0, 0.9, 0.5, 0.05, 0.999, 1.0, 0.7, 0.3, 1e-9, 1.0, 0.99, 0.8]
    min_p = [0.0, 0.1, 0.5, 0.0, 1.0, 0.01] * 2
    seed, position = list(range(12)), list(range(100, 112))
    expected = _sample(reference, logits, temperature, top_k, top_p, seed, position, min_p)
    out = _sample(launchers, logits, temperature, top_k, top_p, seed, position, min_p)
    assert out.tolist() == expected.tolist()


def test_more_candidates_than_the_first_look():
    # So flat that top-p needs more than the reference looks at before it sorts the whole row.
    logits = torch.randn(2, 5000) * 0.01
    out = _sample(reference, logits.repeat(300, 1), top_p=0.5, position=list(range(600)))
    kept = (logits >= logits.median(-1, keepdim=True).values - 1e-3).repeat(300, 1)
    assert kept.gather(1, out.long()[:, None]).all()
    assert len(set(out.tolist())) > 400


@BOTH
def test_a_row_does_not_depend_on_its_neighbours(implementation, device):
    logits = torch.randn(6, 300, device=device)
    temperature, top_k, top_p = [0.5, 1, 0, 2, 1, 1], [3, -1, -1, 50, -1, 9], [1.0, 0.9, 1.0, 0.8, 1.0, 0.5]
    together = _sample(implementation, logits, temperature, top_k, top_p, list(range(6)), list(range(6))).tolist()
    alone = [
        int(_sample(implementation, logits[i : i + 1], temperature[i], top_k[i], top_p[i], i, i)) for i in range(6)
    ]
    assert together == alone


@BOTH
@pytest.mark.parametrize("vocab_size", [1, 300, 20001])
@pytest.mark.parametrize("options", [{}, {"top_k": 5, "top_p": 0.9, "min_p": 0.01}, {"temperature": 0.0}])
def test_no_token_where_logits_are_not_numbers(implementation, vocab_size, options, device):
    logits = spoiled_logits(vocab_size).to(device)
    tokens = _sample(implementation, logits, position=list(range(len(logits))), **options)
    assert (tokens[1::2] == -1).all()
    assert ((tokens[::2] >= 0) & (tokens[::2] < vocab_size)).all()
    assert tokens[2] == 0
    good = logits[::2].contiguous()
    assert tokens[::2].tolist() == _sample(implementation, good, position=list(range(0, 12, 2)), **options).tolist()


@BOTH
def test_no_sequences(implementation, device):
    assert _sample(implementation, torch.empty(0, 7, device=device)).shape == (0,)
