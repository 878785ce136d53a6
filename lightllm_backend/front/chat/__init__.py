# SPDX-License-Identifier: Apache-2.0
"""Takes a chat model's text apart while it comes: reasoning, content and tool calls. Pure, without a server."""
