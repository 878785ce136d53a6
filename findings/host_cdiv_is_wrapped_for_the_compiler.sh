#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# triton 3.9.0: triton.cdiv and triton.next_power_of_2 take the host about 2 µs a call, 10 to 35 times as long as in
# 3.4.0.
#
# Both are what launchers size grids and blocks with, and each is one line of arithmetic. One would expect them to cost
# what such a line costs. Since 3.5 they are functions that kernels may call while they are compiled as well, and on the
# host, too, each call imports two names, and copies its arguments to a list and a dictionary to look through them for
# compile-time values, before it gets to that line.
#
# Users meet it where the host launches kernels one by one, outside CUDA graphs: a step of a language model calls them
# some times for each layer. Sixteen calls in each of 32 layers are 0.9 ms of a step that a GPU may compute in 10, and
# more beside other processes. A function of one's own, -(-a // b), costs what 3.4 did.
#
# Seen (ns a call; the last column is a function of one line, called in the same way):
#   triton 3.4.0: cdiv 50, next_power_of_2 192, own cdiv 51
#   triton 3.9.0: cdiv 1828, next_power_of_2 1818, own cdiv 50
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

cat >measure.py <<'PYTHON'
import timeit

import triton

CALLS = 20_000


def cdiv(number, divisor):
    return -(-number // divisor)


def nanoseconds(call):
    times = timeit.repeat(call, globals={"triton": triton, "cdiv": cdiv}, number=CALLS, repeat=7)
    return min(times) / CALLS * 1e9


calls = ("triton.cdiv(1000, 128)", "triton.next_power_of_2(1000)", "cdiv(1000, 128)")
print(*(round(nanoseconds(call)) for call in calls))
PYTHON

for version in 3.4.0 3.9.0; do
    python3 -m venv "$version"
    "$version/bin/python" -m pip install --quiet triton==$version
    read -r cdiv power own < <("$version/bin/python" measure.py)
    echo "triton $version: cdiv $cdiv, next_power_of_2 $power, own cdiv $own"
    if [ $version = 3.4.0 ] && ((cdiv > 3 * own)); then
        echo "changed: 3.4.0's cdiv is not a plain function"
        exit 1
    fi
    if [ $version = 3.9.0 ] && ((cdiv < 8 * own)); then
        echo "changed: cdiv costs about what a function of one line does"
        exit 1
    fi
done
