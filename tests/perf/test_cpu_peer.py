# SPDX-License-Identifier: Apache-2.0
"""cpu_peer: what a row counts, and the pipe to the peer, with a program that stands in for it."""

import shutil
import sys
from pathlib import Path

import click
import pytest

from perf import cpu_peer


class Peer:
    """Takes a second for a round, and says what it was given."""

    def __init__(self) -> None:
        self.given: list[tuple[cpu_peer.Prompts, int]] = []

    def seconds(self, prompts: cpu_peer.Prompts, output_len: int) -> float:
        self.given.append((prompts, output_len))
        return 1.0


@pytest.mark.parametrize(("output_len", "tokens"), [(8, 24), (1, 15)])
def test_a_row_has_medians_of_the_rounds_after_the_first(monkeypatch, output_len, tokens) -> None:
    monkeypatch.setattr(cpu_peer, "_PAUSE_SECONDS", 0.0)
    peer, seconds, given = Peer(), iter([100.0, 4.0, 0.25, 0.5]), []

    def ours(prompts: cpu_peer.Prompts, count: int) -> float:
        given.append((prompts, count))
        return next(seconds)

    row = cpu_peer.compare("work", (3, 5, output_len), ours, peer, vocab_size=10, rounds=3)
    assert peer.given == given
    assert [len(prompt) for prompt in given[0][0]] == [5, 5, 5]
    assert len({str(prompts) for prompts, _ in given}) == 4, "each round has prompts of its own"
    assert row["engine_rounds"] == [tokens / 4, tokens * 4, tokens * 2]
    assert (row["engine_tokens_per_second"], row["llama_cpp_tokens_per_second"]) == (tokens * 2, tokens)
    assert (row["ratio"], row["ratio_of_best"]) == (2, 4)


STAND_IN = """\
import json, sys
print(json.dumps({"features": "none"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    count = asked["outputLength"]
    if count == 13:
        sys.exit(1)
    print(json.dumps({"seconds": 0.5, "tokens": count * len(asked["prompts"])}), flush=True)
"""


def test_the_peer_answers_line_by_line_and_its_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "stand_in.py").write_text(STAND_IN)
    node = programs / "node"
    node.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{programs}/stand_in.py"\n')
    node.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setattr(cpu_peer, "install", lambda folder: None)
    peer = cpu_peer.LlamaCpp(tmp_path, tmp_path / "model.gguf", 2)
    assert shutil.which("node") == str(node)
    assert peer.features == "none"
    assert peer.seconds([(1,), (2,)], 4) == 0.5
    with pytest.raises(click.ClickException, match="has ended"):
        peer.seconds([(1,)], 13)
    peer.close()
