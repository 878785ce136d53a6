# SPDX-License-Identifier: Apache-2.0
# mypy: ignore-errors
"""The inner loop of products with a GridWeight, for numba: 16 output features of a few tokens, in integers.

The CPU multiplies unsigned bytes with signed ones and adds four products at a time (vpdpbusd of AVX-512 VNNI), or two
(vpmaddubsw of AVX2). Numba has no vectors, so this builds LLVM's instructions itself.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lightllm_backend.kernels.quantized.grid_weight import BLOCK, GROUP, SCALE_BYTES

_INT8, _INT16, _INT32, _HALF, _FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()
# Input features that one instruction multiplies, and bytes of a vector of them for the block.
_STEP = 4
_BYTES = _STEP * BLOCK
# How far ahead weights are fetched: by itself the CPU fetches only within a page, and few tokens wait for memory.
_AHEAD = 2048


@intrinsic(prefer_literal=True)
def multiply_block(context, block, groups, values, scales, out, bits, tokens):  # noqa: ARG001 - numba's signature
    """The product of `tokens` tokens (a literal) with one block of a weight of `bits` bits (a literal: 4 or 8).

    The others are addresses: of the block in GridWeight's layout, whose `groups` follow each other; of the tokens'
    `values` [tokens, 32 * groups] int8 and `scales` [tokens, groups, 2] float32; of `out` [tokens, 16] float32.
    """
    signature = types.void(block, groups, values, scales, out, bits, tokens)

    def generate(context, builder, _, arguments):
        # What numba compiles for, which NUMBA_CPU_FEATURES may change. It is part of the key of numba's cache.
        features = context.codegen().magic_tuple()[2].split(",")
        code = _Code(builder, features)
        code.multiply_block(*arguments[:5], bits.literal_value, tokens.literal_value)
        return context.get_dummy_value()

    return signature, generate


class _Code:
    """Appends instructions to a function."""

    def __init__(self, builder, features):
        self.builder, self.features = builder, features

    def multiply_block(self, block, groups, values, scales, out, bits, tokens):
        builder = self.builder
        zeros = ir.Constant(ir.VectorType(_FLOAT, BLOCK), None)
        sums = [cgutils.alloca_once_value(builder, zeros) for _ in range(tokens)]
        group_bytes = SCALE_BYTES + GROUP * bits // 8 * BLOCK
        with cgutils.for_range(builder, groups) as loop:
            weights = self.at(block, loop.index, group_bytes)
            for first in range(0, group_bytes, 64):
                self.prefetch(builder.add(weights, self.constant(weights.type, _AHEAD + first)))
            scale, least = (
                builder.fpext(self.load(weights, _HALF, BLOCK, 2 * BLOCK * index), zeros.type) for index in (0, 1)
            )
            numbers = [
                self.load(weights, _INT8, _BYTES, SCALE_BYTES + _BYTES * step) for step in range(GROUP * bits // 32)
            ]
            if bits == 4:
                halves = [self.halves(number) for number in numbers]
                numbers = [low for low, _ in halves] + [high for _, high in halves]
            for token in range(tokens):
                group = builder.add(builder.mul(groups, self.constant(groups.type, token)), loop.index)
                total = ir.Constant(ir.VectorType(_INT32, BLOCK), None)
                for step, number in enumerate(numbers):
                    four = self.spread(self.load(self.at(values, group, GROUP), _INT32, 1, _STEP * step))
                    total = self.add_products(total, number, builder.bitcast(four, number.type), bits)
                # The sum over the group of (number * scale + least) * value * value_scale.
                value_scale, value_sum = (
                    self.spread(self.load(self.at(scales, group, 8), _FLOAT, 1, 4 * index)) for index in (0, 1)
                )
                product = self.fused(
                    builder.fmul, builder.sitofp(total, zeros.type), self.fused(builder.fmul, scale, value_scale)
                )
                offset = self.fused(builder.fmul, least, value_sum)
                product = self.fused(builder.fadd, self.fused(builder.fadd, builder.load(sums[token]), product), offset)
                builder.store(product, sums[token])
        for token, total in enumerate(sums):
            place = builder.inttoptr(
                self.at(out, self.constant(groups.type, token), 4 * BLOCK), zeros.type.as_pointer()
            )
            builder.store(builder.load(total), place).align = 4

    def add_products(self, sums, unsigned, signed, bits):
        """Add to each of `sums` <16 x int32> its four products of `unsigned` and `signed` <64 x int8>."""
        if "+avx512vnni" in self.features:
            return self.call("llvm.x86.avx512.vpdpbusd.512", sums.type, sums, unsigned, signed)
        parts = zip(*(self.split(vector) for vector in (sums, unsigned, signed)), strict=True)
        return self.join(*(self._add_half(*part, bits) for part in parts))

    def _add_half(self, sums, unsigned, signed, bits):
        if bits == 4:
            return self._add_pairs(sums, unsigned, signed, 1)
        # Pairs of products of whole bytes do not fit 16 bits.
        low, high = self.halves(unsigned)
        return self._add_pairs(self._add_pairs(sums, high, signed, 16), low, signed, 1)

    def _add_pairs(self, sums, unsigned, signed, factor):
        pairs = self.call("llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(_INT16, 16), unsigned, signed)
        factors = ir.Constant(pairs.type, [factor] * 16)
        return self.builder.add(sums, self.call("llvm.x86.avx2.pmadd.wd", sums.type, pairs, factors))

    def prefetch(self, address):
        place = self.builder.inttoptr(address, _INT8.as_pointer())
        to_read, to_all_caches, data = (self.constant(_INT32, number) for number in (0, 3, 1))
        self.call("llvm.prefetch.p0", ir.VoidType(), place, to_read, to_all_caches, data)

    def halves(self, numbers):
        """The lower and the higher four bits of each byte."""
        count = numbers.type.count
        low = self.builder.and_(numbers, ir.Constant(numbers.type, [15] * count))
        return low, self.builder.lshr(numbers, ir.Constant(numbers.type, [4] * count))

    def at(self, address, index, size):
        return self.builder.add(address, self.builder.mul(index, self.constant(address.type, size)))

    def load(self, address, element, count, offset):
        """A vector, or a single element, `offset` bytes behind the address."""
        kind = element if count == 1 else ir.VectorType(element, count)
        place = self.builder.add(address, self.constant(address.type, offset))
        loaded = self.builder.load(self.builder.inttoptr(place, kind.as_pointer()))
        loaded.align = 4
        return loaded

    def spread(self, element):
        """The element, 16 times."""
        vector = ir.Constant(ir.VectorType(element.type, BLOCK), ir.Undefined)
        first = self.builder.insert_element(vector, element, self.constant(_INT32, 0))
        return self.builder.shuffle_vector(first, vector, ir.Constant(ir.VectorType(_INT32, BLOCK), None))

    def split(self, vector):
        half = vector.type.count // 2
        return [
            self.builder.shuffle_vector(
                vector, vector, ir.Constant(ir.VectorType(_INT32, half), [*range(first, first + half)])
            )
            for first in (0, half)
        ]

    def join(self, first, second):
        count = 2 * first.type.count
        return self.builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_INT32, count), [*range(count)]))

    def fused(self, operation, first, second):
        """An operation that may become part of a fused multiply-add."""
        return operation(first, second, flags=("contract",))

    def call(self, name, result, *arguments):
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)

    def constant(self, kind, number):
        return ir.Constant(kind, number)
