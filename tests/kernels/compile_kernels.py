# SPDX-License-Identifier: Apache-2.0
"""Compiles what the launchers would launch on another GPU, without one.

`python -m tests.kernels.compile_kernels JOBS` takes a JSON list of jobs, each a compute capability and its models:
every kernel is compiled for these, to machine code if the model says so, and else as far as its shared memory is known;
without models, the products are compiled at the blocks that are stored for the GPU.
Prints a JSON list of the shared memory that each kernel takes in each job. Must run without TRITON_INTERPRET.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import llvm
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from lightllm_backend.kernels import launchers
from lightllm_backend.kernels.activation.silu_and_mul import rounded_silu_and_mul
from lightllm_backend.kernels.attention import prefill_attention_hopper
from lightllm_backend.kernels.attention.head_norm import HeadNorm
from lightllm_backend.kernels.attention.whole_prompt_tiles import WholePromptTiles
from lightllm_backend.kernels.collective.all_reduce_rms_norm import rounded_all_reduce_rms_norm
from lightllm_backend.kernels.collective.lamport_buffers import LamportBuffers, bits_type_of
from lightllm_backend.kernels.linear import choice as linear_choice
from lightllm_backend.kernels.linear import gated_linear, linear_splits
from lightllm_backend.kernels.linear.choice import (
    BLOCKS,
    FEW_TOKENS,
    PREFETCH_BLOCKS,
    Choice,
    LinearBlocks,
    ProductKernel,
    stored_blocks,
)
from lightllm_backend.kernels.norm.layer_norm import rounded_layer_norm
from lightllm_backend.kernels.norm.rms_norm import paired_rms_norm, rounded_rms_norm
from lightllm_backend.kernels.quantized.choice import BLOCKS as QUANTIZED_BLOCKS
from lightllm_backend.kernels.quantized.choice import (
    PrefetchBlocks,
    pair_dtype,
)
from lightllm_backend.kernels.quantized.quantized_prefetch import launch_quantized_prefetch
from lightllm_backend.kernels.quantized.weight import QuantizedWeight
from tests.kernels.pretended_gpu import pretend_gpu
from tests.kernels.quantized_weights import DTYPES as KINDS
from tests.kernels.quantized_weights import random_weight

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")


@contextlib.contextmanager
def sizes_alone() -> Iterator[None]:
    """Compiles to unoptimized LLVM IR, which has the shared memory; the rest takes four times as long."""

    def change_stages(*of_backend: Any) -> tuple[str, str]:
        if of_backend:
            stages = of_backend[1]
            lower = stages["llir"]

            def lower_only(source: Any, metadata: dict[str, Any]) -> Any:
                with mock.patch.object(llvm, "optimize_module"):
                    return lower(source, metadata)

            def end(_: Any, metadata: dict[str, Any]) -> str:
                return str(metadata.setdefault("name", "none"))

            stages |= {"llir": lower_only, "ptx": end, "cubin": end}
        return "sizes", "sizes"  # in the key of Triton-lang's cache

    with mock.patch.object(triton.knobs.runtime, "add_stages_inspection_hook", change_stages):
        yield


def compile_launch(kernel: JITFunction, arguments: tuple[Any, ...], keywords: dict[str, Any], target: GPUTarget) -> int:
    """Compiles one launch and returns its shared memory in bytes."""
    options = {name: keywords.pop(name) for name in OPTIONS if name in keywords}
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, (TensorDescriptor, GluonDescriptor)):
            shape = ", ".join(map(str, value.block_shape))
            layout = f",{value.layout!r}" if isinstance(value, GluonDescriptor) else ""
            signature[parameter.name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}[{shape}]{layout}>"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    compiled = triton.compile(source(kernel, signature, constants, attributes), target=target, options=options)
    return int(compiled.metadata.shared)


def launch_all(dtype: torch.dtype, head_dim: int, heads: int, kv_heads: int, with_variants: bool) -> None:
    """One launch of every kernel, at a prompt and batch that lead to the largest blocks."""
    vocab_size, tokens = 32000, 4096
    q = torch.empty(tokens, heads, head_dim, dtype=dtype)
    k = torch.empty(tokens, kv_heads, head_dim, dtype=dtype)
    table = torch.zeros(4, 4096, dtype=torch.int32)
    lengths = torch.zeros(4, dtype=torch.int32)
    starts = torch.zeros(5, dtype=torch.int32)
    cos = torch.zeros(tokens, head_dim // 2)
    floats = torch.zeros(4)
    logits = torch.zeros(4, vocab_size)
    weight = torch.empty(heads * head_dim, dtype=dtype)
    launchers.rms_norm(q.flatten(1), weight, 1e-5, q.flatten(1), post_weight=weight)
    buffers = [torch.empty(2, 4, *q.flatten(1).shape, dtype=bits_type_of(dtype))] * 4
    for rows in (1, len(q)):  # in one shot, in two
        launchers.all_reduce_rms_norm(
            q[:rows].flatten(1), weight, 1e-5, q.flatten(1), LamportBuffers.of(buffers, rank=2), post_weight=weight
        )
    own = LamportBuffers.of(buffers, rank=2)
    launchers.all_reduce_embeddings(lengths, q.flatten(1), 0, 4096, own)
    launchers.all_gather(logits.to(dtype), own)
    launchers.layer_norm(q.flatten(1), weight, weight, 1e-5, q.flatten(1))
    launchers.silu_and_mul(q.flatten(1), is_gelu=True)
    if dtype != torch.float32:
        for tokens in (1, 64, 2048):
            if tokens <= FEW_TOKENS[-1]:  # of more, they are cuBLAS's
                launchers.linear(torch.empty(tokens, 11008, dtype=dtype), torch.empty(4096, 11008, dtype=dtype))
                launchers.linear(torch.empty(tokens, 4096, dtype=dtype), torch.empty(12288, 4096, dtype=dtype))
            launchers.gated_linear(torch.empty(tokens, 4096, dtype=dtype), torch.empty(22016, 4096, dtype=dtype))
    launchers.gelu_tanh(q.flatten(1))
    slots = torch.zeros(len(q), dtype=torch.int32)
    launchers.rotary_kv_write(q, k, k, cos, cos, slots, k, k)
    launchers.prefill_attention(q, k, k, k, k, table, lengths, starts, lengths, 0.1)
    whole = WholePromptTiles(torch.zeros(5, 3, dtype=torch.int32), are_all=True)
    launchers.prefill_attention(q, k, k, k, k, table, lengths, starts, lengths, 0.1, whole_prompts=whole)
    # No query heads share K and V and contexts are whole; all of them do and contexts are split, for other stores.
    for pool, longest in ((q, 60), (k[:, :1], 4096)):
        new = (q[:4], pool[:4], pool[:4], cos[:4], cos[:4], lengths)
        launchers.token_attention(*new, pool, pool, table, lengths, lengths, longest, 0.1)
    with sizes_alone():
        launch_large_batches(q, k, table, lengths)
    if with_variants:
        launch_variants(q, k, table, lengths, starts)
        launch_quantized(dtype)
    launchers.add_logit_bias(logits, lengths, lengths, table[:, :300].contiguous(), torch.zeros(4, 300))
    launchers.apply_penalties(logits, table, *[lengths] * 3, *[floats] * 3, lengths, lengths[:, None])
    masks = torch.zeros(4, -(-logits.shape[1] // 32), dtype=torch.int32)
    for masked in (logits, logits.to(dtype)):
        launchers.apply_token_masks(masked, masks, lengths, logits)
    launchers.choose_greedily(logits.to(dtype), lengths.long(), lengths)
    launchers.choose_greedily(logits.to(dtype), lengths.long(), lengths, masks, lengths)
    launchers.sample(logits, floats, lengths, floats, floats, lengths.long(), lengths, lengths.long(), lengths)


def launch_quantized(dtype: torch.dtype) -> None:
    """Products with weights of 4 and 8 bits, of few tokens and of so many that other kernels take over."""
    for kind, group_size, all_tokens in (
        ("int4", 128, (64, 65)),  # with zero points, int4 takes the most shared memory
        ("int8", 1024, (16, 65)),
        ("fp8", 128, (16, 65)),
        ("fp8", 1024, (65,)),
    ):
        weight = random_weight(kind, 1024, 1024, group_size, torch.device("cpu"), with_zeros=kind == "int4")
        weight = dataclasses.replace(weight, quantizes_input=kind != "int4")
        for tokens in all_tokens:
            launchers.linear(torch.empty(tokens, 1024, dtype=dtype), weight)


def launch_large_batches(q: torch.Tensor, k: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> None:
    """Decode attention of so many KV heads that its blocks are others than those of a few."""
    cos, int8 = torch.zeros(len(q), q.shape[2] // 2), torch.empty(k.shape, dtype=torch.int8)
    scales = torch.zeros(*k.shape[:2], 2, dtype=torch.float16)
    for heads in (512, 2048):
        count = heads // k.shape[1]
        new = (q[:count], k[:count], k[:count], cos[:count], cos[:count], lengths)
        for pool, pool_scales in ((k, None), (int8, scales)):
            launchers.token_attention(*new, pool, pool, table, lengths, lengths, 60, 0.1, scales=pool_scales)


def blocks_to_compile(capability: str) -> list[tuple[int, bool, LinearBlocks]]:
    """The stored blocks, as tokens, whether gated, and blocks; of those that differ in the stages alone, the deepest.

    Fewer stages compile to the same loop over fewer buffers, so they take less shared memory.
    """
    deepest: dict[tuple[int, bool, LinearBlocks], int] = {}
    for path in (BLOCKS, PREFETCH_BLOCKS):
        for name, by_tokens in stored_blocks(path).get(capability, {}).items():
            for tokens, stored in by_tokens.items():
                if stored is not None:
                    blocks = LinearBlocks(*stored)._replace(splits=1)
                    key = (int(tokens), name.endswith("gated"), blocks._replace(num_stages=0))
                    deepest[key] = max(blocks.num_stages, deepest.get(key, 0))
    return [(*key, blocks._replace(num_stages=stages)) for (*key, blocks), stages in sorted(deepest.items())]


def launch_stored(capability: str) -> None:
    """Products at the blocks that are stored for this GPU, whatever their sizes: 1024 divides all of those."""
    for tokens, is_gated, blocks in blocks_to_compile(capability):
        x, weight = (torch.empty(rows, 1024, dtype=torch.bfloat16) for rows in (tokens, 1024))
        other = ProductKernel.TILES if tokens > FEW_TOKENS[-1] else ProductKernel.SPLITS
        choice = Choice(ProductKernel.PREFETCH if blocks.programs_per_sm else other, blocks)
        if is_gated:
            gated_linear.launch_gated(x, weight, None, x.new_empty(tokens, 512), choice, is_gelu=tokens > 16)
        else:
            linear_splits.launch_product(x, weight, None, x.new_empty(1, tokens, 1024), choice)


def launch_stored_quantized(capability: str) -> None:
    """Products with weights of 4 and 8 bits at blocks that are stored for this GPU: one of each kind, gated or not, of
    few tokens and of many."""
    compiled = set()
    for name, by_tokens in stored_blocks(QUANTIZED_BLOCKS).get(capability, {}).items():
        kind, shape = name.removesuffix(", gated").split(", ")
        out_features, in_features = map(int, shape.split(" x "))
        is_gated, is_int4 = name.endswith("gated"), kind.startswith("int4")
        group_size = 128 if is_int4 else in_features
        for tokens in (4, 8, 64, 256):
            if by_tokens.get(str(tokens)) is None or (kind, is_gated, tokens) in compiled:
                continue
            compiled.add((kind, is_gated, tokens))
            dtype = KINDS[kind.partition(" ")[0]]
            values = torch.empty(out_features, in_features // (8 if is_int4 else 1), dtype=dtype)
            scales = torch.empty(in_features // group_size, out_features, dtype=torch.float16 if is_int4 else None)
            weight = QuantizedWeight(values, scales, group_size, in_fragments=True)
            blocks = PrefetchBlocks(*by_tokens[str(tokens)])
            is_paired = kind.endswith(" by pairs")
            x, x_scales = torch.empty(tokens, in_features, dtype=torch.bfloat16), None
            if is_paired:
                x, x_scales = torch.empty(2 * tokens, in_features, dtype=pair_dtype(weight)), torch.empty(tokens)
            elif kind == "fp8 by fp8":
                x, x_scales = x.to(values.dtype), torch.empty(tokens, 1)
            features = out_features // (2 if is_gated else 1)
            out = torch.empty(blocks.splits, tokens, features, dtype=torch.bfloat16)
            is_gelu = tokens > 8 and blocks.splits == 1
            launch_quantized_prefetch(x, x_scales, weight, None, out, blocks, is_gated, is_gelu, is_paired)


def launch_rounding() -> None:
    """Norms and a gate's activation that round for fp8 by fp8, one that sums over ranks too, and norms of pairs."""
    reader = random_weight("fp8", 16, 4096, 4096, torch.device("cpu"))
    reader = dataclasses.replace(reader, quantizes_input=True, in_fragments=True)
    x = torch.empty(65, 4096, dtype=torch.bfloat16)
    rounded_rms_norm(x, x[0], 1e-5, x, None, reader)
    rounded_layer_norm(x, x[0], x[0], 1e-5, x, reader)
    buffers = LamportBuffers.of([torch.empty(2, 2, *x.shape, dtype=torch.int16)] * 2, rank=1)
    rounded_all_reduce_rms_norm(x, x[0], 1e-5, x, buffers, None, reader)
    rounded_silu_and_mul(torch.empty(65, 8192, dtype=torch.bfloat16), False, reader)
    paired_rms_norm(x[:4], x[0], 1e-5, x[:4], None, reader)
    reader = dataclasses.replace(random_weight("int4", 16, 4096, 128, torch.device("cpu")), in_fragments=True)
    paired_rms_norm(x[:4], x[0], 1e-5, x[:4], None, reader)


def launch_variants(
    q: torch.Tensor, k: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor
) -> None:
    """Attention with all that it can be asked for at once; of a plain pool, decode attention is another kernel."""
    tokens, heads, head_dim = q.shape
    slopes, cos = torch.zeros(heads), torch.zeros(tokens, head_dim // 2)
    int8 = torch.empty(k.shape, dtype=torch.int8)
    scales = torch.zeros(*k.shape[:2], 2, dtype=torch.float16)
    norm = HeadNorm(q[0, 0], k[0, 0], 1e-6)
    launchers.rotary_kv_write(q, k, k, cos, cos, torch.zeros(tokens, dtype=torch.int32), int8, int8, scales, norm=norm)
    new = (q[:4], k[:4], k[:4], cos[:4], cos[:4], lengths)
    options = {"alibi_slopes": slopes, "window": 1000, "soft_cap": 50.0}
    of_int8 = options | {"scales": scales}
    launchers.prefill_attention(q, k, k, int8, int8, table, lengths, starts, lengths, 0.1, **of_int8)
    launchers.token_attention(*new, int8, int8, table, lengths, lengths, 4096, 0.1, **of_int8, norm=norm)
    launchers.token_attention(*new, k, k, table, lengths, lengths, 4096, 0.1, **options, norm=norm)


def run_job(job: tuple[str, list[tuple[str, int, int, int, bool]]]) -> dict[str, int]:
    """The shared memory that each kernel takes. The process is of no use for another job: it pretends to have a GPU."""
    capability, models = job
    major, minor = (int(digit) for digit in capability.split("."))
    target = GPUTarget("cuda", 10 * major + minor, 32)
    pretend_gpu((major, minor))
    # They are to compile, whether or not this Triton-lang was tried on a GPU.
    prefill_attention_hopper.GLUON_TRIED = linear_choice.GLUON_TRIED = True
    shared: dict[str, int] = {}

    def record(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        size = compile_launch(kernel, arguments, keywords, target)
        shared[kernel.fn.__name__] = max(size, shared.get(kernel.fn.__name__, 0))

    JITFunction.run = record
    torch.mm = lambda x, weight, out=None: x.new_empty(len(x), weight.shape[1])  # cuBLAS's: nothing to compile
    if not models:
        launch_stored(capability)
        launch_stored_quantized(capability)
        launch_rounding()
    for index, (dtype, *shape, to_machine_code) in enumerate(models):
        with contextlib.nullcontext() if to_machine_code else sizes_alone():
            # Variants take no more shared memory than plain kernels, and longer to compile.
            launch_all(getattr(torch, dtype), *shape, with_variants=index == 0)
    return shared


def main() -> None:
    # Each job has a process of its own, which begins with what this one has imported.
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        print(json.dumps(pool.map(run_job, json.loads(sys.argv[1]), chunksize=1)))


if __name__ == "__main__":
    main()
