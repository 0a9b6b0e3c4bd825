# SPDX-License-Identifier: Apache-2.0
"""Batches from banks of any size: in device memory, in pinned host memory, on disk, or not stored.

The draws are computed from a counter, so the rows of the coming steps are known. For banks on disk (``StoredRows``) a
thread reads these rows in advance into a ring of buffers (pinned if the device is a GPU), and ``noise_gather`` reads
from the ring. The batches have the same bits wherever the banks are. Prompts that are encoded on demand
(``EncodedRows``) are encoded in advance by this thread, on its own stream, into a ring on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fastdistill.data.encoded import EncodedRows, rows_of
from fastdistill.data.stored import StoredRows
from fastdistill.data.values import has_values, require_dtype
from fastdistill.errors import InputError, described
from fastdistill.ops import Draw, NoiseGather, Task, _check, empty_draw, noise_gather, use
from fastdistill.ops.noise_gather.banks import cast, listed, mapped

Rows = Tensor | StoredRows | EncodedRows


class Batches:
    """``noise_gather`` on banks in memory, on disk or encoded on demand; call ``prepare`` once before each draw.

        batches = Batches(latents, latent_prompts, prompts, coefficients, replace, batch=64, null_index=M)
        for step in range(steps):
            batches.prepare(seed, step)
            draw = batches(counter)

    It takes the arguments of ``noise_gather``, but ``latents`` and ``prompts`` can also be ``StoredRows``, and
    ``prompts`` can be ``EncodedRows`` (if one of several prompt banks is, all are staged). ``latent_prompts`` and the
    tables are on the device. If everything is in memory, ``prepare`` does nothing.

    ``prepare`` waits until the rows of its step are there. Call it outside of a captured graph, on the stream of the
    draws (capture with ``capture_error_mode="thread_local"``, because the thread waits for events during the capture).
    ``ahead``: number of steps that are read in advance. ``task``: ``task()`` will be called. ``dtype``: of x_t and of
    floating-point prompts in the draws; None: the dtypes of the banks. ``in_parts``: ``task()`` will be called for
    parts of a batch.
    """

    def __init__(
        self,
        latents: Rows,
        latent_prompts: Tensor,
        prompts: Rows | Sequence[Rows] | Mapping[str, Rows],
        coefficients: Tensor,
        replace: Tensor,
        *,
        batch: int,
        null_index: int,
        target: bool = False,
        task: bool = False,
        ahead: int = 3,
        dtype: torch.dtype | None = None,
        in_parts: bool = False,
        **options: Any,
    ) -> None:
        _check.tensors(latent_prompts=latent_prompts, coefficients=coefficients, replace=replace)
        for name, number, low in (("batch", batch, 1), ("null_index", null_index, 0), ("ahead", ahead, 1)):
            _check.integers(**{name: number})
            _check.require(number >= low, name, f"at least {low}", number)
        for name, switch in (("target", target), ("task", task), ("in_parts", in_parts)):
            _check.flag(switch, name)
        if dtype is not None:
            require_dtype(dtype, "dtype")
        banks = [prompts] if not isinstance(prompts, Sequence | Mapping) else listed(prompts)
        for name, bank in {"latents": latents, **{f"prompts[{i}]": bank for i, bank in enumerate(banks)}}.items():
            known = isinstance(bank, Tensor | StoredRows | EncodedRows)
            _check.require(known, name, "rows: a tensor, StoredRows or EncodedRows", described(bank))
        if len({len(bank) for bank in banks}) != 1:
            raise InputError.of("prompts", "banks of as many rows", [len(bank) for bank in banks])
        _check_rows(latent_prompts, len(banks[0]))
        self._turns, self._batch, self._device, self._dtype = ahead + 1, batch, latent_prompts.device, dtype
        self._latents: list[tuple[Rows, Tensor]] = []  # a bank, and the ring that replaces it
        self._prompts: list[tuple[Rows, Tensor]] = []
        given: Any = latents, prompts
        if isinstance(latents, StoredRows):
            given = self._ring(latents, self._latents), prompts
        if any(isinstance(bank, StoredRows | EncodedRows) for bank in banks):
            given = given[0], mapped(lambda bank: self._ring(bank, self._prompts), given[1])
        self._tables = given[0], latent_prompts, given[1], coefficients, replace
        rows = {"latent_rows": len(latents), "prompt_rows": len(banks[0])}
        staged = {"latent_rows": bool(self._latents), "prompt_rows": bool(self._prompts)}
        options |= {"null_index": null_index}
        self._options = options | {name: rows[name] * staged[name] for name in rows}
        self._made_again = not in_parts and isinstance(latents, Tensor) and latents.device == self._device
        target = target or (task and not self._made_again)
        self.out: Draw[Any] = empty_draw(given[0], given[1], batch, target=target, device=self._device)
        self._counter: Tensor | None = None
        self._draw: NoiseGather[Any] | None = None  # made for that counter
        self._rows = torch.arange(batch, device=self._device)
        self._as_stored = torch.zeros_like(coefficients)  # with this table, the target is the row itself
        self._as_stored[:, 2] = 1.0
        self._index: _Index | None = None
        if any(staged.values()):
            self._index = _Index(batch, latent_prompts.cpu(), coefficients.cpu(), replace.cpu(), options | rows)
        self._reader: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None  # the reader's stream
        self._reads: dict[int, Future[None]] = {}  # by step, in order
        self._seed: int | None = None
        self._ready = False

    def _ring(self, bank: Rows, pairs: list[tuple[Rows, Tensor]]) -> Tensor:
        shape, device = (self._turns * self._batch, *bank.shape[1:]), self._device
        if not isinstance(bank, EncodedRows):
            device = torch.device("cpu")
        pinned = device != self._device and self._device.type == "cuda"
        pairs.append((bank, torch.empty(shape, dtype=bank.dtype, device=device, pin_memory=pinned)))
        return pairs[-1][1]

    @property
    def staged(self) -> bool:
        """Whether rows are read in advance, so that a draw needs ``prepare``."""
        return self._index is not None

    def prepare(self, seed: int, step: int) -> None:
        """Wait until the rows of this step are there, and start reading those of the next steps.

        Steps can be in any order, but if they are not consecutive, the call waits for the disk or the encoder.

        Raises:
            StorageError: a file could not be read. The next call tries again.
            InputError: a latent refers to a prompt that the bank does not have; a prompt's encoding is not finite.
        """
        if self._index is None:
            return
        if seed != self._seed or step not in self._reads:
            self.close()
            self._seed = seed
        drawn = None
        for past in [s for s in self._reads if s < step]:
            del self._reads[past]
            drawn = drawn or self._event()
        if self._stream is None and self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._reader = self._reader or ThreadPoolExecutor(1, "fastdistill-rows")
        try:
            for coming in range(step, step + self._turns):
                if coming not in self._reads:
                    self._reads[coming] = self._reader.submit(self._read, coming, *self._index(seed, coming), drawn)
            self._reads[step].result()
        except BaseException:
            self.close()
            raise
        self._ready = True

    def __call__(self, counter: Tensor) -> Draw[Any]:
        """The batch of the step in ``counter`` [2] int64 (seed, step), in the same buffers every time.

        Raises:
            InputError: rows are read in advance and the step was not prepared. (On a GPU nothing is read back, so the
                only check is for a ``prepare`` since the last draw; in compiled code there is no check.)
        """
        if torch.compiler.is_compiling():  # compiled code would be compiled again for values that change with the step
            return self._cast(noise_gather(*self._tables, counter, out=self.out, **self._options))
        if self._index is not None:
            prepared = [self._seed, *list(self._reads)[:1]]
            if not self._ready:
                raise InputError("counter: expected a step that was prepared, got none since the last draw")
            if counter.device.type == "cpu" and counter.tolist() != prepared:
                raise InputError.of("counter", f"the seed and step that were prepared {prepared}", counter.tolist())
            self._ready = False
        if self._draw is None or self._counter is not counter:
            self._counter, self._draw = counter, NoiseGather(*self._tables, counter, out=self.out, **self._options)
        return self._cast(self._draw())

    def _cast(self, draw: Draw[Any]) -> Draw[Any]:
        if self._dtype is None:
            return draw
        return draw.replaced(x_t=cast(draw.x_t, self._dtype), prompt=cast(draw.prompt, self._dtype))

    def task(self, draw: Draw[Any], counter: Tensor) -> Task:
        """The argument ``task`` of ``output_match`` for this batch: the latents and the counter; or, if the latents are
        not on the device or batches are used ``in_parts``, the target that the draw has stored.

        Raises:
            InputError: a part of a batch (``Draw.part``) without ``in_parts``.
        """
        if self._made_again:
            if len(draw.choice) != self._batch:
                rule = f"the {self._batch} samples of a batch, or in_parts"
                raise InputError.of("draw", rule, f"{len(draw.choice)} of them")
            return Task.of(draw, self._tables[0], self._tables[3], counter, self._options.get("first_sample", 0))
        return Task(draw.target, self._rows[: len(draw.choice)], draw.choice, self._as_stored, counter)

    def refresh(self) -> None:
        """Call this after changing the table ``replace`` in place: rows read in advance are drawn again."""
        if self._index is not None:
            self.close()
            self._index.replace.copy_(self._tables[4])

    def close(self) -> None:
        """Stop reading in advance, after the batch that is being read; ``prepare`` starts it again."""
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)
            if drawn := self._event():
                drawn.synchronize()
        self._reader, self._reads, self._ready = None, {}, False

    def _event(self) -> torch.cuda.Event | None:
        """The event at which the draws so far are finished; None if they are."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _read(self, step: int, latent: Tensor, prompt: Tensor, drawn: torch.cuda.Event | None) -> None:
        """Fill the step's slot in the rings, after the last draw from this slot has finished."""
        if drawn is not None:
            drawn.synchronize()
        first = step % self._turns * self._batch
        with torch.cuda.stream(self._stream):
            for index, pairs in ((latent, self._latents), (prompt, self._prompts)):
                places = [(bank, ring[first : first + self._batch]) for bank, ring in pairs]
                others = [(bank, place) for bank, place in places if not isinstance(bank, StoredRows)]
                for bank, place in places:
                    if isinstance(bank, StoredRows):
                        bank.read(index, place)
                for rows, (_, place) in zip(rows_of([bank for bank, _ in others], index), others, strict=True):
                    place.copy_(rows)
        if self._stream is not None:
            self._stream.synchronize()


def _check_rows(latent_prompts: Tensor, prompts: int) -> None:
    """Checked once, here, because kernels on a GPU cannot raise errors."""
    if not has_values(latent_prompts):
        return
    outside = (latent_prompts < 0) | (latent_prompts >= prompts)
    if bool(outside.any()):
        latent = int(outside.nonzero()[0])
        rule = f"a row of prompts, 0 to {prompts - 1}"
        raise InputError.of(f"latent_prompts[{latent}]", rule, int(latent_prompts[latent]))


class _Index:
    """The rows that a step will draw: computed by the op itself on the host, with empty banks."""

    def __init__(
        self, batch: int, latent_prompts: Tensor, coefficients: Tensor, replace: Tensor, options: dict[str, Any]
    ) -> None:
        nothing = torch.zeros(batch, 1, device="cpu")
        self.replace = replace.clone()
        self._tables = nothing, latent_prompts, nothing, coefficients, self.replace
        self._options = options | {"batch": batch}

    def __call__(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        with use(None):
            draw = noise_gather(*self._tables, torch.tensor([seed, step], device="cpu"), **self._options)
        return draw.latent_index, draw.prompt_index
