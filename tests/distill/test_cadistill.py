# SPDX-License-Identifier: Apache-2.0
"""CaDistill: the terms of the loss, draws by counter, and what is refused."""

from __future__ import annotations

import dataclasses
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdistill.distill.cadistill import BoundCaDistill, CaDistill, cka
from fastdistill.distill.canonical_set import CanonicalSet
from fastdistill.distill.classifier import Augmentation, ClassifierCall, ClassifierSetting, turn_hue
from fastdistill.errors import InputError
from fastdistill.ops import philox
from fastdistill.train.guard import NoHostSync
from tests import processes
from tests.distill import classifiers
from tests.distill.classifiers import CLASSES, OBJECTIVE, OF_SET, ROWS, Net, setting
from tests.harness import EPS


@torch.no_grad()
def test_the_terms_of_the_loss() -> None:
    """The terms are computed again, class by class, for the rows that were drawn."""
    own = setting()
    bound = OBJECTIVE.bind(own)
    counter = torch.tensor([3, 2])
    draw = bound.draw(counter)
    loss, metrics = bound.loss(draw, counter)
    found = dict(zip(bound.metric_names, map(float, metrics), strict=True))
    batch, canonical = draw
    assert canonical is not None and own.canonical is not None and own.posterior is not None
    (z, logits), (theirs, others) = own.student(batch.x_t), own.student(canonical.x_t)
    labels, index = batch.prompt_index, canonical.latent_index
    assert torch.equal(own.labels[batch.latent_index], labels)
    assert torch.equal(own.labels[own.canonical.rows[index]], canonical.prompt_index)
    assert torch.equal(own.canonical.samples[index], canonical.x_t)
    means = {int(c): theirs[canonical.prompt_index == c].mean(0) for c in canonical.prompt_index.unique()}

    def apart(rows: Tensor, classes: Tensor) -> list[float]:
        pairs = zip(rows, classes.tolist(), strict=True)
        return [1 - float(F.cosine_similarity(row, means[c], 0)) if c in means else 0.0 for row, c in pairs]

    wanted = {
        "cross_entropy": float(F.cross_entropy(logits, labels)),
        "own_labels": float(F.cross_entropy(others, canonical.prompt_index)),
        "align": sum(apart(z, labels)) / len(z),
        "canonical": sum(apart(theirs, canonical.prompt_index)) / len(theirs),
        "distance": 1 - float(cka(theirs, own.canonical.features[index].flatten(1))),
        "posterior": float(
            (own.posterior[index] * (own.posterior[index].log() - others.log_softmax(1))).sum() / len(others)
        ),
    }
    weights = {"cross_entropy": 1, "own_labels": 1, "align": 1, "canonical": 0.5, "distance": 0.5, "posterior": 0.25}
    wanted |= {"loss": sum(weights[name] * value for name, value in wanted.items())}
    wanted |= {"right": float((logits.argmax(1) == labels).float().mean())}
    assert found == pytest.approx(wanted, rel=0, abs=100 * EPS) and float(loss) == found["loss"]


def test_prototypes_teach_the_images_and_are_not_taught_by_them() -> None:
    """The gradient of L_align is that of cosines with constant prototypes."""
    own = setting()
    bound = CaDistill(align=1, canonical=0, distance=0, own_labels=False).bind(own)
    counter = torch.tensor([0, 0])
    draw = bound.draw(counter)
    loss, _ = bound.loss(draw, counter)
    (loss - F.cross_entropy(own.student(draw.batch.x_t)[1], draw.batch.prompt_index)).backward()
    found = own.student.body[1].weight.grad.clone()  # type: ignore[index, union-attr]
    own.student.zero_grad()
    assert draw.canonical is not None
    with torch.no_grad():
        theirs, labels = own.student(draw.canonical.x_t)[0], draw.canonical.prompt_index
        prototypes = torch.stack([theirs[labels == c].mean(0) for c in range(CLASSES)])
    (1 - F.cosine_similarity(own.student(draw.batch.x_t)[0], prototypes[draw.batch.prompt_index])).mean().backward()
    wanted = own.student.body[1].weight.grad  # type: ignore[index, union-attr]
    assert float((found - wanted).abs().max()) <= 100 * EPS * float(found.abs().max())


def test_each_term_is_left_out_where_its_weight_is_0() -> None:
    bound = CaDistill.plain().bind(setting(student=Net(alone=True), canonical=None, posterior=None))
    loss, metrics = bound(torch.tensor([0, 0]))
    found = dict(zip(bound.metric_names, map(float, metrics), strict=True))
    assert found["loss"] == found["cross_entropy"] == float(loss.detach()) > 0
    assert not any(found[name] for name in ("own_labels", "align", "canonical", "distance", "posterior"))


@torch.no_grad()
def test_the_teachers_feature_averaged_over_its_places() -> None:
    own = setting()
    bound = CaDistill(pooled=True).bind(own)
    draw = bound.draw(torch.tensor([0, 1]))
    found = dict(zip(bound.metric_names, bound.loss(draw, torch.tensor([0, 1]))[1], strict=True))
    assert draw.canonical is not None and own.canonical is not None
    mean = own.canonical.features[draw.canonical.latent_index].mean((2, 3))
    wanted = 1 - float(cka(own.student(draw.canonical.x_t)[0], mean))
    assert float(found["distance"]) == pytest.approx(wanted, abs=100 * EPS)


@torch.no_grad()
def test_labels_in_place_of_the_teachers_feature() -> None:
    own = setting()
    bound = CaDistill(target="labels").bind(own)
    draw = bound.draw(torch.tensor([0, 1]))
    found = dict(zip(bound.metric_names, bound.loss(draw, torch.tensor([0, 1]))[1], strict=True))
    assert draw.canonical is not None
    onehot = F.one_hot(draw.canonical.prompt_index, CLASSES).float()
    wanted = 1 - float(cka(own.student(draw.canonical.x_t)[0], onehot))
    assert float(found["distance"]) == pytest.approx(wanted, abs=100 * EPS)


def test_a_named_module_gives_the_feature() -> None:
    """The bits are those of a classifier that returns the feature; ``close`` removes the hook, ``attach`` restores
    it."""
    named, counter = setting(student=Net(alone=True), feature="body"), torch.tensor([1, 1])
    bound = OBJECTIVE.bind(named)
    wanted = OBJECTIVE.bind(setting())(counter)[1]
    for _ in range(2):
        bound.prepare(1, 1)
        assert all(map(torch.equal, bound(counter)[1], wanted))
        bound.close()
        assert not named.student._forward_pre_hooks and not named.student.body._forward_hooks  # type: ignore[union-attr]
    with pytest.raises(InputError, match="prepared"):
        bound(counter)
    refused = setting(student=Net(alone=True), feature="body", canonical=None)
    with pytest.raises(InputError, match="CanonicalSet"):
        OBJECTIVE.bind(refused)
    assert not refused.student._forward_pre_hooks


def test_maps_and_tokens_are_averaged_over_their_positions() -> None:
    class Returns(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return images, images.flatten(1)

    for shape, axes in (((2, 3), ()), ((2, 5, 3), (1,)), ((2, 3, 4, 5), (2, 3))):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        found = ClassifierCall(Returns())(x)[0]
        assert found is not None and torch.allclose(found, x.mean(axes) if axes else x, atol=8 * EPS, rtol=0)


def rows(bound: BoundCaDistill, steps: int, seed: int = 7) -> list[tuple[Tensor, Tensor, Tensor]]:
    found = []
    for step in range(steps):
        batch, canonical = bound.draw(torch.tensor([seed, step]))
        assert canonical is not None
        found.append((batch.latent_index.clone(), batch.x_t.clone(), canonical.latent_index.clone()))
    return found


def test_images_and_canonical_rows_come_once_an_epoch_each_in_its_own_order() -> None:
    drawn = rows(OBJECTIVE.bind(setting(batch=6, canonical_batch=6)), 10)
    for epoch in range(2):
        assert sorted(torch.cat([d[0] for d in drawn[5 * epoch : 5 * epoch + 5]]).tolist()) == list(range(ROWS))
    for epoch in range(5):
        assert sorted(torch.cat([d[2] for d in drawn[2 * epoch : 2 * epoch + 2]]).tolist()) == list(range(OF_SET))
    whole = setting(canonical=None, images=setting().images[:OF_SET], labels=setting().labels[:OF_SET], batch=OF_SET)
    alone = CaDistill.plain().bind(whole).draw(torch.tensor([7, 0])).batch.latent_index
    assert alone.tolist() != torch.cat([drawn[0][2], drawn[1][2]]).tolist()  # drawn for as many rows with the same seed


def test_draws_and_augmentations_do_not_depend_on_the_split_of_a_batch() -> None:
    whole = rows(OBJECTIVE.bind(setting()), 3)
    halves = [rows(OBJECTIVE.bind(setting(batch=4, first_sample=first, global_batch=8)), 3) for first in (0, 4)]
    for step, (index, images, canonical) in enumerate(whole):
        assert torch.equal(torch.cat([half[step][0] for half in halves]), index)
        assert torch.equal(torch.cat([half[step][1] for half in halves]), images)
        assert all(torch.equal(half[step][2], canonical) for half in halves)


def test_a_part_of_a_batch_has_all_canonical_rows() -> None:
    """Therefore the mean of the parts' losses is the loss, although the alignment compares rows with each other."""
    own = setting()
    bound, counter = OBJECTIVE.bind(own), torch.tensor([0, 4])
    draw = bound.draw(counter)
    whole = torch.stack(bound.loss(draw, counter)[1])
    parts = [torch.stack(bound.loss(draw.part(start, start + 2), counter)[1]) for start in range(0, 8, 2)]
    assert float((torch.stack(parts).mean(0) - whole).abs().max()) <= 100 * EPS * float(whole.abs().max())


def test_augmentation_turns_hues_and_adds_noise() -> None:
    red = torch.tensor([1.0, -0.5, -0.5])[None, :, None].expand(3, 3, 2)
    found = turn_hue(red, torch.tensor([0.0, 1 / 3, 0.5]))
    wanted = torch.tensor([[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-1.0, 0.5, 0.5]])[..., None].expand(3, 3, 2)
    assert float((found - wanted).abs().max()) <= 4 * EPS
    gray = torch.linspace(-1, 1, 6)[None, None].expand(4, 3, 6)
    assert float((turn_hue(gray, torch.rand(4)) - gray).abs().max()) <= 4 * EPS
    own = setting(batch=ROWS)
    drawn = {
        noise: CaDistill.plain(Augmentation(0.0, noise)).bind(own).draw(torch.tensor([0, 0])).batch
        for noise in (0.0, 0.3)
    }
    assert torch.equal(drawn[0.0].x_t, own.images[drawn[0.0].latent_index])
    assert torch.equal(drawn[0.3].latent_index, drawn[0.0].latent_index)
    added = (drawn[0.3].x_t - drawn[0.0].x_t).flatten(1)
    scale = drawn[0.3].timestep.float() * 0.3 / 63
    noise = philox.normal(torch.tensor(0), torch.tensor(0), torch.arange(ROWS), (48,))
    assert float((added - scale[:, None] * noise).abs().max()) <= 8 * EPS * 4  # of images below 4, and 4e-6 a kernel


def test_a_step_waits_for_nothing() -> None:
    bound, counter = OBJECTIVE.bind(setting()), torch.tensor([0, 1])
    bound.prepare(0, 1)
    with NoHostSync():
        loss, _ = bound(counter)
        loss.backward()


@pytest.mark.slow
def test_a_run_goes_on_to_the_bit_after_a_kill(tmp_path: Path) -> None:
    process = processes.begin(classifiers.killed, tmp_path)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000002.safetensors"]
    found, wanted = classifiers.run(tmp_path), classifiers.run()
    assert found["history"][1:] == wanted["history"][1:]
    assert all(torch.equal(found["state"][name], value) for name, value in wanted["state"].items())
    assert {"distance", "align", "canonical", "own_labels", "posterior", "gradient_norm"} < wanted["history"][0].keys()


def close(found: Any, wanted: Any) -> None:
    """Gradients are sums in another order, so they differ by about 1e-6 of their size; with eps = 0.01 an update
    differs by at most a hundred times lr = 0.01 times that."""
    for name, value in wanted["state"].items():
        if name != "totals":
            torch.testing.assert_close(found["state"][name], value, rtol=1e-4, atol=1e-5, msg=name)
    for mine, theirs in zip(found["history"], wanted["history"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_two_ranks_and_parts_of_a_batch_train_as_one(tmp_path: Path) -> None:
    processes.as_ranks(classifiers.ranks, str(tmp_path))
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    wanted = classifiers.run()
    assert all(torch.equal(one["state"][name], two["state"][name]) for name in one["state"])
    close(one, wanted)
    close(classifiers.run(micro_batch=2), wanted)


@pytest.mark.slow
def test_a_compiled_run_is_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdistill.train.step import TrainStep

    monkeypatch.setattr(TrainStep.compile, "__kwdefaults__", {"backend": "aot_eager"})
    close(classifiers.run(execution="compiled"), classifiers.run())


def test_a_set_on_the_disk_gives_the_same_steps(tmp_path: Path) -> None:
    from fastdistill.data.manifest import TensorSpec
    from fastdistill.data.shards import RowWriter

    made = classifiers.canonical()
    columns = {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.name != "fingerprint"}
    specs = {name: TensorSpec(tuple(value.shape[1:]), value.dtype) for name, value in columns.items()}
    options: dict[str, Any] = {"rows": OF_SET, "tensors": specs, "rows_per_shard": 5}
    with RowWriter(tmp_path / "set", kind="canonical", fingerprint=made.fingerprint, **options) as writer:
        for span in writer.claims():
            writer.write(span, {name: value[span.start : span.stop] for name, value in columns.items()})
    stored = setting(canonical=CanonicalSet.open(tmp_path / "set"))
    bound, wanted = OBJECTIVE.bind(stored), OBJECTIVE.bind(setting())
    for step in (0, 1, 5):
        bound.prepare(7, step)
        assert all(map(torch.equal, bound(torch.tensor([7, step]))[1], wanted(torch.tensor([7, step]))[1]))
    bound.close()
    assert stored.fingerprint() == setting().fingerprint()


def test_a_small_batch_for_the_biased_form_is_said() -> None:
    with pytest.warns(UserWarning, match=r"at least 20 rows for the biased CKA of features of 5 dimensions, got 6"):
        CaDistill(cka="biased", pooled=True).bind(setting())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CaDistill().bind(setting())


class Flat(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten()


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no set": ({}, {"canonical": None}, "canonical: expected a CanonicalSet"),
    "another teacher": (
        {}, {"expect": {"teacher": "ours"}}, "a set of this model and data, got .*(of the set.*ours|ours.*of the set)",
    ),
    "other data": ({}, {"expect": {"data": "ours"}}, "data.*(the same.*ours|ours.*the same)"),
    "samples of another size": (
        {}, {"canonical": classifiers.canonical(samples=torch.zeros(OF_SET, 3, 2, 2))},
        r"shape of the images \(3, 4, 4\)",
    ),
    "rows beyond the images": (
        {}, {"canonical": classifiers.canonical(rows=torch.arange(OF_SET) + 25)}, "rows of the 30 images, got 36",
    ),
    "rows of other labels": (
        {}, {"canonical": classifiers.canonical(rows=torch.arange(OF_SET) // 2)}, "one class for each prompt",
    ),
    "a class without a row": (
        {}, {"canonical_labels": torch.zeros(OF_SET, dtype=torch.int64)}, "every class of the labels, got none of 1, 2",
    ),
    "no feature": ({}, {"student": Net(alone=True)}, r"feature= the name of a module, got Net, which gives logits"),
    "a module that is not there": ({}, {"student": Net(alone=True), "feature": "bodi"}, "near matches: body"),
    "no classifier": ({}, {"student": Flat()}, r"student: expected logits \[B, classes\]"),
    "too few classes": ({}, {"labels": torch.arange(ROWS) % 4}, "classes below the 3 of the student, got 3"),
    "labels of floats": ({}, {"labels": torch.zeros(ROWS)}, "labels: expected dtype int64"),
    "too few labels": ({}, {"labels": torch.zeros(3, dtype=torch.int64)}, "a class of each of the 30 images"),
    "a small batch": ({}, {"canonical_batch": 3}, "at least 4 rows for the debiased CKA, got 3"),
    "a batch beyond the set": ({}, {"canonical_batch": 13}, "at most the 12 rows of the set, got 13"),
    "no posterior": ({"posterior": 1.0}, {"posterior": None}, "posterior: expected that of the rows of the set"),
    "no probabilities": ({}, {"posterior": torch.ones(OF_SET, CLASSES)}, r"probabilities \[12, 3\]"),
    "gray images": (
        {"augment": Augmentation()}, {"images": torch.zeros(ROWS, 4, 3, 4), "canonical": None},
        "augment.hue: expected 0",
    ),
    "a negative weight": ({"align": -1.0}, {}, "align: input should be greater than or equal to 0"),
    "half a circle at most": ({"augment": Augmentation(hue=0.7)}, {}, "hue: input should be less than or equal to 0.5"),
    "another form": ({"cka": "unbiased"}, {}, "cka: input should be 'debiased' or 'biased'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name: str) -> None:
    options, given, message = BAD[name]
    start = CaDistill.plain() if "augment" in options else CaDistill()
    objective = dataclasses.replace(start, **options)
    with pytest.raises(InputError, match=message):
        objective.bind(setting(**given))


def test_a_setting_says_what_a_run_depends_on() -> None:
    one = setting().fingerprint()
    assert one == setting().fingerprint() == setting(batch=4, global_batch=8).fingerprint()
    for changed in (
        {"labels": torch.zeros(ROWS, dtype=torch.int64)},
        {"canonical": classifiers.canonical(samples=torch.zeros(OF_SET, 3, 4, 4))},
        {"canonical_batch": 5},
        {"posterior": None},
    ):
        assert ClassifierSetting(**vars(setting()) | changed).fingerprint() != one


def test_the_step_that_is_measured_is_the_scripts() -> None:
    """The two contestants of the benchmark have the same loss and gradients."""
    from benchmarks.ops import cadistill

    model, tables = cadistill.Net(8, 8), cadistill.Tables(8, torch.device("cpu"))
    cadistill._check(model, tables, 16)
    cadistill.ours(model, tables, 16)()
    cadistill.script(model, tables, 16, cadistill.losses, torch.Generator().manual_seed(0))()
