# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of docs/clients.md, which take minutes: run with -m soak."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
import yaml

from lightllm_client import LightLLMClient
from tests.clients.page import blocks, programs_of, run
from tests.e2e.front import encode
from tests.e2e.server import TritonServer

pytestmark = [pytest.mark.e2e, pytest.mark.soak, pytest.mark.timeout(3600)]

NUMBER = 20  # requests of each command with aiperf
LENGTH = 8  # tokens of an answer
LIMIT_SECONDS = 1500
# A machine that runs tests may be slow to start a dozen processes. Offline, aiperf reads no directories of tokenizers.
AIPERF = {
    "AIPERF_SERVICE_REGISTRATION_TIMEOUT": "900",
    "AIPERF_SERVICE_START_TIMEOUT": "900",
    "AIPERF_SERVICE_PROFILE_CONFIGURE_TIMEOUT": "900",
    "HF_HUB_OFFLINE": "",
}
QUESTIONS: list[tuple[str, list[str]]] = [
    ("The capital of Japan is", ["Tokyo", "the city of Kyoto"]),
    ("Water is made of hydrogen and", ["oxygen", "iron, lead and a little gold"]),
]
BEGIN = 1  # the id of the embedded model's BOS, behind which lm-eval puts a whole text
TEXT = "Tokyo is the capital of Japan.\n\nIt is a large city."


@pytest.fixture(scope="module")
def programs() -> Path:
    if sys.version_info < (3, 11):
        pytest.skip("aiperf needs Python 3.11")
    return programs_of("benchmarks")


@pytest.fixture(scope="module")
def addresses(http: httpx.Client, server: TritonServer, short_model: Path) -> dict[str, str]:
    """What the page has, and what it is here."""
    return {
        "http://127.0.0.1:9000": str(http.base_url).rstrip("/"),
        "http://127.0.0.1:8000": f"http://{server.http_url}",
        "/models/SmolLM2-135M-Instruct": str(short_model),
    }


@pytest.mark.parametrize("endpoint", ["chat", "completions", "template"])
def test_aiperf(programs: Path, addresses: dict[str, str], tmp_path: Path, endpoint: str) -> None:
    front, template = blocks("aiperf", "console", addresses)
    command = template if endpoint == "template" else front.replace("chat", endpoint)
    arguments = shlex.split(command.removeprefix("$ "))[1:]
    log = run([programs / "aiperf", *arguments, "--artifact-dir", tmp_path, "--ui", "none"], AIPERF, LIMIT_SECONDS)
    report = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert report["request_count"]["avg"] == NUMBER, log
    assert not report["error_summary"]
    assert report["output_sequence_length"]["avg"] == pytest.approx(LENGTH, abs=2)  # aiperf counts anew
    assert report["time_to_first_token"]["avg"] > 0


def write_task(folder: Path, name: str, documents: list[dict[str, Any]], **task: Any) -> None:
    """Write a task of lm-eval and what it asks."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | {"test_split": "test"} | task))


def test_lm_eval(
    programs: Path, addresses: dict[str, str], short_model: Path, client: LightLLMClient, tmp_path: Path
) -> None:
    """The log likelihoods of continuations and of whole texts are those of transformers, the texts the engine's."""
    questions = [{"question": question, "choices": choices} for question, choices in QUESTIONS]
    write_task(
        tmp_path, "choose", questions,
        output_type="multiple_choice", doc_to_text="question", doc_to_choice="choices", doc_to_target=0,
    )  # fmt: skip
    write_task(
        tmp_path, "score", [{"text": TEXT}],
        output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="text",
        metric_list=[{"metric": "byte_perplexity"}],
    )  # fmt: skip
    write_task(
        tmp_path, "write", questions,
        output_type="generate_until", doc_to_text="question", doc_to_target="question",
        generation_kwargs={"until": ["\n\n\n"], "max_gen_toks": LENGTH}, metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    [command] = blocks("lm-eval", "console", addresses)
    asked = ["--tasks", "choose,score,write", "--include_path", tmp_path, "--output_path", tmp_path, "--log_samples"]
    arguments = shlex.split(command.removeprefix("$ ").replace("--tasks lambada_openai", ""))[1:]
    cache = {"HF_HOME": str(tmp_path / "cache"), "HF_DATASETS_OFFLINE": "1"}
    run([programs / "lm_eval", *arguments, *asked], cache, LIMIT_SECONDS)

    def found(task: str) -> list[Any]:
        [samples] = tmp_path.rglob(f"samples_{task}_*.jsonl")
        answers = [json.loads(line) for line in samples.read_text().splitlines()]
        return [response for answer in sorted(answers, key=lambda one: one["doc_id"]) for response in answer["resps"]]

    model = transformers.AutoModelForCausalLM.from_pretrained(short_model, dtype=torch.float32).eval()

    @torch.no_grad()
    def expected(context: list[int], text: str) -> float:
        whole = encode(text) if context == [BEGIN] else encode(text)[len(context) :]
        logits = model(torch.tensor([[*context, *whole]])).logits[0, len(context) - 1 : -1]
        return float(logits.log_softmax(-1).gather(1, torch.tensor(whole)[:, None]).sum())

    likelihoods = [float(response[0][0]) for response in found("choose")]
    pairs = [(question, choice) for question, choices in QUESTIONS for choice in choices]
    assert likelihoods == pytest.approx([expected(encode(q), f"{q} {choice}") for q, choice in pairs], abs=1e-3)
    [[score]] = found("score")
    assert float(score[0] if isinstance(score, list) else score) == pytest.approx(expected([BEGIN], TEXT), abs=1e-3)
    assert [response[0] for response in found("write")] == [
        client.generate(question, max_tokens=LENGTH, stop_words=["\n\n\n"]).text for question, _ in QUESTIONS
    ]
