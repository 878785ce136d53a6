# SPDX-License-Identifier: Apache-2.0
"""LightLLM's own HTTP API, for its clients: names, shapes, defaults and errors are those of its server."""
