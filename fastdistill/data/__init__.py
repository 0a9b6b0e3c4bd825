# SPDX-License-Identifier: Apache-2.0
"""The data of a run: latents made by the teacher, embeddings of prompts, and their format on disk."""
