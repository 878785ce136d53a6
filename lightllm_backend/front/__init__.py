# SPDX-License-Identifier: Apache-2.0
"""The front: an HTTP server for OpenAI's API, LightLLM's API and a page, beside tritonserver. Imports no torch."""
