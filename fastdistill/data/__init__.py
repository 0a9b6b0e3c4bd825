# SPDX-License-Identifier: Apache-2.0
"""Data a run reads: latents made by the teacher, embeddings of prompts, and their format on disk."""
