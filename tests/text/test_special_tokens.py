# SPDX-License-Identifier: Apache-2.0
"""The server and the client, a package of its own, read the same named special tokens from a model directory."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightllm_backend.text.tokenizer_settings import TokenizerSettings
from lightllm_client.chat import ChatTemplate

NAMES = ("bos_token", "eos_token", "image_token", "boi_token", "pad_token")


@pytest.mark.parametrize(
    ("config", "special_map"),
    [
        ({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}, {}),
        ({"bos_token": "<s>", "image_token": "<image>"}, {"bos_token": "<map>", "eos_token": {"content": "</map>"}}),
        ({"bos_token": "<s>", "added_tokens_decoder": {}}, {"bos_token": "<map>"}),
        ({"eos_token": "</s>", "extra_special_tokens": {"boi_token": "<boi>"}}, {}),
    ],
)
def test_both_read_the_same_named_tokens(tmp_path: Path, config: dict[str, Any], special_map: dict[str, Any]) -> None:
    template = "".join(f"{{% if {name} is defined %}}{{{{ {name} }}}}|{{% endif %}}" for name in NAMES)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special_map))
    rendered = ChatTemplate.load(tmp_path).render([{"role": "user", "content": ""}])
    assert {token for token in rendered.split("|") if token} == set(TokenizerSettings.read(tmp_path).special_tokens)
