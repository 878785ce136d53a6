# SPDX-License-Identifier: Apache-2.0
"""rotary_kv_write: the reference against complex rotation, the kernel against the reference."""

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from tests.kernels.kernel_harness import TOLERANCE, head_norm, relative_error

SHAPES = [
    (1, 1, 1, 16, 16),
    (3, 6, 2, 80, 80),
    (5, 9, 3, 64, 32),
    (2, 8, 1, 96, 96),
    (2, 17, 17, 128, 128),
    (3, 4, 2, 20, 0),
]


def _step(tokens, heads, kv_heads, head_dim, rotary_dim, dtype, device):
    """Views into a fused tensor, one padding token, and a pool of NaN."""
    fused = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim + 3, device=device).to(dtype)
    q, k, v, _ = fused.split((heads * head_dim, kv_heads * head_dim, kv_heads * head_dim, 3), 1)
    angle = torch.randn(tokens, rotary_dim // 2, device=device) * 7
    slots = torch.randperm(tokens + 4)[:tokens].to(device, torch.int32)
    if tokens > 1:
        slots[tokens // 2] = -1
    k_pool = torch.full((tokens + 4, kv_heads, head_dim), torch.nan, device=device, dtype=dtype)
    v_pool = torch.full((tokens + 4, kv_heads, head_dim), torch.nan, device=device, dtype=dtype)
    heads_of = (
        q.unflatten(1, (heads, head_dim)),
        k.unflatten(1, (kv_heads, head_dim)),
        v.unflatten(1, (kv_heads, head_dim)),
    )
    return fused, (*heads_of, angle.cos(), angle.sin(), slots, k_pool, v_pool), angle


def _rotate_as_complex(x, angle):
    half = angle.shape[1]
    pairs = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double())
    turned = pairs * torch.exp(1j * angle.double())[:, None]
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :].double()), -1)


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_a_rotation(shape):
    _, arguments, angle = _step(*shape, torch.float32, torch.device("cpu"))
    q, k, v, _, _, slots, k_pool, v_pool = arguments
    expected_q, expected_k = _rotate_as_complex(q, angle), _rotate_as_complex(k, angle)
    reference.rotary_kv_write(*arguments)
    assert relative_error(q, expected_q) < 1e-6
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert relative_error(k_pool[slot], expected_k[token]) < 1e-6
            assert torch.equal(v_pool[slot], v[token])
    untouched = sorted(set(range(len(k_pool))) - set(slots.tolist()))
    assert k_pool[untouched].isnan().all()
    assert v_pool[untouched].isnan().all()


@pytest.mark.parametrize("implementation", [reference, launchers])
@pytest.mark.parametrize("first", [0, 3, 5])
def test_tokens_that_decode_are_left_alone(implementation, first, device):
    fused, arguments, _ = _step(5, 4, 2, 16, 16, torch.float32, device)
    expected, others = fused.clone(), arguments[6:]
    pools = [pool.clone() for pool in others]
    alone = [tensor[first:].clone() for tensor in arguments[:6]]
    implementation.rotary_kv_write(*alone, *pools)
    starts = torch.tensor([first, 5], dtype=torch.int32, device=device)
    implementation.rotary_kv_write(*arguments, query_starts=starts)
    assert torch.equal(fused[:first], expected[:first])
    for tensor, wanted in zip((*arguments[:3], *others), (*alone[:3], *pools), strict=True):
        part = tensor[first:] if len(tensor) == 5 else tensor
        assert torch.equal(part.nan_to_num(9), wanted.nan_to_num(9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_matches_the_reference(shape, dtype, device):
    fused, arguments, _ = _step(*shape, dtype, device)
    q, k, v, cos, sin, slots, k_pool, v_pool = arguments
    before = fused.clone()
    expected_q, expected_k_pool, expected_v_pool = q.clone(), k_pool.clone(), v_pool.clone()
    reference.rotary_kv_write(expected_q, k.clone(), v.clone(), cos, sin, slots, expected_k_pool, expected_v_pool)
    launchers.rotary_kv_write(*arguments)
    assert relative_error(q, expected_q) < TOLERANCE[dtype]
    assert torch.equal(k_pool.isnan(), expected_k_pool.isnan())
    assert relative_error(k_pool.nan_to_num(), expected_k_pool.nan_to_num()) < TOLERANCE[dtype]
    assert torch.equal(v_pool.nan_to_num(), expected_v_pool.nan_to_num())
    others = fused.shape[1] - 3 - v.shape[1] * v.shape[2]
    assert torch.equal(fused[:, others:], before[:, others:])


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_norm_of_heads_is_rms_norm_before_the_rest(shape, int8):
    _, arguments, _ = _step(*shape, torch.bfloat16, torch.device("cpu"))
    q, k, v, *others, k_pool, v_pool = arguments
    pools, scales = _int8_pools(arguments) if int8 else ((k_pool, v_pool), None)
    expected, expected_scales = [pool.clone() for pool in pools], scales.clone() if int8 else None
    norm = head_norm(shape[3], torch.bfloat16, q.device)
    queries, keys = (reference.rms_norm(x.flatten(0, 1), w, 1e-3).view(x.shape) for x, w in ((q, norm.q), (k, norm.k)))
    reference.rotary_kv_write(queries, keys, v.clone(), *others, *expected, expected_scales)
    reference.rotary_kv_write(q, k, v, *others, *pools, scales, norm=norm)
    for out, wanted in zip((q, k, *pools), (queries, keys, *expected), strict=True):
        assert torch.equal(out.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(torch.float32,) * 2, (torch.float16,) * 2, (torch.float16, None)])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_kernel_norms_as_the_reference(shape, dtype, weight_dtype, int8, device):
    _, arguments, _ = _step(*shape, dtype, device)
    q, k, v, *others, k_pool, v_pool = arguments
    pools, scales = _int8_pools(arguments) if int8 else ((k_pool, v_pool), None)
    expected, expected_scales = [pool.clone() for pool in pools], scales.clone() if int8 else None
    norm = head_norm(shape[3], weight_dtype or torch.float32, device)
    queries, keys = q.clone(), k.clone()
    reference.rotary_kv_write(queries, keys, v.clone(), *others, *expected, expected_scales, norm=norm)
    launchers.rotary_kv_write(q, k, v, *others, *pools, scales, norm=norm)
    written = others[2] >= 0  # `k` of padding has no meaning
    tolerance = 1e-2 if int8 else TOLERANCE[dtype]  # an int8 may be tipped over to its neighbour by rounding
    for out, wanted in zip((q, k[written], *pools), (queries, keys[written], *expected), strict=True):
        assert relative_error(out.nan_to_num(), wanted.nan_to_num()) < tolerance


def _int8_pools(arguments):
    """The same pools as int8, with scales that are NaN until written."""
    *_, k_pool, v_pool = arguments
    pools = [torch.full_like(pool, 99, dtype=torch.int8) for pool in (k_pool, v_pool)]
    scales = torch.full((*k_pool.shape[:2], 2), torch.nan, dtype=torch.float16, device=k_pool.device)
    return pools, scales


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_reference_is_the_definition(shape):
    _, arguments, angle = _step(*shape, torch.float32, torch.device("cpu"))
    q, k, v, cos, sin, slots, _, _ = arguments
    pools, scales = _int8_pools(arguments)
    exact = (_rotate_as_complex(k, angle), v.double())
    reference.rotary_kv_write(q, k, v, cos, sin, slots, *pools, scales)
    for pool, scale, values in zip(pools, scales.unbind(2), exact, strict=True):
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                largest = values[token].abs().amax(-1)
                assert torch.allclose(scale[slot].double(), largest / 127, rtol=1e-3)
                # Half a step at most is lost, and the greatest value is at the end of the range.
                step = scale[slot].double()[:, None]
                assert ((pool[slot] * step - values[token]).abs() <= step * 0.5001 + largest[:, None] * 5e-4).all()
                assert (pool[slot].abs().amax(-1) >= 126).all()
        untouched = sorted(set(range(len(pool))) - set(slots.tolist()))
        assert (pool[untouched] == 99).all()
        assert scale[untouched].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_kernel_matches_the_reference(shape, dtype, device):
    _, arguments, _ = _step(*shape, dtype, device)
    q, k, v, cos, sin, slots, _, _ = arguments
    pools, scales = _int8_pools(arguments)
    expected_pools, expected_scales = _int8_pools(arguments)
    expected_q = q.clone()
    new = (expected_q, k.clone(), v.clone(), cos, sin, slots)
    reference.rotary_kv_write(*new, *expected_pools, expected_scales)
    launchers.rotary_kv_write(q, k, v, cos, sin, slots, *pools, scales)
    assert relative_error(q, expected_q) < TOLERANCE[dtype]
    assert torch.equal(pools[1], expected_pools[1])
    assert torch.equal(scales[..., 1].nan_to_num(7), expected_scales[..., 1].nan_to_num(7))
    for out, expected in ((pools[0], expected_pools[0]), (scales[..., 0], expected_scales[..., 0])):
        # A GPU rounds the rotation once less, which may tip a value over to its neighbour.
        difference = (out.nan_to_num(7).float() - expected.nan_to_num(7).float()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 0.01


@pytest.mark.parametrize("implementation", [reference, launchers])
@pytest.mark.parametrize("rotary_dim", [0, 4])
def test_int8_at_the_edges(implementation, rotary_dim, device):
    """An all-zero head, values too small for a float16 scale, ties, and the greatest in each part of the head."""
    v = torch.zeros(1, 4, 8, device=device)
    v[0, 1, :3] = torch.tensor([1e-7, -6.2e-5, 3.1e-5])
    v[0, 2] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 63.4])
    v[0, 3, 6] = -1e9
    slots = torch.tensor([1], dtype=torch.int32, device=device)
    angles = torch.zeros(1, rotary_dim // 2, device=device)
    pools, scales = _int8_pools([torch.empty(2, 4, 8, device=device)] * 2)
    q = torch.randn(1, 4, 8, device=device)
    implementation.rotary_kv_write(q, v, v, angles.cos(), angles.sin(), slots, *pools, scales)
    for pool, scale in zip(pools, scales.unbind(2), strict=True):
        assert scale[1].tolist() == [1.0, 2.0**-14, 1.0, 65504.0]
        assert pool[1].tolist() == [
            [0] * 8,
            [0, -1, 1, 0, 0, 0, 0, 0],
            [127, 0, 2, 2, 0, -2, -126, 63],
            [0, 0, 0, 0, 0, 0, -127, 0],
        ]


def test_no_tokens(device):
    _, arguments, _ = _step(1, 2, 1, 16, 16, torch.float32, device)
    q, k, v, cos, sin, slots, k_pool, v_pool = arguments
    launchers.rotary_kv_write(q[:0], k[:0], v[:0], cos[:0], sin[:0], slots[:0], k_pool, v_pool)
    assert k_pool.isnan().all()


@pytest.mark.parametrize("implementation", [reference, launchers])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_k_and_v_become_what_was_written(implementation, int8, shape, device):
    _, arguments, _ = _step(*shape, torch.float32, device)
    q, k, v, cos, sin, slots, *pools = arguments
    scales = None
    if int8:
        pools, scales = _int8_pools(arguments)
    implementation.rotary_kv_write(q, k, v, cos, sin, slots, *pools, scales)
    for token, slot in enumerate(slots.tolist()):
        for index, values in enumerate((k, v)):
            if slot >= 0:
                scale = scales[slot, :, index].float().unsqueeze(-1) if int8 else 1.0
                assert relative_error(values[token], pools[index][slot] * scale) < 1e-6
