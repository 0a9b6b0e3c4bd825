# SPDX-License-Identifier: Apache-2.0
"""``make fuzz``: random arguments, files and configurations, in child processes, until the wanted counts are reached.

A *target* (``targets.py``) is one op, or one kind of input from outside. It runs in *rounds*: a round is one run of
hypothesis with the seed of its number, some hundred examples, and does the same wherever it runs. ``__main__.py`` hands
ranges of rounds to children (``child.py``), whose memory and time are limited, and keeps in a JSON file which rounds
were done, on which commit, with which outcome of how many calls: what was interrupted goes on from there. A crash, a
hang, an allocation beyond the limit, an exception that is not this package's, a message that does not name argument,
rule and value, a result that is not the reference's: each is a *fault*, kept with the command that repeats it.

===================  ==================================================================================================
``tensors.py``       tensors of any strides over memory with margins, of values of several kinds
``calls.py``         what a call of an op is, and what it has to give
``norms.py`` ...     the arguments of each op; also ``attentions.py``, ``losses.py``, ``draws.py``, ``updates.py``
``emulated.py``      the same calls with kernels for a GPU, interpreted and emulated
``configurations.py`` run files and settings: random types, nesting, numbers, texts
``stored.py``        manifests, shards, banks, checkpoints, kept calls: bytes and headers that lie
``prompts.py``       prompt files: text, CSV, JSON lines, Parquet
===================  ==================================================================================================
"""
