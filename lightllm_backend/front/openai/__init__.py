# SPDX-License-Identifier: Apache-2.0
"""OpenAI's API: models, completions, chat completions."""
