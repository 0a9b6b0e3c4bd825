# SPDX-License-Identifier: Apache-2.0
"""``make fuzz``: random arguments, files and configurations, in child processes, until the wanted counts are reached.

A *target* (``targets.py``) is one op, or one kind of external input. It runs in *rounds*. A round is one run of
hypothesis with some hundred examples; its seed is its number, so it does the same on every machine. ``__main__.py``
gives ranges of rounds to children (``rounds.py``) with limited memory and time. A JSON file records which rounds were
done, on which commit, and the outcomes of their calls, so an interrupted run can be continued. A *fault* is a crash, a
hang, an allocation beyond the limit, an exception that is not this package's, a message that does not name argument,
rule and value, or a result that differs from the reference. It is recorded with the command that repeats it.

===================  ==================================================================================================
``tensors.py``       tensors with any strides in memory with margins, and several kinds of values
``calls.py``         a call of an op, and the checks of its results
``norms.py`` ...     the arguments of each op; also ``attentions.py``, ``losses.py``, ``draws.py``, ``updates.py``
``emulated.py``      the same calls with GPU kernels, interpreted and emulated
``configurations.py`` run files and settings: random types, nesting, numbers, texts
``stored.py``        manifests, shards, banks, checkpoints, saved calls: changed bytes and wrong headers
``prompts.py``       prompt files: text, CSV, JSON lines, Parquet
===================  ==================================================================================================
"""
