# SPDX-License-Identifier: Apache-2.0
"""Training the student of a run (``fastdistill distill``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill import plan as plans
from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.manifest import MANIFEST_NAME, read_manifest
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.errors import InputError
from fastdistill.files import atomic_write
from fastdistill.models.families import FAMILIES
from fastdistill.plan import Plan
from fastdistill.plan.memory import CONTEXT
from fastdistill.runs import beginning
from fastdistill.runs.about import About
from fastdistill.runs.config import RunConfig
from fastdistill.runs.models import teacher_and_student
from fastdistill.runs.objective import as_fields, objective_of
from fastdistill.runs.opened import Run, opened
from fastdistill.runs.plan import default_micro_batch, plan_of
from fastdistill.train import DistillTrainer, FitResult, TrainConfig, distributed
from fastdistill.train.callbacks import Callbacks, Progress
from fastdistill.train.config import PreviewConfig, from_yaml, run_yaml

RUN_FILE = "run.yaml"


def distill(
    config: RunConfig,
    *,
    allow_code: bool = False,
    progress: Progress | None = None,
    callbacks: Callbacks = (),
    tell: Callable[[str], object] | None = None,
) -> FitResult:
    """Train the student of a run to its last step, or continue the run in ``config.directory``.

    Under ``torchrun`` each process is a rank. Prompts and latents must exist (``cache``). The other arguments and the
    errors are those of ``DistillTrainer.fit``.

    Args:
        allow_code: whether ``config.call``, code of the user, may be imported.
        progress: as in ``DistillTrainer.fit``. If the run has a plan, the metrics also have ``mfu``: the operations
            since the last line, as a fraction of those that the device can do in this time (docs/monitoring.md).
        tell: called on rank 0 with lines about models, taps and memory before the first step, and with one about
            execution, kernels and memory after it.
    """
    with distributed.launched(config.device) as device:
        run, planned = fitted(opened(dataclasses.replace(config, device=device), allow_code=allow_code))
        with trainer_of(run) as trainer:
            calls, about = 0, About(run.directory, trainer.device, planned)

            def started(done: int, metrics: dict[str, float] | None) -> object:
                nonlocal calls
                calls += 1
                first = distributed.rank() == 0
                if calls == 1 and done > config.train.steps:
                    rule = f"at least the {done} that the run in {run.directory} has done"
                    raise InputError.of("train.steps", rule, config.train.steps)
                if first and calls == 1:  # by now the directory belongs to this run
                    kept = dataclasses.replace(config, train=run.config.train)
                    atomic_write(run.directory / RUN_FILE, run_yaml(kept).encode())
                if first and calls <= 2:
                    lines = beginning.before(trainer, planned) if calls == 1 else beginning.after(trainer)
                    about.add(lines)
                    if tell is not None:
                        for line in lines:
                            tell(line)
                if calls == 1:
                    about.begin(done)
                if progress is None:
                    return None
                return progress(done, None if metrics is None else metrics | about.utilization(done))

            try:
                with as_fields(objective=False):
                    return trainer.fit(run.directory, progress=started, callbacks=callbacks)
            except BaseException as error:
                if calls and distributed.rank() == 0:  # the directory belongs to this run
                    about.end(error)
                raise


def fitted(run: Run) -> tuple[Run, Plan | None]:
    """The run with its micro-batch: if the run file has none, that of the previous call, or the largest that fits. And
    its plan; None if the run is so small that none is made.

    Raises:
        InputError: the run does not fit into the memory of its device; the message says what would make it fit.
    """
    device, ranks = torch.device(run.config.device), distributed.size()
    free = plans.available(device) + (CONTEXT if device.type == "cuda" else 0)  # planned, but exists already
    free = -distributed.largest(-free, device)
    part = run.config.train.batch // ranks
    micro_batch = run.config.train.micro_batch
    if micro_batch is None and (file := run.directory / RUN_FILE).exists():
        before = from_yaml(RunConfig, file).train.micro_batch  # another micro-batch would change the rounding
        micro_batch = before if before is None or part % before == 0 else None
    if micro_batch is None:
        if _far_from(free, run):
            return run, None
        micro_batch = default_micro_batch(run, free, ranks=ranks)
    train = dataclasses.replace(run.config.train, micro_batch=None if micro_batch == part else micro_batch)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, train=train))
    found = plan_of(run, dataclasses.replace(plans.card_here(run.config.device), memory=free), ranks=ranks)
    if (remedies := plans.fits(found, free)) is not None:
        advice = "; ".join(map(str, remedies)) or "nothing that is known"
        rule = f"a run that fits into the {free / 2**30:.1f} GiB that are free on {run.config.device}"
        raise InputError.of("train", rule, f"one of {found.total / 2**30:.1f} GiB (what would help: {advice})")
    return run, found


def _far_from(free: int, run: Run) -> bool:
    """Whether ``free`` bytes are more than enough for a batch of models this small: the activations of a sample take at
    most about ten times the memory of the weights."""
    size: int = sum(p.nbytes for p in run.pipeline.model(device="meta").parameters())
    return 100 * size * run.config.train.batch < free


def trainer_of(run: Run, sources: tuple[PromptBank, Sequence[LatentCache]] | None = None) -> DistillTrainer:
    """The trainer of a run, with the stored prompts and latents.

    Args:
        sources: use these instead; latents for each of the run's sizes.

    Raises:
        StorageError, InputError: they are missing or belong to another run; whatever ``DistillTrainer`` refuses.
    """
    bank, latents = stored_sources(run) if sources is None else sources
    teacher, student = teacher_and_student(run)
    previews = run.config.preview.every is not None
    with as_fields():
        return DistillTrainer(
            teacher,
            student,
            run.pipeline.scheduler(),
            latents,
            [run.pipeline.sized(bank, size) for size in run.sizes],
            objective_of(run.config.objective, student),
            train_config(run, bank),
            device=run.config.device,
            prediction_type=run.pipeline.prediction_type,
            call=run.call,
            decode=_decoder(run) if previews else None,
            preview_prompts=_preview_prompts(run, bank) if previews else None,
            shard=sharded_blocks if run.config.shard else None,
        )


def stored_sources(run: Run) -> tuple[PromptBank, Sequence[LatentCache]]:
    """The stored prompts and the latents of each size, in memory or on disk."""
    load = in_memory(run)
    bank = run.bank(load=load)
    return bank, [run.latents(size, bank, load=load) for size in run.sizes]


def train_config(run: Run, bank: PromptBank) -> TrainConfig:
    """The settings of the trainer."""
    config, preview = run.config, run.config.preview
    guidance = run.guidance(preview.guidance_scale)
    if "guidance_scale" in guidance:
        guidance["guidance_scale"] = run.pipeline.family.guided(run.pipeline.config, guidance["guidance_scale"])
    texts = preview.prompts if isinstance(preview.prompts, int) else tuple(preview.prompts)
    return TrainConfig(
        **dataclasses.asdict(config.train),
        seed=config.seed,
        trackers=tuple(name for name in config.log if name == "tensorboard" or name == "wandb"),
        preview=PreviewConfig(preview.every, texts, preview.seeds, preview.steps, **guidance),
    )


def in_memory(run: Run) -> bool:
    """Whether prompts and latents are read into memory at the start. For ``cache.read: auto``: if they need at most a
    quarter of the free memory."""
    if run.config.cache.read != "auto":
        return run.config.cache.read == "memory"
    free = plans.available(run.config.device if run.config.train.banks == "device" else "cpu")
    places = [run.latents_place(size) for size in run.sizes]
    places += [run.prompts_place] if run.config.cache.encodings == "stored" else []
    stored = [read_manifest(place) for place in places if (place / MANIFEST_NAME).exists()]
    size: int = sum(each.rows * tensor.row_bytes for each in stored for tensor in each.tensors.values())
    return size <= free // 4


def _decoder(run: Run) -> Callable[[Tensor], Tensor]:
    vae = run.pipeline.autoencoder(device=run.config.device)
    return lambda latents: run.pipeline.family.decode(vae, latents)


def _preview_prompts(run: Run, bank: PromptBank) -> PromptBank | None:
    """Encodings of the prompts for previews, if the pool does not contain all of them; else None."""
    wanted = run.config.preview.prompts
    if isinstance(wanted, int) or set(wanted) <= set(bank.texts):
        return None
    encoders = run.pipeline.encoders(device=run.config.device, dtype=run.teacher_dtype)
    scale = run.guidance(run.config.preview.guidance_scale).get("guidance_scale")
    made = run.pipeline.encode(list(wanted), encoders, size=run.sizes[0], guidance_scale=scale)
    return dataclasses.replace(made, encoder=bank.encoder)  # the encoder of the same folder, identified by its files


def sharded_blocks(student: nn.Module) -> None:
    """Calls ``fully_shard`` for each of the model's blocks, and for the rest."""
    from torch.distributed.fsdp import fully_shard

    lists = {"down_blocks", "up_blocks", *(name for family in FAMILIES.values() for name in family.blocks)}
    for name, child in student.named_children():
        if name in lists and isinstance(child, nn.ModuleList):
            for block in child:
                fully_shard(block)
        elif name == "mid_block" and child is not None:
            fully_shard(child)
    fully_shard(student)


def metrics_of(result: FitResult) -> dict[str, Any]:
    """The result of a run, as JSON values."""
    last = result.history[-1] if result.history else {}
    return {"steps": result.steps, "seconds": result.seconds, **last}
