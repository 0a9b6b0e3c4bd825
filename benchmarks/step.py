# SPDX-License-Identifier: Apache-2.0
"""Whole training steps of random conditioning, also with guidance distillation: those of the trainer, and those of
scripts that a user would write (which call the teacher twice for a guided prediction).

The models and sizes are in ``benchmarks/ops/step.py``. Rivals are compiled in the compiler's default mode: tuning two
U-Nets with 1.4 billion parameters would take longer than the measurement.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.registry import COMPILED, Contestant, Group, Run, Workload
from fastdistill.ops import use
from fastdistill.ops.noise_gather.banks import cast

if TYPE_CHECKING:
    from fastdistill.data.latent_cache import LatentCache
    from fastdistill.data.prompt_bank import PromptBank
    from fastdistill.diffusion.schedule import NoiseSchedule
    from fastdistill.train import DistillTrainer
    from fastdistill.train.config import Execution

LITERAL, TUNED, BEST_SDPA, UNFUSED = "literal", "tuned", f"{COMPILED}, best SDPA", "ours, unfused"
OURS_COMPILED = "ours, compiled graph"
IN_FLOAT32 = f"{COMPILED} in float32"
PRODUCTS, REDUCED = f"{BEST_SDPA}, 1x1 convolutions as products", f"{COMPILED}, reduce-overhead"
_BEST_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Setup:
    """What every contestant starts from. The models have the memory layout and dtype that ours and the tuned rivals
    use.
    guidance: weight w of the teacher's prediction; None: no guidance."""

    teacher: nn.Module
    student: nn.Module
    taps: Sequence[tuple[str, str]]
    cache: LatentCache
    bank: PromptBank
    schedule: NoiseSchedule
    batch: int
    device: torch.device
    guidance: float | None = None


def rivals(batch: int, gpu: bool = True, low: bool = False) -> tuple[str, ...]:
    """The names of the rivals. At small batches, where launches dominate, CUDA graphs of the compiler are added.
    ``low``: bfloat16 on a CPU, compared also with float32."""
    others = (*((REDUCED,) if batch <= 4 else ()), *((OURS_COMPILED,) if gpu else ()), *((IN_FLOAT32,) if low else ()))
    return (COMPILED, BEST_SDPA, PRODUCTS, *others, UNFUSED, TUNED, LITERAL)


def workload(
    build: Callable[[torch.device], Setup],
    device: torch.device,
    sustained: float = 0.0,
    measured: bool = False,
    whole: Callable[[torch.device], Setup] | None = None,
) -> Workload:
    """Ours (fused) against its rivals. ``measured``: ours runs in the way that a run of 10,000 steps on a CPU would
    choose by its measurement. ``whole``: the same setup in float32, for a rival that uses it.

    On a GPU only one rival at a time runs beside ours, because the memory of all would be too much: first, for ten
    seconds each, those that need no compiler; then, for ``sustained`` seconds, the compiled ones, the likely fastest.
    """
    setup = build(device)
    trainer = _trainer(setup, fuse="auto" if measured else True)
    scripts: weakref.WeakValueDictionary[bool, Script] = weakref.WeakValueDictionary()

    def script(compile: Callable[[Callable[..., Any]], Any] | None = None, literal: bool = False) -> Contestant:
        def make() -> _Scripted:
            its = scripts.get(literal)
            if its is None:
                its = scripts[literal] = Script(setup, literal)
            parts = its.teacher, its.student, _distance
            return _Scripted(its, *(map(compile, parts) if compile else parts), compiled=compile is not None)

        return Contestant(make)

    def in_float32() -> _Scripted:
        its = Script((whole or build)(device), literal=False)
        parts = (torch.compile(part, dynamic=False) for part in (its.teacher, its.student, _distance))
        return _Scripted(its, *parts, compiled=True)

    known: dict[str, Run | str] = {
        IN_FLOAT32: Contestant(in_float32),
        COMPILED: script(functools.partial(torch.compile, dynamic=False)),
        BEST_SDPA: script(functools.partial(torch.compile, backend=_inductor_with_best_sdpa, dynamic=False)),
        PRODUCTS: script(functools.partial(torch.compile, backend=_and_with_products, dynamic=False)),
        REDUCED: script(functools.partial(torch.compile, mode="reduce-overhead", dynamic=False)),
        UNFUSED: Contestant(lambda: _Trained(_trainer(setup, fuse=False), measured)),
        OURS_COMPILED: Contestant(lambda: _Trained(_trainer(setup, fuse=True, execution="compiled_graph"))),
        TUNED: script(),
        LITERAL: script(literal=True),
    }
    groups: tuple[Group, ...] = ()
    if device.type == "cuda":
        turns = TUNED, UNFUSED, LITERAL, REDUCED, COMPILED, BEST_SDPA, PRODUCTS, OURS_COMPILED
        order = sorted(rivals(setup.batch), key=turns.index)
        groups = tuple(Group((n,), max(sustained, 15.0) if n.startswith(COMPILED) else 10.0) for n in order)
    return Workload(
        Contestant(lambda: _Trained(trainer, measured)),
        {name: known[name] for name in rivals(setup.batch, device.type == "cuda", whole is not None)},
        functools.partial(_check, trainer),
        flops=flops(build),
        samples=setup.batch,
        groups=groups,
        graphs=False,  # on a GPU ours is a CUDA graph already; scripts cannot be captured
    )


def flops(build: Callable[[torch.device], Setup]) -> int:
    """FLOPs of the forwards and the backward of the literal step, counted by torch on meta tensors."""
    with FlopCounterMode(display=False) as counter:
        its = Script(build(torch.device("meta")), literal=True)
        its.loss(its.teacher, its.student, _distance).backward()
    return int(counter.get_total_flops())


def _trainer(setup: Setup, fuse: bool | Literal["auto"], execution: Execution = "auto") -> DistillTrainer:
    from fastdistill import DistillTrainer, GuidanceDistillation, RandomConditioning
    from fastdistill.train import TrainConfig

    objective: RandomConditioning = RandomConditioning(taps=tuple(setup.taps))
    if setup.guidance is not None:
        objective = GuidanceDistillation(
            setup.guidance, probability="exp", loss_weighting="uniform", taps=tuple(setup.taps)
        )
    return DistillTrainer(
        _sharing(setup.teacher),
        copy.deepcopy(setup.student),
        setup.schedule,
        setup.cache,
        setup.bank,
        objective,
        TrainConfig(steps=10_000, batch=setup.batch, lr=1e-5, fuse=fuse, execution=execution),
        device=setup.device,
    )


class _Trained:
    """The trainer's step, in a CUDA graph on a GPU; ``rest`` releases the graph. ``measured``: execute it in the way
    that a run would choose by its measurement on a CPU."""

    def __init__(self, trainer: DistillTrainer, measured: bool = False) -> None:
        self._trainer, self._measured = trainer, measured
        self._run: Run | None = None

    def __call__(self) -> None:
        if self._run is None:
            self._run = self._made()
        self._run()

    def _made(self) -> Run:
        from fastdistill.train.choice import choose, running

        its = self._trainer
        chosen = choose(its.step, its.student, its.teacher, its.config) if self._measured else None
        run = running(its.step, its.student, its.config, chosen)
        if chosen is not None:
            print(f"  ours: {chosen} ({chosen.why})", file=sys.stderr, flush=True)
        return run

    def held(self) -> Iterator[Tensor]:
        trainer = self._trainer
        knowledge: Any = trainer.step.objective._knowledge  # type: ignore[attr-defined]
        yield from _held((trainer.teacher, trainer.student), trainer.step.optimizer)
        yield from (t for t in tree_leaves((knowledge._gradient, knowledge._gradients)) if t is not None)

    def rest(self) -> None:
        self._run = None


class _Scripted:
    """A script with its models and its loss, eager or compiled."""

    def __init__(self, script: Script, *parts: Callable[..., Any], compiled: bool = False) -> None:
        self._script, self._parts, self._compiled = script, parts, compiled
        self.held = script.held

    def __call__(self) -> None:
        if self._compiled:  # the next step may overwrite outputs of the last one
            torch.compiler.cudagraph_mark_step_begin()
        self._script(*self._parts)

    def rest(self) -> None:
        """Does nothing: it holds nothing that could be created again."""


def _check(trainer: DistillTrainer) -> None:
    """Check that the fused models and ops give the loss of diffusers' models and the reference ops."""
    from fastdistill.models.calling import compute_dtype
    from fastdistill.models.fuse import fuse, unfuse

    models = trainer.teacher, trainer.student
    losses = []
    for kernel in (None, "reference"):
        for model in models:
            unfuse(model) if kernel else fuse(model)
        with use(kernel) if kernel else contextlib.nullcontext():
            losses.append(trainer.step.objective(trainer.step.counter)[1][0])
    for model in models:
        fuse(model)
    low = compute_dtype(trainer.student) != torch.float32
    torch.testing.assert_close(*losses, rtol=2e-2 if low else 1e-4, atol=0)


class Script:
    """The step of the published scripts: hooks for the features, AdamW, a loop for the average, the loss read in every
    step, NCHW. If the models have low precision, the student has fp32 weights and runs under autocast.

    If not ``literal``: our memory layout, low-precision weights with fp32 masters, fused AdamW, averages by
    ``torch._foreach``, and no reads. Called with the two models and ``_distance``, each eager or compiled.
    """

    def __init__(self, setup: Setup, literal: bool) -> None:
        from fastdistill.models.calling import compute_dtype
        from fastdistill.models.families import family_of

        self.literal, self.batch, self.steps, self.device = literal, setup.batch, len(setup.schedule), setup.device
        self.teacher = _sharing(setup.teacher).eval().requires_grad_(False)
        self.student = copy.deepcopy(setup.student).train()
        family_of(self.student).prepare(self.student)
        self.dtype = compute_dtype(self.student)
        self.mixed = self.dtype != torch.float32
        if literal:
            self.student.float()
            for model in (self.teacher, self.student):
                model.to(memory_format=torch.contiguous_format)
        self.features: tuple[dict[int, Tensor], dict[int, Tensor]] = {}, {}
        for i, pair in enumerate(setup.taps):
            for model, module, kept in zip((self.teacher, self.student), pair, self.features, strict=True):
                model.get_submodule(module).register_forward_hook(functools.partial(_keep, kept, i))
        self.weights = list(self.student.parameters())
        apart = self.mixed and not literal
        self.masters = [p.detach().float().requires_grad_() for p in self.weights] if apart else self.weights
        self.averages = [p.detach().clone() for p in self.masters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-5, fused=None if literal else True)
        self.latents, self.own = setup.cache.latents[:].to(setup.device), setup.cache.prompt_index.to(setup.device)
        self.prompts = {name: bank[:].to(setup.device) for name, bank in setup.bank.banks.items()}
        self.guidance = setup.guidance
        self.family = family_of(self.teacher)
        self.signal, self.noise = setup.schedule.coefficients()[:, :2].to(setup.device, self.latents.dtype).T

    def held(self) -> Iterator[Tensor]:
        yield from _held((self.teacher, self.student), self.optimizer)
        yield from (*self.masters, *self.averages, self.latents, *self.prompts.values())

    def __call__(self, teacher: Callable[..., Any], student: Callable[..., Any], distance: Callable[..., Any]) -> None:
        loss = self.loss(teacher, student, distance)
        loss.backward()
        self.update()
        if self.literal:
            loss.item()

    def loss(self, teacher: Callable[..., Any], student: Callable[..., Any], distance: Callable[..., Any]) -> Tensor:
        row, t, text = (
            torch.randint(n, (self.batch,), device=self.device)
            for n in (len(self.latents), self.steps, len(next(iter(self.prompts.values()))))
        )
        random = torch.rand(self.batch, device=self.device) < 0.5
        index = torch.where(random, text, self.own[row])
        prompt = {name: bank[index] for name, bank in self.prompts.items()}
        x = self.latents[row]
        x_t = self.signal[t].view(-1, 1, 1, 1) * x + self.noise[t].view(-1, 1, 1, 1) * torch.randn_like(x)
        with torch.no_grad():
            if self.guidance is not None:
                null = {name: bank[-1:].expand_as(prompt[name]) for name, bank in self.prompts.items()}
                unconditional = self.family.call(teacher, x_t, t, null).sample
            target = self.family.call(teacher, x_t, t, prompt).sample
            if self.guidance is not None:
                target = target + self.guidance * (target - unconditional)
        if self.mixed and self.literal and self.device.type != "meta":
            with torch.autocast(self.device.type, self.dtype):
                output = self.family.call(student, x_t, t, prompt).sample
        else:
            dtype = self.weights[0].dtype
            output = self.family.call(student, x_t.to(dtype), t, cast(prompt, dtype)).sample
        channels = x.shape[1]  # the other channels are a learned variance
        theirs, own = self.features
        loss = distance(
            [output[:, :channels], *(own[i] for i in own)], [target[:, :channels], *(theirs[i] for i in own)]
        )
        for kept in self.features:
            kept.clear()
        return loss

    @torch.no_grad()
    def update(self) -> None:
        apart = self.masters is not self.weights
        if apart:
            pairs = [(m, p) for m, p in zip(self.masters, self.weights, strict=True) if p.grad is not None]
            for master, _ in pairs:
                master.grad = torch.empty_like(master)
            torch._foreach_copy_([m.grad for m, _ in pairs], [p.grad for _, p in pairs])
            for _, p in pairs:
                p.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.literal:
            for average, p in zip(self.averages, self.masters, strict=True):
                average.mul_(0.9999).add_(p, alpha=1e-4)
        else:
            torch._foreach_lerp_(self.averages, self.masters, 1e-4)
        if apart:
            torch._foreach_copy_(self.weights, self.masters)


def _distance(own: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """The sum over all pairs of the mean squared difference, in float32."""
    return torch.stack([F.mse_loss(a.float(), b.float()) for a, b in zip(own, theirs, strict=True)]).sum()


def _inductor_with_best_sdpa(module: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
    """torch.compile's backend with cuDNN's attention if it supports the shape; this is decided during tracing.

    The cache of traces is not used, because its key does not contain this decision.
    """
    from torch._inductor.compile_fx import compile_fx

    cache = torch._functorch.config.patch(enable_autograd_cache=False)
    with cache, sdpa_kernel(_BEST_FIRST, set_priority=True):
        return compile_fx(module, inputs, **options)


def _and_with_products(module: torch.fx.GraphModule, inputs: Any) -> Any:
    return _inductor_with_best_sdpa(module, inputs, config_patches={"conv_1x1_as_mm": True})


def _sharing(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares the model's parameters and buffers."""
    kept = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, kept)


def _held(models: Iterable[nn.Module], optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for model in models:
        yield from (*model.parameters(), *model.buffers())
    yield from (t for t in tree_leaves(list(optimizer.state.values())) if isinstance(t, Tensor))


def _keep(kept: dict[int, Tensor], index: int, module: nn.Module, args: Any, output: Any) -> None:
    kept[index] = output[0] if isinstance(output, tuple) else output
