# SPDX-License-Identifier: Apache-2.0
"""The benchmark of whole training steps: contestants for every model, their columns, and where the time goes."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import compile_fx
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend

from benchmarks import attribution, files, report, step, timing
from benchmarks.measure import Settings, allocated_gb, measure, peak_gb
from benchmarks.ops import step as models
from benchmarks.ops.step import dit, pixart, sd15
from benchmarks.registry import COMPILED, Case, Contestant, Group, Workload

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
QUICK = Settings(CPU, rounds=4, warm_up=1, seconds=0.0)
HEADS = {"num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 8}
TINY_SD15 = functools.partial(sd15, 2, block_out_channels=(8, 8, 16, 16), norm_num_groups=4, attention_head_dim=2)
TINY: dict[str, Callable[[torch.device], step.Setup]] = {
    "sd15": TINY_SD15,
    "pixart": functools.partial(pixart, 2, **HEADS, cross_attention_dim=16, caption_channels=24, sample_size=16),
    "dit": functools.partial(dit, 2, **HEADS),
    "guided": functools.partial(models._guided, TINY_SD15),
}


@pytest.fixture
def small_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SD15_SAMPLE", "PIXART_SAMPLE"):
        monkeypatch.setattr(models, name, ((4, 16, 16), (7, 24)))


@pytest.mark.usefixtures("small_samples")
@pytest.mark.parametrize("model", [*list(TINY)[:-1], pytest.param("guided", marks=pytest.mark.slow)])
def test_every_contestant_takes_the_step_of_a_model(model: str) -> None:
    workload = step.workload(TINY[model], CPU)
    workload.check()
    assert tuple(workload.rivals) == step.rivals(2, gpu=False) and workload.flops > 0 and workload.samples == 2
    for name, run in {"ours": workload.ours, **workload.rivals}.items():
        if name.startswith(COMPILED):
            continue
        assert isinstance(run, Contestant)
        run()
        held = run.held()
        run()
        run.rest()
        run()
        assert run.held() == held > 0, name


@pytest.mark.usefixtures("small_samples")
def test_scripts_train_the_student_alone_and_share_the_teacher() -> None:
    setup = TINY["pixart"](CPU)
    for literal in (True, False):
        script = step.Script(setup, literal)
        before = [p.clone() for p in script.masters]
        script(script.teacher, script.student, step._distance)
        assert next(script.student.parameters()).dtype == (torch.float32 if literal else torch.bfloat16)
        assert any(not torch.equal(a, b) for a, b in zip(before, script.masters, strict=True))
        assert next(script.teacher.parameters()) is next(setup.teacher.parameters())
        assert not any(script.features)


@pytest.mark.usefixtures("small_samples")
def test_a_guided_script_asks_the_teacher_twice_and_ours_once() -> None:
    setup = TINY["guided"](CPU)
    script = step.Script(setup, literal=True)
    seen: list[int] = []
    script.teacher.register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
    script(script.teacher, script.student, step._distance)
    assert seen == [2, 2]
    trainer = step._trainer(setup, fuse=False)
    trainer.teacher.register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
    trainer.step()
    assert seen == [2, 2, 4]


def test_flops_are_those_of_the_models_and_nothing_is_allocated() -> None:
    assert step.flops(functools.partial(sd15, 1)) == pytest.approx(2.37e12, rel=5e-3)


class Slow:
    def __init__(self, seconds: float) -> None:
        self.seconds, self.rests, self.kept = seconds, 0, torch.zeros(10)

    def __call__(self) -> None:
        time.sleep(self.seconds)
        torch.softmax(self.kept, 0)

    def held(self) -> Iterator[Tensor]:
        yield from (self.kept, self.kept[:5])

    def rest(self) -> None:
        self.rests += 1


def planted(grouped: bool) -> tuple[Case, list[Slow]]:
    made: list[Slow] = []

    def contestant(seconds: float) -> Contestant:
        def make() -> Slow:
            made.append(Slow(seconds))
            return made[-1]

        return Contestant(make)

    def broken() -> Any:
        raise RuntimeError("it cannot be made")

    rivals: dict[str, Any] = {"slow": contestant(0.004), "broken": Contestant(broken)}
    groups = (Group(("slow",), 0.1), Group(("broken",), 0.1)) if grouped else ()
    workload = Workload(contestant(0.001), rivals, lambda: None, samples=8, groups=groups, graphs=False)
    return Case("planted", "small", "fp32", "cpu", lambda device: workload, ("slow", "broken")), made


@pytest.mark.parametrize("grouped", [False, True])
def test_rows_of_steps(grouped: bool, capsys: pytest.CaptureFixture[str]) -> None:
    case, made = planted(grouped)
    slow, broken = measure(case, QUICK)
    assert slow["ratio"] > 1.5 and 0 < slow["rival_img_s"] < slow["ours_img_s"] < 8000
    assert slow["ours_peak_gb"] == slow["rival_peak_gb"] == ""
    assert slow["rival_parts"]["attention"] > 0 and slow["rival_parts"]["other"] > 3
    assert broken["note"] == "RuntimeError: it cannot be made" and broken["ratio"] == ""
    assert [s.rests > 0 for s in made] == [grouped, grouped]
    turns = capsys.readouterr().err.count("a turn of slow: ")
    assert (turns > 0) == grouped, "the clocks of each turn are told"


def test_groups_of_rivals_that_nobody_asked_for_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    case, _ = planted(grouped=True)
    (row,) = measure(case, dataclasses.replace(QUICK, rivals=["slow"]))
    told = capsys.readouterr().err
    assert row["rival"] == "slow" and told.count("a turn of ours: ") == told.count("a turn of slow: ") > 0


def test_memory_is_counted_once_and_not_on_a_cpu() -> None:
    run = Contestant(lambda: Slow(0.0))
    assert run.held() == 40
    assert peak_gb(run, CPU) == ""


def test_memory_of_a_run_is_the_most_at_once() -> None:
    there = torch.ones(10**6)

    def run() -> torch.Tensor:
        first = torch.empty(10**6)
        second = torch.empty(500_000)
        del first
        return torch.stack([second, second + there[0]]).sum()  # 2, 2 and 4 MB

    assert allocated_gb(run, CPU) == pytest.approx(8e-3, rel=1e-3)
    build = Workload(run, {"rival": lambda: torch.empty(10**6)}, lambda: None, memory=True)
    (row,) = measure(Case("some", "shape", "fp32", "cpu", lambda device: build, ("rival",)), QUICK)
    assert row["ours_peak_gb"] == pytest.approx(8e-3, rel=1e-3) and row["rival_peak_gb"] == pytest.approx(4e-3)


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (["aten::_scaled_dot_product_flash_attention_for_cpu"], "attention"),
        (["pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>"], "attention"),
        (["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma"], "attention"),
        (["aten::mkldnn_convolution"], "conv+matmul"),
        (["nvjet_tst_128x128_64x6_1x2_h_bz_NNT"], "conv+matmul"),
        (["sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32"], "conv+matmul"),
        (["aten::addmm"], "conv+matmul"),
        (["aten::mm"], "conv+matmul"),
        (["aten::native_group_norm_backward"], "norms+activations"),
        (["triton_red_fused_native_group_norm_silu_3"], "norms+activations"),
        (["fastdistill::geglu"], "norms+activations"),
        (["fastdistill::adamw_ema"], "optimizer"),
        (["aten::mul", "Optimizer.step#AdamW.step"], "optimizer"),
        (["aten::_foreach_lerp_"], "optimizer"),
        (["aten::mul", "MseLossBackward0"], "loss"),
        (["fastdistill::feature_match"], "loss"),
        (["aten::copy_", "aten::convolution"], "copies+casts"),
        (["aten::empty", "aten::to"], "copies+casts"),
        (["Memcpy DtoD (Device -> Device)"], "copies+casts"),
        (["triton_poi_fused_cat_1"], "copies+casts"),
        (["aten::add", "run"], "other"),
        (["fastdistill::noise_gather"], "other"),
        (["aten::repeat_interleave"], "other"),
    ],
)
def test_groups(names: list[str], group: str) -> None:
    assert attribution.group(names) == group


def test_names_of_our_kernels_say_what_they_are_for() -> None:
    """In a CUDA graph, kernels can only be attributed by name."""
    of = {
        "adamw_ema": "optimizer",
        "grad_square_sum": "optimizer",
        "cross_attention": "attention",
        "noise_gather": "other",
        "quantize_rows": "copies+casts",
    }
    of |= dict.fromkeys(("feature_match", "output_match", "scale_gradients"), "loss")
    of |= dict.fromkeys(
        ("group_norm_silu", "layer_norm_modulate", "geglu", "add_bias", "bias_gradient"), "norms+activations"
    )
    with (ROOT / "benchmarks" / "kernels" / "report.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rows = [row for row in rows if row["backend"] == "triton" or row["op"].startswith("group_norm")]
    assert len(rows) > 50
    for row in rows:
        op = row["op"].split()[0].removesuffix("_backward")
        assert attribution.group([row["kernel"]]) == of[op], (row["op"], row["kernel"])


def test_attribution_of_a_run_is_all_of_its_time() -> None:
    layer, x = nn.Conv2d(8, 8, 3), torch.randn(16, 8, 32, 32)

    def run() -> None:
        torch.softmax(layer(x), 1).clone()
        time.sleep(0.02)

    parts = attribution.attribution(run, CPU)
    assert set(parts) == {*attribution.GROUPS, attribution.OTHER}
    assert min(parts["conv+matmul"], parts["attention"], parts["copies+casts"]) > 0
    assert parts["other"] >= 20 and parts["optimizer"] == parts["loss"] == 0


def event(name: str, us: float, launched: float = 0.0, annotation: bool = False) -> SimpleNamespace:
    """A kernel, or with ``launched`` an op that launched a kernel of that many microseconds."""
    if launched:
        return SimpleNamespace(
            name=name,
            device_type=DeviceType.CPU,
            cpu_parent=None,
            kernels=[SimpleNamespace(name="k", duration=launched)],
        )
    span = SimpleNamespace(elapsed_us=lambda: us)
    return SimpleNamespace(name=name, device_type=DeviceType.CUDA, time_range=span, is_user_annotation=annotation)


def test_kernels_go_to_the_ops_that_launched_them_or_by_their_names() -> None:
    alone = [event("flash_fwd", 3), event("elementwise", 4), event("run", 7, annotation=True)]
    assert attribution.kernels(alone) == {"attention": 3, "other": 4}
    launched = [*alone, event("aten::mse_loss", 0, launched=4)]
    assert attribution.kernels(launched) == {"loss": 4, "other": 3}


def test_the_parts_of_a_step_are_kept_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, _ = planted(grouped=False)
    monkeypatch.setattr(report, "cases", lambda device: [case] if device == case.device else [])
    path = tmp_path / "cpu-some.csv"
    for row in measure(case, QUICK):
        files.append(path, [row])
        files.append_parts(path, [row])
    lines = [json.loads(line) for line in (tmp_path / "cpu-some.steps.jsonl").read_text().splitlines()]
    assert [line["contestant"] for line in lines] == ["ours", "slow"]
    assert lines == files.latest_parts(path)
    table = report.table(tmp_path)
    assert "| small | slow | 0.0 |" in table and "slow **" in table


def test_small_batches_have_a_rival_with_graphs_of_the_compiler() -> None:
    small, large = ({c.shape: c.rivals for c in models.cases() if c.shape.endswith(f" B={n}")} for n in (4, 32))
    assert len(small) == len(large) == len(models.MODELS) + 1
    assert all(step.REDUCED in names for names in small.values())
    assert not any(step.REDUCED in names for names in large.values())


def test_a_compiled_rival_with_products_in_place_of_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the backward, which is compiled later: the compiler keeps the option."""
    given: list[dict[str, Any]] = []

    def keep(module: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        given.append(options)
        return module.forward

    monkeypatch.setattr(compile_fx, "compile_fx", keep)
    torch._dynamo.reset()
    torch.compile(lambda x: x + 1, backend=step._and_with_products)(torch.ones(3))
    (options,) = given
    assert options == {"config_patches": {"conv_1x1_as_mm": True}}
    with torch._inductor.config.patch(**options["config_patches"]):
        assert torch._inductor.config.conv_1x1_as_mm


@pytest.mark.parametrize(("copies", "captured"), [(1, 8), (3, 9), (20, 20)])
def test_a_graph_holds_several_runs_and_tells_the_time_of_one(
    copies: int, captured: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With simulated CUDA calls."""
    ran: list[int] = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext(ran.clear()))
    monkeypatch.setattr(timing, "stopwatch", lambda runs, device: lambda: 360.0)
    watch = timing.graphed([functools.partial(ran.append, i) for i in range(copies)], CPU)
    assert ran == [i % copies for i in range(captured)] and watch() == 360.0 / captured


def test_the_compiled_rival_has_the_attention_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[str] = []

    def keep(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module.code)
        return module.forward

    monkeypatch.setattr(compile_fx, "compile_fx", aot_autograd(fw_compiler=keep))
    attend = torch.nn.functional.scaled_dot_product_attention
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        monkeypatch.setattr(step, "_BEST_FIRST", [backend])
        torch._dynamo.reset()
        torch.compile(lambda x: attend(x, x, x), backend=step._inductor_with_best_sdpa)(torch.randn(1, 2, 16, 8))
    assert ["flash_attention" in code for code in graphs] == [False, True]
