# SPDX-License-Identifier: Apache-2.0
"""draw an image, its canonical image, and the directions between"""

from __future__ import annotations

import json

from fastdistill.commands._options import configured, import_pydantic, quiet


def run(arguments: list[str]) -> None:
    import_pydantic()
    from fastdistill.tasks.context.selecting import ShowConfig, run_show

    if arguments and not arguments[0].startswith("-"):
        arguments = ["--row", *arguments]
    config = configured(ShowConfig, arguments, "canonical show")
    if config is None:
        return
    quiet()
    found, before, image = run_show(config)
    subspace = found.subspace
    values = [] if subspace is None else subspace.values[0].tolist()
    report = {
        "row": config.row, "part": config.part, "t_e": config.t_e, "k": config.k, "tap": config.tap,
        "energy": float(found.energy[0]), "values": values,
        "settled": None if subspace is None else bool(subspace.settled[0]),
        "round_trip": float((before.samples[0].cpu() - image).square().mean().sqrt()),
    }  # fmt: skip
    if config.png is not None:
        from fastdistill.evaluate.canonical_figures import canonical_figure
        from fastdistill.evaluate.figures import png
        from fastdistill.files import atomic_write, located, make_directory

        shown = {"image": image, "inverted, decoded": before.samples[0], "canonical": found.samples[0]}
        directions = found.latents.new_zeros(0, *image.shape)
        if subspace is not None:
            directions = subspace.vectors[0].T.reshape(-1, *image.shape)
        title = f"{config.part} {config.row}: t_e {config.t_e}, k {config.k}, {config.tap}"
        figure = canonical_figure(
            {name: (x.cpu() + 1) / 2 for name, x in shown.items()}, directions.cpu(), values, title
        )
        file = located(config.png, "png")
        make_directory(file.parent)
        atomic_write(file, png(figure, transparent=False))
        report["png"] = config.png
    if config.json:
        print(json.dumps(report))
        return
    print(f"row {config.row} of {config.part}: {report['energy']:.1%} of the latent projected out")
    print(f"  singular values {', '.join(f'{value:.3g}' for value in values[:8]) or 'none'}")
    print(f"  error of inverting and decoding {report['round_trip']:.3f}")
    if config.png is not None:
        print(f"  {config.png}")
